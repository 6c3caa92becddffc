# SPDX-License-Identifier: Apache-2.0
"""Inputs that hardly vary: they have reduced forms, and those lose nothing."""

import pytest
import torch

import loraven

LEVELS = (0.3, 0.5, 0.7, 1.0)


@torch.no_grad()
def deviation(model, x, level):
    loraven.set_budget(model, 1.0)
    exact = model(x)
    loraven.set_budget(model, level)
    return ((model(x) - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("sensitivity", [False, True])
def test_constant_inputs_are_reduced_without_loss(mlp, sensitivity):
    model, x = mlp(), torch.randn(64).expand(256, 64).clone()
    summary = loraven.convert(model, [x], sensitivity=sensitivity)
    assert len(summary.layers) == 3
    for layer in summary.layers:
        assert layer.ranks[0.3] == 8
        assert set(layer.expected_error.values()) == {0.0}
    assert max(deviation(model, x, level) for level in LEVELS) < 1e-5
    for module in (model[0], model[2], model[4]):
        module.rebuild()
    assert max(deviation(model, x, level) for level in LEVELS) < 1e-5


def test_a_dead_layer_does_not_keep_the_others_from_a_level(mlp):
    model = mlp()
    with torch.no_grad():
        model[0].weight.zero_()
    x = torch.randn(256, 64)
    summary = loraven.convert(model, [x], sensitivity=False)
    assert summary.levels[0.3].cost_fraction <= 0.3
    assert max(deviation(model, x, level) for level in LEVELS) < 1e-5


def test_inputs_of_twelve_directions_need_sixteen_ranks(mlp):
    model, x = mlp(), torch.randn(256, 12) @ torch.randn(12, 64)
    summary = loraven.convert(model, [x], include=["0"], levels=(0.5, 1.0))
    assert summary.layers[0].ranks[0.5] == 16
    assert deviation(model, x, 0.5) < 1e-4


def test_an_outlier_is_said_with_the_layers_name(mlp):
    x = torch.randn(512, 64)
    x[0, 0] = 1e10
    with pytest.warns(UserWarning, match=r"layer '0'.* 1 of 96 .*an outlier"):
        loraven.convert(mlp(), [x])


def test_one_vector_is_enough_and_warned_of(mlp):
    model, x = mlp(), torch.randn(1, 64)
    with pytest.warns(UserWarning, match="saw 1 valid tokens"):
        loraven.convert(model, [x])
    assert deviation(model, x, 0.3) < 1e-5
