# SPDX-License-Identifier: Apache-2.0
"""The figures of a summary, each by a count of the test's own."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import loraven


@torch.no_grad()
def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def test_the_share_of_the_whole_model_is_the_counted_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 20)).eval()
    x = torch.randn(90, 64)
    dense = flops(model, x)
    with pytest.warns(UserWarning, match="saw 90 valid tokens"):
        summary = loraven.convert(model, [x])
    assert len(summary.layers) == 1
    for level, found in summary.levels.items():
        loraven.set_budget(model, level)
        share = flops(model, x) / dense
        assert found.model_macs_fraction == pytest.approx(share, abs=1e-12)


def test_without_sensitivity_each_layer_counts_by_its_own_share():
    """The scale of a layer's output does not matter then."""
    plans = []
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
        with torch.no_grad():
            model[1].weight.mul_(scale)
            model[1].bias.mul_(scale)
        x = torch.randn(400, 64) * torch.logspace(0, -2, 64)
        summary = loraven.convert(model, [x], sensitivity=False)
        plans.append([layer.ranks for layer in summary.layers])
    assert plans[0] == plans[1]


def test_padding_counts_as_cost(bert, sentences):
    model, data = bert(), sentences()
    found = loraven.calibrate.calibrate(
        model, data, loraven.eligible.find_targets(model)[0]
    )
    assert found.rows["encoder.layer.0.output.dense"] == 9 * 16 * 12
    assert found.calls["encoder.layer.0.output.dense"] == 9
