# SPDX-License-Identifier: Apache-2.0
"""Weights that were written to after the conversion: no reduced level may run."""

import copy
import pickle

import pytest
import torch
from torch import nn

import loraven
from loraven import freshness

CALLS = {
    "set_budget": lambda model, folder: loraven.set_budget(model, 0.5),
    "at_budget": lambda model, folder: loraven.at_budget(model, 0.5),
    "export_static": lambda model, folder: loraven.export_static(model, 0.5),
    "save": lambda model, folder: loraven.save(model, folder),
    "distill": lambda model, folder: loraven.distill(model, data(4), steps=1),
}
WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "bfloat16": lambda model: model.bfloat16(),
    "float64": lambda model: model.double(),
    "own state": lambda model: model.load_state_dict(model.state_dict()) and model,
    "assigned": lambda model: (
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True) and model
    ),
}


def data(count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(200, 64, generator=generator) for _ in range(count)]


@pytest.fixture
def model(mlp):
    found = mlp()
    loraven.convert(found, data())
    return found


def train(model):
    """One step of an optimizer on the original weights, at level 1.0."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(data()[0]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.critical
@pytest.mark.parametrize("call", CALLS)
def test_trained_weights_under_old_factors_are_noticed(model, call, tmp_path):
    train(model)
    with pytest.raises(RuntimeError, match=r"layer '0': its weights.*convert again"):
        CALLS[call](model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    # The dense level is the model itself, and goes on.
    assert loraven.get_budget(model) == loraven.set_budget(model, 1.0) == 1.0
    x = data()[0]
    dense = loraven.export_static(model, 1.0)
    assert torch.equal(loraven.at_budget(model, 1.0)(x), dense(x))


@pytest.mark.critical
@pytest.mark.parametrize("call", ["export_static", "save", "distill"])
def test_what_is_kept_for_good_looks_at_the_bits(model, call, tmp_path):
    # Nothing but the bits tells of this.
    model[2].bias.detach().numpy()[5] += 1
    with pytest.raises(RuntimeError, match=r"layer '2': its weights.*convert again"):
        CALLS[call](model, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
        lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias + 1)),
        lambda layer: nn.init.zeros_(layer.bias),
        lambda layer: nn.init.orthogonal_(layer.weight),
    ],
)
def test_a_switch_notices_writes_of_every_ordinary_kind(model, change):
    loraven.set_budget(model, 0.5)
    loraven.set_budget(model, 1.0)
    change(model[2])
    with pytest.raises(RuntimeError, match="layer '2'"):
        loraven.set_budget(model, 0.3)
    assert loraven.get_budget(model) == 1.0


def test_weights_that_come_back_are_known(model):
    x = data()[0]
    loraven.set_budget(model, 0.3)
    with torch.no_grad():
        expected, kept = model(x), model[0].weight.clone()
        model[0].weight.zero_()
        with pytest.raises(RuntimeError, match="layer '0'"):
            loraven.set_budget(model, 0.3)
        with pytest.raises(RuntimeError, match="the factors are stale"):
            model(x)
        model[0].weight.copy_(kept)
        loraven.set_budget(model, 0.3)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("trained", [False, True])
def test_copies_and_conversions_neither_forget_nor_invent_it(model, way, trained):
    if trained:
        train(model)
    found = WAYS[way](model)
    if trained:
        with pytest.raises(RuntimeError, match="layer '0'"):
            loraven.set_budget(found, 0.5)
        return
    for _ in range(2):
        assert loraven.set_budget(found, 0.5) == 0.5
    loraven.export_static(found, 0.5)
    # And what happens to the copy later is noticed in turn.
    with torch.no_grad():
        found[4].bias[0] += 1
    with pytest.raises(RuntimeError, match="layer '4'"):
        loraven.set_budget(found, 0.5)


def test_a_switch_reads_no_weight_again_unless_one_was_written(model, monkeypatch):
    counted = []
    real = freshness.fingerprint

    def counting(weight, bias):
        counted.append(weight)
        return real(weight, bias)

    monkeypatch.setattr(freshness, "fingerprint", counting)
    for _ in range(3):
        loraven.set_budget(model, 0.3)
        loraven.set_budget(model, 1.0)
    assert not counted
    with torch.no_grad():
        model[2].weight.mul_(1)
    for _ in range(3):
        loraven.set_budget(model, 0.3)
    assert len(counted) == 1
    assert counted[0] is model[2].weight


def test_a_level_with_the_layer_dense_needs_no_factors(mlp):
    model = mlp()
    loraven.convert(model, data(), levels=(0.5, 1.0))
    with torch.no_grad():
        model[0].weight += 1
    assert loraven.set_budget(model, 1.0) == 1.0
    plans = model[0].plans
    model[0].plans = (plans[1], plans[1])
    assert loraven.set_budget(model, 0.5) == 0.5


@pytest.fixture
def group(tmp_path):
    """This process as a group of its own."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_switched_and_run(model, group):
    from torch.distributed.fsdp import fully_shard

    x, expected = data()[0], []
    with torch.no_grad():
        for level in (0.3, 0.7, 1.0):
            loraven.set_budget(model, level)
            expected.append(model(x))
    for part in (model[0], model[2], model[4], model):
        fully_shard(part, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        for level, y in zip((0.3, 0.7, 1.0), expected, strict=True):
            assert loraven.set_budget(model, level) == level
            torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-4)
