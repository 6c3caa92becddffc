# SPDX-License-Identifier: Apache-2.0
"""Distillation of what can't be trained, and in inference mode."""

import pytest
import torch
from torch import nn

import loraven
from loraven.batches import evaluating


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))


def data(count=16):
    generator = torch.Generator().manual_seed(1)
    scale = torch.logspace(0.5, -1, 48)
    return [torch.randn(32, 48, generator=generator) * scale for _ in range(count)]


@pytest.fixture
def converted():
    found = model()
    loraven.convert(found, data(), levels=(0.5, 1.0))
    return found


def test_without_a_reduced_level_there_is_nothing_to_train():
    found = model()
    loraven.convert(found, data(), levels=(1.0,))
    with pytest.raises(ValueError, match="every level runs every layer dense"):
        loraven.distill(found, data(), steps=3)


class Mixed(nn.Module):
    """Takes a tensor in each way that a batch can hold one."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, more=None):
        return self.body(x if more is None else x + more[0])


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
@pytest.mark.parametrize("inside", [False, True])
def test_inference_mode_trains_the_same(kind, inside):
    def batches():
        plain = data(64)
        if kind == "tensor":
            return plain
        if kind == "tuple":
            return [(x, [x]) for x in plain]
        return [{"x": x, "more": (x,)} for x in plain]

    trained = []
    for inference in (False, True):
        found = Mixed(model())
        loraven.convert(found, data(), levels=(0.5, 1.0))
        with torch.inference_mode(inference):
            given = batches()
        with torch.inference_mode(inference and inside):
            summary = loraven.distill(found, given, steps=10, lr=1e-4)
        assert not summary.restored, summary.reason
        trained.append(found.body[0])
    for name in ("up", "down", "order", "skeleton_32"):
        if hasattr(trained[0], name):
            assert torch.equal(getattr(trained[0], name), getattr(trained[1], name))
    # It can be used and trained on afterwards as any other.
    y = trained[1](data(1)[0].requires_grad_())
    y.sum().backward()


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        found = model()
    for layer in (found[0], found[2]):
        for name in ("weight", "bias"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).clone()))
    loraven.convert(found, data(), levels=(0.5, 1.0))
    with torch.inference_mode():
        found.register_buffer("table", torch.ones(3))
    with pytest.raises(ValueError, match=r"made in inference mode.*deepcopy"):
        loraven.distill(found, data(), steps=3)


@pytest.mark.parametrize("value", [1.0, None, torch.ones(2)])
def test_a_loss_that_is_no_tensor_of_one_number(converted, value):
    before = {k: v.clone() for k, v in converted.state_dict().items()}
    with pytest.raises(TypeError, match=r"loss returned a .*a 0-dim Tensor is needed"):
        loraven.distill(converted, data(), steps=3, loss=lambda a, b: value)
    after = converted.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with evaluating(converted):
        assert converted(data(1)[0]).isfinite().all()
