# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention in torch operations, one block of queries at a time.

It runs where no kernel does: float64, float16, other devices, a bias, block sizes or
head dimensions that the kernels don't have, and a machine without the native library.
It never makes a matrix of all queries times all keys: a step gathers the keys that one
block of queries keeps. Decisions:

- Arithmetic is in float32 (float64 for float64), as in the kernels.
- What a query doesn't see must not reach it, even a NaN, and 0 times NaN is NaN: rows
  that aren't finite are taken out of a product, and the results that did see one get
  NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

INF = float("inf")


@dataclass(frozen=True, eq=False)
class Problem:
    """All that defines one call but the queries' own gradients.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: Like ``k``.
        counts: Int32 [B|1, H, Tq].
        blocks: Int32 [B|1, H, Tq, width].
        key_padding: Bool [B, Nk] or None.
        documents: Int64 [B, max(Nq, Nk)] or None.
        bias: Bool or float, [1|B, 1|H, 1|Nq, 1|Nk], or None.
        extra_k: The compressed remainder's keys, [B, Hkv, Tk, D], or None.
        extra_v: Its values, likewise.
        block_size: Tokens in a block.
        causal: As in `MaskSpec`.
        window: As in `MaskSpec`; 0 = none.
        scale: Factor of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    counts: Tensor
    blocks: Tensor
    key_padding: Tensor | None
    documents: Tensor | None
    bias: Tensor | None
    extra_k: Tensor | None
    extra_v: Tensor | None
    block_size: int
    causal: bool
    window: int
    scale: float

    @property
    def kind(self) -> torch.dtype:
        """Dtype of the arithmetic and of lse."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys, Tk."""
        return -(-self.k.shape[2] // self.block_size)

    def extra_weight(self) -> Tensor:
        """Logarithm of each key block's length, [Tk] in the arithmetic's dtype."""
        start = torch.arange(self.kv_blocks, device=self.q.device) * self.block_size
        return (self.k.shape[2] - start).clamp(max=self.block_size).to(self.kind).log()


class Row(NamedTuple):
    """One block of queries with the L keys that it keeps.

    Attributes:
        q: [B, H, rows, D].
        k: [B, H, L, D], zero where no query of the block sees the key.
        v: Like ``k``.
        seen: Bool [B, H, rows, L].
        bias: Added to the scores, broadcasting to [B, H, rows, L], or None.
        where: Three indices of k and v that give the first L - extra keys.
        extra: How many of the keys are the remainder's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    bias: Tensor | None
    where: tuple[Tensor, Tensor, Tensor]
    extra: int


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return out like q and lse [B, H, Nq] (float32; float64 for float64)."""
    q = problem.q
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -INF, dtype=problem.kind, device=q.device)
    for start in range(0, q.shape[2], problem.block_size):
        row, at = gather(problem, start), slice(start, start + problem.block_size)
        scores = _scores(problem, row)
        found = scores.logsumexp(-1) if scores.shape[-1] else lse[:, :, at]
        weights = _weights(scores, found)
        out[:, :, at] = _product(weights, row.v, row.seen).to(q.dtype)
        lse[:, :, at] = found
    return out, lse


def backward(
    problem: Problem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor
) -> list[Tensor]:
    """Return the gradients of q, k, v, extra_k and extra_v, in their dtypes.

    The last two are empty without a remainder. P = exp(S - lse), dS = P * (dO V^T -
    delta + dlse) with delta = sum(dO * O), as in Dao et al., FlashAttention (2022).
    """
    p = problem
    extra = () if p.extra_k is None else (p.extra_k, p.extra_v)
    tensors = [p.q, p.k, p.v, *(t for t in extra if t is not None)]
    sums = [torch.zeros(t.shape, dtype=p.kind, device=t.device) for t in tensors]
    for start in range(0, p.q.shape[2], p.block_size):
        row, at = gather(p, start), slice(start, start + p.block_size)
        d_row = d_out[:, :, at].to(p.kind)
        weights = _weights(_scores(p, row), lse[:, :, at])
        delta = (d_row * out[:, :, at]).sum(-1) - d_lse[:, :, at]
        slope = weights * (d_row @ row.v.transpose(2, 3) - delta[..., None])
        slope = slope.masked_fill(~row.seen, 0.0) * p.scale
        turned = row.seen.transpose(2, 3)
        sums[0][:, :, at] = _product(slope, row.k, row.seen)
        _scatter(sums[1::2], row, _product(slope.transpose(2, 3), row.q, turned))
        _scatter(sums[2::2], row, _product(weights.transpose(2, 3), d_row, turned))
    grads = [s.to(t.dtype) for s, t in zip(sums, tensors, strict=True)]
    return grads + [p.q.new_empty(0) for _ in range(5 - len(grads))]


