# SPDX-License-Identifier: Apache-2.0
"""Partial attention: the output over some keys, and what is needed to merge it.

Every exact plan of this package is built from these two functions. A partial output is
normalised over its own keys only, so parts are joined by their log-sum-exp; averaging
them would be wrong (Rabe and Staats, Self-attention Does Not Need O(n^2) Memory, 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernel_pytorch.attention.blocks import (
    INF,
    check_qkv,
    checked_scale,
    lse_dtype,
)
from kernel_pytorch.attention.masks import LaidMask, MaskSpec
from kernel_pytorch.attention.tiling import backward, forward
from torchworks_core.errors import InvalidValue


def partial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec | None = None,
    *,
    scale: float | None = None,
    q_start: int = 0,
    k_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attend from some queries to some keys; differentiable in out and in lse.

    Args:
        q: [B, H, Nq, D], any floating-point dtype.
        k: [B, Hkv, Nk, D]; H must be a multiple of Hkv.
        v: Like ``k``.
        mask: Over global positions; its tensors are indexed by position, too.
        scale: Factor of the scores; None is 1 / sqrt(D).
        q_start: Position of the first query.
        k_start: Position of the first key.

    Returns:
        out [B, H, Nq, D] in the dtype of ``q``, and lse [B, H, Nq] in fp32 (fp64 for
        fp64). A row that sees no key has out 0, lse -inf and gradient 0.

    Raises:
        InvalidValue: shapes, dtypes or devices do not fit, or a mask is too short.
        NotImplementedError: ``mask.bias`` requires a gradient.

    Example:
        >>> q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
        >>> out, lse = partial_attention(q, k, torch.ones(1, 1, 3, 4))
        >>> out.flatten().tolist(), round(lse.exp().item(), 4)
        ([1.0, 1.0, 1.0, 1.0], 3.0)
    """
    laid = lay_mask(mask, q, k, q_start, k_start)
    return blockwise(q, k, v, laid, scale)


def merge_partials(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Join the outputs of the same queries over two disjoint sets of keys.

    With m = logaddexp(a, b): out = out_a * e^(a - m) + out_b * e^(b - m).

    Args:
        out_a: [..., D].
        lse_a: [...], -inf where no key was seen.
        out_b: Like ``out_a``.
        lse_b: Like ``lse_a``.

    Returns:
        out and lse in fp32 (fp64 if a part is fp64), differentiable; 0 and -inf in rows
        that saw no key on either side.

    Example:
        >>> a, b = torch.ones(1, 2), torch.full((1, 2), 4.0)
        >>> out, lse = merge_partials(a, torch.zeros(1), b, torch.tensor([2.0]).log())
        >>> out, lse.exp()
        (tensor([[3., 3.]]), tensor([3.]))
    """
    kind = torch.promote_types(
        torch.promote_types(lse_dtype(out_a), lse_dtype(out_b)),
        torch.promote_types(lse_a.dtype, lse_b.dtype),
    )
    out_a, lse_a, out_b, lse_b = (t.to(kind) for t in (out_a, lse_a, out_b, lse_b))
    top = torch.maximum(lse_a, lse_b).detach()
    # Subtracting -inf from -inf is NaN, in values and in gradients: rows without keys
    # are measured from 0 instead.
    top = top.masked_fill(top == -INF, 0.0)
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = weight_a + weight_b
    dead = total == 0
    total = total.masked_fill(dead, 1.0)
    out = (out_a * weight_a[..., None] + out_b * weight_b[..., None]) / total[..., None]
    return out, (total.log() + top).masked_fill(dead, -INF)


def blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    laid: LaidMask,
    scale: float | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend under a laid mask, with autograd; see `partial_attention`."""
    scale = checked_scale(scale, q.shape[-1])
    return _Blockwise.apply(q, k, v, laid, scale, chunk)


def lay_mask(
    mask: MaskSpec | None, q: Tensor, k: Tensor, q_start: int = 0, k_start: int = 0
) -> LaidMask:
    """Check q and k against the mask, and cut it to their positions.

    Raises:
        InvalidValue: as in `partial_attention`.
        NotImplementedError: ``mask.bias`` requires a gradient.
    """
    mask = MaskSpec() if mask is None else mask
    if q.ndim != 4 or k.ndim != 4:
        check_qkv(q, k, k)
    if q_start < 0 or k_start < 0:
        raise InvalidValue(f"q_start={q_start}, k_start={k_start}", "must be >= 0")
    refuse_trained_bias(mask)
    for name, part in mask.tensors().items():
        leading = part.shape[:1] if name != "bias" else _leading(part)
        if any(x not in (1, y) for x, y in zip(leading, q.shape[:2], strict=False)):
            why = f"it does not broadcast to batch and heads of q {tuple(q.shape)}"
            raise InvalidValue(f"{name} of shape {tuple(part.shape)}", why)
        if part.device != q.device:
            raise InvalidValue(f"{name} on {part.device}", f"q is on {q.device}")
    rows = range(q_start, q_start + q.shape[2])
    return mask.lay(rows, range(k_start, k_start + k.shape[2]))


def refuse_trained_bias(mask: MaskSpec) -> None:
    """Raise NotImplementedError if the bias wants a gradient."""
    if mask.bias is not None and mask.bias.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "mask.bias requires a gradient, which blockwise plans do not compute. "
            "Detach it, or use torch's scaled_dot_product_attention."
        )


def _leading(bias: Tensor) -> tuple[int, ...]:
    return ((1,) * (4 - bias.ndim) + tuple(bias.shape))[:2]


class _Blockwise(torch.autograd.Function):
    """Forward keeps q, k, v, out and lse; backward computes each tile anew."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        laid: LaidMask,
        scale: float,
        chunk: int | None,
    ) -> tuple[Tensor, Tensor]:
        check_qkv(q, k, v)
        out, lse = forward(q, k, v, laid, scale, chunk)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = (laid, scale, chunk)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]  (the decorator hides the signature)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, d_lse = grads
        q, k, v, out, lse = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * 6
        if d_out is None:
            d_out = torch.zeros_like(out)
        if d_lse is not None:
            d_lse = d_lse.masked_fill(lse == -INF, 0.0)
        found = backward(d_out, d_lse, (q, k, v, out, lse), *ctx.settings)
        dq, dk, dv = (g.to(q.dtype) for g in found)
        return dq, dk, dv, None, None, None
