# SPDX-License-Identifier: Apache-2.0
"""Exact attention on one device in memory O(N), for every kind of mask."""

from __future__ import annotations

from torch import Tensor

from kernel_pytorch.attention.blocks import in_autocast_dtype
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.partial import blockwise, lay_mask
from torchworks_core.errors import InvalidValue


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec | None = None,
    *,
    scale: float | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Attend exactly, chunk by chunk, forward and backward.

    No tensor of the size Nq * Nk ever exists: masks are built for one tile at a time,
    and backward computes each tile anew from q, k, v, out and lse. Time is O(N^2), or
    O(N * window) with a window.

    Args:
        q: [B, H, Nq, D], any floating-point dtype.
        k: [B, Hkv, Nk, D]; H must be a multiple of Hkv.
        v: Like ``k``.
        mask: What may be seen; None is everything. Query i has position i.
        scale: Factor of the scores; None is 1 / sqrt(D).
        chunk_size: Query rows in one chunk; None chooses.

    Returns:
        [B, H, Nq, D] in the dtype of ``q``; 0 in rows that see no key.

    Raises:
        InvalidValue: shapes, dtypes, devices or ``chunk_size`` are unusable.
        NotImplementedError: ``mask.bias`` requires a gradient.

    Example:
        >>> import torch
        >>> q = k = v = torch.randn(1, 2, 5, 8)
        >>> out = attention(q, k, v, MaskSpec(causal=True))
        >>> bool(torch.allclose(out[:, :, 0], v[:, :, 0]))
        True
    """
    q, k, v = in_autocast_dtype(q, k, v)
    return attention_with_lse(q, k, v, mask, scale=scale, chunk_size=chunk_size)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec | None = None,
    *,
    scale: float | None = None,
    chunk_size: int | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """As `attention`, with lse [B, H, Nq] and queries from position ``q_start`` on."""
    if chunk_size is not None and chunk_size < 1:
        raise InvalidValue(f"chunk_size={chunk_size}", "it must be None or >= 1")
    laid = lay_mask(mask, q, k, q_start)
    return blockwise(q, k, v, laid, scale, chunk_size)
