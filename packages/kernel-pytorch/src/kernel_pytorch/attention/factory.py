# SPDX-License-Identifier: Apache-2.0
"""Functions that make attention layers."""

from __future__ import annotations

from typing import Any

import torch

from kernel_pytorch.attention.layers import RingAttentionLayer


def create_ring_attention(
    d_model: int,
    num_heads: int,
    max_sequence_length: int = 1_000_000,
    device: torch.device | str | None = None,
    *,
    num_kv_heads: int | None = None,
    bias: bool = False,
    causal: bool = False,
    window: int | None = None,
    group: Any = None,
    layout: str = "zigzag",
    chunk_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> RingAttentionLayer:
    """Make a `RingAttentionLayer`; the arguments are the layer's.

    Example:
        >>> layer = create_ring_attention(d_model=64, num_heads=8, window=16)
        >>> layer(torch.randn(1, 100, 64, device=layer.q_proj.weight.device)).shape
        torch.Size([1, 100, 64])
    """
    return RingAttentionLayer(
        d_model,
        num_heads,
        max_sequence_length,
        device,
        num_kv_heads=num_kv_heads,
        bias=bias,
        causal=causal,
        window=window,
        group=group,
        layout=layout,
        chunk_size=chunk_size,
        dtype=dtype,
    )
