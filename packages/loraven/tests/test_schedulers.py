# SPDX-License-Identifier: Apache-2.0
"""The schedulers against slow re-computations in fractions, and brute force."""

import copy
import inspect
import math
import pickle
import random
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraven import (
    EnergyAwareRankScheduler,
    EnergyEstimator,
    LinearRankScheduler,
    RankScheduler,
    get_default_hardware_profile,
)

EMPTY = inspect.Parameter.empty
scores = st.lists(st.floats(-0.5, 1.5, width=32), min_size=1, max_size=9)
DIMS = (96, 64)


class Table:
    """An energy model that is no estimator of ours: mJ by rank, for one row."""

    def __init__(self, energies: dict[int, float]) -> None:
        self.energies = energies

    def estimate(self, layer_dims: Any, rank: int, batch_size: int = 1) -> float:
        assert layer_dims == DIMS
        return self.energies[rank] * batch_size


def parameters(function: Any) -> dict[str, Any]:
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.kind is not p.VAR_KEYWORD}


def test_signatures_are_the_specified_ones():
    linear, energy = LinearRankScheduler, EnergyAwareRankScheduler
    assert parameters(linear) == {"r_min": 4, "r_max": 128, "diversity_factor": 0.1}
    ranks = {"r_min": 4, "r_max": 128, "energy_model": None}
    assert parameters(energy) == {**ranks, "alpha": 1.0, "beta": 0.1}
    first = {"self": EMPTY, "complexity_scores": EMPTY, "budget": None}
    assert parameters(RankScheduler.schedule_rank) == first
    more = {"current_loss": None, "gradient_norm": None}
    assert parameters(linear.schedule_rank) == first | more
    assert parameters(energy.schedule_rank) == first | {"layer_dims": None}
    for kind in (RankScheduler, linear, energy):
        kinds = [
            p.kind for p in inspect.signature(kind.schedule_rank).parameters.values()
        ]
        assert kinds[-1] is inspect.Parameter.VAR_KEYWORD
    with pytest.raises(TypeError, match="abstract"):
        RankScheduler()  # type: ignore[abstract]


def clamped(values: list[float]) -> list[Fraction]:
    return [min(max(Fraction(v), Fraction(0)), Fraction(1)) for v in values]


def linear_rank(values, r_min, r_max, factor, norm) -> float:
    """The specified formula before rounding; population std, in fractions."""
    s = clamped(values)
    mean = sum(s) / len(s)
    std = math.sqrt(sum((v - mean) ** 2 for v in s) / len(s))
    bonus = min(norm / 10, 1.0) * 0.2
    return r_min + (float(mean) + std * factor + bonus) * (r_max - r_min)


@settings(deadline=None)
@given(
    scores, st.integers(1, 40), st.integers(0, 200), st.floats(0, 2), st.floats(0, 30)
)
def test_linear_is_the_formula(values, r_min, span, factor, norm):
    scheduler = LinearRankScheduler(r_min, r_min + span, factor)
    given_scores = torch.tensor(values, dtype=torch.float64)
    found = scheduler.schedule_rank(given_scores, gradient_norm=norm)
    exact = linear_rank(values, r_min, r_min + span, factor, norm)
    near = {math.floor(exact + 0.5 + tiny) for tiny in (-1e-9, 1e-9)}
    assert found in {min(max(r, r_min), r_min + span) for r in near}
    assert type(found) is int
    column = scheduler.schedule_rank(given_scores[:, None], None, 0.7, norm)
    assert column == found
    single = LinearRankScheduler(r_min, r_min + span, factor)
    float32 = single.schedule_rank(given_scores.float(), gradient_norm=norm)
    assert abs(float32 - found) <= 1


def test_linear_rounds_half_up_and_clamps():
    scheduler = LinearRankScheduler(r_min=4, r_max=5)
    assert scheduler.schedule_rank(torch.tensor([0.5])) == 5
    scheduler = LinearRankScheduler(r_min=4, r_max=11)
    assert scheduler.schedule_rank(torch.tensor([0.5])) == 8
    high = torch.tensor([1.0, float("inf"), 7.0])
    assert scheduler.schedule_rank(high, gradient_norm=1e30) == 11
    assert scheduler.schedule_rank(torch.tensor([-float("inf")])) == 4
    assert scheduler.schedule_rank(torch.empty(0), gradient_norm=9.0) >= 4


def test_no_scores_give_the_smallest_rank():
    for kind in (LinearRankScheduler, EnergyAwareRankScheduler):
        for shape in ((0,), (0, 1)):
            assert kind().schedule_rank(torch.empty(shape)) == 4


