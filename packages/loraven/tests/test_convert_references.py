# SPDX-License-Identifier: Apache-2.0
"""Layers that a model does not call by the place where they stand."""

import pytest
import torch
from torch import nn

import loraven


class Listed(nn.Module):
    """Calls one of its layers through a plain list."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.three = nn.Linear(64, 64)
        self.steps = [self.two]

    def forward(self, x):
        return self.three(self.steps[0](self.one(x).relu()).relu())


@pytest.mark.critical
def test_a_layer_that_another_reference_calls_is_left_alone():
    torch.manual_seed(0)
    model, x = Listed().eval(), torch.randn(300, 64)
    kept, before = model.two, model(x)
    summary = loraven.convert(model, [x])
    assert summary.skipped == {"two": "it is called by another reference"}
    assert [layer.name for layer in summary.layers] == ["one", "three"]
    assert model.two is kept
    assert not kept._forward_pre_hooks
    assert torch.equal(model(x), before)
    # The budget is that of the others alone.
    loraven.set_budget(model, 0.5)
    ran = [
        (m.in_features, m.out_features, *m.plans[m.level])
        for m in (model.one, model.three)
    ]
    spent = sum(
        rank * (i + o - rank if form == "gauge" else i + o) for i, o, rank, form in ran
    )
    assert spent <= 0.5 * 2 * 64 * 64


def test_nothing_is_left_where_no_layer_is_reached():
    model, x = Listed().eval(), torch.randn(300, 64)
    with pytest.raises(ValueError, match="'two': it is called by another reference"):
        loraven.convert(model, [x], include=["two"])
    assert isinstance(model.two, nn.Linear)
    assert "_loraven" not in vars(model)
    loraven.convert(model, [x], include=["one"])


def test_a_model_that_refuses_the_new_layers_is_as_before():
    class Picky(Listed):
        def forward(self, x):
            if type(self.three) is not nn.Linear:
                raise RuntimeError("not a Linear")
            return self.three(x)

    model, x = Picky().eval(), torch.randn(300, 64)
    modules = list(model.modules())
    with pytest.raises(RuntimeError, match="not a Linear"):
        loraven.convert(model, [x])
    assert list(model.modules()) == modules
    assert torch.equal(model(x), model.three(x))
