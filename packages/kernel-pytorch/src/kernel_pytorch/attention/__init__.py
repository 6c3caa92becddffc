# SPDX-License-Identifier: Apache-2.0
"""Attention as one exact blockwise operation, run under a plan.

`partial_attention` and `merge_partials` are the operation; `attention` (one device),
`ring_attention` (ranks) and `block_sparse_attention` (the blocks of a `BlockIndex`)
are the plans. Each takes a `MaskSpec`. `build_block_index` makes an index by a
`SparsePattern`.
"""

from kernel_pytorch.attention.block_index import BlockIndex
from kernel_pytorch.attention.block_sparse import block_sparse_attention
from kernel_pytorch.attention.config import (
    AttentionConfig,
    AttentionPatterns,
    FP8AttentionConfig,
)
from kernel_pytorch.attention.factory import (
    create_attention,
    create_context_parallel_attention,
    create_ring_attention,
    create_sparse_attention,
)
from kernel_pytorch.attention.flash_layer import FlashAttention3
from kernel_pytorch.attention.gate import BlockGate, distill_gate
from kernel_pytorch.attention.huggingface import register_with_transformers
from kernel_pytorch.attention.layout import (
    shard_positions,
    shard_sequence,
    unshard_sequence,
)
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.native import NativeStatus, native_status
from kernel_pytorch.attention.parallel_layer import ContextParallelAttention
from kernel_pytorch.attention.partial import merge_partials, partial_attention
from kernel_pytorch.attention.patterns import SparsePattern, build_block_index
from kernel_pytorch.attention.ring import RingStats, ring_attention, ring_stats
from kernel_pytorch.attention.ring_layer import RingAttentionLayer
from kernel_pytorch.attention.sparse_layer import DynamicSparseAttention, SparsityStats
from kernel_pytorch.attention.streaming import attention

__all__ = [
    "AttentionConfig",
    "AttentionPatterns",
    "BlockGate",
    "BlockIndex",
    "ContextParallelAttention",
    "DynamicSparseAttention",
    "FP8AttentionConfig",
    "FlashAttention3",
    "MaskSpec",
    "NativeStatus",
    "RingAttentionLayer",
    "RingStats",
    "SparsePattern",
    "SparsityStats",
    "attention",
    "block_sparse_attention",
    "build_block_index",
    "create_attention",
    "create_context_parallel_attention",
    "create_ring_attention",
    "create_sparse_attention",
    "distill_gate",
    "merge_partials",
    "native_status",
    "partial_attention",
    "register_with_transformers",
    "ring_attention",
    "ring_stats",
    "shard_positions",
    "shard_sequence",
    "unshard_sequence",
]