def test_gradient_norm_may_be_a_tensor():
    found = LinearRankScheduler().schedule_rank(
        torch.tensor([0.0], requires_grad=True), gradient_norm=torch.tensor(10.0)
    )
    assert found == 29


def test_linear_shifts_a_stuck_rank_in_training_only():
    constant = torch.full((4,), 0.5)
    idle = LinearRankScheduler()
    assert {idle.schedule_rank(constant, mode="inference") for _ in range(50)} == {66}
    zero = LinearRankScheduler(diversity_factor=0.0)
    assert {zero.schedule_rank(constant, mode="training") for _ in range(50)} == {66}
    scheduler, generator = LinearRankScheduler(), random.Random(0)
    ranks = [scheduler.schedule_rank(constant, mode="training") for _ in range(30)]
    # The mean of the scores is 0.5: 4 + 62 = 66, and the shift is 0.1·124/2 = 6.2.
    expected, run = [], 0
    for _ in range(30):
        shifted = run == 8
        shift = generator.choice((-6.2, 6.2)) if shifted else 0.0
        expected.append(math.floor(66 + shift + 0.5))
        run = 0 if shifted else run + 1
    assert ranks == expected
    assert set(ranks) == {60, 66, 72}
    assert (
        scheduler.history == expected[-8:] or list(scheduler.history) == expected[-8:]
    )


def test_linear_is_seeded_and_can_be_copied():
    def run(scheduler: LinearRankScheduler) -> list[int]:
        ones = torch.full((4,), 0.5)
        return [scheduler.schedule_rank(ones, mode="training") for _ in range(40)]

    first = LinearRankScheduler()
    run(first)
    twins = [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), first]
    torch.manual_seed(5)
    assert run(twins[0]) == run(twins[1]) == run(twins[2])


def brute_force(values, r_min, energies, budget, alpha, beta) -> int:
    """Argmax of P over all ranks within the budget; the optimum rounded down.

    The integer below the real optimum x is the integer r whose r + 1/2 is nearest to
    x: P is compared at these halves, exactly, and of two equal ones the larger wins.
    """
    r_max = max(energies)
    allowed = [r for r, energy in energies.items() if energy <= budget]
    high = max(allowed, default=None)
    if high is None or high <= r_min:
        return r_min
    s = clamped(values)
    need = r_min + sum(s) / len(s) * (r_max - r_min)
    low, alpha, beta = min(need, Fraction(high)), Fraction(alpha), Fraction(beta)

    def performance(r: int) -> Fraction:
        half = r + Fraction(1, 2)
        return -alpha * (half - low) ** 2 - beta * (half - high) ** 2

    ranks = range(r_min, high + 1)
    return max(ranks, key=lambda r: (performance(r), r))


eighths = st.lists(st.integers(0, 8).map(lambda k: k / 8), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    eighths,
    st.integers(1, 10),
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.integers(0, 100),
    st.sampled_from([(1, 0.25), (1, 1), (0, 1), (1, 0), (0.5, 2), (3, 1)]),
    st.integers(1, 5),
)
def test_energy_aware_is_the_argmax(values, r_min, steps, budget, weights, rows):
    values = (values * 4)[:4]
    energies, energy = {}, 0.0
    for rank, step in enumerate(steps, r_min):
        energy += step
        energies[rank] = energy
    scheduler = EnergyAwareRankScheduler(
        r_min, max(energies), Table(energies), float(weights[0]), float(weights[1])
    )
    found = scheduler.schedule_rank(
        torch.tensor(values), float(budget), DIMS, batch_size=rows, mode="inference"
    )
    assert found == brute_force(values, r_min, energies, budget, *weights)
    assert found == r_min or energies[found] <= budget


@settings(max_examples=200, deadline=None)
@given(
    scores,
    scores,
    st.floats(0, 3),
    st.floats(0, 3),
    st.floats(0, 5),
    st.floats(0.01, 5),
    st.integers(1, 64),
)
def test_energy_aware_is_monotone_and_within_budget(
    values, rises, budget, more, alpha, beta, rows
):
    model = EnergyEstimator(get_default_hardware_profile())
    scheduler = EnergyAwareRankScheduler(2, 48, model, alpha, beta)

    def rank(given_scores, budget):
        tensor = torch.tensor(given_scores, dtype=torch.float64)
        return scheduler.schedule_rank(tensor, budget, DIMS, batch_size=rows)

    found = rank(values, budget)
    assert 2 <= found <= 48
    energy = model.estimate(DIMS, found, batch_size=rows) / rows
    assert found == 2 or energy <= budget
    assert rank(values, budget + more) >= found
    raised = [v + abs(r) for v, r in zip(values, rises * 9, strict=False)]
    assert rank(raised, budget) >= found
    assert rank(values, None) >= found


