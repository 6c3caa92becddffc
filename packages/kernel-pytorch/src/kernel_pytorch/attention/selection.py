# SPDX-License-Identifier: Apache-2.0
"""Which blocks of keys matter, judged by the content of queries and keys.

For each block of queries every 8th one (at least two) is compared with all keys; the
softmax weights, summed by block of keys, estimate the attention mass of each block.
That is exact for the sampled queries. Decisions:

- The sampled queries of a block are the last of each eight, so that under a causal
  mask they see what the others see.
- The budget's last tenth goes to the blocks with the highest bound on mean query
  times key, from per-channel extremes (as in Quest, arXiv:2406.10774), where the
  sample may have missed a strong key. It's no promise: a key that a single query
  wants, and no sampled one, may be dropped.
- Rows are taken in chunks, so the logits of one chunk are the largest tensor made.
- Nothing here has a gradient: choosing isn't differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_pytorch.attention.block_index import BlockIndex
from kernel_pytorch.attention.blocks import check_qkv, lse_dtype
from kernel_pytorch.attention.masks import (
    EMPTY,
    FULL,
    INF,
    LaidMask,
    MaskSpec,
    Tile,
)
from kernel_pytorch.attention.partial import lay_mask
from torchworks_core.errors import InvalidValue

EVERY = 8
_CHUNK = 2**21


class Selection(NamedTuple):
    """Chosen blocks, and what they are estimated to leave out.

    Args:
        index: The blocks, for each batch entry and head.
        missed_mass: Float [B, H, Tq] in [0, 1]: the share of the sampled queries'
            softmax that lies outside the chosen blocks. 0 where no sampled query
            sees a key.
    """

    index: BlockIndex
    missed_mass: Tensor


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    mask: MaskSpec | None = None,
    *,
    sparsity_ratio: float = 0.9,
    block_size: int = 64,
    coverage: float | None = None,
    block_logits: Tensor | None = None,
) -> Selection:
    """Choose blocks of keys by their estimated attention mass.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D]; H must be a multiple of Hkv.
        mask: As for the attention itself.
        sparsity_ratio: In [0, 0.95]; see `budgets`.
        block_size: Tokens in a block.
        coverage: In (0, 1]: keep the fewest blocks whose estimated mass reaches this
            share, instead of a fixed number. A row of which no sampled query sees a
            key keeps every admissible block.
        block_logits: [B, H, Tq, Tk], added to the logarithm of the estimated mass.

    Raises:
        InvalidValue: a number is out of its range, or shapes don't fit.

    Example:
        >>> q, k = torch.randn(2, 1, 2, 256, 8)
        >>> found = select_blocks(q, k, sparsity_ratio=0.5, block_size=32)
        >>> found.index.counts.unique().tolist(), found.missed_mass.shape
        ([4], torch.Size([1, 2, 8]))
    """
    check_choice(q, k, sparsity_ratio, block_size, coverage)
    mask = MaskSpec() if mask is None else mask
    open_blocks = admissible_blocks(q, k, mask, block_size)
    sizes = *q.shape[:2], *open_blocks.shape[2:]
    if block_logits is not None and block_logits.shape != sizes:
        shape = f"block logits of shape {tuple(block_logits.shape)}"
        raise InvalidValue(shape, f"q, k and blocks of {block_size} need {sizes}")
    budget = budgets(open_blocks, sparsity_ratio)
    # Once, not in each chunk.
    k = k.to(lse_dtype(k))
    kept = torch.zeros(sizes, dtype=torch.bool, device=q.device)
    missed = torch.zeros(sizes[:3], dtype=lse_dtype(q), device=q.device)
    low, high = _extremes(k, mask, block_size)
    for first, end in _chunks(q, k, block_size):
        mass = block_mass(q, k, mask, block_size, first, end)
        score, seen = mass, open_blocks[:, :, first:end].expand_as(mass)
        if block_logits is not None:
            score = _gated(mass, block_logits[:, :, first:end], seen)
        forced = _diagonal(seen, first) if mask.causal else None
        if coverage is None:
            bound = _bound(q, low, high, block_size, first, end)
            slots = budget[:, :, first:end].expand(mass.shape[:3])
            chosen = _by_budget(score, bound, seen, slots, forced)
        else:
            chosen = _by_coverage(score, seen, coverage, forced)
        kept[:, :, first:end] = chosen
        total = mass.sum(-1).clamp_min(torch.finfo(mass.dtype).tiny)
        missed[:, :, first:end] = mass.masked_fill(chosen, 0.0).sum(-1) / total
    index = BlockIndex.from_block_mask(kept, block_size, q.shape[2], k.shape[2])
    return Selection(index, missed)


def admissible_blocks(q: Tensor, k: Tensor, mask: MaskSpec, block_size: int) -> Tensor:
    """Blocks of which some query may see some key, bool [B|1, H|1, Tq, Tk].

    Raises:
        InvalidValue: the mask doesn't fit q and k.
    """
    laid, q_len, kv_len = lay_mask(mask, q, k), q.shape[2], k.shape[2]
    rows, columns = -(-q_len // block_size), -(-kv_len // block_size)
    if not mask.tensors():
        return _by_position(laid, q_len, kv_len, block_size).to(q.device)
    leading = [1, 1]
    for name, part in mask.tensors().items():
        wide = (1,) * (4 - part.ndim) + part.shape if name == "bias" else part.shape
        leading[0] = max(leading[0], wide[0])
        leading[1] = max(leading[1], wide[1]) if name == "bias" else leading[1]
    found = torch.zeros(*leading, rows, columns, dtype=torch.bool, device=q.device)
    for row in range(rows):
        q0, q1 = row * block_size, min((row + 1) * block_size, q_len)
        first, end = laid.keys_of(q0, q1)
        if first >= end:
            continue
        first = first // block_size * block_size
        tile = laid.tile(q0, q1, first, end)
        if tile is EMPTY:
            continue
        seen = _seen(tile, end - first).any(2)
        seen = _by_block(seen, block_size).any(-1)
        at = first // block_size
        found[:, :, row, at : at + seen.shape[-1]] = seen
    return found


def budgets(admissible: Tensor, sparsity_ratio: float) -> Tensor:
    """Blocks to keep in each row, int64 [B|1, H|1, Tq].

    max(1, round((1 - sparsity_ratio) * admissible)), halves to even; 0 where no block
    is admissible.

    Example:
        >>> budgets(torch.ones(1, 1, 1, 32, dtype=torch.bool), 0.9).item()
        3
    """
    count = admissible.sum(-1)
    share = ((1 - sparsity_ratio) * count.double()).round().long()
    return torch.minimum(share.clamp_min(1), count)


def keep_best(scores: Tensor, admissible: Tensor, budget: Tensor) -> Tensor:
    """Mark the ``budget`` admissible blocks of highest score; ties go to the first.

    Args:
        scores: [B, H, Tq, Tk], greater than -inf.
        admissible: Bool that broadcasts to it.
        budget: Int64 that broadcasts to [B, H, Tq].

    Returns:
        Bool [B, H, Tq, Tk].
    """
    scores, admissible = torch.broadcast_tensors(scores, admissible)
    hidden = scores.masked_fill(~admissible, -INF)
    order = hidden.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device)
    best = (place < budget[..., None]).expand_as(order)
    kept = torch.zeros_like(admissible, memory_format=torch.contiguous_format)
    return kept.scatter_(-1, order, best) & admissible


def block_mass(
    q: Tensor, k: Tensor, mask: MaskSpec, block_size: int, first: int, end: int
) -> Tensor:
    """Mean softmax weight of each block of keys over the sampled queries of a block.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        mask: As for the attention itself.
        block_size: Tokens in a block.
        first: First block of queries.
        end: End of them (excluded); all of them must be equally long.

    Returns:
        [B, H, end - first, Tk], float32 (float64 for float64); each row sums to 1, or
        to 0 if its sampled queries see no key.
    """
    (batch, heads, q_len, dim), (_, groups, kv_len, _) = q.shape, k.shape
    length = min(block_size, q_len - first * block_size)
    rows = _sampled(length)[None] + torch.arange(first, end)[:, None] * block_size
    rows = rows.flatten()
    kind = lse_dtype(q)
    mass = q.new_zeros(batch, heads, end - first, -(-kv_len // block_size), dtype=kind)
    lay = lay_mask(mask, q, k)
    start, stop = lay.keys_of(first * block_size, min(end * block_size, q_len))
    start = start // block_size * block_size
    if start >= stop:
        return mass
    picked = q[:, :, rows.to(q.device)].to(kind) * max(dim, 1) ** -0.5
    picked = picked.reshape(batch, groups, -1, dim)
    logits = picked @ k[:, :, start:stop].to(kind).transpose(2, 3)
    logits = logits.view(batch, heads, len(rows), stop - start)
    logits = _masked(logits, mask.lay(rows, range(kv_len)), start, first * block_size)
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top.masked_fill(top == -INF, 0.0)).exp_()
    by_block = _by_block(weights, block_size).sum(-1)
    total = by_block.sum(-1, keepdim=True)
    by_block = by_block / total.masked_fill(total == 0, 1.0)
    by_block = by_block.unflatten(2, (end - first, -1)).sum(3)
    alive = by_block.sum(-1, keepdim=True)
    at = start // block_size
    by_block = by_block / alive.masked_fill(alive == 0, 1.0)
    mass[..., at : at + by_block.shape[-1]] = by_block
    return mass


def check_choice(
    q: Tensor, k: Tensor, ratio: float, block_size: int, coverage: float | None
) -> None:
    """Raise InvalidValue unless shapes fit and numbers are in their ranges."""
    check_qkv(q, k, k)
    check_sparsity(ratio, block_size, coverage)


def check_sparsity(ratio: float, block_size: int, coverage: float | None) -> None:
    """Raise InvalidValue unless the numbers are in their ranges."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise InvalidValue(f"sparsity_ratio={ratio!r}", "it must be in [0, 0.95]")
    if not 0 <= ratio <= 0.95:
        raise InvalidValue(f"sparsity_ratio={ratio!r}", "it must be in [0, 0.95]")
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise InvalidValue(f"block_size={block_size!r}", "it must be an int >= 1")
    if block_size < 1:
        raise InvalidValue(f"block_size={block_size!r}", "it must be an int >= 1")
    if coverage is None:
        return
    number = isinstance(coverage, int | float) and not isinstance(coverage, bool)
    if not number or not 0 < coverage <= 1:
        raise InvalidValue(f"coverage={coverage!r}", "it must be None or in (0, 1]")


