# SPDX-License-Identifier: Apache-2.0
"""Which choice each layer runs at each level, under one additive budget.

A multiple-choice knapsack: minimise the sum of losses, one choice for each layer,
sum of costs <= budget. Three steps for each level, from the smallest budget up:

1. Bisection on the price of cost: at a price, each layer takes its own best
   choice. This is Everett's Lagrangian method (Operations Research 11, 1963).
2. What it leaves over is spent by gain per cost.
3. A dynamic program over the few choices of each layer that lie so close to the
   best price that they could still beat step 2 (the core of the problem, as in
   Pisinger, European Journal of Operational Research 83, 1995).

Costs are integers and budgets are exact fractions of them, so no rounding lets a
level pass its budget. A level's choices are never below those of the level
before, so the family is nested.
"""

from collections.abc import Sequence

import numpy as np

from torchworks_core.errors import InvalidValue

__all__ = ["allocate"]

# Limits of the dynamic program: choices of one layer, and partial sums kept.
_CORE, _STATES = 6, 256
_BISECTIONS = 64


def allocate(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    dense_cost: int,
    levels: Sequence[float],
) -> list[list[int]]:
    """Choose for every level and layer.

    Args:
        costs: for each layer its choices' costs, integers, strictly ascending;
            the last choice is the dense layer.
        losses: for each layer its choices' losses, finite, >= 0, strictly
            descending but for the last, which may equal the one before.
        dense_cost: what a level of 1 may spend.
        levels: fractions of ``dense_cost``, strictly ascending.

    Returns:
        For each level, for each layer, the index of its choice. A level that can
        pay for the last choice everywhere has it everywhere.

    Raises:
        InvalidValue: the cheapest choices exceed a level, or the tables do not fit
            together.

    Example:
        >>> costs, losses = [[2, 5, 9], [2, 5, 9]], [[8.0, 1.0, 0.0], [4.0, 3.0, 0.0]]
        >>> allocate(costs, losses, 18, [0.25, 0.5, 1.0])
        [[0, 0], [1, 0], [2, 2]]
    """
    table = _Table(costs, losses)
    floor = np.zeros(len(table.last), dtype=np.int64)
    found = []
    for level in levels:
        part, whole = float(level).as_integer_ratio()
        budget = dense_cost * part // whole
        if table.spent(table.last) <= budget:
            floor = table.last
        elif (least := table.spent(np.zeros_like(floor))) > budget:
            # The next one of four digits: it can be given as it is read.
            smallest = (least * 10**4 // dense_cost + 1) / 10**4
            why = f"the cheapest choices cost {least / dense_cost:.4f} of dense"
            raise InvalidValue(f"level {level}", why, f"Give {smallest} or more")
        else:
            floor = _one_level(table, floor, budget)
        found.append(floor.tolist())
    return found


class _Table:
    """Costs and losses as rectangles; what a layer does not have is never chosen."""

    def __init__(
        self, costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]
    ) -> None:
        sizes = [len(row) for row in costs]
        if not sizes or min(sizes) < 1 or sizes != [len(row) for row in losses]:
            raise InvalidValue("tables", f"{sizes} costs, {[len(r) for r in losses]}")
        self.layers = np.arange(len(sizes))
        self.last = np.array(sizes) - 1
        self.cost = np.zeros((len(sizes), max(sizes)), dtype=np.int64)
        self.loss = np.full(self.cost.shape, np.inf)
        for layer, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            self.cost[layer, : len(cost)] = cost
            self.loss[layer, : len(loss)] = loss

    def spent(self, chosen: np.ndarray) -> int:
        return int(self.cost[self.layers, chosen].sum())

    def lost(self, chosen: np.ndarray) -> float:
        return float(self.loss[self.layers, chosen].sum())


