# SPDX-License-Identifier: Apache-2.0
"""A whole attention layer streamed by chunk: projections, attention, output projection.

A fused attention kernel already needs O(N) memory, but a layer around it holds q, k, v,
the attention output and the result at once, five times its input. Here K and V are
kept, and q, the attention output and the result exist for one chunk of rows only; the
result is written in place. For training x, K, V, out and lse are saved, and q is
computed anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from kernel_pytorch.attention.blocks import checked_scale, lse_dtype
from kernel_pytorch.attention.masks import LaidMask, MaskSpec
from kernel_pytorch.attention.partial import lay_mask
from kernel_pytorch.attention.tiling import backward, clean, forward
from torchworks_core.errors import InvalidValue

_TEMPORARIES = 64 << 20
# From here on torch's CPU kernel takes its large tiles; below, it is a tenth slower.
_LEAST = 768


class Projections(NamedTuple):
    """Weights [out, in] and biases [out] (or None) of an attention layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    out_bias: Tensor | None = None


def project_and_attend(
    x: Tensor,
    weights: Projections,
    heads: int,
    kv_heads: int,
    mask: MaskSpec | None = None,
    *,
    scale: float | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute a self-attention layer with one set of K and V and chunks of the rest.

    Args:
        x: [B, N, width].
        weights: q [heads * D, width], k and v [kv_heads * D, width], out
            [width, heads * D].
        heads: Heads of q, a multiple of ``kv_heads``.
        kv_heads: Heads of k and v.
        mask: As in `kernel_pytorch.attention.attention`.
        scale: Factor of the scores; None is 1 / sqrt(D).
        chunk_size: Query rows in one chunk; None chooses, at least 768.

    Returns:
        The layer's result [B, N, out width], and lse [B, heads, N] without gradient.

    Raises:
        InvalidValue: shapes do not fit.
        NotImplementedError: ``mask.bias`` requires a gradient.

    Example:
        >>> x, w = torch.randn(1, 6, 8), torch.eye(8)
        >>> mask = MaskSpec(causal=True)
        >>> y, _ = project_and_attend(x, Projections(w, w, w, w), 2, 2, mask)
        >>> bool(torch.allclose(y[:, 0], x[:, 0]))
        True
    """
    _check(x, weights, heads, kv_heads)
    dim = weights.q.shape[0] // heads
    probe = x.new_empty((x.shape[0], heads, 1, dim)).expand(-1, -1, x.shape[1], -1)
    laid = lay_mask(mask, probe, probe)
    if chunk_size is None:
        # About six tensors of one chunk are alive at once; together they may be as
        # large as a fourteenth of x, so that they don't undo what streaming saves.
        row = 6 * x.shape[0] * heads * dim * max(x.element_size(), 4)
        budget = min(_TEMPORARIES, x.numel() * x.element_size() // 14)
        chunk_size = max(_LEAST, budget // max(row, 1))
    elif chunk_size < 1:
        raise InvalidValue(f"chunk_size={chunk_size}", "it must be None or >= 1")
    scale = checked_scale(scale, dim)
    # Under no_grad a Function is still told that its inputs require gradients.
    wanted = [t is not None and t.requires_grad for t in (x, *weights)]
    training = torch.is_grad_enabled() and any(wanted)
    settings = _Settings(heads, kv_heads, laid, scale, chunk_size, training)
    return _Layer.apply(settings, x, *weights)


class _Settings(NamedTuple):
    heads: int
    kv_heads: int
    laid: LaidMask
    scale: float
    chunk: int
    training: bool


def _check(x: Tensor, weights: Projections, heads: int, kv_heads: int) -> None:
    shapes = f"x {tuple(x.shape)}, " + ", ".join(
        f"{name} {tuple(w.shape)}"
        for name, w in zip(("q", "k", "v", "out"), weights, strict=False)
        if w is not None
    )
    if x.ndim != 3:
        raise InvalidValue(shapes, "x must be [batch, tokens, width]")
    if heads < 1 or kv_heads < 1 or heads % kv_heads or weights.q.shape[0] % heads:
        why = f"heads={heads} and kv_heads={kv_heads} do not divide them"
        raise InvalidValue(shapes, why)
    inner = weights.q.shape[0]
    keys = (inner // heads * kv_heads, x.shape[2])
    wanted = ((inner, x.shape[2]), keys, keys)
    found = tuple(tuple(w.shape) for w in weights[:3])
    if found != wanted or weights.out.shape[1:] != (inner,):
        raise InvalidValue(shapes, f"q, k, v must be {wanted}, and out [*, {inner}]")


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """[B, n, width] -> [B, heads, n, D], as a view of the projection."""
    return linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)


def _keys(x: Tensor, w: Projections, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Project K and V chunk by chunk into [B, Hkv, N, D] with heads outermost."""
    dim = w.k.shape[0] // settings.kv_heads
    shape = (x.shape[0], settings.kv_heads, x.shape[1], dim)
    k, v = x.new_empty(shape), x.new_empty(shape)
    for rows in _chunks(x.shape[1], settings.chunk):
        k[:, :, rows] = _project(x[:, rows], w.k, w.k_bias, settings.kv_heads)
        v[:, :, rows] = _project(x[:, rows], w.v, w.v_bias, settings.kv_heads)
    return k, v


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(a, min(a + chunk, length)) for a in range(0, length, chunk)]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: _Settings, x: Tensor, *parts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        w = Projections(*parts)  # type: ignore[arg-type]
        batch, length = x.shape[:2]
        # Cleaning reads all keys: it is done once for all chunks and for backward.
        k, v, strict = clean(*_keys(x, w, settings), settings.laid)
        # Without a gradient to come, nothing but the result outlives its chunk.
        training = settings.training
        y = x.new_empty((batch, length, w.out.shape[0]))
        lse = x.new_empty((batch, settings.heads, length), dtype=lse_dtype(x))
        saved = x.new_empty((batch, length, w.q.shape[0])) if training else None
        for rows in _chunks(length, settings.chunk):
            q = _project(x[:, rows], w.q, w.q_bias, settings.heads)
            out, lse[:, :, rows] = forward(
                *(q, k, v, settings.laid, settings.scale),
                start=rows.start,
                strict=strict,
            )
            out = out.transpose(1, 2).flatten(2)
            y[:, rows] = linear(out, w.out, w.out_bias)
            if saved is not None:
                saved[:, rows] = out
            # Else they would live on beside those of the next chunk.
            del q, out
        if saved is not None:
            ctx.save_for_backward(x, k, v, saved, lse, *parts)
        ctx.settings, ctx.strict = settings, strict
        ctx.mark_non_differentiable(lse)
        return y, lse

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]  (the decorator hides the signature)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy, settings = grads[0], ctx.settings
        x, k, v, saved, lse, *parts = ctx.saved_tensors
        w = Projections(*parts)
        sums = _Sums(x, w, ctx.needs_input_grad[1:], lse.dtype)
        attends = sums.wants(0) or sums.wants(1) or sums.wants(2)
        chunks = _chunks(x.shape[1], settings.chunk)
        for rows in chunks:
            sums.add_weight(3, dy[:, rows], saved[:, rows])
        if not attends:
            return None, None, *sums.of_weights()
        dk, dv = (torch.zeros_like(t, dtype=lse.dtype) for t in (k, v))
        for rows in chunks:
            q = _project(x[:, rows], w.q, w.q_bias, settings.heads)
            dq = torch.zeros_like(q, dtype=lse.dtype)
            d_out = _split(dy[:, rows] @ w.out, settings.heads)
            out = _split(saved[:, rows], settings.heads)
            backward(
                *(d_out, None, (q, k, v, out, lse[:, :, rows])),
                *(settings.laid, settings.scale),
                start=rows.start,
                strict=ctx.strict,
                into=(dq, dk, dv),
            )
            sums.add(0, dq, rows)
            del q, dq, d_out, out
        for rows in chunks:
            sums.add(1, dk[:, :, rows], rows)
            sums.add(2, dv[:, :, rows], rows)
        return None, sums.dx, *sums.of_weights()


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class _Sums:
    """Gradients of x and the weights, as far as they are needed.

    A weight's gradient is a sum over all chunks: adding them up in half precision
    would lose digits with every chunk, so it is cast only when all are added.
    """

    def __init__(
        self, x: Tensor, w: Projections, needed: tuple[bool, ...], dtype: torch.dtype
    ) -> None:
        self._x, self._w, self._dtype = x, w, dtype
        self.dx = torch.zeros_like(x) if needed[0] else None
        self._sums = [
            torch.zeros_like(p, dtype=dtype) if p is not None and need else None
            for p, need in zip(w, needed[1:], strict=True)
        ]

    def wants(self, place: int) -> bool:
        """Whether the gradient of projection ``place`` is of any use."""
        found = (self.dx, self._sums[place], self._sums[place + 4])
        return any(t is not None for t in found)

    def add(self, place: int, grad: Tensor, rows: slice) -> None:
        """Add what follows from the gradient [B, H, n, D] of a projection of x."""
        if not self.wants(place):
            return
        part, x = grad.to(self._x.dtype).transpose(1, 2).flatten(2), self._x[:, rows]
        self.add_weight(place, part, x)
        weight = self._w[place]
        if self.dx is not None and weight is not None:
            self.dx[:, rows] += part @ weight

    def add_weight(self, place: int, dy: Tensor, x: Tensor) -> None:
        """Add the gradients of one linear map: its weight, and its bias."""
        weight, bias = self._sums[place], self._sums[place + 4]
        if weight is not None:
            weight += dy.flatten(0, 1).T @ x.flatten(0, 1)
        if bias is not None:
            bias += dy.sum((0, 1), dtype=self._dtype)

    def of_weights(self) -> list[Tensor | None]:
        """The weights' gradients, in the dtype of the weights."""
        pairs = zip(self._sums, self._w, strict=True)
        return [None if s is None or p is None else s.to(p.dtype) for s, p in pairs]
