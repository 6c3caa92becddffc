# SPDX-License-Identifier: Apache-2.0
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import loraven
from loraven.nested import NestedLinear

LEVELS = (0.3, 0.5, 0.7, 1.0)


def ids(seed=0, rows=16, length=24):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, length), generator=random)


@pytest.fixture(params=["bert", "gpt2", "mlp"])
def case(request, bert, gpt2, mlp, sentences):
    """A model, its calibration batches, and the layers that are to be converted."""
    if request.param == "bert":
        return bert(), sentences(), 12
    if request.param == "gpt2":
        return gpt2(), [(ids(seed),) for seed in range(2)], 8
    return mlp(), [torch.randn(150, 64) for _ in range(2)], 3


@torch.no_grad()
def out(model, batch):
    if isinstance(batch, dict):
        return model(**batch).last_hidden_state
    found = model(batch) if isinstance(batch, torch.Tensor) else model(*batch)
    return found if isinstance(found, torch.Tensor) else found.logits


def counted(model, batch):
    """Matrix products of the layers' own, by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        out(model, batch)
    return counter.get_total_flops()


@pytest.mark.critical
def test_full_budget_and_revert_are_equal_to_the_bit(case):
    model, data, count = case
    modules = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: module.training for name, module in modules.items()}
    before = [out(model, batch) for batch in data]
    summary = loraven.convert(model, data)
    assert len(summary.layers) == count
    assert loraven.get_budget(model) == 1.0
    for batch, expected in zip(data, before, strict=True):
        assert torch.equal(out(model, batch), expected)
    loraven.set_budget(model, 0.5)
    assert not torch.equal(out(model, data[0]), before[0])
    assert loraven.revert(model) is model
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert {name: module.training for name, module in after.items()} == flags
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    for batch, expected in zip(data, before, strict=True):
        assert torch.equal(out(model, batch), expected)
    with pytest.raises(RuntimeError, match="was not converted"):
        loraven.revert(model)


@pytest.mark.critical
def test_counted_work_is_within_every_level(case):
    model, data, _ = case
    # What is not converted: attention counts nothing in the fused kernel, a tied
    # head is the rest.
    dense = counted(model, data[0])
    summary = loraven.convert(model, data)
    layers = sum(
        2 * layer.in_features * layer.out_features * rows(model, layer.name, data[0])
        for layer in summary.layers
    )
    rest = dense - layers
    before = 0
    for level in LEVELS:
        assert loraven.set_budget(model, level) == level
        spent = counted(model, data[0])
        assert before < spent <= rest + level * layers
        # A budget is used, not only kept.
        assert spent >= rest + (level - 0.06) * layers
        fraction = summary.levels[level].cost_fraction
        assert fraction <= level
        assert (spent - rest) / layers == pytest.approx(fraction, abs=1e-9)
        before = spent
    assert summary.levels[1.0].model_macs_fraction == 1.0


def rows(model, name, batch):
    """How many vectors a layer sees, by a hook of the test's own."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(
        lambda m, args, y: seen.append(y[..., 0].numel())
    )
    out(model, batch)
    handle.remove()
    return sum(seen)


def test_ranks_are_nested_and_errors_fall_as_the_level_rises(case):
    model, data, _ = case
    summary = loraven.convert(model, data)
    for layer in summary.layers:
        ranks = [layer.ranks[level] for level in LEVELS]
        errors = [layer.expected_error[level] for level in LEVELS]
        assert ranks == sorted(ranks)
        assert errors == sorted(errors, reverse=True)
        assert all(0 <= error <= 1 for error in errors)
        assert layer.forms[1.0] == "dense"
        assert errors[-1] == 0.0
    sizes = [found.resident_bytes for found in summary.levels.values()]
    assert sizes == sorted(sizes)
    assert str(summary).startswith(f"{len(summary.layers)} layers converted")
    assert all(layer.name in str(summary) for layer in summary.layers)


