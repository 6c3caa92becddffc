# SPDX-License-Identifier: Apache-2.0
"""Which blocks of keys matter, judged by the content of queries and keys.

`estimate` says what each block of keys weighs for some queries of each block of
queries; here blocks are chosen by it. Decisions:

- The budget goes to the highest mean weights, but its last tenth to the highest weight
  that any one query gives, so that a key that a single query wants isn't lost in the
  mean of its block.
- With the compressed remainder, what counts is the weight that the remainder would not
  stand for: a block whose keys are all wanted alike is well replaced by its mean.
- float32 and bfloat16 on the CPU go to the C kernel, if it is there and has that block
  size; other types and devices, and a bias, take the path in torch.
- Rows are taken in chunks, so the logits of one chunk are the largest tensor made.
- Nothing here has a gradient: choosing isn't differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_pytorch.attention.block_index import BlockIndex
from kernel_pytorch.attention.blocks import check_qkv, lse_dtype, without_autocast
from kernel_pytorch.attention.estimate import (
    EVERY,
    Estimate,
    estimate,
    examine_keys,
)
from kernel_pytorch.attention.masks import (
    EMPTY,
    INF,
    LaidMask,
    MaskSpec,
    Tile,
)
from kernel_pytorch.attention.native_selection import Choice, fits, select_native
from kernel_pytorch.attention.partial import lay_mask
from torchworks_core.errors import InvalidValue

_CHUNK = 2**21


class Selection(NamedTuple):
    """Chosen blocks, and what they are estimated to leave out.

    Args:
        index: The blocks, for each batch entry and head.
        missed_mass: Float [B, H, Tq] in [0, 1]: the share of the examined queries'
            softmax outside as many blocks, chosen by one half of these queries and
            measured by the other. 0 where no examined query sees a key.
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
    remainder: bool = False,
) -> Selection:
    """Choose blocks of keys by their estimated attention mass.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D]; H must be a multiple of Hkv.
        mask: As for the attention itself.
        sparsity_ratio: In [0, 0.95]; see `budgets`.
        block_size: Tokens in a block.
        coverage: In (0, 1]: keep the fewest blocks whose estimated mass reaches this
            share, instead of a fixed number, where what one half of the examined
            queries chooses is measured by the other. A row of which none sees a key
            keeps every admissible block.
        block_logits: [B, H, Tq, Tk], added to the logarithm of the estimated mass.
        remainder: Choose for an attention with ``remainder=True``: by the mass that
            the dropped blocks' means would not stand for. With ``coverage`` the
            mass itself counts.

    Raises:
        InvalidValue: a number is out of its range, or shapes don't fit.
        NotImplementedError: ``remainder`` with a bias, as in the attention.
        OutOfMemory: no room for the kernel's buffers.

    Example:
        >>> q, k = torch.randn(2, 1, 2, 256, 8)
        >>> found = select_blocks(q, k, sparsity_ratio=0.5, block_size=32)
        >>> found.index.counts.unique().tolist(), found.missed_mass.shape
        ([4], torch.Size([1, 2, 8]))
    """
    check_choice(q, k, sparsity_ratio, block_size, coverage)
    mask = MaskSpec() if mask is None else mask
    if not torch.compiler.is_compiling():
        lay_mask(mask, q, k)
    if remainder and mask.bias is not None:
        raise NotImplementedError(
            "remainder=True with mask.bias: whether a dropped block may enter by its "
            "mean can't be told from a bias. Leave one of them out."
        )
    sizes = *q.shape[:2], -(-q.shape[2] // block_size), -(-k.shape[2] // block_size)
    if block_logits is not None and block_logits.shape != sizes:
        shape = f"block logits of shape {tuple(block_logits.shape)}"
        raise InvalidValue(shape, f"q, k and blocks of {block_size} need {sizes}")
    choice = Choice(block_size, 1 - sparsity_ratio, coverage, remainder)
    run = select_native if fits(q, k, mask, block_size) else _select_by_torch
    with without_autocast(q.device.type):
        counts, blocks, missed = run(q, k, mask, block_logits, choice)
    index = BlockIndex(counts, blocks, block_size, q.shape[2], k.shape[2])
    return Selection(index, missed)


def _select_by_torch(
    q: Tensor, k: Tensor, mask: MaskSpec, block_logits: Tensor | None, choice: Choice
) -> tuple[Tensor, Tensor, Tensor]:
    """The lists' counts and blocks, and the missed mass."""
    size = choice.block_size
    open_blocks = admissible_blocks(q, k, mask, size)
    full = full_blocks(q, k, mask, size) if choice.remainder else None
    sizes = *q.shape[:2], *open_blocks.shape[2:]
    budget = _share(open_blocks, choice.keep)
    k = k.to(lse_dtype(k))
    keys = examine_keys(k, mask, size, choice.remainder)
    kept = torch.zeros(sizes, dtype=torch.bool, device=q.device)
    missed = torch.zeros(sizes[:3], dtype=lse_dtype(q), device=q.device)
    for first, end in _chunks(q, k, size) if sizes[3] else ():
        rows = slice(first, end)
        own = None if full is None else full[:, :, rows]
        found = estimate(q, k, mask, size, (first, end), keys, own)
        seen = open_blocks[:, :, rows].expand_as(found.mass)
        forced = _diagonal(seen, first) if mask.causal else None
        score = found.mass if choice.coverage is not None else found.lost
        slots = budget[:, :, rows].expand(score.shape[:3])
        logits = None if block_logits is None else block_logits[:, :, rows]
        held = _held(found, seen, logits, forced)
        if choice.coverage is not None:
            slots = _covering(held, seen, choice.coverage)
        if logits is not None:
            score = _gated(score, logits, seen)
        peak = None if choice.coverage is not None else found.peak
        kept[:, :, rows] = _best(score, peak, seen, slots, forced)
        at = (slots - 1).clamp_min(0)[..., None]
        missed[:, :, rows] = 1 - held.gather(-1, at)[..., 0]
        empty = found.mass.sum(-1) == 0
        missed[:, :, rows] = missed[:, :, rows].masked_fill(empty, 0.0)
    index = BlockIndex.from_block_mask(kept, size, q.shape[2], k.shape[2])
    return index.counts, index.blocks, missed


def admissible_blocks(q: Tensor, k: Tensor, mask: MaskSpec, block_size: int) -> Tensor:
    """Blocks of which some query may see some key, bool [B|1, H|1, Tq, Tk].

    Raises:
        InvalidValue: the mask doesn't fit q and k.
    """
    return _blocks(q, k, mask, block_size, False)


def full_blocks(q: Tensor, k: Tensor, mask: MaskSpec, block_size: int) -> Tensor:
    """Blocks of which every query sees every key, bool [B|1, H|1, Tq, Tk].

    Raises:
        InvalidValue: the mask doesn't fit q and k.
    """
    return _blocks(q, k, mask, block_size, True)


def _blocks(
    q: Tensor, k: Tensor, mask: MaskSpec, block_size: int, whole: bool
) -> Tensor:
    laid, q_len, kv_len = lay_mask(mask, q, k), q.shape[2], k.shape[2]
    rows, columns = -(-q_len // block_size), -(-kv_len // block_size)
    if not mask.tensors():
        return _by_position(laid, q_len, kv_len, block_size, whole).to(q.device)
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
        # Whole blocks: what lies beyond is hidden and counts as such.
        first = first // block_size * block_size
        end = min(-(-end // block_size) * block_size, kv_len)
        tile = laid.tile(q0, q1, first, end)
        if tile is EMPTY:
            continue
        seen = _seen(tile, end - first)
        seen = seen.all(2) if whole else seen.any(2)
        short = (0, -seen.shape[-1] % block_size)
        seen = torch.nn.functional.pad(seen, short, value=whole)
        seen = seen.unflatten(-1, (-1, block_size))
        seen = seen.all(-1) if whole else seen.any(-1)
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
    return _share(admissible, 1 - sparsity_ratio)


def _share(admissible: Tensor, keep: float) -> Tensor:
    count = admissible.sum(-1)
    share = (keep * count.double()).round().long()
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


def _chunks(q: Tensor, k: Tensor, block_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of query blocks, all of one length, whose logits stay small."""
    whole, rest = divmod(q.shape[2], block_size)
    sampled = max(2, -(-block_size // EVERY))
    each = q.shape[0] * q.shape[1] * sampled * k.shape[2]
    step = max(1, _CHUNK // max(1, each))
    for first in range(0, whole, step):
        yield first, min(first + step, whole)
    if rest:
        yield whole, whole + 1


def _by_position(
    laid: LaidMask, q_len: int, kv_len: int, size: int, whole: bool
) -> Tensor:
    """`_blocks` of a mask that knows nothing but positions."""
    low, high = laid.span
    q0, k0 = torch.arange(0, q_len, size)[:, None], torch.arange(0, kv_len, size)
    q1, k1 = (q0 + size).clamp(max=q_len) - 1, (k0 + size).clamp(max=kv_len) - 1
    if whole:
        return ((q0 - k1 >= low) & (q1 - k0 <= high))[None, None]
    return ((q1 - k0 >= low) & (q0 - k1 <= high))[None, None]


def _seen(tile: Tile | Tensor, keys: int) -> Tensor:
    """Bool, four dimensions, as wide as there are keys."""
    if not isinstance(tile, Tensor):
        return torch.ones(1, 1, 1, keys, dtype=torch.bool)
    seen = tile if tile.dtype == torch.bool else tile != -INF
    return seen.expand(-1, -1, -1, keys)


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


def _best(
    score: Tensor,
    peak: Tensor | None,
    seen: Tensor,
    budget: Tensor,
    forced: Tensor | None,
) -> Tensor:
    """Mark the best of each row by score, and where there are peaks some by these."""
    score = _first(score, forced)
    if peak is None:
        return keep_best(score, seen, budget)
    best = keep_best(score, seen, budget - (budget + 5) // 10)
    return keep_best(_first(peak, best), seen, budget)


def _held(
    found: Estimate, seen: Tensor, logits: Tensor | None, forced: Tensor | None
) -> Tensor:
    """Share of the mass in the best n blocks, float64 [B, H, rows, Tk] for n = 1...

    Those that one half of the queries chooses are measured by the other: judged by the
    queries that chose them, they would look better than they are.
    """
    one, other = found.halves
    empty = ~((one.sum(-1) > 0) & (other.sum(-1) > 0))[..., None]
    one, other = (torch.where(empty, found.mass, t) for t in (one, other))
    share = torch.zeros_like(one, dtype=torch.float64)
    for ours, theirs in ((one, other), (other, one)):
        score = ours if logits is None else _gated(ours, logits, seen)
        score = _first(score, forced).masked_fill(~seen, -INF)
        order = score.argsort(dim=-1, descending=True, stable=True)
        running = theirs.double().gather(-1, order).cumsum(-1)
        share += running / running[..., -1:] / 2
    return share


def _covering(held: Tensor, seen: Tensor, coverage: float) -> Tensor:
    """The fewest blocks that hold the share; all where there is no mass, or a NaN."""
    count = seen.sum(-1)
    few = (held < coverage).sum(-1) + 1
    few = torch.where(held[..., -1].isnan(), count, few)
    return torch.minimum(few, count)


def _first(score: Tensor, forced: Tensor | None) -> Tensor:
    """Put what is kept in any case first, and then what can't be judged."""
    most = torch.finfo(score.dtype).max
    score = score.nan_to_num(most, most)
    return score if forced is None else score.masked_fill(forced, INF)
