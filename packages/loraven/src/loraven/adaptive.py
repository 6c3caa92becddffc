# SPDX-License-Identifier: Apache-2.0
"""One forward of a layer that looks at its input before it decides what to run.

The one idea: look (scores and gates, with the first columns in the same product),
decide (rank, blocks, on the host), run what is left. A block of columns that is
closed for every row is not computed; one that is closed for some is zeroed in those.

Decisions: the first ``r_min`` columns run with the scorer, before any gate is known,
so a closed block among them saves only its share of ``up``. An accelerator is asked
once: scores, gates and the count of replaced elements come in one transfer, and the
scheduler sees scores on the host. A score that is not a number counts as 1.
"""

import math
import operator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from loraven.fused import Copies, copies_of, join
from loraven.scoring import column_blocks, rank_mask, row_ranks
from torchworks_core.errors import InvalidValue

if TYPE_CHECKING:
    from loraven.layers import DynamicLowRankLayer

__all__ = ["Work", "run_adaptive"]

_SMALL = 64


class Work(NamedTuple):
    """What one forward multiplies: columns of each factor, and what else ran."""

    down: int
    up: int
    merged: bool
    scored: bool
    gated: bool


class _Look(NamedTuple):
    """What is known of a batch before the decision.

    ``x``: the input without what the NaN policy removed; ``scores`` (rows,);
    ``opened`` (rows, blocks) bool or None where all are open; ``first`` (rows, r):
    the first columns where they are computed already.
    """

    x: Tensor
    scores: Tensor
    opened: Tensor | None
    first: Tensor | None


class _Choice(NamedTuple):
    """``columns``: those to compute, None: all; ``keep``: (rows, columns) 0/1."""

    rank: int
    blocks: tuple[bool, ...]
    columns: list[int] | None
    keep: Tensor | None


def run_adaptive(
    layer: "DynamicLowRankLayer",
    x: Tensor,
    cap: int,
    budget: float | None,
    shape: torch.Size,
) -> tuple[Tensor, int]:
    """Look, decide, run: (rows, in) -> (rows, out), and the rank.

    Args:
        layer: The layer, whose histories and work are noted.
        x: (rows, in_features), at least one row.
        cap: Largest rank that the budget allows.
        budget: For the scheduler, in mJ per row.
        shape: Shape of the input as it was given, for messages.
    """
    copies = copies_of(layer)
    seen = _look(layer, x, copies, shape)
    choice, complexity = _decide(layer, seen, cap, budget)
    if copies is None:
        y, work = _run_plain(layer, seen, choice)
    else:
        y, work = _run_fused(layer, seen, choice, copies)
    layer._last.note(choice.rank, work, complexity)
    return y, choice.rank


def _look(
    layer: "DynamicLowRankLayer", x: Tensor, copies: Copies | None, shape: torch.Size
) -> _Look:
    if copies is None:
        return _look_plain(layer, x, shape)
    gated = layer.num_blocks if layer._gates_enabled else 0
    early = layer._rank_scope == "row" or not layer._merges(layer.r_min)
    rows = layer.r_min if early else 0
    weight, bias = copies.head(rows, gated > 0)
    out, x, finite = layer._linear(x, weight, bias, shape)
    # Parts: gate of block 0, which never closes; other gates; scorer; columns.
    parts = [min(gated, 1), max(gated - 1, 0), out.shape[1] - gated - rows, rows]
    _, logits, hidden, first = out.split(parts, 1)
    last = layer._modules["scorer"]._modules["output"]._parameters
    scores = F.linear(torch.relu(hidden), last["weight"], last["bias"])
    scores = torch.sigmoid(scores).view(-1)
    if not finite:
        scores = scores.nan_to_num(1.0)
    opened = None
    # A gate of 0.5 is a logit of 0; the sigmoid runs where it can matter.
    if gated > 1 and not (out.is_cpu and logits.amin().item() >= 0):
        opened = _opened(torch.sigmoid(out[:, :gated]))
    return _Look(x, scores, opened, first if rows else None)


@torch.no_grad()
def _look_plain(layer: "DynamicLowRankLayer", x: Tensor, shape: torch.Size) -> _Look:
    x = layer._guard.clean(x, shape)
    scores = layer.scorer(x).reshape(-1).nan_to_num(1.0)
    return _Look(
        x, scores, _opened(layer.gate(x)) if layer._gates_enabled else None, None
    )


def _opened(gates: Tensor) -> Tensor:
    opened = gates >= 0.5
    opened[:, 0] = True
    return opened


