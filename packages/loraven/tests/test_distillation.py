# SPDX-License-Identifier: Apache-2.0
"""Training the factors: what gets better, and what must stay as it is."""

import copy

import pytest
import torch
from torch import nn

import loraven
from loraven.batches import evaluating

LEVELS = (0.3, 0.5, 0.7, 1.0)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(48, 96), nn.GELU(), nn.Dropout(0.5), nn.Linear(96, 48)
    )


def data(count=16, seed=1):
    """Inputs of which some directions matter more than others."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0.5, -1, 48)
    return [torch.randn(32, 48, generator=generator) * scale for _ in range(count)]


@pytest.fixture
def converted():
    found = model()
    loraven.convert(found, data(), levels=LEVELS)
    return found


@torch.no_grad()
def errors(found, batches):
    """Relative squared error of every level against budget 1.0."""
    result = {}
    with evaluating(found):
        loraven.set_budget(found, 1.0)
        wanted = [found(x) for x in batches]
        for level in LEVELS[:-1]:
            loraven.set_budget(found, level)
            parts = zip(batches, wanted, strict=True)
            off = sum((found(x) - y).square().sum() for x, y in parts)
            result[level] = float(off / sum(y.square().sum() for y in wanted))
        loraven.set_budget(found, 1.0)
    return result


@pytest.mark.critical
def test_every_level_gets_better_on_unseen_data(converted):
    fresh = data(8, seed=2)
    before = errors(converted, fresh)
    summary = loraven.distill(converted, data(64), steps=150, lr=3e-4)
    after = errors(converted, fresh)
    assert not summary.restored, summary.reason
    assert list(summary.after) == list(LEVELS[:-1])
    for level in LEVELS[:-1]:
        assert after[level] < 0.99 * before[level]
        assert summary.after[level] < summary.before[level]
    assert "150 steps" in str(summary)


def test_the_dense_form_and_everything_else_stay(converted):
    state = {k: v.clone() for k, v in converted.state_dict().items()}
    converted.train()
    loraven.set_budget(converted, 0.5)
    flags = [p.requires_grad for p in converted.parameters()]
    x = data(1)[0]
    with evaluating(converted):
        dense = loraven.at_budget(converted, 1.0)(x)
    loraven.distill(converted, data(64), steps=40, lr=3e-4)
    changed = {
        name
        for name, value in converted.state_dict().items()
        if not torch.equal(value, state[name])
    }
    names = {name.rpartition(".")[2] for name in changed}
    assert {"up", "down"} <= names <= {"up", "down", "down_bias", "up_bias", "order"}
    assert converted.training
    assert loraven.get_budget(converted) == 0.5
    assert [p.requires_grad for p in converted.parameters()] == flags
    assert all(p.grad is None for p in converted.parameters())
    assert not any(m.training_form for m in converted if hasattr(m, "training_form"))
    with evaluating(converted):
        assert torch.equal(loraven.at_budget(converted, 1.0)(x), dense)


def test_the_fast_forms_are_those_of_the_trained_factors(converted):
    loraven.distill(converted, data(64), steps=40, lr=3e-4)
    x = data(1, seed=3)[0]
    assert any(p.form == "gauge" for m in (converted[0], converted[3]) for p in m.plans)
    for level in LEVELS[:-1]:
        loraven.set_budget(converted, level)
        for layer, width in ((converted[0], 48), (converted[3], 96)):
            rank = layer.plans[layer.level].rank
            values = torch.randn(64, width)
            if layer.plans[layer.level].form != "dense":
                low = values @ layer.down[:rank].T + layer.down_bias[:rank]
                wanted = low @ layer.up[:rank] + layer.up_bias
                torch.testing.assert_close(
                    layer(values), wanted.detach(), atol=1e-4, rtol=1e-4
                )
    with evaluating(converted):
        before = [loraven.at_budget(converted, level)(x) for level in LEVELS]
        again = model().eval()
        loraven.convert(again, data(), levels=LEVELS)
        again.load_state_dict(converted.state_dict())
        after = [loraven.at_budget(again, level)(x) for level in LEVELS]
    assert all(map(torch.equal, before, after))


def test_the_same_seed_trains_the_same(converted):
    other = copy.deepcopy(converted)
    third = copy.deepcopy(converted)
    loraven.distill(converted, data(64), steps=40, lr=3e-4, seed=5)
    loraven.distill(other, data(64), steps=40, lr=3e-4, seed=5)
    loraven.distill(third, data(64), steps=40, lr=3e-4, seed=6)
    assert torch.equal(converted[0].up, other[0].up)
    assert not torch.equal(converted[0].up, third[0].up)


@pytest.mark.critical
def test_what_got_worse_is_put_back_and_said(converted):
    before = {k: v.clone() for k, v in converted.state_dict().items()}
    summary = loraven.distill(converted, data(), steps=30, lr=3.0)
    assert summary.restored
    assert "held-out loss at 0.3 went from" in summary.reason
    assert summary.after == summary.before
    assert "put back" in str(summary)
    after = converted.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_puts_everything_back(converted, error):
    before = {k: v.clone() for k, v in converted.state_dict().items()}
    calls = []

    def loss(output, reference):
        calls.append(1)
        if len(calls) == 30:
            raise error("stop")
        return (output - reference).square().mean()

    with pytest.raises(error, match="stop"):
        loraven.distill(converted, data(), steps=50, loss=loss)
    after = converted.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not converted[0].training_form
    assert not converted[0].up.requires_grad
    assert loraven.get_budget(converted) == 1.0


def test_padding_does_not_count():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model()

        def forward(self, x, attention_mask):
            return self.body(x)

    def batches(fill):
        found = []
        for x in data(12):
            mask = torch.arange(8)[None] < torch.tensor([3, 8, 5, 1])[:, None]
            values = x.view(4, 8, 48)
            values = torch.where(mask[..., None], values, fill)
            found.append({"x": values, "attention_mask": mask.long()})
        return found

    trained = []
    for fill in (0.0, 50.0):
        tokens = Tokens()
        loraven.convert(tokens, batches(0.0), levels=(0.5, 1.0))
        summary = loraven.distill(tokens, batches(fill), steps=5)
        trained.append((tokens.body[0].up, summary.after[0.5]))
    torch.testing.assert_close(trained[0], trained[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": []}, ValueError, r"data: 0 batch\(es\)"),
        ({"data": torch.ones(2, 48)}, TypeError, "data is an iterable of batches"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"steps": 1.5}, TypeError, "steps must be an int"),
        ({"lr": float("nan")}, ValueError, "lr=nan"),
        ({"lr": 0}, ValueError, "lr=0"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"loss": 3}, TypeError, "loss=3"),
        ({"loss": lambda a, b: (a - b).sum() / 0}, ValueError, "not finite"),
    ],
)
def test_bad_arguments(converted, options, error, message):
    before = {k: v.clone() for k, v in converted.state_dict().items()}
    with pytest.raises(error, match=message):
        loraven.distill(converted, **({"data": data(), "steps": 3} | options))
    after = converted.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_half_precision_and_unconverted_models_are_refused(converted):
    with pytest.raises(ValueError, match=r"torch.bfloat16.*float\(\) first"):
        loraven.distill(converted.bfloat16(), [x.bfloat16() for x in data()])
    with pytest.raises(RuntimeError, match="not converted"):
        loraven.distill(model(), data())
