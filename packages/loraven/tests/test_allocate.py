# SPDX-License-Identifier: Apache-2.0
import itertools
from fractions import Fraction

import numpy as np
import pytest

from loraven.allocate import allocate

SHAPES = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
LEVELS = [0.3, 0.5, 0.7, 0.85]


def transformer(rng, layers=36, ranks=48):
    """Gauge costs and decaying tails of a transformer's linear layers."""
    costs, losses = [], []
    for layer in range(layers):
        m, n = SHAPES[layer % len(SHAPES)]
        k = min(m, n)
        rank = np.unique(np.linspace(8, k - 8, ranks).astype(int) // 8 * 8)
        decay = np.exp(-rng.uniform(1, 6) * np.arange(k) / k)
        energy = np.sort(decay * rng.lognormal(0, 0.5, k))[::-1]
        tail = energy[::-1].cumsum()[::-1] * rng.lognormal(0, 1.5)
        costs.append([*(rank * (m + n - rank)).tolist(), m * n])
        losses.append([*tail[rank].tolist(), 0.0])
    return costs, losses


def measures(costs, losses, chosen):
    """Cost and loss of one level's choices, in exact and in plain sums."""
    cost = sum(row[i] for row, i in zip(costs, chosen, strict=True))
    return cost, sum(row[i] for row, i in zip(losses, chosen, strict=True))


def best_milp(costs, losses, budget):
    """The least loss, by scipy's exact mixed-integer solver."""
    optimize = pytest.importorskip("scipy.optimize")
    loss, cost = np.concatenate(losses), np.concatenate(costs)
    sizes = [len(row) for row in costs]
    one = np.repeat(np.eye(len(sizes)), sizes, axis=1)
    rows = optimize.LinearConstraint(
        np.vstack([one, cost / budget]),
        np.r_[np.ones(len(sizes)), 0],
        np.ones(len(sizes) + 1),
    )
    found = optimize.milp(
        loss,
        constraints=rows,
        integrality=np.ones(len(loss)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 1e-6},
    )
    assert found.success
    return found.fun


@pytest.mark.critical
@pytest.mark.parametrize("seed", range(3))
def test_within_a_thousandth_of_the_exact_optimum(seed):
    costs, losses = transformer(np.random.default_rng(seed))
    assert len(costs) == 36
    assert {len(row) for row in costs} == {48}
    dense = sum(row[-1] for row in costs)
    for level, chosen in zip(
        LEVELS, allocate(costs, losses, dense, LEVELS), strict=True
    ):
        cost, loss = measures(costs, losses, chosen)
        assert cost <= level * dense
        assert loss <= 1.001 * best_milp(costs, losses, level * dense)


def random_case(rng):
    """Any tables: few or many choices, equal layers, flat or steep losses."""
    layers = int(rng.integers(1, 7))
    costs, losses = [], []
    scale = 10.0 ** rng.integers(-9, 10)
    for _ in range(layers):
        size = int(rng.integers(1, 9))
        top = int(10 ** rng.integers(1, 10)) + size
        cost = np.unique(rng.integers(1, top, size)).tolist()
        loss = np.sort(rng.random(len(cost)) ** rng.integers(1, 9))[::-1] * scale
        loss[-1] = 0.0
        costs.append(cost)
        losses.append(loss.tolist())
    if rng.random() < 0.2:
        costs, losses = [costs[0]] * layers, [losses[0]] * layers
    dense = sum(row[-1] for row in costs)
    least = sum(row[0] for row in costs) / dense
    levels = np.unique(np.clip(rng.uniform(least, 1.05, 4) + 1e-12, 1e-9, 1.0))
    return costs, losses, dense, levels.tolist()


def check(costs, losses, dense, levels):
    """Budgets as fractions of integers, and ranks that only grow."""
    found = allocate(costs, losses, dense, levels)
    before = [0] * len(costs)
    for level, chosen in zip(levels, found, strict=True):
        cost, _ = measures(costs, losses, chosen)
        assert Fraction(cost) <= Fraction(level) * dense
        assert cost / dense <= level
        assert cost <= level * dense
        assert all(a <= b for a, b in zip(before, chosen, strict=True))
        before = chosen


def test_budgets_hold_in_random_cases():
    rng = np.random.default_rng(7)
    for _ in range(500):
        check(*random_case(rng))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_budgets_hold_in_1e5_random_cases(part):
    rng = np.random.default_rng(11 + part)
    for _ in range(25_000):
        check(*random_case(rng))


def small_case(seed):
    """At most four layers, a level, and the losses of all picks that fit in it."""
    rng = np.random.default_rng(seed)
    costs, losses, _, _ = random_case(rng)
    costs, losses = costs[:4], losses[:4]
    level, dense = float(rng.uniform(0.05, 1)), sum(row[-1] for row in costs)
    sums = [
        measures(costs, losses, pick)
        for pick in itertools.product(*(range(len(row)) for row in costs))
    ]
    fits = [loss for cost, loss in sums if Fraction(cost) <= Fraction(level) * dense]
    return costs, losses, dense, level, fits


def test_small_cases_equal_brute_force_nearly_always():
    """With few layers there is little to trade: one in a thousand is not the best."""
    missed = 0
    for seed in range(600):
        costs, losses, dense, level, fits = small_case(seed)
        if not fits:
            with pytest.raises(ValueError, match="the cheapest choices cost"):
                allocate(costs, losses, dense, [level])
            continue
        (chosen,) = allocate(costs, losses, dense, [level])
        missed += measures(costs, losses, chosen)[1] > min(fits) * (1 + 1e-9)
    assert missed <= 3


def test_a_full_level_is_dense_though_a_cheaper_choice_loses_nothing():
    assert allocate([[1, 4], [2, 4]], [[0.0, 0.0], [0.0, 0.0]], 8, [1.0]) == [[1, 1]]


def test_the_smallest_feasible_level_is_named_and_is_feasible():
    costs, losses = [[3, 10], [4, 10]], [[1.0, 0.0], [1.0, 0.0]]
    with pytest.raises(ValueError, match=r"0\.3500 of dense. Give 0\.3501 or"):
        allocate(costs, losses, 20, [0.3, 1.0])
    assert allocate(costs, losses, 20, [0.3501]) == [[0, 0]]


def test_a_budget_is_a_floor_of_the_exact_fraction():
    # 0.29 * 100 is 28.999999999999996 in floats: 29 must not be spent.
    assert allocate([[28, 29, 100]], [[2.0, 1.0, 0.0]], 100, [0.29]) == [[0]]


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="tables"):
        allocate([[1, 2]], [[1.0]], 2, [1.0])
    with pytest.raises(ValueError, match="tables"):
        allocate([], [], 0, [1.0])
