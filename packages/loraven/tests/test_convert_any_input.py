# SPDX-License-Identifier: Apache-2.0
"""A level is kept on inputs of other proportions than those of the calibration."""

import pytest
import torch
from torch import nn

import loraven

LEVELS = (0.3, 0.5, 0.7)


class TwoSides(nn.Module):
    """A wide and a narrow part that run on inputs of their own lengths."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        self.two = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))

    def forward(self, x, y):
        return self.one(x).mean(1, keepdim=True) + self.two(y)


def spent(model, inputs, sizes):
    """Multiply-adds of the converted layers, by the plans that run."""
    found = 0

    def look(module, args):
        nonlocal found
        rows = args[0][..., 0].numel()
        out, in_ = module.out_features, module.in_features
        plan = None if sizes is None else sizes[id(module)]
        if plan is None or plan.form == "dense":
            found += rows * out * in_
        elif plan.form == "gauge":
            found += rows * plan.rank * (in_ + out - plan.rank)
        else:
            found += rows * plan.rank * (in_ + out)

    modules = vars(model)["_loraven"].modules
    handles = [m.register_forward_pre_hook(look) for m in modules]
    with torch.no_grad():
        model(*inputs) if isinstance(inputs, tuple) else model(**inputs)
    for handle in handles:
        handle.remove()
    return found


def assert_kept(model, batches):
    for number, level in enumerate(LEVELS):
        loraven.set_budget(model, level)
        modules = vars(model)["_loraven"].modules
        sizes = {id(module): module.plans[number] for module in modules}
        for batch in batches:
            share = spent(model, batch, sizes) / spent(model, batch, None)
            assert share <= level, (level, share)


@pytest.mark.critical
def test_a_level_is_kept_whatever_the_lengths_are():
    torch.manual_seed(0)
    model = TwoSides().eval()
    data = [(torch.randn(8, 64, 64), torch.randn(8, 2, 64)) for _ in range(13)]
    loraven.convert(model, data)
    assert_kept(model, [data[0], (torch.randn(3, 1, 64), torch.randn(3, 50, 64))])


@pytest.mark.critical
def test_a_pooler_has_a_budget_of_its_own(bert, sentences):
    model = bert()
    loraven.convert(model, sentences(), output=lambda found: found.pooler_output)
    names = vars(model)["_loraven"].names
    assert "pooler.dense" in names
    assert_kept(model, [sentences(1)[0], sentences(1, length=3)[0]])


def test_layers_that_run_equally_often_share_a_budget():
    """Where it pays, one of them gets more than the level and the other less."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.loud, self.quiet = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.loud(x) + 1e-2 * self.quiet(x)

    torch.manual_seed(0)
    data = [torch.randn(400, 64)]
    summary = loraven.convert(Sum().eval(), data, levels=(0.5, 1.0))
    loud, quiet = (layer.ranks[0.5] for layer in summary.layers)
    assert loud > 2 * quiet


def test_a_group_that_cannot_reach_a_level_is_named():
    torch.manual_seed(0)
    model = TwoSides().eval()
    model.two = nn.Linear(64, 32)
    model.one[2] = nn.Linear(128, 32)
    data = [(torch.randn(8, 64, 64), torch.randn(8, 2, 64)) for _ in range(13)]
    message = r"layer 'two'.*Give 0\.\d+ or more"
    with pytest.raises(ValueError, match=message) as caught:
        loraven.convert(model, data, levels=(0.2, 1.0))
    smallest = float(str(caught.value).split("Give ")[1].split()[0])
    loraven.convert(model, data, levels=(smallest, 1.0))


def test_a_cost_that_no_reduced_form_improves_is_said():
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    with pytest.raises(ValueError, match=r"layer '0'.*costs less than"):
        loraven.convert(model, [torch.randn(200, 64)], cost=lambda *sizes: 1.0)
