# SPDX-License-Identifier: Apache-2.0
"""Walk queries and keys tile by tile: what to compute, and with which mask.

`walk` turns a laid mask into calls of `kernel_pytorch.attention.blocks`; `forward`
and `backward` run them. Decisions:

- Rows that need no mask of their own (full, causal on the diagonal, padding) are one
  call, as one call of the kernel is faster than many.
- Elsewhere a chunk of rows is cut along the keys; neighbouring FULL tiles become one
  call, and a mask tensor never has more than `TILE` elements for each head.
- Only keys that a chunk can see are visited: a window costs O(N * window).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_pytorch.attention.blocks import (
    INF,
    Block,
    backend_of,
    block_backward,
    block_forward,
    lse_dtype,
)
from kernel_pytorch.attention.masks import EMPTY, FULL, LaidMask, Tile, is_abstract

TILE = 1 << 20
_NARROW, _WIDE, _KEYS = 512, 2048, 512


class Call(NamedTuple):
    """One block: queries q0..q1, keys k0..k1 (ends excluded) and its mask."""

    q0: int
    q1: int
    k0: int
    k1: int
    diagonal: bool
    tile: Tensor | None


class Work:
    """Counts the query-key pairs of all calls while it is active; names the kernels.

    Example:
        >>> with counting() as work:
        ...     _ = walk(LaidMask(True, None, range(4), range(4)), 1)
        >>> work.pairs
        0.0
    """

    def __init__(self) -> None:
        self.pairs = 0.0
        self.calls = 0
        self.backends: set[str] = set()

    def add(self, call: Call, backend: str) -> None:
        """Count one call; a diagonal one computes half of its square."""
        self.backends.add(backend)
        pairs = (call.q1 - call.q0) * (call.k1 - call.k0)
        self.pairs += pairs / 2 if call.diagonal else pairs
        self.calls += 1


# Of each thread its own: threads run layers side by side.
_active: ContextVar[tuple[Work, ...]] = ContextVar("active", default=())


@contextlib.contextmanager
def counting() -> Iterator[Work]:
    """Count the work done inside the block, in this thread.

    On CUDA a backward pass runs in a thread of autograd, which isn't counted here.
    """
    work = Work()
    token = _active.set((*_active.get(), work))
    try:
        yield work
    finally:
        _active.reset(token)


def walk(
    laid: LaidMask,
    heads: int,
    chunk: int | None = None,
    bounded: bool = False,
    part: tuple[int, int] | None = None,
) -> Iterator[tuple[int, int, list[Call]]]:
    """Yield (q0, q1, calls) for each chunk of rows.

    Args:
        laid: The mask.
        heads: Batch times heads: with ``bounded`` a call's scores are materialised,
            so that they count once for each head.
        chunk: Rows in one chunk; chosen here if None.
        bounded: No call may have more than `TILE` scores over all heads.
        part: First and end row; None is all rows.
    """
    first, end = part or (0, len(laid.rows))
    limit = TILE
    if bounded:
        limit = max(TILE // max(heads, 1), 64 * 64)
        chunk = min(chunk or _NARROW, max(64, int(limit**0.5)))
    elif chunk is None and (whole := _whole(laid, first, end)) is not None:
        yield first, end, [whole]
        return
    if chunk is None:
        fine = laid.window is not None or laid.q_documents is not None
        fine = fine or (laid.bias is not None and laid.bias.shape[2] > 1)
        chunk = _NARROW if fine else _WIDE
    for q0 in range(first, end, chunk):
        q1 = min(q0 + chunk, end)
        yield q0, q1, _calls(laid, q0, q1, limit, bounded)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    laid: LaidMask,
    scale: float,
    chunk: int | None = None,
    *,
    start: int = 0,
    strict: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend exactly; q [B, H, Nq, D], k and v [B, Hkv, Nk, D], fitting ``laid``.

    Args:
        q: Rows ``start`` to ``start + Nq`` of the mask.
        k: All keys of the mask.
        v: Like ``k``.
        laid: The mask.
        scale: Factor of the scores.
        chunk: As in `walk`.
        start: Row of the mask that the first query is.
        strict: What `clean` said, if k and v come from it; None calls it here, which
            reads all keys.

    Returns:
        out in the dtype of ``q`` (fp32 where it had to be merged from half-precision
        parts of the whole), and lse [B, H, Nq] in fp32 (fp64 for fp64).
    """
    if is_abstract(q) or is_abstract(k) or not laid.checks:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype(q))
    if strict is None:
        k, v, strict = clean(k, v, laid)
    bounded = backend_of(q, k, Block(scale, strict=strict)) == "reference"
    out = lse = None
    rows = start, start + q.shape[2]
    for q0, q1, calls in walk(laid, q.shape[0] * q.shape[1], chunk, bounded, rows):
        own = slice(q0 - start, q1 - start)
        part = _rows_forward(q[:, :, own], k, v, calls, scale, strict)
        if q1 - q0 == q.shape[2]:
            return part[0].to(q.dtype), part[1]
        if out is None or lse is None:
            out = torch.empty_like(q)
            lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q))
        out[:, :, own], lse[:, :, own] = part
    if out is None or lse is None:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -INF, dtype=lse_dtype(q))
    return out, lse


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    laid: LaidMask,
    scale: float,
    chunk: int | None = None,
    *,
    start: int = 0,
    strict: bool | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk, dv of these rows and keys.

    Args:
        d_out: Gradient of out [B, H, Nq, D].
        d_lse: Gradient of lse [B, H, Nq], or None; 0 in rows that see no key.
        saved: q, k, v, and the final out and lse of the rows.
        laid: The mask.
        scale: Factor of the scores.
        chunk: As in `walk`.
        start: As in `forward`.
        strict: As in `forward`.
        into: dq, dk, dv to be added to, in place; only keys that the rows can see are
            touched.

    Returns:
        ``into``, or else gradients in fp32 (fp64 for fp64), or in the dtype of q for a
        single call.
    """
    q, k, v, out, lse = saved
    if is_abstract(q) or is_abstract(k) or not laid.checks:
        return into or (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    if strict is None:
        k, v, strict = clean(k, v, laid)
    slow = d_lse is not None or strict
    bounded = slow or backend_of(q, k, Block(scale)) == "reference"
    grads, end = into, start + q.shape[2]
    shape = q.shape[0] * q.shape[1], chunk, bounded
    for q0, q1, calls in walk(laid, *shape, (start, end)):
        for call in calls:
            rows = slice(q0 - start, q1 - start)
            part = _call_backward(
                d_out[:, :, rows],
                None if d_lse is None else d_lse[:, :, rows],
                (q[:, :, rows], k, v, out[:, :, rows], lse[:, :, rows]),
                call,
                Block(scale, call.diagonal, call.tile, strict),
            )
            if into is None and call[:4] == (start, end, 0, k.shape[2]):
                return part
            grads = grads or _zeros(saved)
            grads[0][:, :, rows] += part[0]
            grads[1][:, :, call.k0 : call.k1] += part[1]
            grads[2][:, :, call.k0 : call.k1] += part[2]
    return grads or _zeros(saved)


def _zeros(saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.zeros_like(t, dtype=lse_dtype(t)) for t in saved[:3])
    return q, k, v


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge a part into ``out`` and ``lse`` (fp32 or fp64) in place."""
    total = torch.logaddexp(lse, part_lse)
    base = total.masked_fill(total == -INF, 0.0)
    out.mul_(lse.sub_(base).exp_()[..., None])
    out.addcmul_(part.to(out.dtype), (part_lse - base).exp_()[..., None])
    lse.copy_(total)


