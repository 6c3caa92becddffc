# SPDX-License-Identifier: Apache-2.0
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from loraven.batches import Judge
from loraven.calibrate import calibrate, count_macs
from loraven.eligible import find_targets


def inputs(model, name, batches, keep):
    """All valid inputs of one layer in float64, by a hook of the test's own."""
    found = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return torch.cat(
        [
            (x[mask] if x.ndim == 3 and keep else x.reshape(-1, x.shape[-1])).double()
            for x, mask in zip(found, masks, strict=True)
        ]
    )


@pytest.mark.critical
def test_moments_equal_numpy_over_valid_tokens_alone(bert, sentences):
    model, batches = bert(), sentences()
    targets, _ = find_targets(model)
    result = calibrate(model, batches, targets)
    assert not result.skipped
    for name in (
        "encoder.layer.0.attention.self.query",
        "encoder.layer.1.output.dense",
    ):
        x = inputs(model, name, batches, keep=True)
        moments = result.moments[name]
        assert moments.tokens == len(x)
        assert np.allclose(moments.mean, x.mean(0), atol=1e-6)
        expected = np.cov(x.T.numpy(), bias=True)
        assert np.allclose(moments.covariance, expected, atol=1e-5)
        # With the padding they would be something else.
        wrong = inputs(model, name, batches, keep=False)
        assert not np.allclose(moments.mean, wrong.mean(0), atol=1e-3)
    pooled = result.moments["pooler.dense"]
    assert pooled.tokens == 9 * 16
    assert result.tokens == sum(int(b["attention_mask"].sum()) for b in batches)


def test_what_padding_holds_does_not_matter(bert, sentences):
    model, batches = bert(), sentences()
    targets, _ = find_targets(model)
    other = [
        batch | {"input_ids": batch["input_ids"] + 7 * (1 - batch["attention_mask"])}
        for batch in batches
    ]
    one, two = (calibrate(model, data, targets) for data in (batches, other))
    for name in one.moments:
        torch.testing.assert_close(
            one.moments[name].covariance,
            two.moments[name].covariance,
            rtol=1e-6,
            atol=1e-6,
        )


def test_equal_inputs_share_their_statistics(bert, sentences):
    model = bert()
    targets, _ = find_targets(model)
    moments = calibrate(model, sentences(), targets).moments
    at = "encoder.layer.0.attention.self."
    assert moments[at + "query"] is moments[at + "key"] is moments[at + "value"]
    assert len({id(found) for found in moments.values()}) == 13 - 2 * 2


