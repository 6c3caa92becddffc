# SPDX-License-Identifier: Apache-2.0
"""Models that share tensors: what is done to one shows in the other, or in neither."""

import copy
import threading

import pytest
import torch
from torch import nn

import loraven

LEVELS = (0.3, 0.5, 0.7)


def data(count=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0.5, -1, 64)
    return [torch.randn(32, 64, generator=generator) * scale for _ in range(count)]


@pytest.fixture
def pair(mlp):
    """A converted model and a twin of it that was made at once."""
    model = mlp()
    loraven.convert(model, data())
    assert any(p.form == "gauge" for p in model[0].plans)
    return model, loraven.at_budget(model, 0.5)


@torch.no_grad()
def outputs(model, x):
    """At all reduced levels."""
    found = []
    for level in LEVELS:
        loraven.set_budget(model, level)
        found.append(model(x))
    return found


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.critical
@pytest.mark.parametrize("trained", [0, 1])
def test_distilling_either_changes_both(pair, trained, tmp_path, mlp):
    x = data(1, seed=2)[0]
    before = outputs(pair[0], x)
    summary = loraven.distill(pair[trained], data(64), steps=30, lr=3e-5)
    assert not summary.restored, summary.reason
    found = outputs(pair[0], x)
    assert not same(found, before)
    assert same(outputs(pair[1], x), found)
    loraven.save(pair[1], tmp_path)
    loaded = mlp()
    loraven.load(loaded, tmp_path)
    assert same(outputs(loaded, x), found)


@pytest.mark.critical
@pytest.mark.parametrize("loaded", [0, 1])
def test_other_weights_in_one_make_both_stale(pair, loaded, mlp):
    x = data(1)[0]
    right = {
        name: value.clone()
        for name, value in pair[0].state_dict().items()
        if name.endswith(("weight", "bias"))
    }
    before = outputs(pair[0], x)
    for model in pair:
        loraven.set_budget(model, 0.5)
    pair[loaded].load_state_dict(mlp(seed=1).state_dict(), strict=False)
    for model in pair:
        with pytest.raises(RuntimeError, match="stale, convert again"):
            model(x)
        with pytest.raises(RuntimeError, match="stale, convert again"):
            loraven.set_budget(model, 0.3)
    pair[loaded].load_state_dict(right, strict=False)
    for model in pair:
        assert same(outputs(model, x), before)


def test_a_model_that_was_given_tensors_of_its_own_leaves_its_twin_alone(pair, mlp):
    model, twin = pair
    x = data(1)[0]
    before = outputs(twin, x)
    other = mlp(seed=1)
    loraven.convert(other, data())
    # The same plans, so that everything of the one fits into the other.
    other_plans = [layer.plans for layer in (other[0], other[2], other[4])]
    if other_plans != [layer.plans for layer in (model[0], model[2], model[4])]:
        state = {k: v + 0.1 for k, v in model.state_dict().items() if "up" in k}
    else:
        state = other.state_dict()
    model.load_state_dict(copy.deepcopy(state), strict=False, assign=True)
    assert same(outputs(twin, x), before)
    assert not same(outputs(model, x), before)
    # A layer's own new weight makes its own factors stale, and no one else's.
    model[0].weight = nn.Parameter(torch.randn_like(model[0].weight))
    with pytest.raises(RuntimeError, match="layer '0': its weights have changed"):
        loraven.set_budget(model, 0.3)
    assert same(outputs(twin, x), before)
    with pytest.raises(RuntimeError, match="layer '0'"):
        loraven.set_budget(model, 0.3)


def test_copies_are_no_twins(pair):
    model, _ = pair
    x = data(1)[0]
    copied, before = copy.deepcopy(model), outputs(model, x)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(RuntimeError, match="layer '0'"):
        loraven.set_budget(model, 0.5)
    assert same(outputs(copied, x), before)


class Guarded(nn.Module):
    """A model with attributes that can't be copied, deep in others."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.lock = threading.Lock()
        self.parts = {"inside": [threading.RLock(), threading.Condition()]}
        self.helper = threading.Semaphore(2)
        self.helper.body = body
        self.python = threading

    def forward(self, x):
        with self.lock, self.helper:
            return self.body(x)


def test_locks_are_shared_and_what_holds_them_is_copied(mlp):
    model = Guarded(mlp())
    loraven.convert(model, data())
    twin = loraven.at_budget(model, 0.3)
    assert twin.lock is model.lock
    assert twin.parts["inside"][0] is model.parts["inside"][0]
    assert twin.helper is not model.helper
    assert twin.helper.body is twin.body is not model.body
    assert twin.body[0].weight is model.body[0].weight
    assert (loraven.get_budget(twin), loraven.get_budget(model)) == (0.3, 1.0)
    x = data(1)[0]
    wanted = outputs(model, x)
    loraven.set_budget(model, 1.0)
    assert torch.equal(twin(x), wanted[0])


def test_an_attribute_without_any_copy_is_named(mlp):
    class Stubborn:
        def __reduce_ex__(self, protocol):
            raise TypeError("Stubborn stays")

    model = mlp()
    model.extra = Stubborn()
    model.extra.body = model
    loraven.convert(model, data())
    with pytest.raises(ValueError, match=r"Sequential: .*no copy: Stubborn stays"):
        loraven.at_budget(model, 0.3)
    assert loraven.get_budget(model) == 1.0


def test_tensors_in_lists_and_tuples_are_shared(mlp):
    model = mlp()
    model.kept = [torch.ones(2), (torch.ones(3), {"a": torch.ones(4)})]
    loraven.convert(model, data())
    twin = loraven.at_budget(model, 0.3)
    assert twin.kept[0] is model.kept[0]
    assert twin.kept[1][0] is model.kept[1][0]
    assert twin.kept[1][1]["a"] is model.kept[1][1]["a"]