def clean(k: Tensor, v: Tensor, laid: LaidMask) -> tuple[Tensor, Tensor, bool]:
    """Make hidden keys harmless.

    Returns:
        k and v, zero where padding hides a key that is not finite, and True if other
        keys are not finite while the mask may hide them from some rows.
    """
    hides = laid.causal or laid.window or laid.q_documents is not None
    if not hides and laid.keep is None and laid.bias is None:
        return k, v, False
    if is_abstract(k) or not laid.checks:
        return k, v, False
    # Waiting for the answer is impossible while a CUDA graph is captured.
    if k.is_cuda and torch.cuda.is_current_stream_capturing():
        return k, v, False
    if _finite(k) and _finite(v):
        return k, v, False
    if laid.keep is not None:
        hidden = ~laid.keep[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    return k, v, not (_finite(k) and _finite(v))


def _finite(t: Tensor) -> bool:
    # A sum reads once and allocates nothing; an overflow only costs time.
    return bool(t.sum(dtype=lse_dtype(t)).isfinite())


def _rows_forward(
    q: Tensor, k: Tensor, v: Tensor, calls: list[Call], scale: float, strict: bool
) -> tuple[Tensor, Tensor]:
    out = lse = None
    for call in calls:
        keys = slice(call.k0, call.k1)
        block = Block(scale, call.diagonal, call.tile, strict)
        for work in _active.get():
            work.add(call, backend_of(q, k, block))
        part = block_forward(q, k[:, :, keys], v[:, :, keys], block)
        if out is None or lse is None:
            out, lse = part
            if len(calls) > 1:
                out, lse = out.to(lse.dtype), lse.clone()
        else:
            merge_into(out, lse, *part)
    if out is None or lse is None:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -INF, dtype=lse_dtype(q))
    return out, lse


