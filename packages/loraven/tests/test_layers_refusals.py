# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from loraven import DynamicLowRankLayer, LoRAven
from torchworks_core.errors import InvalidValue


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return DynamicLowRankLayer(32, 24, r_max=16, r_min=3)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((32, 24, 25), [r"r_max=25 is above min\(32, 24\)=24"]),
        ((32, 24, 2), ["r_min=4 is above r_max=2"]),
        ((32, 24, 16, 4, 3), ["init_rank=3 is not from r_min=4 to r_max=16"]),
        ((32, 24, 16, 4, 17), ["init_rank=17"]),
        ((0, -1, 0), ["in_features=0", "out_features=-1", "r_max=0"]),
        ((32, 24, 16.0, True), [r"r_max=16\.0", "r_min=True"]),
        (("32", None, 4), ["in_features='32'", "out_features=None"]),
    ],
)
def test_everything_wrong_is_named_at_once(arguments, parts):
    for part in parts:
        with pytest.raises(ValueError, match=part):
            DynamicLowRankLayer(*arguments)


def test_widths_of_the_networks_are_checked():
    for name in ("scorer_hidden", "num_gate_blocks"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            DynamicLowRankLayer(8, 8, 4, **{name: 0})


@pytest.mark.parametrize("shape", [(31,), (4, 24), (), (32, 4)])
def test_wrong_feature_size_names_both(layer, shape):
    with pytest.raises(ValueError, match=r"in_features=32"):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("budget", [math.nan, math.inf, -1.0, -math.inf])
def test_wrong_budget(layer, budget):
    with pytest.raises(ValueError, match="budget"):
        layer(torch.zeros(2, 32), budget=budget)
    assert layer.rank_history == []


def test_wrong_types(layer):
    with pytest.raises(TypeError, match="budget"):
        layer(torch.zeros(2, 32), budget="much")
    with pytest.raises(TypeError, match="x must be a Tensor"):
        layer([[0.0] * 32])
    with pytest.raises(TypeError, match="estimate"):
        layer.energy_model = object()


def test_wrong_settings(layer):
    with pytest.raises(ValueError, match="mode='eval'"):
        layer(torch.zeros(2, 32), mode="eval")
    with pytest.raises(ValueError, match="rank_scope='token'"):
        layer.rank_scope = "token"
    with pytest.raises(ValueError, match="nan_policy='clip'"):
        layer.nan_policy = "clip"
    for rank in (2, 17):
        with pytest.raises(ValueError, match="fixed_rank"):
            layer.fixed_rank = rank
    with pytest.raises(TypeError, match="fixed_rank"):
        layer.fixed_rank = 4.0
    assert layer.fixed_rank is None
    assert layer.rank_scope == "batch"
    assert layer.nan_policy == "sanitize"


def test_a_model_that_gives_no_energy(layer):
    class Broken:
        def estimate(self, layer_dims, rank, batch_size=1):
            return math.nan

    layer.energy_model = Broken()
    with pytest.raises(ValueError, match="estimate"):
        layer(torch.zeros(2, 32), budget=1.0)


def test_a_new_energy_model_replaces_the_old_figures(layer):
    class Flat:
        def __init__(self, figure):
            self.figure = figure

        def estimate(self, layer_dims, rank, batch_size=1):
            return self.figure * rank * batch_size

    layer.energy_model = Flat(1.0)
    assert layer(torch.zeros(2, 32), budget=5.0)[1] <= 5
    assert layer.energy(4) == 4.0
    layer.energy_model = Flat(10.0)
    assert layer(torch.zeros(2, 32), budget=5.0)[1] == 3
    assert layer.over_budget
    assert layer.energy(4) == 40.0


@pytest.mark.parametrize("share", [5, -1, float("nan"), float("inf"), 1.001])
def test_a_share_is_from_0_to_1(share):
    layer = DynamicLowRankLayer(8, 8, 4, 2)
    with pytest.raises(InvalidValue, match="random_rank_share"):
        layer.random_rank_share = share
    assert layer.random_rank_share == 0.25


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gates_enabled", "no"),
        ("gates_enabled", 0),
        ("scheduler", None),
        ("scheduler", torch.nn.Identity()),
        ("energy_model", torch.nn.Identity()),
        ("random_rank_share", "0.5"),
    ],
)
def test_settings_of_a_wrong_type_are_refused_where_they_are_given(name, value):
    layer = DynamicLowRankLayer(8, 8, 4, 2)
    before = getattr(layer, name)
    with pytest.raises(TypeError, match=name):
        setattr(layer, name, value)
    assert getattr(layer, name) is before


def test_an_energy_model_may_be_a_module():
    class Learned(torch.nn.Module):
        def estimate(self, layer_dims, rank, batch_size=1):
            return 7.0 * batch_size

    layer = DynamicLowRankLayer(8, 8, 4, 2)
    layer.energy_model = model = Learned()
    assert layer.energy_model is model
    assert layer.energy(3, 2) == 14.0


def test_integers_of_numpy_are_integers():
    sizes = [np.int64(size) for size in (8, 6, 4, 2)]
    layer = DynamicLowRankLayer(*sizes)
    assert type(layer.r_max) is type(layer.current_rank) is int
    y, rank = layer(torch.randn(3, 8))
    assert y.shape == (3, 6)
    assert type(rank) is int
    preset = LoRAven(*sizes[:2], "custom", *sizes[2:])
    assert type(preset.max_rank) is int


@pytest.mark.parametrize("budget", ["1", [1.0], True, {}])
def test_an_energy_budget_that_is_no_number_is_a_type_error(budget):
    with pytest.raises(TypeError, match="energy_budget must be a number"):
        LoRAven(8, 8, energy_budget=budget)


def test_an_infinite_budget_is_refused_in_words_that_name_it():
    with pytest.raises(InvalidValue, match="finite number of at least 0"):
        DynamicLowRankLayer(8, 8, 4, 2)(torch.randn(2, 8), budget=float("inf"))
