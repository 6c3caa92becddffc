# SPDX-License-Identifier: Apache-2.0
"""What every layer holds to, whatever its plan."""

import ast
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kernel_pytorch.attention import (
    AttentionConfig,
    ContextParallelAttention,
    DynamicSparseAttention,
    FlashAttention3,
    MaskSpec,
    RingAttentionLayer,
)
from kernel_pytorch.core import AttentionLayer

sys.path.insert(0, str(Path(__file__).parent))
from reference import layer_reference

LAYERS = {
    "ring": lambda: RingAttentionLayer(32, 4, device="cpu"),
    "sparse": lambda: DynamicSparseAttention(32, 4, 0.0, block_size=16),
    "flash": lambda: FlashAttention3(AttentionConfig(32, 4)),
    "parallel": lambda: ContextParallelAttention(32, 4, 2),
    "attention": lambda: AttentionLayer(32, 4, dropout=0.0),
}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.mark.critical
@every_layer
def test_projections_are_called_as_modules(name):
    layer, called = LAYERS[name](), []
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        getattr(layer, part).register_forward_hook(
            lambda module, args, out, part=part: called.append(part)
        )
    layer(torch.randn(1, 20, 32))
    assert sorted(called) == ["k_proj", "out_proj", "q_proj", "v_proj"]


@pytest.mark.critical
@every_layer
def test_projections_may_be_replaced(name):
    layer = LAYERS[name]()
    x = torch.randn(2, 20, 32)
    double = copy.deepcopy(layer)
    double.v_proj.weight.data *= 2
    if double.v_proj.bias is not None:
        double.v_proj.bias.data *= 2

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    layer.v_proj = Twice(layer.v_proj)
    torch.testing.assert_close(layer(x), double(x), **TOLERANCE)
    keep = torch.rand(2, 20) > 0.4
    out = layer(x, attention_mask=keep)
    torch.testing.assert_close(out, double(x, attention_mask=keep), **TOLERANCE)


@every_layer
@pytest.mark.parametrize(
    "shape", [(1, 21), (1, 19), (1, 1, 20, 21), (1, 1, 21, 20), (1, 21, 20), (20,)]
)
def test_masks_of_other_lengths_are_refused(name, shape):
    with pytest.raises(ValueError, match="attention_mask"):
        LAYERS[name]()(torch.randn(1, 20, 32), attention_mask=torch.ones(shape))


@pytest.mark.critical
@every_layer
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_padding_hides_stays_there(name, training, value):
    layer = LAYERS[name]().train(training)
    if name == "attention":
        layer.dropout = 1e-9
    x, keep = torch.randn(2, 40, 32), torch.ones(2, 40, dtype=torch.bool)
    keep[:, 30:] = False
    want, _ = layer_reference(layer, x[:, :30], MaskSpec())
    x[:, 30:] = value
    out = layer(x, attention_mask=keep)[:, :30]
    torch.testing.assert_close(out.double(), want, **TOLERANCE)


@every_layer
def test_meta_tensors_have_shapes(name):
    layer = LAYERS[name]().to("meta").eval()
    out = layer(torch.empty(2, 20, 32, device="meta"))
    assert (out.shape, out.device.type) == ((2, 20, 32), "meta")


@every_layer
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_other_types(name, kind):
    layer = LAYERS[name]().to(kind)
    x = torch.randn(2, 40, 32, dtype=kind, requires_grad=True)
    want, _ = layer_reference(layer, x, MaskSpec())
    out = layer(x)
    assert out.dtype == kind
    error = (out.double() - want).abs().max() / want.abs().max()
    assert error < (1e-12 if kind == torch.float64 else 0.03)
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.critical
@every_layer
@pytest.mark.parametrize("value", [float("-inf"), torch.finfo(torch.float32).min, 0.5])
def test_masks_to_be_added_are_not_taken_for_flags(name, value):
    given = torch.zeros(1, 20)
    given[:, 15:] = value
    with pytest.raises(ValueError, match=r"Pass a bool mask, or \[batch, 1, 1, keys\]"):
        LAYERS[name]()(torch.randn(1, 20, 32), attention_mask=given)


@pytest.mark.critical
def test_importing_loads_nothing_that_is_not_asked_for():
    code = (
        "import sys, torch; before = set(sys.modules); "
        "import kernel_pytorch.attention, kernel_pytorch.core; "
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = ast.literal_eval(done.stdout)
    heavy = ("torch._dynamo", "torch._inductor", "torch.onnx", "triton", "sympy")
    heavy += ("transformers", "matplotlib", "torch.distributed.tensor")
    assert not [name for name in loaded if name.startswith(heavy)]
    assert len(loaded) < 120
