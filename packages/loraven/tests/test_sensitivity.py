# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from loraven.calibrate import calibrate
from loraven.eligible import find_targets
from loraven.factorize import output_pca
from loraven.sensitivity import sensitivities


def prepared(model, data):
    targets, _ = find_targets(model)
    found = calibrate(model, data, targets)
    factors = {
        target.name: output_pca(
            target.matrix(), target.module.bias, found.moments[target.name]
        )
        for target in targets
    }
    return targets, factors, found.examples


def test_of_one_layer_alone_it_is_the_relative_error_itself():
    model = nn.Sequential(nn.Linear(64, 96)).double()
    x = torch.randn(90, 64).double() * torch.logspace(0, -1, 64)
    with pytest.warns(UserWarning, match="90 valid tokens"):
        targets, factors, examples = prepared(model, [x])
    found = sensitivities(model, examples, targets, factors)
    # The rank of 0.4 of the multiply-adds: r (64 + 96 - r) = 0.4 * 64 * 96.
    rank = max(r for r in range(64) if r * (160 - r) <= 0.4 * 64 * 96)
    part = factors["0"]
    with torch.no_grad():
        y = model(x)
        low = x @ part.down[:rank].T + part.down_bias[:rank]
        change = y - (low @ part.up[:rank] + part.up_bias)
    relative = change.square().sum(1) / y.square().sum(1)
    expected = relative.mean() / part.tail[rank]
    assert found["0"] == pytest.approx(float(expected), rel=1e-9)


def test_what_the_output_ignores_has_no_weight():
    class Ignoring(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    model, x = Ignoring(), torch.randn(300, 64)
    found = sensitivities(model, *reordered(prepared(model, [x])))
    assert found["unused"] == 0.0
    assert found["used"] > 0


def reordered(found):
    targets, factors, examples = found
    return examples, targets, factors


def test_a_layer_without_energy_has_no_weight():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.zero_()
    found = sensitivities(model, *reordered(prepared(model, [torch.randn(300, 64)])))
    assert found["0"] == 0.0


def test_padding_does_not_count(bert, sentences):
    model, data = bert(), sentences()
    targets, factors, examples = prepared(model, data)
    one = sensitivities(model, examples, targets, factors)
    padded = [
        {
            name: nn.functional.pad(value, (0, 6), value=9 * (name == "input_ids"))
            for name, value in batch.items()
        }
        for batch in examples
    ]
    two = sensitivities(model, padded, targets, factors)
    for name in one:
        assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-9)
