# SPDX-License-Identifier: Apache-2.0
import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraven import (
    EnergyEstimator,
    LoRAven,
    RankScheduler,
    create_loraven_layer,
    get_default_hardware_profile,
)

TABLE = {
    "high_performance": (0.8, 0.3, 1.5),
    "balanced": (0.5, 0.2, 1.0),
    "low_power": (0.3, 0.1, 0.7),
}


class Fixed(RankScheduler):
    def __init__(self, rank):
        self.rank = rank

    def schedule_rank(self, complexity_scores, budget=None, **kwargs):
        return self.rank


@pytest.mark.parametrize("mode", list(TABLE))
@pytest.mark.parametrize("size", [(512, 256), (784, 512), (10, 10), (1, 7), (3, 50)])
def test_preset_table(mode, size):
    ratio, least, _ = TABLE[mode]
    layer = LoRAven(*size, mode=mode)
    short = min(size)
    assert layer.max_rank == layer.layer.r_max == max(1, round(ratio * short))
    assert layer.min_rank == layer.layer.r_min == max(1, round(least * short))
    assert (layer.in_features, layer.out_features, layer.mode) == (*size, mode)
    assert layer.energy_budget is None


def test_the_documented_example():
    layer = LoRAven(512, 256)
    assert (layer.mode, layer.max_rank, layer.min_rank) == ("balanced", 128, 51)


def test_explicit_ranks_override_the_preset():
    layer = LoRAven(512, 256, max_rank=60)
    assert (layer.max_rank, layer.min_rank) == (60, 51)
    layer = LoRAven(512, 256, "low_power", min_rank=7)
    assert (layer.max_rank, layer.min_rank) == (77, 7)
    layer = create_loraven_layer(64, 32, "custom", max_rank=8, min_rank=2, bias=False)
    assert (layer.max_rank, layer.min_rank, layer.layer.bias) == (8, 2, None)
    with pytest.raises(TypeError):
        create_loraven_layer(64, 32, rank=8)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"mode": "fast"}, [f"'fast' is none of {', '.join(TABLE)}, custom"]),
        ({"mode": "custom"}, ["needs max_rank and min_rank"]),
        (
            {"mode": "custom", "max_rank": 600},
            ["needs min_rank", "max_rank=600 is"],
        ),
        ({"mode": "custom", "min_rank": 4}, ["needs max_rank"]),
        ({"max_rank": 4}, ["min_rank=51 is above max_rank=4"]),
        ({"max_rank": 0, "min_rank": 2.0}, ["max_rank=0", r"min_rank=2\.0"]),
        ({"in_features": 0}, ["in_features=0 is not"]),
        ({"energy_budget": math.nan}, ["energy_budget=nan"]),
        ({"energy_budget": -1, "max_rank": 999}, ["energy_budget=-1", "max_rank=999"]),
        (
            {"mode": "none", "out_features": -3, "energy_budget": math.inf},
            ["mode='none'", "out_features=-3", "energy_budget=inf"],
        ),
    ],
)
def test_everything_wrong_is_named_at_once(arguments, parts):
    arguments = {"in_features": 512, "out_features": 256} | arguments
    for part in parts:
        with pytest.raises(ValueError, match=part):
            LoRAven(**arguments)


@pytest.mark.critical
@settings(deadline=None, max_examples=60)
@given(
    mode=st.sampled_from(list(TABLE)),
    rows=st.integers(1, 40),
    proposal=st.integers(0, 600),
)
def test_preset_budget_is_a_multiple_of_the_largest_rank(mode, rows, proposal):
    torch.manual_seed(0)
    layer = LoRAven(64, 48, mode=mode).eval()
    layer.layer.scheduler = Fixed(proposal)
    layer(torch.randn(rows, 64))
    estimate = EnergyEstimator(get_default_hardware_profile()).estimate

    def each(rank):
        return estimate((64, 48), rank, batch_size=rows) / rows

    budget = TABLE[mode][2] * each(layer.max_rank)
    ranks = range(layer.min_rank, layer.max_rank + 1)
    cap = max([r for r in ranks if each(r) <= budget], default=layer.min_rank)
    rank = layer.get_current_rank()
    assert rank == max(layer.min_rank, min(proposal, cap))
    assert (cap < layer.max_rank) == (mode == "low_power")
    stats = layer.get_performance_stats()
    assert stats["energy_budget"] == pytest.approx(budget)
    assert stats["energy_consumption"] == pytest.approx(each(rank))
    usage = min(each(rank) / budget, 1)
    assert layer.get_budget_usage() == pytest.approx(usage)
    if proposal > 100:
        full = {"high_performance": 1 / 1.5, "balanced": 1.0}
        if mode in full:
            assert usage == pytest.approx(full[mode], rel=0.01)


@pytest.mark.critical
@pytest.mark.parametrize("training", [True, False])
def test_explicit_budget_caps_each_forward(training):
    torch.manual_seed(0)
    estimate = EnergyEstimator(get_default_hardware_profile()).estimate
    budget = estimate((64, 48), 11)
    layer = LoRAven(64, 48, energy_budget=budget).train(training)
    layer.layer.scheduler = Fixed(10**6)
    for rows in (1, 2, 17):
        layer(torch.randn(rows, 64))
        rank = layer.get_current_rank()
        assert estimate((64, 48), rank, batch_size=rows) / rows <= budget
        if not training:
            over = estimate((64, 48), rank + 1, batch_size=rows) / rows
            assert rank == layer.max_rank or over > budget
    assert not layer.get_performance_stats()["over_budget"]
    tight = LoRAven(64, 48, energy_budget=1e-9).train(training)
    tight(torch.randn(4, 64))
    assert tight.get_current_rank() == tight.min_rank
    assert tight.get_performance_stats()["over_budget"]
    assert tight.get_budget_usage() == 1.0


