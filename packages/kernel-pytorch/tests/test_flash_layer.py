# SPDX-License-Identifier: Apache-2.0
"""FlashAttention3, the configurations, and `create_attention`."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from kernel_pytorch.attention import (
    AttentionConfig,
    AttentionPatterns,
    ContextParallelAttention,
    DynamicSparseAttention,
    FlashAttention3,
    FP8AttentionConfig,
    MaskSpec,
    RingAttentionLayer,
    SparsePattern,
    create_attention,
)
from kernel_pytorch.precision import FP8Format

sys.path.insert(0, str(Path(__file__).parent))
from reference import layer_reference

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def config(**options):
    return AttentionConfig(embed_dim=32, num_heads=4, **options)


@pytest.mark.critical
@pytest.mark.parametrize("pattern", list(AttentionPatterns))
def test_every_pattern_has_a_layer_that_keeps_its_mask(pattern):
    given = config(
        pattern=pattern, sparsity_ratio=0.0, block_size=16, max_sequence_length=80
    )
    layer = create_attention(given)
    x = torch.randn(2, 60, 32)
    causal = pattern is AttentionPatterns.CAUSAL
    window = 20 if pattern is AttentionPatterns.SLIDING_WINDOW else None
    keep = torch.rand(2, 60) > 0.3
    mask = MaskSpec(causal, window, keep)
    want, _ = layer_reference(layer, x, mask)
    torch.testing.assert_close(
        layer(x, attention_mask=keep).double(), want, **TOLERANCE
    )
    with pytest.raises(ValueError, match="81 tokens"):
        layer(torch.randn(1, 81, 32))


@pytest.mark.critical
@pytest.mark.parametrize("name", ["flash", "ring", "sparse", "context_parallel"])
def test_implementations_by_name(name):
    kinds = {
        "flash": FlashAttention3,
        "ring": RingAttentionLayer,
        "sparse": DynamicSparseAttention,
        "context_parallel": ContextParallelAttention,
    }
    options = {"num_kv_heads": 2, "head_dim": 6, "sparsity_ratio": 0.0}
    given = config(pattern="sliding_window", causal=True, **options)
    given.sliding_window_size = 9
    layer = create_attention(given, name)
    assert type(layer) is kinds[name]
    x = torch.randn(2, 40, 32)
    want, _ = layer_reference(layer, x, MaskSpec(True, 9))
    torch.testing.assert_close(layer(x).double(), want, **TOLERANCE)


def test_create_attention_refuses():
    with pytest.raises(ValueError, match=r"'best'.*'flash', 'ring', 'sparse'"):
        create_attention(config(), "best")
    for name in ("ring", "sparse", "context_parallel"):
        with pytest.raises(ValueError, match="fp8_config=FP8AttentionConfig"):
            create_attention(config(fp8_config=FP8AttentionConfig()), name)
        with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
            create_attention(config(attention_dropout=0.1), name)
    for name in ("flash", "ring", "sparse"):
        with pytest.raises(ValueError, match="context_parallel_size=2"):
            create_attention(config(context_parallel_size=2), name)
    for name in ("sparse", "context_parallel"):
        with pytest.raises(ValueError, match="chunk_size=64"):
            create_attention(config(chunk_size=64), name)
    odd = config(pattern="dynamic_sparse", sparse_pattern="random")
    with pytest.raises(ValueError, match="DYNAMIC_SPARSE looks at the content"):
        create_attention(odd)


@pytest.mark.critical
def test_cross_attention_and_gradients():
    layer = FlashAttention3(config(causal=False, num_kv_heads=2))
    q, k, v = (torch.randn(2, n, 32, requires_grad=True) for n in (10, 25, 25))
    keep = torch.rand(2, 25) > 0.3
    want, _ = layer_reference(layer, q, MaskSpec(key_padding=keep), k, v)
    out = layer(q, k, v, keep)
    torch.testing.assert_close(out.double(), want, **TOLERANCE)
    seed, leaves = torch.randn_like(out), [q, k, v, *layer.parameters()]
    found = torch.autograd.grad(out, leaves, seed)
    expected = torch.autograd.grad(want, leaves, seed.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


def test_the_backend_is_what_ran():
    layer = FlashAttention3(config(causal=True))
    with pytest.raises(RuntimeError, match="no forward pass"):
        _ = layer.backend
    x = torch.randn(1, 40, 32)
    with torch.profiler.profile() as ran:
        layer(x)
    names = " ".join(event.name for event in ran.events())
    assert ("flash_attention_for_cpu" in names) == (layer.backend == "cpu-flash")
    layer.double()(x.double())
    assert layer.backend == "reference"


@pytest.mark.parametrize("form", list(FP8Format))
@pytest.mark.parametrize("scaling", ["per_head", "per_tensor"])
def test_fp8_rounds_and_says_that_it_is_not_faster(form, scaling):
    torch.manual_seed(0)
    fp8 = FP8AttentionConfig(form, scaling)
    layer = FlashAttention3(config(fp8_config=fp8))
    layer.k_proj.bias.data += 30  # a mean that smoothing takes away
    assert layer.accelerated is False
    assert "rounded" in layer.reason
    x = torch.randn(2, 50, 32, requires_grad=True)
    want, _ = layer_reference(layer, x, None)
    error = (layer(x) - want).norm() / want.norm()
    assert 1e-4 < error < (0.08 if form is FP8Format.E4M3 else 0.15)
    layer.fp8_config = FP8AttentionConfig(form, scaling, smooth_k=False)
    assert (layer(x) - want).norm() / want.norm() > error
    found = torch.autograd.grad(layer(x).sum(), x)[0]
    assert found.isfinite().all()
    assert found.abs().sum() > 0
    assert FlashAttention3(config()).accelerated


def test_what_fp8_padding_hides_does_not_count():
    layer = FlashAttention3(config(fp8_config=FP8AttentionConfig()))
    x, keep = torch.randn(1, 20, 32), torch.ones(1, 20)
    keep[:, 15:] = 0
    want = layer(x[:, :15])
    x[:, 15:] = 1e9
    scale = layer(x, attention_mask=keep)[:, :15]
    torch.testing.assert_close(scale, want, **TOLERANCE)


def test_dropout_is_refused_in_training_only():
    layer = FlashAttention3(config(attention_dropout=0.1))
    x = torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        layer(x)
    assert layer.eval()(x).shape == x.shape


@pytest.mark.critical
def test_configurations_go_to_json_and_back():
    given = config(
        pattern="sparse",
        sparse_pattern="strided",
        fp8_config=FP8AttentionConfig("e5m2", "per_tensor", False),
        num_kv_heads=2,
        context_parallel_size=3,
    )
    told = given.to_dict()
    again = json.loads(json.dumps(told))
    kept = json.dumps(again)
    assert AttentionConfig.from_dict(again) == given
    assert json.dumps(again) == kept
    assert set(told) == {field.name for field in dataclasses.fields(given)}
    assert AttentionConfig.from_dict(told).fp8_config.format is FP8Format.E5M2
    with pytest.raises(ValueError, match="'heads'"):
        AttentionConfig.from_dict({"embed_dim": 8, "num_heads": 2, "heads": 2})
    with pytest.raises(ValueError, match="'bits' of fp8_config"):
        AttentionConfig.from_dict(told | {"fp8_config": {"bits": 2}})


def test_defaults():
    given = AttentionConfig(64, 8)
    assert given.pattern is AttentionPatterns.FULL
    assert given.sparse_pattern is SparsePattern.DYNAMIC_THRESHOLD
    assert (given.sparsity_ratio, given.block_size, given.bias) == (0.9, 64, True)
    assert given.window is None
    assert AttentionConfig(64, 8, pattern="sliding_window").window == 1024
    short = AttentionConfig(64, 8, pattern="sliding_window", max_sequence_length=400)
    assert short.window == 100


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"embed_dim": 10, "num_heads": 4}, "embed_dim=10.*num_heads=4"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4.*num_kv_heads=3"),
        ({"pattern": "dense"}, "pattern='dense'.*'causal'"),
        ({"sparse_pattern": "dense"}, "sparse_pattern='dense'.*'strided'"),
        ({"sparsity_ratio": 0.99}, r"sparsity_ratio=0\.99"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"sliding_window_size": 0}, "sliding_window_size=0"),
        ({"fp8_config": "e4m3"}, "fp8_config"),
        ({"context_parallel_size": 0}, "context_parallel_size=0"),
        ({"head_dim": 0}, "head_dim=0"),
    ],
)
def test_bad_settings(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        AttentionConfig(**({"embed_dim": 32, "num_heads": 4} | options))


def test_bad_fp8_settings():
    with pytest.raises(ValueError, match="format='e3m4'"):
        FP8AttentionConfig("e3m4")
    with pytest.raises(ValueError, match="scaling='per_row'"):
        FP8AttentionConfig(scaling="per_row")
