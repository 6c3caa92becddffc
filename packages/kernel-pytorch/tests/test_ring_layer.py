# SPDX-License-Identifier: Apache-2.0
"""RingAttentionLayer against projections around float64 dense attention."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kernel_pytorch.attention import (
    MaskSpec,
    RingAttentionLayer,
    create_ring_attention,
)

sys.path.insert(0, str(Path(__file__).parent))
from reference import layer_reference as reference

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def alone(tmp_path):
    """A gloo group of this process alone."""
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 7},
    "gqa": {"num_kv_heads": 2, "bias": True},
    "chunks": {"causal": True, "chunk_size": 8},
}


@pytest.mark.critical
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grouped", [False, True])
def test_equals_dense_attention(name, grouped, alone):
    options = CASES[name] | ({"group": alone} if grouped else {})
    layer = RingAttentionLayer(32, 4, device="cpu", **options)
    x = torch.randn(2, 30, 32, requires_grad=True)
    keep = torch.ones(2, 30, dtype=torch.long)
    keep[1, :9] = 0
    for given in (None, keep):
        padding = None if given is None else given.bool()
        mask = MaskSpec(layer.causal, layer.window, padding)
        out, lse = layer(x, given, return_lse=True)
        want, want_lse = reference(layer, x, mask)
        torch.testing.assert_close(out.double(), want, **TOLERANCE)
        torch.testing.assert_close(lse.double(), want_lse, **TOLERANCE)
        seed, leaves = torch.randn_like(out), [x, *layer.parameters()]
        found = torch.autograd.grad(out, leaves, seed)
        expected = torch.autograd.grad(want, leaves, seed.double())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_masks_of_pairs(dims, kind):
    layer = create_ring_attention(32, 4, device="cpu")
    x, seen = torch.randn(2, 12, 32), torch.rand(2, 12, 12) > 0.4
    bias = torch.randn(2, 12, 12) if kind == torch.float32 else seen.to(kind)
    given = bias if dims == 3 else bias[:, None]
    exact = bias[:, None] if kind == torch.float32 else seen[:, None]
    want, _ = reference(layer, x, MaskSpec(bias=exact))
    torch.testing.assert_close(layer(x, given).double(), want, **TOLERANCE)


def test_autocast_runs_in_its_type():
    layer = create_ring_attention(32, 4, device="cpu", causal=True)
    x = torch.randn(1, 20, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), atol=3e-2, rtol=3e-2)
    out.sum().backward()
    assert layer.k_proj.weight.grad.dtype == torch.float32


def test_the_device_and_the_parameters():
    with torch.device("meta"):
        assert create_ring_attention(8, 2).q_proj.weight.device.type == "meta"
    layer = create_ring_attention(8, 2, device="cpu", num_kv_heads=1, bias=True)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes["k_proj.weight"] == (4, 8)
    assert shapes["out_proj.bias"] == (8,)
    assert len(shapes) == 8


def test_only_a_group_makes_a_ring(alone):
    x, layer = torch.randn(1, 6, 8), create_ring_attention(8, 2, device="cpu")
    assert layer.group is None
    torch.testing.assert_close(layer(x).double(), reference(layer, x, None)[0])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"d_model": 10, "num_heads": 4}, "d_model=10.*num_heads=4"),
        ({"d_model": 8, "num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3"),
        ({"d_model": 8, "num_heads": 0}, "num_heads=0"),
        ({"d_model": 8, "num_heads": 2, "layout": "spiral"}, "zigzag"),
        ({"d_model": 8, "num_heads": 2, "window": 0}, "window"),
        ({"d_model": 8, "num_heads": 2, "chunk_size": 0}, "chunk_size=0"),
        ({"d_model": 8, "num_heads": 2, "max_sequence_length": 0}, "max_seq"),
    ],
)
def test_bad_settings(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        create_ring_attention(**options)


def test_bad_input():
    layer = create_ring_attention(8, 2, max_sequence_length=10, device="cpu")
    x = torch.randn(2, 10, 8)
    assert layer(x).shape == x.shape
    with pytest.raises(ValueError, match=r"11 tokens.*max_sequence_length is 10"):
        layer(torch.randn(2, 11, 8))
    with pytest.raises(ValueError, match="hidden_states"):
        layer(torch.randn(10, 8))
    with pytest.raises(ValueError, match="attention_mask"):
        layer(x, torch.ones(10, 10))
    with pytest.raises(ValueError, match="total_length=5"):
        layer(x, total_length=5)
