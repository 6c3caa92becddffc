# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from mol.cache import FlatCache, GateLayer, RunningMeanLayer, view


def _filled(steps=5, batch=3):
    layer = GateLayer()
    values = torch.arange(float(batch * steps)).reshape(batch, steps)
    layer.record(steps, lambda t: {"x": values[:, t]})
    return layer, values


def test_batch_operations_reach_every_kept_state():
    layer, values = _filled()
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(layer.state["x"], values[[2, 0, 0], -1])
    layer.batch_repeat_interleave(2)
    assert torch.equal(layer.state["x"], values[[2, 2, 0, 0, 0, 0], -1])
    layer.batch_select_indices(torch.tensor([0, 5]))
    layer.crop(-1)
    assert torch.equal(layer.state["x"], values[[2, 0], -2])


def test_crop_goes_back_within_the_latest_call():
    layer, values = _filled()
    layer.crop(0)
    layer.crop(-2)
    layer.crop(-1)
    assert torch.equal(layer.state["x"], values[:, 1])
    layer.crop(-2)
    assert layer.state is None
    layer, values = _filled()
    layer.record(1, lambda t: {"x": values[:, 0] * 100})
    layer.crop(-1)
    assert torch.equal(layer.state["x"], values[:, -1])
    with pytest.raises(ValueError, match=r"crop\(-1\) reaches too far"):
        layer.crop(-1)


def test_crop_refuses_what_it_cannot_undo():
    layer, values = _filled(steps=100)
    layer.crop(-63)
    assert torch.equal(layer.state["x"], values[:, 36])
    with pytest.raises(ValueError, match="latest 1 positions"):
        layer.crop(-1)
    with pytest.raises(ValueError, match=r"crop\(3\) is positive"):
        layer.crop(3)


def test_running_mean_continues_over_calls():
    stream = torch.randn(2, 7, 3)
    whole, parts = RunningMeanLayer(), RunningMeanLayer()
    ones = torch.ones(2, 7, 1)
    total, count = whole.extend(stream.cumsum(1), ones.cumsum(1))
    seen = []
    for a, b in ((0, 3), (3, 4), (4, 7)):
        piece = stream[:, a:b].cumsum(1), ones[:, a:b].cumsum(1)
        seen.append(parts.extend(*piece))
    assert torch.allclose(torch.cat([t for t, _ in seen], 1), total, atol=1e-6)
    assert torch.equal(torch.cat([c for _, c in seen], 1), count)
    parts.reset()
    assert parts.state is None


def test_view_shares_layer_objects(make):
    runtime = make("gpt2", "llama")
    cache = runtime.model.new_cache()
    assert len(cache.layers) == runtime.model.streams.cache_depth() == 12
    both = make("gpt2", "llama", stream="parallel").model
    assert len(both.new_cache().layers) == both.streams.cache_depth() == 9
    assert isinstance(cache, FlatCache)
    assert [type(x).__name__ for x in cache.layers[-4:]] == ["RunningMeanLayer"] * 4
    assert view(cache, 2, 3).layers[0] is cache.layers[2]
    assert view(None, 0, 1) is None
    assert cache.get_seq_length() == 0