def _sampled(length: int) -> Tensor:
    """Offsets of the sampled queries in a block: every 8th, at least two."""
    count = min(length, max(2, -(-length // EVERY)))
    return (torch.arange(count) + 1) * length // count - 1


def _chunks(q: Tensor, k: Tensor, block_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of query blocks, all of one length, whose logits stay small."""
    whole, rest = divmod(q.shape[2], block_size)
    sampled = len(_sampled(min(block_size, q.shape[2])))
    each = q.shape[0] * q.shape[1] * sampled * k.shape[2]
    step = max(1, _CHUNK // max(1, each))
    for first in range(0, whole, step):
        yield first, min(first + step, whole)
    if rest:
        yield whole, whole + 1


def _by_position(laid: LaidMask, q_len: int, kv_len: int, size: int) -> Tensor:
    """`admissible_blocks` of a mask that knows nothing but positions."""
    low, high = laid.span
    q0, k0 = torch.arange(0, q_len, size)[:, None], torch.arange(0, kv_len, size)
    q1, k1 = (q0 + size).clamp(max=q_len) - 1, (k0 + size).clamp(max=kv_len) - 1
    return ((q1 - k0 >= low) & (q0 - k1 <= high))[None, None]


def _seen(tile: Tile | Tensor, keys: int) -> Tensor:
    """Bool, four dimensions, as wide as there are keys."""
    if not isinstance(tile, Tensor):
        return torch.ones(1, 1, 1, keys, dtype=torch.bool)
    seen = tile if tile.dtype == torch.bool else tile != -INF
    return seen.expand(-1, -1, -1, keys)


def _by_block(t: Tensor, size: int) -> Tensor:
    """Split the last dimension in blocks, the last one filled up with 0."""
    short = -t.shape[-1] % size
    t = torch.nn.functional.pad(t, (0, short)) if short else t
    return t.unflatten(-1, (-1, size))


def _masked(logits: Tensor, laid: LaidMask, start: int, diagonal: int) -> Tensor:
    """Apply the mask to logits of the laid rows and keys from ``start`` on."""
    stop = start + logits.shape[-1]
    # Under a causal mask all keys before the first query are seen: no work for them.
    cut = min(max(diagonal, start), stop) if laid.causal else stop
    for k0, k1 in ((start, cut), (cut, stop)):
        if k0 >= k1:
            continue
        tile, part = laid.tile(0, len(laid.rows), k0, k1), logits[..., k0 - start :]
        part = part[..., : k1 - k0]
        if tile is EMPTY:
            part.fill_(-INF)
        elif isinstance(tile, Tensor):
            tile = tile.to(logits.device)
            if tile.dtype != torch.bool:
                part.add_(tile)
            part.masked_fill_(~_seen(tile, k1 - k0), -INF)
        else:
            assert tile is FULL
    return logits


def _extremes(k: Tensor, mask: MaskSpec, size: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest key of each block by channel, [B, Hkv, Tk, D]."""
    ends = []
    for sign in (-1, 1):
        keys = k.to(lse_dtype(k)) * sign
        if mask.key_padding is not None:
            hidden = ~mask.key_padding[:, None, : k.shape[2], None]
            keys = keys.masked_fill(hidden, -INF)
        short = -k.shape[2] % size
        keys = torch.nn.functional.pad(keys, (0, 0, 0, short), value=-INF)
        ends.append(keys.unflatten(2, (-1, size)).amax(3) * sign)
    low, high = (t.masked_fill(t.isinf(), 0.0) for t in ends)
    return low, high


def _bound(
    q: Tensor, low: Tensor, high: Tensor, size: int, first: int, end: int
) -> Tensor:
    """No key of a block times the mean query exceeds this, [B, H, rows, Tk]."""
    rows = q[:, :, first * size : end * size].to(low.dtype)
    mean = rows.unflatten(2, (end - first, -1)).mean(3)
    mean = mean.unflatten(1, (low.shape[1], -1)).flatten(2, 3)
    up, down = mean.clamp_min(0.0), mean.clamp_max(0.0)
    bound = up @ high.transpose(2, 3) + down @ low.transpose(2, 3)
    return bound.view(*q.shape[:2], end - first, low.shape[2])


def _gated(mass: Tensor, logits: Tensor, seen: Tensor) -> Tensor:
    """Scale the mass by exp(logits), the largest of a row's factors being 1."""
    logits = logits.detach().to(mass.dtype).masked_fill(~seen, -INF)
    top = logits.amax(-1, keepdim=True)
    factor = (logits - top.masked_fill(top == -INF, 0.0)).exp()
    return mass.clamp_min(torch.finfo(mass.dtype).tiny) * factor


def _diagonal(seen: Tensor, first: int) -> Tensor:
    """Admissible blocks on the diagonal, for rows from ``first`` on."""
    rows, columns = seen.shape[2:]
    row = torch.arange(first, first + rows, device=seen.device)[:, None]
    return seen & (row == torch.arange(columns, device=seen.device))


def _by_budget(
    score: Tensor, bound: Tensor, seen: Tensor, budget: Tensor, forced: Tensor | None
) -> Tensor:
    # What can't be judged comes first, but after what is kept in any case.
    most = torch.finfo(score.dtype).max
    score, bound = (t.nan_to_num(most, most) for t in (score, bound))
    if forced is not None:
        score = score.masked_fill(forced, INF)
    best = keep_best(score, seen, budget - (budget + 5) // 10)
    return keep_best(bound.masked_fill(best, INF), seen, budget)


def _by_coverage(
    score: Tensor, seen: Tensor, coverage: float, forced: Tensor | None
) -> Tensor:
    score = score.double().masked_fill(~seen, 0.0)
    first = score if forced is None else score.masked_fill(forced, INF)
    order = first.argsort(dim=-1, descending=True, stable=True)
    running = score.gather(-1, order).cumsum(-1)
    total = running[..., -1:]
    before = torch.nn.functional.pad(running, (1, 0))[..., :-1]
    # Written so that NaN, and a row without a score, keep everything.
    wanted = ~(before >= coverage * total) | (total == 0)
    if forced is not None:
        wanted = wanted | forced.gather(-1, order)
    return torch.zeros_like(wanted).scatter_(-1, order, wanted) & seen
