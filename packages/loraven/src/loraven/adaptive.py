# SPDX-License-Identifier: Apache-2.0
"""One forward of a layer that looks at its input before it decides what to run.

The one idea: look (scores and gates), decide (rank, blocks, on the host), run what is
left. A block of columns that is closed for every row is not computed; one that is
closed for some is zeroed in those.

Decisions: an accelerator is asked once: scores, gates and the count of replaced
elements come in one transfer, and the scheduler sees scores on the host. A score that
is not a number counts as 1, whether the input or the scorer's weights made it so.
"""

import math
import operator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from loraven.scoring import GateNetwork, column_blocks, rank_mask, row_ranks
from torchworks_core.errors import InvalidValue

if TYPE_CHECKING:
    from loraven.layers import DynamicLowRankLayer

__all__ = ["Work", "run_adaptive"]

_SMALL = 64


class Work(NamedTuple):
    """What one forward multiplies.

    ``columns`` of both factors; ``whole``: they are a prefix that no mask thins
    out; and whether the scorer and the gates ran.
    """

    columns: int
    whole: bool
    scored: bool
    gated: bool


class _Look(NamedTuple):
    """What is known of a batch before the decision.

    ``x``: the input without what the NaN policy removed; ``scores`` (rows,);
    ``opened`` (rows, blocks) bool or None where all are open.
    """

    x: Tensor
    scores: Tensor
    opened: Tensor | None


class _Choice(NamedTuple):
    """``columns``: those to compute, None: all; ``keep``: (rows, columns) 0/1."""

    rank: int
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
    x = layer._guard.clean(x, shape)
    seen = _look(layer, x)
    choice, complexity = _decide(layer, seen, cap, budget)
    y, work = _run(layer, seen, choice)
    layer._last.note(choice.rank, work, complexity)
    return y, choice.rank


@torch.no_grad()
def _look(layer: "DynamicLowRankLayer", x: Tensor) -> _Look:
    modules = layer._modules
    scorer, gate = modules["scorer"], modules["gate"]
    opened = _opened(gate, x) if layer._gates_enabled else None
    return _Look(x, scorer(x).reshape(-1), opened)


def _opened(gate: torch.nn.Module, x: Tensor) -> Tensor | None:
    """(rows, blocks) bool; None where all are open and that costs little to know."""
    if type(gate) is GateNetwork and x.is_cpu and not gate._forward_hooks:
        logits = gate.logits(x)
        # A logit of 0 is a gate of 0.5; a NaN answers False.
        if logits.amin().item() >= 0:
            return None
        gates = logits.sigmoid()
    else:
        gates = gate(x)
    opened = gates >= 0.5
    opened[:, 0] = True
    return opened


def _decide(
    layer: "DynamicLowRankLayer", seen: _Look, cap: int, budget: float | None
) -> tuple[_Choice, float]:
    """The choice, and the mean score."""
    scores, any_open, all_open = _to_host(layer, seen)
    complexity, keep = _mean(scores), None
    if math.isnan(complexity):
        scores = scores.nan_to_num(1.0)
        complexity = _mean(scores)
    if layer._rank_scope == "row":
        rank, keep = _rows(layer, seen.scores, scores, cap)
    else:
        rank = max(min(_proposal(layer, scores, budget), cap), layer.r_min)
    if any_open is None or seen.opened is None:
        return _Choice(rank, None, keep), complexity
    blocks, total = layer.num_blocks, layer.r_max
    used = (rank - 1) * blocks // total + 1
    alive, whole = any_open[:used], all_open[:used]
    columns = None
    if not all(alive):
        columns = [i for i in range(rank) if alive[i * blocks // total]]
        keep = keep if keep is None else keep[:, columns]
    if alive != whole:
        index = column_blocks(total, blocks, seen.x.device)[:rank]
        index = index if columns is None else index[columns]
        opened = seen.opened[:, index].float()
        keep = opened if keep is None else keep * opened
    return _Choice(rank, columns, keep), complexity


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


def _run(
    layer: "DynamicLowRankLayer", seen: _Look, choice: _Choice
) -> tuple[Tensor, Work]:
    rank, columns, keep = choice
    gated = layer._gates_enabled
    if columns is None and keep is None:
        return layer._prefix(seen.x, rank), Work(rank, True, True, gated)
    if columns is None:
        return layer._product(seen.x, slice(0, rank), keep), Work(
            rank, False, True, gated
        )
    index = torch.tensor(columns, device=seen.x.device)
    y = layer._product(seen.x, index, keep)
    return y, Work(len(columns), False, True, gated)
