# SPDX-License-Identifier: Apache-2.0
"""Conversion of compiled models, and with tensors of inference mode."""

import pytest
import torch
from torch import nn

import loraven


@pytest.fixture(autouse=True)
def fresh():
    """No compiled graph is left to the next test."""
    yield
    torch._dynamo.reset()


def test_inference_tensors_can_calibrate(mlp, bert, sentences):
    with torch.inference_mode():
        x = torch.randn(300, 64)
        batches = [
            {key: value.clone() for key, value in batch.items()}
            for batch in sentences()
        ]
    assert x.is_inference()
    assert len(loraven.convert(mlp(), [x]).layers) == 3
    assert len(loraven.convert(mlp(), [(x,)], sensitivity=False).layers) == 3
    assert len(loraven.convert(bert(), batches).layers) == 12
    model = mlp()
    with torch.inference_mode():
        assert len(loraven.convert(model, [x]).layers) == 3


def test_a_model_made_in_inference_mode_is_refused(mlp):
    with torch.inference_mode():
        model = mlp()
    with pytest.raises(ValueError, match=r"layer '0'.*made in inference mode"):
        loraven.convert(model, [torch.randn(300, 64)])


def test_a_compiled_wrapper_that_has_run_is_converted(mlp):
    model, x = mlp(), torch.randn(300, 64)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        before = compiled(x)
    summary = loraven.convert(compiled, [x])
    assert [layer.name for layer in summary.layers] == ["0", "2", "4"]
    assert not summary.skipped
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), before)
        loraven.set_budget(compiled, 0.3)
        reduced = compiled(x)
        assert not torch.allclose(reduced, before)
        torch.testing.assert_close(reduced, model(x), rtol=1e-4, atol=1e-4)
    loraven.revert(compiled)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), before)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_part_that_has_run_is_converted(mlp, in_place):
    part, x = mlp(), torch.randn(300, 64)
    if in_place:
        part.compile(backend="eager")
        model = nn.Sequential(part)
    else:
        model = nn.Sequential(torch.compile(part, backend="eager"))
    with torch.no_grad():
        before = model(x)
    summary = loraven.convert(model, [x])
    assert len(summary.layers) == 3
    assert not summary.skipped
    loraven.set_budget(model, 0.3)
    with torch.no_grad():
        assert not torch.allclose(model(x), before)