def _call_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    call: Call,
    block: Block,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    for work in _active.get():
        work.add(call, backend_of(q, k, block))
    keys = slice(call.k0, call.k1)
    saved = (q, k[:, :, keys], v[:, :, keys], out, lse)
    return block_backward(d_out, d_lse, saved, block)


def _whole(laid: LaidMask, q0: int, q1: int) -> Call | None:
    """The one call for rows q0..q1 and all keys, if these rows have one mask."""
    rows, columns, bias = laid.rows, laid.columns, laid.bias
    if laid.q_documents is not None or q0 >= q1 or not len(columns):
        return None
    if bias is not None and bias.shape[2] > 1:
        return None
    diagonal = _on_diagonal(laid, q0, q1, 0, len(columns))
    if not diagonal and laid.by_position(rows[q0:q1], columns) is not FULL:
        return None
    free = LaidMask(False, None, rows, columns, keep=laid.keep, bias=bias)
    tile = free.tile(q0, q1, 0, len(columns))
    if tile is EMPTY:
        return None
    return Call(q0, q1, 0, len(columns), diagonal, _tensor(tile))


def _calls(laid: LaidMask, q0: int, q1: int, limit: int, bounded: bool) -> list[Call]:
    """Cut one chunk of rows into as few calls as the limit allows."""
    calls: list[Call] = []
    for k0, k1 in _cuts(laid, q0, q1, limit):
        diagonal = _on_diagonal(laid, q0, q1, k0, k1)
        tile = (_uncausal(laid) if diagonal else laid).tile(q0, q1, k0, k1)
        if tile is EMPTY:
            continue
        call = Call(q0, q1, k0, k1, diagonal, _tensor(tile))
        before = calls[-1] if calls else None
        plain = call.tile is None and not diagonal
        if before and plain and before.tile is None and not before.diagonal:
            wide = (q1 - q0) * (k1 - before.k0)
            if before.k1 == k0 and (wide <= limit or not bounded):
                calls[-1] = before._replace(k1=k1)
                continue
        calls.append(call)
    return _joined(laid, calls, limit)


def _joined(laid: LaidMask, calls: list[Call], limit: int) -> list[Call]:
    """Join neighbouring masked calls while their mask stays small."""
    done: list[Call] = []
    for call in calls:
        before = done[-1] if done else None
        if before and before.k1 == call.k0 and not (before.diagonal or call.diagonal):
            q0, q1, k0, k1 = call.q0, call.q1, before.k0, call.k1
            masked = before.tile is not None or call.tile is not None
            if masked and (q1 - q0) * (k1 - k0) <= limit:
                tile = _tensor(laid.tile(q0, q1, k0, k1))
                done[-1] = Call(q0, q1, k0, k1, False, tile)
                continue
        done.append(call)
    return done


def _cuts(laid: LaidMask, q0: int, q1: int, limit: int) -> Iterator[tuple[int, int]]:
    """Key ranges of one chunk; one of them is the diagonal block if there is one."""
    first, end = laid.keys_of(q0, q1)
    rows, columns = laid.rows, laid.columns
    step = max(64, min(_KEYS, limit // (q1 - q0)))
    edges = {first, end, *range(first, end, step)}
    if laid.causal and isinstance(rows, range) and isinstance(columns, range):
        at = rows[q0] - columns.start
        past = at + q1 - q0
        if first < past and at < end and _on_diagonal(laid, q0, q1, at, past):
            edges = {edge for edge in edges if edge <= at or edge >= past}
            edges |= {at, past}
    ordered = sorted(edges)
    return itertools.pairwise(ordered)


def _on_diagonal(laid: LaidMask, q0: int, q1: int, k0: int, k1: int) -> bool:
    if not (laid.causal and isinstance(laid.rows, range)):
        return False
    if not isinstance(laid.columns, range) or k0 < 0 or k1 > len(laid.columns):
        return False
    inside = laid.window is None or laid.window >= q1 - q0
    return inside and laid.rows[q0:q1] == laid.columns[k0:k1]


def _uncausal(laid: LaidMask) -> LaidMask:
    """The other parts of the mask, for a block whose kernel does the triangle."""
    parts = (laid.keep, laid.q_documents, laid.k_documents, laid.bias)
    return LaidMask(False, None, laid.rows, laid.columns, *parts)


def _tensor(tile: Tile | Tensor) -> Tensor | None:
    assert tile is not EMPTY
    return None if tile is FULL else tile  # type: ignore[return-value]
