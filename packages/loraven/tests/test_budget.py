# SPDX-License-Identifier: Apache-2.0
"""The ledger against a slow one that sums its whole history."""

import copy
import inspect
import math
import pickle
import random
import threading
from typing import Any

import pytest
import torch

from loraven import (
    BudgetExhaustedException,
    BudgetManager,
    EnergyEstimator,
    get_default_hardware_profile,
)

KEYS = [
    "total_budget",
    "usable_budget",
    "consumed",
    "reserved",
    "remaining_budget",
    "utilization",
    "scaling_factor",
    "allocations",
    "exhausted",
]


class Constant:
    """An energy model: the dense layer costs ``value`` mJ."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value

    def estimate(self, layer_dims: Any, rank: int, batch_size: int = 1) -> float:
        assert (rank, batch_size) == (min(layer_dims), 1)
        return self.value


def manager_of(value: float = 1.0, **options: Any) -> BudgetManager:
    manager = BudgetManager(**options)
    manager.energy_model = Constant(value)
    return manager


def check_identity(manager: BudgetManager) -> None:
    consumed, reserved, remaining = manager._picojoules()
    assert {type(v) for v in (consumed, reserved, remaining)} == {int}
    assert min(consumed, reserved, remaining) >= 0
    assert consumed + reserved + remaining == max(manager._usable, consumed)


def test_signatures_are_the_specified_ones():
    def parameters(function):
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in found if p.name != "self"]

    empty = inspect.Parameter.empty
    assert parameters(BudgetManager) == [
        ("total_budget", 10.0),
        ("window_size", 100),
        ("safety_margin", 0.1),
        ("adaptation_rate", 0.01),
    ]
    assert parameters(BudgetManager.allocate_budget) == [
        ("layer_id", empty),
        ("complexity_score", empty),
        ("layer_dims", empty),
        ("performance_priority", 1.0),
    ]
    assert parameters(BudgetManager.update_energy_consumption) == [
        ("layer_id", empty),
        ("actual_energy", empty),
        ("performance_metric", None),
    ]
    assert parameters(BudgetManager.get_budget_status) == []
    assert parameters(BudgetManager.reset) == []


def test_first_status_and_a_life():
    manager = manager_of(2.0)
    status = manager.get_budget_status()
    assert list(status) == KEYS
    assert {type(value) for value in status.values()} == {float}
    assert list(status.values()) == [10.0, 9.0, 0.0, 0.0, 9.0, 0.0, 1.0, 0.0, 0.0]
    assert manager.allocate_budget("a", 0.75, (8, 4)) == 1.5
    assert manager.allocate_budget("b", 0.5, (8, 4), 0.5) == 0.75
    status = manager.get_budget_status()
    assert (status["reserved"], status["remaining_budget"]) == (2.25, 6.75)
    assert status["allocations"] == 2.0
    manager.update_energy_consumption("a", 1.0)
    manager.update_energy_consumption("nobody", 0.5)
    status = manager.get_budget_status()
    assert (status["consumed"], status["reserved"]) == (1.5, 0.75)
    assert status["remaining_budget"] == 6.75
    assert status["utilization"] == pytest.approx(1.5 / 9)


def test_the_dense_energy_is_the_models():
    manager = BudgetManager(total_budget=1000.0)
    model = EnergyEstimator(get_default_hardware_profile())
    dense = model.estimate((512, 256), 256, batch_size=1)
    found = manager.allocate_budget("a", 0.3, (512, 256), 2.0)
    assert found == pytest.approx(dense * 0.3 * 1.5, abs=1e-9)


def test_a_second_promise_replaces_the_first():
    manager = manager_of(6.0)
    assert manager.allocate_budget("a", 1.0, (4, 4)) == 6.0
    assert manager.allocate_budget("b", 1.0, (4, 4)) == 3.0
    assert manager.allocate_budget("a", 1.0, (4, 4)) == 6.0
    assert manager.allocate_budget("a", 0.5, (4, 4)) == 3.0
    assert manager.get_budget_status()["reserved"] == 6.0


def test_overspending_eats_the_rest_and_then_the_promises():
    manager = manager_of(4.0)
    manager.allocate_budget("a", 1.0, (4, 4))
    manager.update_energy_consumption("stranger", 7.0)
    status = manager.get_budget_status()
    assert (status["reserved"], status["remaining_budget"]) == (2.0, 0.0)
    assert status["exhausted"] == 1.0
    assert manager.allocate_budget("b", 1.0, (4, 4)) == 0.0
    manager.update_energy_consumption("a", 1.0)
    assert manager.get_budget_status()["remaining_budget"] == 1.0
    assert manager.get_budget_status()["exhausted"] == 0.0
    manager.update_energy_consumption("b", 50.0)
    status = manager.get_budget_status()
    assert (status["consumed"], status["remaining_budget"]) == (58.0, 0.0)
    assert (status["utilization"], status["exhausted"]) == (1.0, 1.0)


def test_begin_sample_keeps_what_was_learnt_and_reset_does_not():
    manager = manager_of(2.0, adaptation_rate=0.5)
    for _ in range(3):
        manager.allocate_budget("a", 1.0, (4, 4))
        manager.update_energy_consumption("a", 0.5, 0.9)
    manager.allocate_budget("b", 1.0, (4, 4))
    scaling = manager.get_budget_status()["scaling_factor"]
    assert scaling > 1.0
    manager.begin_sample()
    fresh = dict(zip(KEYS, [10.0, 9.0, 0, 0, 9.0, 0, 1.0, 0, 0], strict=True))
    assert manager.get_budget_status() == fresh | {"scaling_factor": scaling}
    assert len(manager._window) == 3
    manager.reset()
    assert manager.get_budget_status() == fresh
    # And it behaves as a new one does.
    other = manager_of(2.0, adaptation_rate=0.5)
    for each in (manager, other):
        for k in range(8):
            each.allocate_budget("a", k / 8, (4, 4))
            each.update_energy_consumption("a", k / 5, 1.0 - k / 10)
    assert manager.get_budget_status() == other.get_budget_status()


@pytest.mark.critical
def test_100_000_operations_keep_the_identity():
    draw = random.Random(7)
    manager = manager_of(3.0, total_budget=11.7, window_size=9)
    names = [f"layer_{k}" for k in range(6)]
    promised: dict[str, float] = {}
    for _ in range(100_000):
        name, what = draw.choice(names), draw.random()
        if what < 0.5:
            before = manager._picojoules()[2] + round(promised.get(name, 0) * 1e9)
            granted = manager.allocate_budget(
                name, draw.random(), (7, 5), draw.random()
            )
            assert 0 <= granted * 1e9 <= before + 1e-5
            promised[name] = granted
        elif what < 0.97:
            spent = draw.choice((0.0, draw.random(), draw.expovariate(3.0), 1e-10))
            metric = draw.choice((None, draw.random()))
            manager.update_energy_consumption(name, spent, metric)
            promised.pop(name, None)
        elif what < 0.999:
            manager.begin_sample()
            promised = {}
        else:
            manager.reset()
            promised = {}
        check_identity(manager)
    assert 0.5 <= manager.get_budget_status()["scaling_factor"] <= 2.0


def test_the_controller_against_a_slow_one():
    draw = random.Random(3)
    manager = manager_of(1.0, total_budget=30.0, window_size=7, adaptation_rate=0.2)
    settled: list[tuple[float, float, float | None]] = []
    scaling = 1.0
    for step in range(400):
        manager.begin_sample()
        granted = manager.allocate_budget("a", draw.choice((0.0, 0.5, 1.0)), (4, 4))
        actual = draw.choice((0.0, 0.3, 0.9, 4.0))
        metric = draw.choice((None, 1.0 / (1 + step % 13), -0.5, 0.0))
        manager.update_energy_consumption("a", actual, metric)
        settled = [*settled, (granted, actual, metric)][-7:]
        given, used = (math.fsum(s[i] for s in settled) for i in (0, 1))
        error = max(-1.0, 1 - used / given) if given else -float(used > 0)
        metrics = [s[2] for s in settled if s[2] is not None]
        if len(metrics) >= 2:
            first, second = (
                metrics[: len(metrics) // 2],
                metrics[len(metrics) // 2 :],
            )
            mean = sum(first) / len(first)
            if mean:
                drop = (mean - sum(second) / len(second)) / abs(mean)
                error += min(max(drop, 0.0), 1.0)
        scaling = min(max(scaling * math.exp(0.2 * error), 0.5), 2.0)
        found = manager.get_budget_status()["scaling_factor"]
        assert found == pytest.approx(scaling, rel=1e-6)


def test_the_scaling_factor_scales_and_is_clipped():
    manager = manager_of(1.0, adaptation_rate=1e9)
    manager.allocate_budget("a", 1.0, (4, 4))
    manager.update_energy_consumption("a", 0.1)
    assert manager.get_budget_status()["scaling_factor"] == 2.0
    assert manager.allocate_budget("a", 1.0, (4, 4)) == 2.0
    manager.update_energy_consumption("a", 1e6)
    assert manager.get_budget_status()["scaling_factor"] == 0.5
    manager.begin_sample()
    assert manager.allocate_budget("a", 1.0, (4, 4)) == 0.5


def test_exhaustion_can_raise():
    manager = manager_of(5.0)
    manager.on_exhausted = "raise"
    assert manager.allocate_budget("a", 1.0, (4, 4)) == 5.0
    assert manager.allocate_budget("b", 1.0, (4, 4)) == 4.0
    before = manager.get_budget_status()
    with pytest.raises(BudgetExhaustedException, match="'c'") as caught:
        manager.allocate_budget("c", 0.5, (4, 4))
    assert isinstance(caught.value, RuntimeError)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.layer_id, error.remaining, error.requested) == ("c", 0.0, 2.5)
    assert str(error) == str(caught.value)
    assert manager.get_budget_status() == before
    # Nothing wanted is nothing refused, and a layer may shrink its own promise.
    assert manager.allocate_budget("c", 0.0, (4, 4)) == 0.0
    assert manager.allocate_budget("b", 0.5, (4, 4)) == 2.5
    manager.on_exhausted = "zero"
    manager.update_energy_consumption("b", 9.0)
    assert manager.allocate_budget("c", 0.5, (4, 4)) == 0.0
    with pytest.raises(ValueError, match="on_exhausted"):
        manager.on_exhausted = "ignore"
    assert manager.on_exhausted == "zero"


NAN, INF = float("nan"), float("inf")
BAD_ALLOCATIONS = [
    {"complexity_score": v} for v in (-0.1, 1.1, NAN, INF, -INF, 10**400)
]
BAD_ALLOCATIONS += [{"performance_priority": v} for v in (-0.1, NAN, INF)]
BAD_ALLOCATIONS += [{"layer_dims": v} for v in ((4,), (4, 4, 4), (0, 4), (4, -1))]


@pytest.mark.parametrize("bad", BAD_ALLOCATIONS, ids=str)
def test_bad_allocations_leave_the_ledger(bad):
    manager = used()
    before = pickle.dumps(manager)
    good = {"layer_id": "a", "complexity_score": 0.5, "layer_dims": (4, 4)}
    with pytest.raises(ValueError, match=next(iter(bad))):
        manager.allocate_budget(**good | bad)
    assert pickle.dumps(manager) == before


@pytest.mark.parametrize(
    "bad",
    [{"actual_energy": v} for v in (-1e-9, NAN, INF, -INF, 1e300)]
    + [{"performance_metric": v} for v in (NAN, INF, -INF)],
    ids=str,
)
def test_bad_updates_leave_the_ledger(bad):
    manager = used()
    before = pickle.dumps(manager)
    with pytest.raises(ValueError, match=next(iter(bad))):
        manager.update_energy_consumption(**{"layer_id": "a", "actual_energy": 1} | bad)
    assert pickle.dumps(manager) == before


def used() -> BudgetManager:
    manager = manager_of(2.0)
    for name in "abc":
        manager.allocate_budget(name, 0.5, (4, 4))
    manager.update_energy_consumption("b", 0.3, 0.8)
    return manager


def test_bad_models_and_types_leave_the_ledger():
    manager = used()
    before = manager.get_budget_status()
    for value in (NAN, INF, -1.0):
        manager.energy_model = Constant(value)
        with pytest.raises(ValueError, match="estimated energy"):
            manager.allocate_budget("a", 0.5, (4, 4))
    for bad in ({"layer_id": 3}, {"complexity_score": "x"}, {"layer_dims": 4}):
        good = {"layer_id": "a", "complexity_score": 0.5, "layer_dims": (4, 4)}
        with pytest.raises(TypeError, match=next(iter(bad))):
            manager.allocate_budget(**good | bad)
    with pytest.raises(TypeError, match="actual_energy"):
        manager.update_energy_consumption("a", None)
    assert manager.get_budget_status() == before


@pytest.mark.parametrize(
    "bad",
    [{"total_budget": v} for v in (0.0, -1.0, NAN, INF, 1e300)]
    + [{"window_size": 0}]
    + [{"safety_margin": v} for v in (-0.1, 1.1, NAN)]
    + [{"adaptation_rate": v} for v in (-1.0, NAN, INF)],
    ids=str,
)
def test_bad_constructor_values(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        BudgetManager(**bad)


def test_a_margin_of_everything_leaves_nothing():
    manager = manager_of(1.0, safety_margin=1.0)
    assert manager.allocate_budget("a", 1.0, (4, 4)) == 0.0
    status = manager.get_budget_status()
    assert (status["utilization"], status["exhausted"]) == (1.0, 1.0)


def test_two_threads_lose_nothing():
    manager = manager_of(1e-4, total_budget=1e6)
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for k in range(4000):
                manager.allocate_budget(f"{name}{k % 3}", 0.5, (4, 4))
                manager.update_energy_consumption(f"{name}{k % 3}", 1e-5)
                if k % 16 == 0:
                    manager.get_budget_status()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert manager._picojoules()[:2] == (8000 * 10_000, 0)
    assert manager._sums == (
        sum(p[0] for p in manager._window),
        sum(p[1] for p in manager._window),
    )
    check_identity(manager)


def test_copies_are_apart_and_numbers_may_be_tensors():
    manager = used()
    twin = copy.deepcopy(manager)
    twin.update_energy_consumption("a", torch.tensor(0.25), torch.tensor([0.5]))
    assert twin.get_budget_status()["consumed"] == 0.55
    assert manager.get_budget_status()["consumed"] == 0.3


def test_the_specified_loop():
    manager = BudgetManager(total_budget=1000.0, window_size=100)
    for step in range(3):
        budget = manager.allocate_budget(
            layer_id=f"layer_{step}",
            complexity_score=0.7,
            layer_dims=(2048, 1024),
            performance_priority=0.8,
        )
        assert budget > 0
        manager.update_energy_consumption(
            layer_id=f"layer_{step}", actual_energy=budget / 2, performance_metric=0.9
        )
    assert 0 < manager.get_budget_status()["utilization"] < 1