def _decide(
    layer: "DynamicLowRankLayer", seen: _Look, cap: int, budget: float | None
) -> tuple[_Choice, float]:
    """The choice, and the mean score."""
    scores, any_open, all_open = _to_host(layer, seen)
    complexity = _mean(scores)
    keep = None
    if layer._rank_scope == "row":
        rank, keep = _rows(layer, seen.scores, scores, cap)
    else:
        rank = max(min(_proposal(layer, scores, budget), cap), layer.r_min)
    if any_open is None:
        return _Choice(rank, (), None, keep), complexity
    blocks, total = layer.num_blocks, layer.r_max
    used = (rank - 1) * blocks // total + 1
    alive, whole = tuple(any_open[:used]), all_open[:used]
    columns = None
    if not all(alive):
        columns = [i for i in range(rank) if alive[i * blocks // total]]
        keep = keep if keep is None else keep[:, columns]
    if alive != tuple(whole):
        index = column_blocks(total, blocks, seen.x.device)[:rank]
        index = index if columns is None else index[columns]
        opened = seen.opened[:, index].float()
        keep = opened if keep is None else keep * opened
    return _Choice(rank, alive, columns, keep), complexity


def _to_host(
    layer: "DynamicLowRankLayer", seen: _Look
) -> tuple[Tensor, list[bool] | None, list[bool]]:
    """Scores on the host; for each block: open for any row, open for all rows."""
    scores, opened = seen.scores, seen.opened
    if scores.is_cpu:
        if opened is None:
            return scores, None, []
        return scores, opened.any(0).tolist(), opened.all(0).tolist()
    parts = [scores.float(), layer._guard.counted(scores.device)]
    if opened is not None:
        parts += [opened.any(0), opened.all(0)]
    packed = torch.cat(parts).cpu()
    rows = len(scores)
    layer._guard.warn(int(packed[rows]))
    if opened is None:
        return packed[:rows], None, []
    bits = (packed[rows + 1 :] > 0).tolist()
    return packed[:rows], bits[: layer.num_blocks], bits[layer.num_blocks :]


def _mean(scores: Tensor) -> float:
    count = len(scores)
    if count == 1:
        return scores.item()
    if count > _SMALL:
        return scores.float().mean().item()
    return math.fsum(scores.tolist()) / count


def _rows(
    layer: "DynamicLowRankLayer", scores: Tensor, host: Tensor, cap: int
) -> tuple[int, Tensor | None]:
    """Largest prefix of any row, and each row's mask unless all are alike."""
    ranks = row_ranks(host, layer.r_min, layer.r_max, cap)
    whole = (ranks + 0.5).floor()
    low, high = (int(end) for end in torch.stack(whole.aminmax()).tolist())
    if low == high:
        return high, None
    ranks = row_ranks(scores, layer.r_min, layer.r_max, cap)
    return high, rank_mask(ranks, high, 1.0)


def _proposal(
    layer: "DynamicLowRankLayer", scores: Tensor, budget: float | None
) -> int:
    found = layer.scheduler.schedule_rank(
        scores,
        budget=budget,
        layer_dims=(layer.in_features, layer.out_features),
        mode="inference",
        batch_size=len(scores),
    )
    if type(found) is int:
        return found
    try:
        return operator.index(found)
    except TypeError:
        pass
    try:
        return math.floor(float(found))
    except (TypeError, ValueError, OverflowError) as error:
        kind = type(layer.scheduler).__name__
        raise InvalidValue(
            f"{kind}.schedule_rank returned {found!r}",
            "a rank is a finite number",
            f"Return an int from {layer.r_min} to {layer.r_max}",
        ) from error


def _run_plain(
    layer: "DynamicLowRankLayer", seen: _Look, choice: _Choice
) -> tuple[Tensor, Work]:
    columns, count = slice(0, choice.rank), choice.rank
    if choice.columns is not None:
        columns = torch.tensor(choice.columns, device=seen.x.device)
        count = len(choice.columns)
    y = layer._product(seen.x, columns, choice.keep)
    return y, Work(count, count, False, True, layer._gates_enabled)


def _run_fused(
    layer: "DynamicLowRankLayer", seen: _Look, choice: _Choice, copies: Copies
) -> tuple[Tensor, Work]:
    x, _, _, first = seen
    rank, blocks, columns, keep = choice
    gated, early = layer._gates_enabled, 0 if first is None else first.shape[1]
    whole = columns is None and keep is None
    if whole and layer._rank_scope == "batch" and layer._merges(rank):
        weight = copies.merged(rank, stays=False)
        if weight is not None:
            y = join(layer._parameters["bias"], x, weight)
            return y, Work(early, 0, True, True, gated)
    if columns is None:
        down, up = copies.span(early, rank, len(x))
    else:
        index, down, up = copies.select(rank, early, blocks, columns)
        first = None if first is None else first.index_select(1, index)
    if first is None:
        z = x @ down
    else:
        z = torch.cat([first, x @ down], 1) if down.shape[1] else first
    if keep is not None:
        z = z * keep.to(z.dtype)
    work = Work(early + down.shape[1], len(up), False, True, gated)
    return join(layer._parameters["bias"], z, up), work