def test_the_error_is_what_the_summary_expects():
    """One layer alone: its tail is the measured error on the calibration data."""
    model = nn.Sequential(nn.Linear(64, 96))
    x = torch.randn(4000, 64) @ torch.randn(64, 64) * torch.logspace(0, -2, 64)
    with torch.no_grad():
        before = model(x)
    summary = loraven.convert(model, [x], sensitivity=False)
    (layer,) = summary.layers
    for level in (0.3, 0.5, 0.7):
        loraven.set_budget(model, level)
        error = (out(model, x) - before).double().square().sum()
        share = error / (before - before.mean(0)).double().square().sum()
        assert share.item() == pytest.approx(layer.expected_error[level], rel=1e-3)


def test_sensitivity_beats_equal_weights_where_layers_matter_differently():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.loud = nn.Linear(64, 64)
            self.quiet = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            return self.loud(x) + 1e-3 * sum(layer(x) for layer in self.quiet)

    x = torch.randn(500, 64)
    errors = []
    for sensitivity in (False, True):
        torch.manual_seed(0)
        model = Sum().eval()
        before = out(model, x)
        loraven.convert(model, [x], sensitivity=sensitivity)
        loraven.set_budget(model, 0.5)
        errors.append((out(model, x) - before).norm() / before.norm())
    assert errors[1] < 0.1 * errors[0]


def test_rows_do_not_depend_on_each_other(mlp):
    model, x = mlp(), torch.randn(300, 64)
    loraven.convert(model, [x])
    for level in LEVELS:
        loraven.set_budget(model, level)
        alone = torch.cat([out(model, row[None]) for row in x[:40]])
        together = out(model, x)[:40]
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
        changed = x.clone()
        changed[40:] = 1e3
        torch.testing.assert_close(
            out(model, changed)[:40], together, rtol=1e-6, atol=1e-6
        )


def test_hooks_go_on_firing_and_handles_go_on_removing(mlp):
    model, x = mlp(), torch.randn(300, 64)
    seen = []
    first = model[0]
    handle = first.register_forward_hook(lambda m, args, y: seen.append("old"))
    loraven.convert(model, [x])
    seen.clear()
    out(model, x)
    assert seen == ["old"]
    other = model[0].register_forward_hook(lambda m, args, y: seen.append("new"))
    handle.remove()
    seen.clear()
    out(model, x)
    assert seen == ["new"]
    loraven.revert(model)
    assert model[0] is first
    out(model, x)
    assert seen == ["new", "new"]
    other.remove()
    out(model, x)
    assert len(seen) == 2


def test_a_training_model_stays_in_training(mlp):
    model = mlp().train()
    model[1].eval()
    loraven.convert(model, [torch.randn(300, 64)])
    assert [m.training for m in model] == [True, False, True, True, True]
    model.eval()
    assert not any(m.training for m in loraven.revert(model).modules())


def test_skipped_layers_come_with_reasons(gpt2):
    summary = loraven.convert(gpt2(), [(ids(rows=24),)])
    assert summary.skipped == {
        "lm_head": "tied: its weight is 'transformer.wte.weight'"
    }
    assert "skipped 'lm_head': tied" in str(summary)


def test_patterns_choose_layers(bert, sentences):
    model = bert()
    options = {"include": ["encoder.*"], "exclude": ["*.attention.*", "pooler*"]}
    summary = loraven.convert(model, sentences(), **options)
    names = [layer.name for layer in summary.layers]
    assert len(names) == 4
    assert not any("attention" in name for name in names)
    assert summary.skipped["pooler.dense"] == "not in include"
    converted = [n for n, m in model.named_modules() if isinstance(m, NestedLinear)]
    assert converted == names


@pytest.mark.parametrize("cost", ["macs", "energy", lambda m, n, r, form: 1.0 * r])
def test_costs(mlp, cost):
    model, x = mlp(), torch.randn(300, 64)
    before = out(model, x)
    summary = loraven.convert(model, [x], cost=cost, levels=(0.6, 1.0))
    assert summary.levels[0.6].cost_fraction <= 0.6
    assert summary.cost == (cost if isinstance(cost, str) else "<lambda>")
    assert torch.equal(out(model, x), before)


def test_latency_is_a_cost():
    model = nn.Sequential(nn.Linear(768, 768), nn.Linear(768, 768))
    data = [torch.randn(64, 768) for _ in range(25)]
    summary = loraven.convert(model, data, cost="latency", levels=(0.8, 1.0))
    assert 0 < summary.levels[0.8].cost_fraction <= 0.8
    assert summary.levels[1.0].cost_fraction == 1.0


