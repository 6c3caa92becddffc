# SPDX-License-Identifier: Apache-2.0
"""Sparse patterns: from a rule, or from the content, to a `BlockIndex`.

RANDOM, BLOCK_SPARSE, STRIDED and LOCAL_GLOBAL look at positions alone and share one
form: each block gets a score, and a row keeps its best. DYNAMIC_THRESHOLD and LEARNED
look at queries and keys; see `selection`. Decisions:

- A row keeps max(1, round((1 - sparsity_ratio) * admissible)) blocks, where a block
  is admissible if the mask lets some query of the row see some key of it. The diagonal
  block counts within that number, and comes first when the mask is causal.
- A local window is the nearest admissible blocks, the earlier of two as near first.
- ``window_blocks`` replaces the budget: then the sizes are the caller's.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from torch import Tensor

from kernel_pytorch.attention.block_index import BlockIndex
from kernel_pytorch.attention.masks import INF, MaskSpec
from kernel_pytorch.attention.selection import (
    admissible_blocks,
    budgets,
    check_choice,
    keep_best,
    select_blocks,
)
from torchworks_core.errors import InvalidValue


class SparsePattern(enum.Enum):
    """Rules by which each block of queries chooses its blocks of keys.

    Example:
        >>> SparsePattern("local_global")
        <SparsePattern.LOCAL_GLOBAL: 'local_global'>
    """

    RANDOM = "random"
    BLOCK_SPARSE = "block_sparse"
    STRIDED = "strided"
    LOCAL_GLOBAL = "local_global"
    DYNAMIC_THRESHOLD = "dynamic_threshold"
    LEARNED = "learned"

    @property
    def by_content(self) -> bool:
        """Whether queries and keys are looked at, not positions alone."""
        return self in (SparsePattern.DYNAMIC_THRESHOLD, SparsePattern.LEARNED)

    @classmethod
    def of(cls, value: SparsePattern | str) -> SparsePattern:
        """Return the member, or that of a value; raise InvalidValue naming all."""
        try:
            return cls(value)
        except ValueError:
            valid = ", ".join(repr(member.value) for member in cls)
            why = f"it must be of {valid}"
            raise InvalidValue(f"pattern={value!r}", why) from None


@torch.no_grad()
def build_block_index(
    q: Tensor,
    k: Tensor,
    pattern: SparsePattern | str,
    *,
    sparsity_ratio: float = 0.9,
    block_size: int = 64,
    mask: MaskSpec | None = None,
    coverage: float | None = None,
    window_blocks: int | None = None,
    global_blocks: int = 1,
    stride: int | None = None,
    generator: torch.Generator | None = None,
    gate: Callable[[Tensor, Tensor], Tensor] | None = None,
    remainder: bool = False,
) -> BlockIndex:
    """Choose the blocks of keys for each block of queries.

    - RANDOM: a sample for each head, shared by the batch.
    - BLOCK_SPARSE: the nearest blocks.
    - STRIDED: the nearest for half of the budget, then every s-th one counted from
      the diagonal (Child et al., arXiv:1904.10509), then the nearest again.
    - LOCAL_GLOBAL: the first ``global_blocks`` columns, then the nearest. Without
      ``mask.causal`` the first ``global_blocks`` rows keep every admissible block.
    - DYNAMIC_THRESHOLD: the blocks of highest estimated attention mass, and for a
      tenth of the budget those to which a single query gives the most.
    - LEARNED: the same, with the gate's logits added to the logarithm of the mass.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D]; H must be a multiple of Hkv.
        pattern: A member of `SparsePattern`, or its value.
        sparsity_ratio: In [0, 0.95], the share of admissible blocks to drop.
        block_size: Tokens in a block.
        mask: The mask that the attention will use; its hidden blocks are never kept.
        coverage: In (0, 1], for DYNAMIC_THRESHOLD and LEARNED: keep the fewest blocks
            whose estimated mass reaches it, which holds for the mean of the rows and
            not for each; ``sparsity_ratio`` is not read.
        window_blocks: For BLOCK_SPARSE, STRIDED and LOCAL_GLOBAL: keep this many
            nearest blocks, and all strided or global ones; ``sparsity_ratio`` is not
            read.
        global_blocks: For LOCAL_GLOBAL, at least 0.
        stride: For STRIDED, at least 1. If None, ``window_blocks``, or what spreads
            the budget over the row.
        generator: For RANDOM; torch's default one if None.
        gate: For LEARNED: ``gate(q, k)`` gives logits [B, H, Tq, Tk]. LEARNED without
            one acts as DYNAMIC_THRESHOLD.
        remainder: For DYNAMIC_THRESHOLD and LEARNED: choose for an attention with
            ``remainder=True``; see `selection.select_blocks`.

    Returns:
        Lists of [1|B, H, Tq]; without a gradient.

    Raises:
        InvalidValue: a value is out of its range or has no meaning for the pattern,
            or shapes don't fit.

    Example:
        >>> q, k = torch.randn(2, 1, 1, 128, 8)
        >>> mask = MaskSpec(causal=True)
        >>> options = {"sparsity_ratio": 0.5, "block_size": 16, "mask": mask}
        >>> index = build_block_index(q, k, "block_sparse", **options)
        >>> index.counts.tolist(), index.blocks[0, 0, 7].tolist()
        ([[[1, 1, 2, 2, 2, 3, 4, 4]]], [4, 5, 6, 7])
    """
    check_choice(q, k, sparsity_ratio, block_size, coverage)
    pattern = SparsePattern.of(pattern)
    _check_options(pattern, coverage, window_blocks, global_blocks, stride, gate)
    if remainder and not pattern.by_content:
        why = f"{pattern.name} looks at positions alone"
        raise InvalidValue("remainder=True", why)
    mask = MaskSpec() if mask is None else mask
    if pattern.by_content:
        return select_blocks(
            q,
            k,
            mask,
            sparsity_ratio=sparsity_ratio,
            block_size=block_size,
            coverage=coverage,
            block_logits=None if gate is None else gate(q, k),
            remainder=remainder,
        ).index
    seen = admissible_blocks(q, k, mask, block_size)
    budget = budgets(seen, sparsity_ratio)
    near = _nearness(seen)
    if pattern is SparsePattern.RANDOM:
        kept = _random(q, near, seen, budget, mask.causal, generator)
    elif pattern is SparsePattern.BLOCK_SPARSE:
        kept = keep_best(near, seen, _or_window(budget, seen, window_blocks))
    elif pattern is SparsePattern.STRIDED:
        kept = _strided(near, seen, budget, window_blocks, stride)
    else:
        kept = _local_global(
            near, seen, budget, mask.causal, window_blocks, global_blocks
        )
    kept = kept.expand(-1, q.shape[1], -1, -1)
    return BlockIndex.from_block_mask(kept, block_size, q.shape[2], k.shape[2])


def _nearness(seen: Tensor) -> Tensor:
    """Float [1, 1, Tq, Tk]: 0 on the diagonal, falling with the distance from it."""
    rows, columns = (torch.arange(n, device=seen.device) for n in seen.shape[2:])
    ahead = (columns - rows[:, None]).double()
    # The earlier of two blocks as far away counts as a little nearer.
    return -(ahead.abs() + 0.5 * (ahead > 0))[None, None]


def _or_window(budget: Tensor, seen: Tensor, window_blocks: int | None) -> Tensor:
    if window_blocks is None:
        return budget
    return seen.sum(-1).clamp_max(window_blocks)


def _random(
    q: Tensor,
    near: Tensor,
    seen: Tensor,
    budget: Tensor,
    causal: bool,
    generator: torch.Generator | None,
) -> Tensor:
    source = "cpu" if generator is None else generator.device
    shape = q.shape[1], *seen.shape[2:]
    scores = torch.rand(shape, generator=generator, device=source).to(seen.device)
    if causal:
        scores = scores.masked_fill(near[0] == 0, INF)
    return keep_best(scores[None], seen, budget)


def _strided(
    near: Tensor,
    seen: Tensor,
    budget: Tensor,
    window_blocks: int | None,
    stride: int | None,
) -> Tensor:
    distance = (-near).floor().long()
    count = seen.sum(-1)
    if window_blocks is not None:
        local = keep_best(near, seen, count.clamp_max(window_blocks))
        return local | (seen & (distance % (stride or window_blocks) == 0))
    half = (budget + 1) // 2
    local = keep_best(near, seen, half)
    if stride is None:
        far, rest = count - half, (budget - half).clamp_min(1)
        step = ((far + rest - 1) // rest).clamp_min(1)[..., None]
    else:
        step = torch.full_like(budget, stride)[..., None]
    columns = near.shape[-1] + 1
    scores = near + columns * 4.0 * local + columns * 2.0 * (distance % step == 0)
    return keep_best(scores, seen, budget)


def _local_global(
    near: Tensor,
    seen: Tensor,
    budget: Tensor,
    causal: bool,
    window_blocks: int | None,
    global_blocks: int,
) -> Tensor:
    rows, columns = (torch.arange(n, device=seen.device) for n in seen.shape[2:])
    first = columns < global_blocks
    if window_blocks is not None:
        count = seen.sum(-1).clamp_max(window_blocks)
        kept = keep_best(near, seen, count) | (seen & first)
    else:
        scores = near.masked_fill(first, 1.0)
        if causal:
            scores = scores.masked_fill(near == 0, INF)
        kept = keep_best(scores, seen, budget)
    return kept if causal else kept | (seen & (rows < global_blocks)[:, None])


def _check_options(
    pattern: SparsePattern,
    coverage: float | None,
    window_blocks: int | None,
    global_blocks: int,
    stride: int | None,
    gate: Callable[[Tensor, Tensor], Tensor] | None,
) -> None:
    numbers = {"window_blocks": (window_blocks, 1), "stride": (stride, 1)}
    numbers["global_blocks"] = (global_blocks, 0)
    for name, (value, least) in numbers.items():
        if value is None and name != "global_blocks":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidValue(f"{name}={value!r}", f"it must be an int >= {least}")
    if coverage is not None and not pattern.by_content:
        why = f"{pattern.name} estimates no mass; DYNAMIC_THRESHOLD and LEARNED do"
        raise InvalidValue(f"coverage={coverage!r}", why)
    if gate is not None and pattern is not SparsePattern.LEARNED:
        raise InvalidValue("gate", f"{pattern.name} has no use for one; LEARNED has")
