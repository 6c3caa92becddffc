# SPDX-License-Identifier: Apache-2.0
"""ContextParallelAttention in one process; over ranks it is in test_ring."""

import sys
from pathlib import Path

import pytest
import torch

from kernel_pytorch.attention import MaskSpec, create_context_parallel_attention

sys.path.insert(0, str(Path(__file__).parent))
from reference import layer_reference, mask_parts

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.critical
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("mesh", [None, ["cpu"] * 3])
def test_equals_dense_attention(layout, mesh):
    options = {"num_kv_heads": 2, "causal": True, "window": 20, "layout": layout}
    layer = create_context_parallel_attention(32, 4, 3, mesh, **options)
    assert layer.mode == ("emulated" if mesh is None else "multi-device")
    x = torch.randn(2, 50, 32, requires_grad=True)
    for kind in ("none", "padding", "bool_bias", "float_bias"):
        parts = mask_parts(2, 4, 50)[kind]
        given = next(iter(parts.values()), None)
        want, _ = layer_reference(layer, x, MaskSpec(True, 20, **parts))
        out = layer(x, given)
        torch.testing.assert_close(out.double(), want, **TOLERANCE)
        seed, leaves = torch.randn_like(out), [x, *layer.parameters()]
        found = torch.autograd.grad(out, leaves, seed)
        expected = torch.autograd.grad(want, leaves, seed.double())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


def test_one_shard_may_be_called_sharded():
    layer = create_context_parallel_attention(16, 2, 1, inputs="sharded")
    x = torch.randn(1, 7, 16)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    want, _ = layer_reference(layer, x, None)
    out = layer(padded, total_length=7)[:, :7]
    torch.testing.assert_close(out.double(), want, **TOLERANCE)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_fewer_tokens_than_shards(length):
    layer = create_context_parallel_attention(16, 2, 4)
    x = torch.randn(2, length, 16)
    want, _ = layer_reference(layer, x, None)
    torch.testing.assert_close(layer(x).double(), want, **TOLERANCE)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"context_parallel_size": 0}, "context_parallel_size=0"),
        ({"device_mesh": ["cpu"]}, "context_parallel_size=2.*1 devices"),
        ({"layout": "spiral"}, "layout='spiral'"),
        ({"inputs": "half"}, "inputs='half'.*'full', 'sharded'"),
        ({"inputs": "sharded"}, "without a group"),
        ({"num_heads": 3}, "d_model=16.*num_heads=3"),
    ],
)
def test_bad_settings(options, complaint):
    given = {"d_model": 16, "num_heads": 2, "context_parallel_size": 2} | options
    with pytest.raises(ValueError, match=complaint):
        create_context_parallel_attention(**given)


def test_bad_input():
    layer = create_context_parallel_attention(16, 2, 2, max_sequence_length=9)
    with pytest.raises(ValueError, match="10 tokens"):
        layer(torch.randn(1, 10, 16))
    with pytest.raises(ValueError, match="total_length=8"):
        layer(torch.randn(1, 8, 16), total_length=8)
    with pytest.raises(ValueError, match="attention_mask"):
        layer(torch.randn(1, 8, 16), torch.ones(1, 7))