def test_levels_without_one_still_have_their_largest(mlp):
    model = mlp()
    loraven.convert(model, [torch.randn(300, 64)], levels=[0.6, 0.3])
    assert loraven.get_budget(model) == 0.6
    assert loraven.set_budget(model, 1.0) == 0.6


def test_conversion_is_repeatable(bert, sentences):
    states = []
    for _ in range(2):
        model = bert()
        loraven.convert(model, sentences())
        states.append(model.state_dict())
    one, two = states
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_it_says_nothing_when_all_is_well(mlp, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loraven.convert(mlp(), [torch.randn(300, 64)])
    assert capsys.readouterr() == ("", "")


def test_half_precision(mlp):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = mlp().to(dtype)
        x = torch.randn(300, 64).to(dtype)
        before = out(model, x)
        loraven.convert(model, [x])
        assert torch.equal(out(model, x), before)
        loraven.set_budget(model, 0.7)
        found = out(model, x)
        assert found.dtype == dtype
        assert (found - before).double().norm() < 0.5 * before.double().norm()


def test_layers_whose_weights_are_read_by_others_are_left_alone():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
            layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
            self.fused = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.last = nn.Linear(64, 64)

        def forward(self, x):
            x = self.attention(x, x, x)[0]
            return self.last(self.fused(x))

    model, x = Attending().eval(), torch.randn(16, 20, 64)
    before = out(model, x)
    summary = loraven.convert(model, [x])
    assert [layer.name for layer in summary.layers] == ["last"]
    assert summary.skipped["attention.out_proj"] == "never ran during calibration"
    assert "fast path" in summary.skipped["fused.layers.0.linear1"]
    assert torch.equal(out(model, x), before)
    # With the fast path turned off its layers are converted, and do run.
    loraven.revert(model)
    model.fused.layers[0].activation_relu_or_gelu = 0
    before = out(model, x)
    summary = loraven.convert(model, [x], exclude=["last"])
    assert [layer.name for layer in summary.layers] == [
        "fused.layers.0.linear1",
        "fused.layers.0.linear2",
    ]
    assert torch.equal(out(model, x), before)
    loraven.set_budget(model, 0.5)
    assert not torch.equal(out(model, x), before)


def test_a_layer_is_paid_for_as_often_as_it_runs():
    class Often(nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.thrice = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            first = self.once(x)
            for scale in (1.0, 2.0, 3.0):
                first = first + self.thrice(scale * x)
            return first

    model, x = Often(), torch.randn(400, 64)
    dense = counted(model, x)
    summary = loraven.convert(model, [x])
    for level in LEVELS:
        loraven.set_budget(model, level)
        assert counted(model, x) <= level * dense
        expected = summary.levels[level].cost_fraction
        assert counted(model, x) / dense == pytest.approx(expected, abs=1e-12)


def test_a_conversion_in_inference_mode_can_be_trained_later(mlp):
    model, x = mlp(), torch.randn(300, 64)
    with torch.inference_mode():
        loraven.convert(model, [x])
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    loraven.set_budget(model, 0.3)
    for module in model.modules():
        if isinstance(module, NestedLinear):
            module.training_form = True
            module.up.requires_grad_(True)
    model(x).square().mean().backward()
    assert model[0].up.grad.abs().sum() > 0


@pytest.mark.critical
def test_factors_keep_what_the_output_depends_on():
    """Four outputs matter, and they vary least: only the metric can know."""

    class Picking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(x)[:, :4]

    torch.manual_seed(0)
    model, x = Picking(), torch.randn(2000, 64)
    with torch.no_grad():
        model.layer.weight[4:] *= 10
    before = model(x)
    errors = []
    for sensitivity in (True, False):
        loraven.convert(model, [x], levels=(0.3, 1.0), sensitivity=sensitivity)
        loraven.set_budget(model, 0.3)
        errors.append((out(model, x) - before).square().sum() / before.square().sum())
        loraven.revert(model)
    assert errors[0] < 1e-2
    assert errors[1] > 0.5
