# SPDX-License-Identifier: Apache-2.0
"""A converted layer where people do to it what they do to a linear layer."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

import loraven
from loraven.nested import NestedLinear

MASTERS = ("up", "down", "down_bias", "up_bias")


@pytest.fixture
def layer():
    """A converted layer at a level of the gauge form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96))
    loraven.convert(model, [torch.randn(300, 64)])
    loraven.set_budget(model, 0.5)
    found = model[0]
    assert found.plans[found.level].form == "gauge"
    return found


def prefix(x, rank, up, down, down_bias, up_bias):
    return (x @ down[:rank].T + down_bias[:rank]) @ up[:rank] + up_bias


@pytest.mark.critical
@pytest.mark.parametrize("name", MASTERS)
@pytest.mark.parametrize("rows", [2, 40])
def test_a_gauge_level_uses_the_factor_that_it_is_given(layer, name, rows):
    x, rank = torch.randn(rows, 64), layer.plans[layer.level].rank
    before = layer(x)
    given = {name: getattr(layer, name) + torch.randn_like(getattr(layer, name))}
    parts = {key: getattr(layer, key) for key in MASTERS} | given
    found = torch.func.functional_call(layer, given, x)
    torch.testing.assert_close(found, prefix(x, rank, **parts), atol=1e-3, rtol=1e-4)
    assert torch.equal(layer(x), before)


@pytest.mark.critical
@pytest.mark.parametrize("name", MASTERS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gauge_level_has_gradients_for_the_factors_that_want_one(
    layer, name, compiled
):
    x, rank = torch.randn(40, 64), layer.plans[layer.level].rank
    frozen = layer(x)
    getattr(layer, name).requires_grad_(True)
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    y = run(x)
    torch.testing.assert_close(y, frozen, atol=1e-4, rtol=1e-4)
    (found,) = torch.autograd.grad(y.square().sum(), getattr(layer, name))
    parts = {key: getattr(layer, key).detach().clone() for key in MASTERS}
    parts[name].requires_grad_(True)
    loss = prefix(x, rank, **parts).square().sum()
    (wanted,) = torch.autograd.grad(loss, parts[name])
    torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-3)


def test_all_parameters_may_want_gradients(layer):
    layer.requires_grad_(True)
    layer(torch.randn(40, 64)).sum().backward()
    assert all(getattr(layer, name).grad is not None for name in MASTERS)


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_the_input_may_be_passed_by_the_name_it_has_in_linear(layer, budget):
    model = nn.Sequential(layer)
    layer.level = 1 if budget == 0.5 else 3
    x = torch.randn(4, 64)
    assert torch.equal(layer(input=x), layer(x))
    # The name that Conv1D gives to it.
    assert torch.equal(layer(x=x), layer(x))
    with pytest.raises(TypeError, match="one Tensor"):
        layer()
    assert torch.equal(model(x), layer(x))


def test_static_layers_take_that_name_too(mlp):
    model, x = mlp(), torch.randn(300, 64)
    loraven.convert(model, [x])
    static = loraven.export_static(model, 0.5)
    assert torch.equal(static[0](input=x), static[0](x))


def test_static_layers_keep_the_mode_of_the_model(mlp):
    model = mlp()
    loraven.convert(model, [torch.randn(300, 64)])
    for mode in (True, False):
        static = loraven.export_static(model.train(mode), 0.5)
        assert {part.training for part in static.modules()} == {mode}


@pytest.mark.parametrize("kind", [np.float32, torch.tensor, lambda x: x * (1 - 1e-7)])
def test_a_level_in_single_precision_is_that_level(mlp, kind):
    model = mlp()
    loraven.convert(model, [torch.randn(300, 64)])
    for level in (0.3, 0.5, 0.7, 1.0):
        assert loraven.set_budget(model, kind(level)) == level
    assert loraven.set_budget(model, 0.6999) == 0.5


@pytest.fixture
def converted(mlp):
    model = mlp()
    loraven.convert(model, [torch.randn(300, 64)])
    return model


@pytest.mark.critical
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.__setitem__(4, nn.Linear(128, 3)), "layer '4': there is Linear"),
        (lambda m: m.__delitem__(4), "layer '4': there is nothing"),
        (lambda m: m.__delitem__(0), "layer '0': there is GELU"),
        (lambda m: m.__setitem__(2, nn.Sequential(m[2])), "layer '2': .*Sequential"),
    ],
)
def test_what_was_changed_since_is_not_overwritten(converted, change, match):
    change(converted)
    before = list(converted.modules())
    with pytest.raises(ValueError, match=match):
        loraven.revert(converted)
    assert list(converted.modules()) == before
    assert loraven.get_budget(converted) == 1.0


def test_parameters_that_were_set_since_stay(converted):
    weight = nn.Parameter(torch.randn(96, 64))
    converted[0].weight = weight
    converted[4].bias = None
    x = torch.randn(3, 64)
    before = converted(x)
    loraven.revert(converted)
    assert type(converted[0]) is nn.Linear
    assert converted[0].weight is weight
    assert converted[4].bias is None
    assert torch.equal(converted(x), before)


def test_one_routed_model_in_four_threads(mlp):
    model, x = mlp(), torch.randn(256, 64)
    loraven.convert(model, [x], levels=(0.3, 0.6, 1.0))
    routed = loraven.fit_router(model, [x], target=0.7)
    loraven.set_budget(model, 0.6)
    batches = [torch.randn(32, 64) for _ in range(4)]
    with torch.no_grad():
        alone = [routed(batch) for batch in batches]
    wrong, barrier = [], threading.Barrier(4)

    def work(number):
        barrier.wait()
        for _ in range(30):
            with torch.no_grad():
                if not torch.equal(routed(batches[number]), alone[number]):
                    wrong.append(number)
            if loraven.get_budget(model) not in (0.3, 0.6, 1.0):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert loraven.get_budget(model) == 0.6
    assert {m.level for m in model if isinstance(m, NestedLinear)} == {1}
