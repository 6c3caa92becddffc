# SPDX-License-Identifier: Apache-2.0
"""Functions that make attention layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from kernel_pytorch.attention.config import AttentionConfig, AttentionPatterns
from kernel_pytorch.attention.flash_layer import FlashAttention3
from kernel_pytorch.attention.parallel_layer import ContextParallelAttention
from kernel_pytorch.attention.patterns import SparsePattern
from kernel_pytorch.attention.ring_layer import RingAttentionLayer
from kernel_pytorch.attention.sparse_layer import DynamicSparseAttention
from torchworks_core.errors import InvalidValue

_BY_PATTERN = {
    AttentionPatterns.FULL: "flash",
    AttentionPatterns.CAUSAL: "flash",
    AttentionPatterns.SLIDING_WINDOW: "flash",
    AttentionPatterns.SPARSE: "sparse",
    AttentionPatterns.DYNAMIC_SPARSE: "sparse",
    AttentionPatterns.RING: "ring",
    AttentionPatterns.CONTEXT_PARALLEL: "context_parallel",
}


def create_ring_attention(
    d_model: int,
    num_heads: int,
    max_sequence_length: int = 1_000_000,
    device: torch.device | str | None = None,
    **options: Any,
) -> RingAttentionLayer:
    """Make a `RingAttentionLayer`; ``options`` are the layer's keyword arguments.

    Example:
        >>> layer = create_ring_attention(d_model=64, num_heads=8, window=16)
        >>> layer(torch.randn(1, 100, 64, device=layer.q_proj.weight.device)).shape
        torch.Size([1, 100, 64])
    """
    return RingAttentionLayer(
        d_model, num_heads, max_sequence_length, device, **options
    )


def create_sparse_attention(
    d_model: int,
    num_heads: int,
    sparsity_ratio: float = 0.9,
    pattern: SparsePattern = SparsePattern.DYNAMIC_THRESHOLD,
    **options: Any,
) -> DynamicSparseAttention:
    """Make a `DynamicSparseAttention`; ``options`` are its keyword arguments.

    Example:
        >>> layer = create_sparse_attention(64, 8, sparsity_ratio=0.75, block_size=16)
        >>> layer(torch.randn(1, 256, 64)).shape, layer.get_sparsity_stats().density
        (torch.Size([1, 256, 64]), 0.25)
    """
    return DynamicSparseAttention(
        d_model, num_heads, sparsity_ratio, pattern, **options
    )


def create_context_parallel_attention(
    d_model: int,
    num_heads: int,
    context_parallel_size: int,
    device_mesh: Any = None,
    **options: Any,
) -> ContextParallelAttention:
    """Make a `ContextParallelAttention`; ``options`` are its keyword arguments.

    Example:
        >>> layer = create_context_parallel_attention(64, 8, context_parallel_size=4)
        >>> layer(torch.randn(1, 100, 64)).shape, layer.mode
        (torch.Size([1, 100, 64]), 'emulated')
    """
    return ContextParallelAttention(
        d_model, num_heads, context_parallel_size, device_mesh, **options
    )


def create_attention(
    config: AttentionConfig, implementation: str | None = None
) -> nn.Module:
    """Make the layer that a configuration describes.

    Args:
        config: The settings.
        implementation: ``"flash"``, ``"ring"``, ``"sparse"`` or
            ``"context_parallel"``; None goes by ``config.pattern``. The pattern's mask
            holds in either case.

    Returns:
        A layer on torch's default device.

    Raises:
        InvalidValue: an unknown implementation, or settings that it has no use for.

    Example:
        >>> config = AttentionConfig(embed_dim=64, num_heads=4, pattern="causal")
        >>> type(create_attention(config)).__name__
        'FlashAttention3'
        >>> type(create_attention(config, "ring")).__name__
        'RingAttentionLayer'
    """
    name = _BY_PATTERN[config.pattern] if implementation is None else implementation
    makers = {
        "flash": FlashAttention3,
        "ring": _ring,
        "sparse": _sparse,
        "context_parallel": _context_parallel,
    }
    if name not in makers:
        valid = ", ".join(repr(key) for key in makers)
        raise InvalidValue(f"implementation={name!r}", f"it must be of {valid}")
    _refuse_unused(name, config)
    return makers[name](config)


def _refuse_unused(name: str, config: AttentionConfig) -> None:
    """Refuse settings that the layer would not read."""
    unused = {
        "chunk_size": ("flash", "ring"),
        "context_parallel_size": ("context_parallel",),
    }
    for setting, readers in unused.items():
        value = getattr(config, setting)
        if value is not None and name not in readers:
            why = f"{name!r} has no use for it"
            raise InvalidValue(f"{setting}={value}", why, "Leave it None")
    if name == "flash":
        return
    if config.fp8_config is not None:
        why = f"{name!r} computes in the dtype of its input"
        raise InvalidValue(f"fp8_config={config.fp8_config}", why)
    if config.attention_dropout:
        why = f"{name!r} has no dropout inside attention"
        raise InvalidValue(f"attention_dropout={config.attention_dropout}", why)


def _shared(config: AttentionConfig) -> dict[str, Any]:
    return {
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "bias": config.bias,
        "causal": config.causal or config.pattern is AttentionPatterns.CAUSAL,
        "window": config.window,
        "max_sequence_length": config.max_sequence_length,
        "device": torch.get_default_device(),
    }


def _ring(config: AttentionConfig) -> nn.Module:
    options = _shared(config) | {"chunk_size": config.chunk_size}
    return RingAttentionLayer(config.embed_dim, config.num_heads, **options)


def _sparse(config: AttentionConfig) -> nn.Module:
    chosen = config.sparse_pattern
    if config.pattern is AttentionPatterns.DYNAMIC_SPARSE and not chosen.by_content:
        why = "DYNAMIC_SPARSE looks at the content: DYNAMIC_THRESHOLD or LEARNED"
        raise InvalidValue(f"sparse_pattern={chosen}", why, "Or take SPARSE")
    return DynamicSparseAttention(
        config.embed_dim,
        config.num_heads,
        config.sparsity_ratio,
        chosen,
        block_size=config.block_size,
        **_shared(config),
    )


def _context_parallel(config: AttentionConfig) -> nn.Module:
    size = config.context_parallel_size
    if size is None:
        ready = dist.is_available() and dist.is_initialized()
        size = dist.get_world_size() if ready else 1
    heads = (config.embed_dim, config.num_heads, size)
    return ContextParallelAttention(*heads, **_shared(config))