def gather(p: Problem, start: int) -> Row:
    """Collect what the queries from ``start`` on, one block of them, need."""
    batch, heads, q_len, _ = p.q.shape
    stop, kv_len, device = min(start + p.block_size, q_len), p.k.shape[2], p.q.device
    counts = p.counts[:, :, start // p.block_size].expand(batch, -1)
    width = int(counts.max()) if counts.numel() else 0
    blocks = p.blocks[:, :, start // p.block_size, :width].expand(batch, -1, -1).long()
    listed = torch.arange(width, device=device) < counts[..., None]
    inside = torch.arange(p.block_size, device=device)
    place = (blocks[..., None] * p.block_size + inside).flatten(2)
    there = listed[..., None].expand(-1, -1, -1, p.block_size).flatten(2)
    there = there & (place < kv_len)
    place = place.clamp(0, max(kv_len - 1, 0))
    seen, bias = _mask(p, start, stop, place)
    seen = seen & there[:, :, None]
    group = heads // p.k.shape[1]
    where = (
        torch.arange(batch, device=device)[:, None, None],
        torch.arange(heads, device=device)[None, :, None] // group,
        place,
    )
    k, v = p.k[where], p.v[where]
    if p.extra_k is not None and p.extra_v is not None:
        rest = _rest(p, start, stop, torch.where(listed, blocks, p.kv_blocks))
        rest = rest[:, :, None].expand(-1, -1, stop - start, -1)
        k = torch.cat([k, p.extra_k.repeat_interleave(group, 1)], 2)
        v = torch.cat([v, p.extra_v.repeat_interleave(group, 1)], 2)
        bias = p.q.new_zeros(k.shape[2], dtype=p.kind)
        bias[place.shape[2] :] = p.extra_weight()
        seen = torch.cat([seen, rest], 3)
    hidden = ~seen.any(2)[..., None]
    k, v = (t.to(p.kind).masked_fill(hidden, 0.0) for t in (k, v))
    q = p.q[:, :, start:stop].to(p.kind)
    return Row(q, k, v, seen, bias, where, k.shape[2] - place.shape[2])


def _mask(
    p: Problem, start: int, stop: int, place: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Which of the keys at ``place`` [B, H, L] each query sees, and the float bias."""
    rows = torch.arange(start, stop, device=place.device)[:, None]
    keys, batch = place[:, :, None], torch.arange(len(place), device=place.device)
    seen = torch.ones_like(rows - keys, dtype=torch.bool)
    if p.causal:
        seen &= keys <= rows
    if p.window:
        seen &= (rows - keys).abs() < p.window
    if p.key_padding is not None:
        seen &= p.key_padding[batch[:, None, None], place][:, :, None]
    if p.documents is not None:
        theirs = p.documents[batch[:, None, None], place][:, :, None]
        seen &= p.documents[:, None, start:stop, None] == theirs
    if p.bias is None:
        return seen, None
    # Strides of 0 where the bias is one for all: nothing is copied here.
    whole = p.bias.expand(*p.q.shape[:3], p.k.shape[2])[:, :, start:stop]
    bias = whole.gather(3, keys.expand(-1, -1, stop - start, -1))
    if bias.dtype == torch.bool:
        return seen & bias, None
    return seen & (bias != -INF), bias.to(p.kind)


def _rest(p: Problem, start: int, stop: int, listed: Tensor) -> Tensor:
    """Bool [B, H, Tk]: blocks not listed, of which every query sees every key."""
    batch, heads, kv_len = len(p.q), p.q.shape[1], p.k.shape[2]
    first = torch.arange(p.kv_blocks, device=p.q.device) * p.block_size
    last = (first + p.block_size).clamp(max=kv_len) - 1
    full = torch.ones(batch, p.kv_blocks, dtype=torch.bool, device=p.q.device)
    if p.causal:
        full &= last <= start
    if p.window:
        full &= (first > stop - 1 - p.window) & (last < start + p.window)
    if p.key_padding is not None:
        full &= _spread(p.key_padding.int(), p, kv_len)[0] == 1
    if p.documents is not None:
        low, high = _spread(p.documents, p, kv_len)
        ours = p.documents[:, start:stop]
        full &= (low == high) & (low == ours[:, :1])
        full &= (ours == ours[:, :1]).all(1)[:, None]
    kept = full.new_zeros(batch, heads, p.kv_blocks + 1).scatter_(-1, listed, True)
    return full[:, None] & ~kept[..., :-1]


def _spread(values: Tensor, p: Problem, kv_len: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of [B, Nk] in each block of keys, [B, Tk]."""
    padded = p.kv_blocks * p.block_size
    at = torch.arange(padded, device=values.device).clamp(max=kv_len - 1)
    blocks = values[:, at].unflatten(1, (p.kv_blocks, p.block_size))
    return blocks.amin(2), blocks.amax(2)


def _scores(p: Problem, row: Row) -> Tensor:
    scores = row.q @ row.k.transpose(2, 3) * p.scale
    scores = scores if row.bias is None else scores + row.bias
    return scores.masked_fill(~row.seen, -INF)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    # A row that sees nothing has lse -inf, and -inf - -inf would be NaN.
    return (scores - lse.masked_fill(lse == -INF, 0.0)[..., None]).exp()


def _product(weights: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """``weights @ x`` where 0 for what isn't seen counts even against NaN."""
    odd = ~x.isfinite().all(-1)
    if not bool(odd.any()):
        return weights @ x
    clean = weights @ x.masked_fill(odd[..., None], 0.0)
    reached = (seen & odd[..., None, :]).any(-1)
    return clean.masked_fill(reached[..., None], float("nan"))


def _scatter(sums: list[Tensor], row: Row, grads: Tensor) -> None:
    """Add gradients [B, H, L, D] to those of k or v, and of the remainder's."""
    own = grads.shape[2] - row.extra
    sums[0].index_put_(row.where, grads[:, :, :own], accumulate=True)
    if row.extra:
        heads = sums[1].shape[1]
        sums[1] += grads[:, :, own:].unflatten(1, (heads, -1)).sum(2)