class Branches(nn.Module):
    """``b`` reads what ``a`` reads in the first batch alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(64, 64) for _ in range(3))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        first = self.a(x)
        # In place: the same memory with other values.
        second = self.c(x.add_(1.0))
        return first + second + self.b(x if self.calls > 1 else x - 0)


def test_changed_memory_is_another_input():
    model = Branches()
    targets, _ = find_targets(model)
    data = [torch.randn(200, 64) for _ in range(2)]
    mean = torch.cat(data).mean(0).double()
    result = calibrate(model, data, targets)
    torch.testing.assert_close(result.moments["a"].mean, mean, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(result.moments["c"].mean, mean + 1, atol=1e-6, rtol=1e-6)
    # It went its own way first, so that sums of its own are right afterwards, too.
    torch.testing.assert_close(result.moments["b"].mean, mean + 1, atol=1e-6, rtol=1e-6)


class Parting(Branches):
    def forward(self, x):
        self.calls += 1
        return self.a(x) + self.b(x if self.calls == 1 else x + 1)


def test_a_layer_that_leaves_its_owner_is_skipped():
    model = Parting()
    targets, _ = find_targets(model)
    result = calibrate(model, [torch.randn(200, 64) for _ in range(2)], targets)
    assert result.moments.keys() == {"a"}
    assert result.skipped["b"] == "its input is that of 'a' in some batches"
    assert result.skipped["c"] == "never ran during calibration"


def test_a_layer_that_runs_twice_counts_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)

        def forward(self, x):
            return self.a(input=x) + self.a(input=2 * x)

    model, x = Twice(), torch.randn(300, 64)
    result = calibrate(model, [x], find_targets(model)[0])
    both = torch.cat([x, 2 * x]).double()
    torch.testing.assert_close(
        result.moments["a"].mean, both.mean(0), atol=1e-6, rtol=1e-6
    )
    assert (result.rows["a"], result.calls["a"]) == (600, 2)


def test_a_layer_whose_input_the_mask_does_not_fit_is_skipped():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)

        def forward(self, x, attention_mask):
            return self.a(x.transpose(0, 1))

    model = TimeFirst()
    mask = torch.ones(8, 40)
    mask[0, 5:] = 0
    batch = {"x": torch.randn(8, 40, 64), "attention_mask": mask}
    targets, _ = find_targets(model)
    result = calibrate(model, [batch], targets)
    assert "(40, 8, 64) and (8, 40)" in result.skipped["a"]
    judge = Judge(None, lambda b: b["attention_mask"].T > 0, metrics=False)
    whole = calibrate(model, [batch], targets, judge)
    assert whole.moments["a"].tokens == int(mask.sum())


def test_few_tokens_give_one_warning_with_layer_and_count(mlp):
    model = mlp()
    targets, _ = find_targets(model)
    with pytest.warns(UserWarning, match=r"'4' \(3 layers in all\) saw 100 ") as caught:
        calibrate(model, [torch.randn(100, 64)], targets)
    assert len(caught) == 1
    assert "128 input features" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [torch.randn(256, 64)], targets)


def test_values_that_are_not_finite_name_the_layer(mlp):
    model = mlp()
    x = torch.randn(300, 64)
    x[7, 3] = torch.inf
    with pytest.raises(ValueError, match="input of layer '0'"):
        calibrate(model, [x], find_targets(model)[0])


def test_no_batch_is_an_error(mlp):
    model = mlp()
    with pytest.raises(ValueError, match="it has no batch"):
        calibrate(model, iter(()), find_targets(model)[0])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_pass_leaves_no_hook_and_no_flag(mlp, error):
    model = mlp().train()
    model[1].eval()

    def data():
        yield torch.randn(300, 64)
        raise error("stop")

    flags = [module.training for module in model.modules()]
    with pytest.raises(error, match="stop"):
        calibrate(model, data(), find_targets(model)[0])
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_macs_are_those_of_torchs_counter(bert, sentences):
    model, (batch,) = bert(), sentences(1)
    targets, _ = find_targets(model)
    total, own = count_macs(model, batch, targets)
    # Written out as products: the fused kernel of the CPU is not counted by torch.
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    assert 2 * total == counter.get_total_flops()
    assert own["encoder.layer.0.intermediate.dense"] == 16 * 12 * 64 * 128
    assert own["pooler.dense"] == 16 * 64 * 64
    assert sum(own.values()) < total


@pytest.mark.critical
def test_a_layer_that_the_output_does_not_need_is_left_alone():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 64)
            self.other = nn.Linear(64, 64)

        def forward(self, x):
            h = self.body(x).relu()
            return self.head(h), self.other(h)

    torch.manual_seed(0)
    model = TwoHeads()
    targets, _ = find_targets(model)
    data = [torch.randn(200, 64)]
    result = calibrate(model, data, targets, Judge())
    assert set(result.metrics) == set(result.moments) == {"body", "head"}
    assert "does not need it" in result.skipped["other"]
    both = calibrate(model, data, targets, Judge(lambda found: torch.cat(found, -1)))
    assert set(both.metrics) == {"body", "head", "other"}
    alone = calibrate(model, data, targets)
    assert (set(alone.moments), alone.metrics) == (set(both.moments), {})
    for name, moments in alone.moments.items():
        assert torch.equal(moments.covariance, both.moments[name].covariance)