def test_a_budget_that_never_binds_warns_with_both_numbers():
    with pytest.warns(UserWarning, match=r"energy_budget=500 mJ .* takes 0\.\d+ mJ"):
        LoRAven(512, 256, energy_budget=500.0)


def test_books_add_up():
    torch.manual_seed(0)
    layer = LoRAven(64, 48, "custom", max_rank=24, min_rank=2, energy_budget=0.001)
    layer.eval()
    assert layer.get_current_rank() == 2
    assert layer.get_budget_usage() == 0.0
    before = layer.get_performance_stats()
    assert before["energy_consumption"] == before["total_energy"] == 0.0
    assert before["samples"] == before["flops"] == 0
    total = samples = 0
    estimate = layer.layer.energy_model.estimate
    for i, rows in enumerate((3, 1, 8)):
        layer.layer.scheduler = Fixed(2 + i)
        layer(torch.randn(rows, 64))
        columns = layer.layer.columns
        total += estimate((64, 48), columns, batch_size=rows)
        samples += rows
    stats = layer.get_performance_stats()
    assert stats["total_energy"] == pytest.approx(total)
    assert stats["samples"] == samples
    assert stats["energy_consumption"] == pytest.approx(
        estimate((64, 48), columns, batch_size=8) / 8
    )
    expected = min(total / samples / 0.001, 1.0)
    assert layer.get_budget_usage() == pytest.approx(expected)
    weights = copy.deepcopy(layer.state_dict())
    layer.reset_budget()
    after = layer.get_performance_stats()
    assert layer.get_budget_usage() == after["total_energy"] == after["samples"] == 0
    assert len(after["rank_history"]) == len(after["energy_history"]) == 3
    for name, value in layer.state_dict().items():
        assert torch.equal(value, weights[name])


def test_statistics_are_plain_values_under_the_documented_keys():
    layer = LoRAven(64, 48).eval()
    layer(torch.randn(2, 3, 64))
    stats = layer.get_performance_stats()
    kinds = {
        "current_rank": int,
        "energy_consumption": float,
        "energy_source": str,
        "total_energy": float,
        "samples": int,
        "energy_budget": float,
        "budget_usage": float,
        "over_budget": bool,
        "rank_history": list,
        "complexity_history": list,
        "energy_history": list,
        "compression_ratio": float,
        "flops": int,
        "sanitized": int,
        "mode": str,
    }
    assert {name: type(value) for name, value in stats.items()} == kinds
    assert stats["flops"] == layer.layer.get_flops(6)
    assert stats["energy_source"] == "nominal"
    assert stats["samples"] == 6
    assert not list(layer.buffers())


def test_without_a_budget_nothing_is_used():
    layer = LoRAven(64, 48, "custom", max_rank=24, min_rank=2).eval()
    layer(torch.randn(4, 64))
    assert layer.get_budget_usage() == 0.0
    assert layer.get_performance_stats()["energy_budget"] is None


def test_energy_follows_rank_and_batch():
    layer = LoRAven(64, 48, "custom", max_rank=24, min_rank=2).eval()
    found = []
    for rank in (2, 8, 20):
        layer.layer.scheduler = Fixed(rank)
        layer(torch.randn(4, 64))
        found.append(layer.get_performance_stats()["energy_consumption"])
    assert found[0] < found[1] < found[2]
    layer(torch.randn(64, 64))
    # Weights are read once for all rows.
    assert layer.get_performance_stats()["energy_consumption"] < found[2]


def test_histories_are_bounded():
    layer = LoRAven(8, 8).eval()
    x = torch.randn(1, 8)
    with torch.no_grad():
        for _ in range(1005):
            layer(x)
    stats = layer.get_performance_stats()
    assert stats["samples"] == 1005
    for name in ("rank", "complexity", "energy"):
        assert len(stats[f"{name}_history"]) == 1000


@pytest.mark.critical
def test_training_mode_gives_gradients_and_eval_is_deterministic():
    torch.manual_seed(0)
    layer = LoRAven(32, 24)
    x = torch.randn(16, 32, requires_grad=True)
    (layer(x).square().mean() + 0.02 * layer.layer.expected_cost).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_copies_and_pickles_are_independent():
    torch.manual_seed(0)
    layer = LoRAven(32, 24)
    x = torch.randn(4, 32)
    layer(x).sum().backward()
    layer.eval()
    with torch.no_grad():
        layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.get_current_rank() == layer.get_current_rank()
        layer.reset_budget()
        assert other.get_performance_stats()["samples"] > 0
        layer(x)
    fresh = LoRAven(32, 24).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_no_rows():
    layer = LoRAven(32, 24)
    assert layer(torch.randn(0, 32)).shape == (0, 24)
    assert layer.get_performance_stats()["samples"] == 0
    for bad in (torch.zeros(2, 31), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="in_features=32"):
            layer(bad)
    with pytest.raises(TypeError, match="x must be a Tensor"):
        layer(None)
