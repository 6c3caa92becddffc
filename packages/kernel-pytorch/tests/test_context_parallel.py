# SPDX-License-Identifier: Apache-2.0
"""Context parallelism in one process: a serial ring over a list of devices.

What needs several processes is in test_ring.
"""

import logging
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from reference import dense_attention, gradients, mask_parts

from kernel_pytorch.attention.context_parallel import (
    place,
    shard_mask,
)
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.serial import serial_ring
from kernel_pytorch.attention.tiling import counting

KINDS = list(mask_parts(1, 1, 8))


def inputs(batch=2, heads=4, kv_heads=2, n=37, dim=8, dtype=torch.float32):
    q = torch.randn(batch, heads, n, dim, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, n, dim, dtype=dtype) for _ in range(2))
    return q, k, v


def check(world, tensors, mask, layout="zigzag", with_lse=False):
    d_out = torch.randn(tensors[0].shape)
    d_lse = torch.randn(tensors[0].shape[:3]) if with_lse else None
    found = gradients(
        lambda *t: serial_ring(*t, mask, devices=["cpu"] * world, layout=layout),
        tensors,
        d_out,
        d_lse,
    )
    wanted = gradients(lambda *t: dense_attention(*t, mask), tensors, d_out, d_lse)
    for a, b in zip((*found[:2], *found[2]), (*wanted[:2], *wanted[2]), strict=True):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite)
        size = max(1.0, b[finite].abs().max().item() if finite.any() else 0.0)
        error = torch.where(finite, a.double() - b, 0.0).abs().max()
        assert error <= 1e-5 * size


@pytest.mark.critical
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("kind", KINDS)
def test_serial_ring(kind, layout):
    mask = MaskSpec(**mask_parts(2, 4, 37)[kind])
    check(3, inputs(), mask, layout, with_lse=layout == "zigzag")


@pytest.mark.fast
@settings(max_examples=60, deadline=None)
@given(
    world=st.integers(1, 5),
    n=st.integers(1, 70),
    names=st.sets(
        st.sampled_from(["causal", "window", "key_padding", "documents", "bias"])
    ),
    layout=st.sampled_from(["zigzag", "contiguous"]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    seed=st.integers(0, 99),
)
def test_any_shape_mask_and_world(world, n, names, layout, heads, seed):
    torch.manual_seed(seed)
    parts = mask_parts(1, heads[0], n, seed=seed)["everything"]
    mask = MaskSpec(**{name: parts[name] for name in names})
    check(world, inputs(1, *heads, n=n, dim=4), mask, layout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "causal", "causal_window", "documents"])
def test_serial_ring_of_4096_tokens(kind):
    mask = MaskSpec(**mask_parts(1, 2, 4096)[kind])
    check(4, inputs(1, 2, 1, 4096), mask)


@pytest.mark.critical
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_the_ring_does_no_more_than_one_device(world):
    n = 1024
    q, k, v = inputs(1, 1, 1, n)
    for mask, ideal in ((MaskSpec(causal=True), n * n / 2), (MaskSpec(), n * n)):
        with counting() as work:
            serial_ring(q, k, v, mask, devices=["cpu"] * world)
        assert work.pairs <= 1.01 * ideal


@pytest.mark.fast
def test_nothing_is_computed_across_documents():
    n = 512
    q, k, v = inputs(1, 1, 1, n)
    mask = MaskSpec(documents=(torch.arange(n) // 64)[None])
    with counting() as work:
        serial_ring(q, k, v, mask, devices=["cpu"] * 8, layout="contiguous")
    assert work.pairs == 8 * 64 * 64


@pytest.mark.fast
def test_placement(caplog):
    with caplog.at_level(logging.INFO, logger="kernel_pytorch"):
        assert place(3) == ("emulated", None, (torch.device("cpu"),) * 3)
    assert caplog.messages == ["context parallelism of 3 is emulated on cpu"]
    assert place(1).devices == (torch.device("cpu"),)
    assert place(2, ["cpu", torch.device("cpu")]).mode == "multi-device"
    with pytest.raises(ValueError, match="context_parallel_size=0"):
        place(0)
    with pytest.raises(ValueError, match=r"context_parallel_size=3: .* lists 2"):
        place(3, ["cpu", "cpu"])


@pytest.mark.fast
def test_errors():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="0 devices"):
        serial_ring(q, k, v, devices=[])
    with pytest.raises(ValueError, match="layout='spiral'"):
        serial_ring(q, k, v, devices=["cpu"], layout="spiral")
    short = MaskSpec(key_padding=torch.ones(2, 30, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"key_padding of shape \(2, 30\)"):
        serial_ring(q, k, v, short, devices=["cpu"])
    with pytest.raises(ValueError, match="there are 37 tokens"):
        shard_mask(short, 37, None)