def test_energy_aware_keeps_the_budget_of_a_model_that_falls():
    energies = {r: float(30 - r if r % 2 else r) for r in range(1, 31)}
    scheduler = EnergyAwareRankScheduler(1, 30, Table(energies))
    for value in (0.0, 0.3, 0.6, 1.0):
        for budget in range(31):
            given_scores = torch.full((3,), value)
            found = scheduler.schedule_rank(given_scores, float(budget), DIMS)
            assert found == 1 or energies[found] <= budget


def test_energy_aware_extremes():
    def rank(alpha: float, beta: float, **options: Any) -> int:
        scheduler = EnergyAwareRankScheduler(4, 128, None, alpha, beta)
        return scheduler.schedule_rank(torch.full((16,), 0.5), **options)

    assert rank(1.0, 0.0) == 66
    assert rank(0.0, 1.0) == 128
    assert rank(1.0, 1.0) == 97
    assert rank(0.0, 1.0, budget=0.0, layer_dims=(256, 256)) == 4
    model = EnergyEstimator(get_default_hardware_profile())
    budget = model.estimate((256, 256), 77, batch_size=16) / 16
    assert rank(0.0, 1.0, budget=budget, layer_dims=(256, 256)) == 77
    assert rank(0.0, 1.0, budget=budget * 0.9999, layer_dims=(256, 256)) == 76


def test_energy_aware_assumes_a_square_once_and_says_so():
    scheduler = EnergyAwareRankScheduler(4, 64)
    given_scores = torch.full((2,), 0.5)
    with pytest.warns(UserWarning, match=r"\(64, 64\) is assumed"):
        first = scheduler.schedule_rank(given_scores, 0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scheduler.schedule_rank(given_scores, 0.01) == first
        assert scheduler.schedule_rank(given_scores, 0.01, (64, 64)) == first
        assert scheduler.schedule_rank(given_scores) >= first


@pytest.mark.parametrize("kind", [LinearRankScheduler, EnergyAwareRankScheduler])
def test_bad_scores_and_budgets(kind):
    scheduler = kind()
    for bad in (torch.tensor([float("nan")]), torch.tensor([0.1, float("nan")])):
        with pytest.raises(ValueError, match="NaN"):
            scheduler.schedule_rank(bad)
    for shape in ((), (2, 2), (1, 1, 1), (2, 0)):
        with pytest.raises(ValueError, match="shape"):
            scheduler.schedule_rank(torch.ones(shape))
    with pytest.raises(TypeError, match="Tensor"):
        scheduler.schedule_rank([0.5])
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="budget"):
            scheduler.schedule_rank(torch.ones(2), bad)
    with pytest.raises(TypeError, match="budget"):
        scheduler.schedule_rank(torch.ones(2), "much")


@pytest.mark.parametrize(
    "options",
    [
        {"r_min": 0},
        {"r_min": 9, "r_max": 8},
        {"alpha": -1.0},
        {"beta": float("nan")},
        {"alpha": 0.0, "beta": 0.0},
        {"diversity_factor": -0.1},
    ],
)
def test_bad_constructor_values(options):
    own = {"diversity_factor"} & options.keys()
    kind = LinearRankScheduler if own else EnergyAwareRankScheduler
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(**options)


def test_other_bad_arguments():
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gradient_norm"):
            LinearRankScheduler().schedule_rank(torch.ones(1), gradient_norm=bad)
    with pytest.raises(TypeError, match="r_min"):
        LinearRankScheduler(r_min=4.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="estimate"):
        EnergyAwareRankScheduler(energy_model=3.0)
    scheduler = EnergyAwareRankScheduler()
    for bad in ((5,), (0, 5)):
        with pytest.raises(ValueError, match="layer_dims"):
            scheduler.schedule_rank(torch.ones(1), 1.0, bad)
    with pytest.raises(ValueError, match="batch_size"):
        scheduler.schedule_rank(torch.ones(1), 1.0, DIMS, batch_size=-1)


@pytest.mark.parametrize("budget", [None, 0.0, 1e9])
def test_no_proposal_exceeds_the_layer(budget):
    scheduler = EnergyAwareRankScheduler(r_min=4, r_max=128)
    scores = torch.ones(8)
    for dims in ((16, 16), (300, 20), (20, 300)):
        rank = scheduler.schedule_rank(scores, budget, dims)
        assert rank == (4 if budget == 0.0 else min(dims))
    assert scheduler.schedule_rank(scores, budget, (2, 2)) == 4
