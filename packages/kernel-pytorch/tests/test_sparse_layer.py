# SPDX-License-Identifier: Apache-2.0
"""DynamicSparseAttention against float64 dense attention under its own block mask."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernel_pytorch.attention import (
    DynamicSparseAttention,
    MaskSpec,
    SparsePattern,
    create_sparse_attention,
    native_status,
)

sys.path.insert(0, str(Path(__file__).parent))
from reference import layer_reference

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SMALL = {"block_size": 16, "device": "cpu"}
PATTERNS = list(SparsePattern)


def check(layer, x, given, parts):
    """Output and gradients equal dense attention under the mask of the blocks."""
    leaves = [x.requires_grad_(), *layer.parameters()]
    kept = layer.block_index(x, given).dense_mask()
    bias = parts.pop("bias", None)
    kept = kept if bias is None else kept & bias
    want, _ = layer_reference(
        layer, x, MaskSpec(layer.causal, layer.window, bias=kept, **parts)
    )
    out = layer(x, given)
    torch.testing.assert_close(out.double(), want, **TOLERANCE)
    seed = torch.randn_like(out)
    options = {"materialize_grads": True, "allow_unused": True}
    found = torch.autograd.grad(out, leaves, seed, **options)
    expected = torch.autograd.grad(want, leaves, seed.double(), **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


@pytest.mark.critical
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_dense_attention_over_its_blocks(pattern, causal):
    options = {"causal": causal, "num_kv_heads": 2, "bias": True}
    layer = create_sparse_attention(32, 4, 0.6, pattern, **options, **SMALL)
    x = torch.randn(2, 130, 32)
    check(layer, x, None, {})
    stats = layer.get_sparsity_stats()
    # The first row of LOCAL_GLOBAL keeps every block, where there is no later key.
    assert 0.3 <= stats.density <= 0.51
    keep = torch.ones(2, 130, dtype=torch.long)
    keep[1, :40] = 0
    check(layer, x.detach(), keep, {"key_padding": keep.bool()})


def test_a_mask_of_pairs_and_a_window():
    layer = DynamicSparseAttention(32, 4, 0.5, window=40, **SMALL)
    seen = torch.rand(2, 1, 100, 100) > 0.5
    check(layer, torch.randn(2, 100, 32), seen, {"bias": seen})


@pytest.mark.critical
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_sparsity_is_ordinary_attention(pattern):
    layer = DynamicSparseAttention(32, 4, 0.0, pattern, **SMALL)
    x = torch.randn(2, 100, 32)
    want, _ = layer_reference(layer, x, None)
    torch.testing.assert_close(layer(x).double(), want, **TOLERANCE)
    assert layer.get_sparsity_stats().density == 1.0


@pytest.mark.critical
def test_statistics_tell_what_ran():
    layer = DynamicSparseAttention(32, 4, 0.75, causal=True, **SMALL)
    with pytest.raises(RuntimeError, match="no forward pass"):
        layer.get_sparsity_stats()
    x = torch.randn(2, 160, 32)
    layer(x)
    stats = layer.get_sparsity_stats()
    rows = torch.arange(1, 11)
    budget = (rows / 4).round().clamp_min(1)
    assert stats.blocks_admissible == 2 * 4 * int(rows.sum())
    assert stats.blocks_kept == 2 * 4 * int(budget.sum())
    assert stats.density == stats.blocks_kept / stats.blocks_admissible
    assert stats.requested_sparsity == 0.75
    status = native_status()
    ran = f"native-{status.isa}" if status.available else "reference"
    assert stats.kernel == ran
    assert 0 < stats.estimated_missed_mass < 1
    layer.double()(x.double())
    assert layer.get_sparsity_stats().kernel == "reference"


def test_missed_mass_is_known_by_content_alone():
    x = torch.randn(1, 160, 32)
    for pattern in PATTERNS:
        layer = DynamicSparseAttention(32, 4, 0.9, pattern, **SMALL)
        layer(x)
        missed = layer.get_sparsity_stats().estimated_missed_mass
        assert (missed is not None) == pattern.by_content


@pytest.mark.critical
def test_coverage_replaces_the_budget():
    torch.manual_seed(0)
    layer = DynamicSparseAttention(32, 4, coverage=0.8, **SMALL)
    layer.q_proj.weight.data *= 6
    layer(torch.randn(1, 320, 32))
    stats = layer.get_sparsity_stats()
    assert stats.requested_sparsity is None
    assert stats.estimated_missed_mass <= 0.2
    assert 0.1 < stats.density < 1
    with pytest.raises(ValueError, match="RANDOM estimates no mass"):
        DynamicSparseAttention(32, 4, 0.5, "random", coverage=0.9, **SMALL)


def test_remainder_comes_closer():
    torch.manual_seed(0)
    x = torch.randn(1, 512, 32)
    errors = []
    for remainder in (False, True):
        torch.manual_seed(1)
        layer = DynamicSparseAttention(32, 4, 0.9, remainder=remainder, **SMALL)
        want, _ = layer_reference(layer, x, None)
        errors.append(((layer(x) - want).norm() / want.norm()).item())
    assert errors[1] < 0.5 * errors[0]


def test_random_blocks_stay_under_checkpointing():
    layer = DynamicSparseAttention(32, 4, 0.8, "random", **SMALL)
    x = torch.randn(1, 160, 32, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), x)[0]
    torch.rand(5)
    again = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), x)[0], plain)
    other = DynamicSparseAttention(32, 4, 0.8, "random", seed=1, **SMALL)
    one, two = layer.block_index(x).block_mask(), other.block_index(x).block_mask()
    assert not torch.equal(one, two)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17])
def test_short_sequences(length):
    layer = DynamicSparseAttention(32, 4, 0.9, causal=True, **SMALL)
    x = torch.randn(2, length, 32)
    want, _ = layer_reference(layer, x, MaskSpec(causal=True))
    out = layer(x)
    assert out.shape == x.shape
    torch.testing.assert_close(out[:, :16].double(), want[:, :16], **TOLERANCE)
    stats = layer.get_sparsity_stats()
    assert stats.blocks_admissible == 8 * {0: 0, 1: 1, 15: 1, 16: 1, 17: 3}[length]


def test_copies_and_autocast():
    layer = DynamicSparseAttention(32, 4, 0.5, **SMALL)
    x = torch.randn(1, 100, 32)
    want = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), want)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sparsity_ratio": 0.96}, r"sparsity_ratio=0.96.*\[0, 0.95\]"),
        ({"sparsity_ratio": -0.1}, "sparsity_ratio=-0.1"),
        ({"pattern": "sliced"}, "pattern='sliced'.*'dynamic_threshold'"),
        ({"block_size": 0}, "block_size=0"),
        ({"coverage": 1.5}, "coverage=1.5"),
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
    ],
)
def test_bad_settings(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        create_sparse_attention(32, 4, **options)


def test_bad_input():
    layer = DynamicSparseAttention(32, 4, max_sequence_length=20, **SMALL)
    with pytest.raises(ValueError, match="21 tokens"):
        layer(torch.randn(1, 21, 32))
    with pytest.raises(ValueError, match="hidden_states"):
        layer(torch.randn(1, 20, 16))
    with pytest.raises(ValueError, match="attention_mask"):
        layer(torch.randn(1, 20, 32), torch.ones(1, 19))