def _one_level(table: _Table, floor: np.ndarray, budget: int) -> np.ndarray:
    """Solve for one budget; every choice is at or above ``floor``, which fits."""
    below = np.arange(table.cost.shape[1]) < floor[:, None]
    loss = np.where(below, np.inf, table.loss)
    chosen, price = _by_price(table, loss, floor, budget)
    chosen = _fill(table, chosen, budget)
    return _core(table, loss, chosen, price, budget)


def _by_price(
    table: _Table, loss: np.ndarray, floor: np.ndarray, budget: int
) -> tuple[np.ndarray, float]:
    """Bisect for the lowest price at which the layers' own choices fit."""
    worst = table.lost(floor)
    if not worst > 0:
        return floor, 0.0
    scale = worst / max(table.spent(floor), 1)
    low, high, best = np.log(scale) - 32.0, np.log(scale) + 32.0, floor
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        chosen = (loss + np.exp(middle) * table.cost).argmin(1)
        if table.spent(chosen) <= budget:
            high, best = middle, chosen
        else:
            low = middle
    return best, float(np.exp(high))


def _fill(table: _Table, chosen: np.ndarray, budget: int) -> np.ndarray:
    """Spend what is left, each time on the step with the highest gain per cost."""
    chosen, left = chosen.copy(), budget - table.spent(chosen)
    while True:
        here = (table.layers, chosen)
        price = table.cost - table.cost[here][:, None]
        gain = table.loss[here][:, None] - table.loss
        fits = (price > 0) & (price <= left) & (gain > 0)
        if not fits.any():
            return chosen
        rate = np.where(fits, gain / np.maximum(price, 1), -1.0)
        layer, choice = np.unravel_index(rate.argmax(), rate.shape)
        left -= int(price[layer, choice])
        chosen[layer] = choice


def _core(
    table: _Table, loss: np.ndarray, chosen: np.ndarray, price: float, budget: int
) -> np.ndarray:
    """Search among the choices that the bound of the price does not exclude."""
    priced = loss + price * table.cost
    least = priced.min(1, keepdims=True)
    # A choice that alone adds more than this to the bound is in no better solution.
    gap = table.lost(chosen) + price * budget - float(least.sum())
    gap = max(gap, 0.0) + 1e-12 * (table.lost(chosen) + price * budget)
    regret = priced - least
    order = regret.argsort(1, kind="stable")[:, :_CORE]
    options = []
    for layer in table.layers:
        near = order[layer][regret[layer, order[layer]] <= gap]
        # What is at hand stays possible, so the result can't be worse.
        options.append(np.union1d(near, chosen[layer]))
    spent, bound, steps = np.zeros(1, np.int64), np.zeros(1), []
    for layer, option in enumerate(options):
        cost = (spent[:, None] + table.cost[layer, option]).ravel()
        over = (bound[:, None] + regret[layer, option]).ravel()
        keep = _undominated(cost, over - price * cost, over, gap)
        if not len(keep):
            return chosen
        steps.append((keep // len(option), option[keep % len(option)]))
        spent, bound = cost[keep], over[keep]
    fits = np.flatnonzero(spent <= budget)
    if not len(fits):
        return chosen
    state = fits[(bound - price * spent)[fits].argmin()]
    better = np.empty_like(chosen)
    for layer in reversed(table.layers):
        parents, picked = steps[layer]
        better[layer], state = picked[state], parents[state]
    return better if table.lost(better) < table.lost(chosen) else chosen


def _undominated(
    cost: np.ndarray, loss: np.ndarray, over: np.ndarray, gap: float
) -> np.ndarray:
    """Indices of the states that no cheaper state beats, the closest to the bound."""
    order = np.lexsort((loss, cost))
    ranked = loss[order]
    best = np.minimum.accumulate(ranked)
    first = np.r_[True, ranked[1:] < best[:-1]]
    kept = order[first]
    kept = kept[over[kept] <= gap]
    if len(kept) > _STATES:
        kept = kept[np.argpartition(over[kept], _STATES)[:_STATES]]
    return kept
