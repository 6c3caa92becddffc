# SPDX-License-Identifier: Apache-2.0
"""`core.AttentionLayer` against torch.nn.MultiheadAttention and float64."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import kernel_pytorch
from kernel_pytorch.attention import MaskSpec
from kernel_pytorch.core import AttentionLayer

sys.path.insert(0, str(Path(__file__).parent))
from reference import layer_reference

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.critical
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_torchs_layer(bias, causal):
    mha = nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)
    for parameter in mha.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = AttentionLayer.from_mha(mha)
    x, keep = torch.randn(2, 20, 32), torch.ones(2, 20, dtype=torch.bool)
    keep[0, 12:] = False
    later = torch.ones(20, 20, dtype=torch.bool).triu(1) if causal else None
    options = {"key_padding_mask": ~keep, "attn_mask": later}
    want = mha(x, x, x, need_weights=False, **options)[0]
    torch.testing.assert_close(layer(x, keep, causal=causal), want, **TOLERANCE)


@pytest.mark.critical
@pytest.mark.parametrize("training", [False, True])
def test_masks(training):
    layer = AttentionLayer(32, 4, dropout=1e-9).train(training)
    x = torch.randn(2, 20, 32)
    keep = torch.ones(2, 20)
    keep[0], keep[1, :6] = 0, 0
    seen = torch.rand(2, 4, 20, 20) > 0.4
    for given, parts in (
        (None, {}),
        (keep, {"key_padding": keep.bool()}),
        (seen, {"bias": seen}),
        (seen[:, 0].float(), {"bias": seen[:, :1].float()}),
    ):
        for causal in (False, True):
            want, _ = layer_reference(layer, x, MaskSpec(causal, **parts))
            out = layer(x, given, causal=causal)
            torch.testing.assert_close(out.double(), want, **TOLERANCE)


def test_dropout_drops_in_training():
    layer = AttentionLayer(32, 4, dropout=0.5, bias=False)
    x = torch.randn(2, 30, 32)
    torch.manual_seed(0)
    one, other = layer(x), layer(x)
    assert not torch.equal(one, other)
    many = torch.stack([layer(x) for _ in range(3000)]).mean(0)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert (many - layer(x)).abs().max() < 0.15 * layer(x).abs().max()


def test_a_sequence_that_sees_nothing_is_the_bias():
    for training in (False, True):
        layer = AttentionLayer(16, 2).train(training)
        x = torch.randn(1, 4, 16, requires_grad=True)
        out = layer(x, torch.zeros(1, 4))
        torch.testing.assert_close(out, layer.out_proj.bias.expand_as(out))
        assert (torch.autograd.grad(out.sum(), x)[0] == 0).all()


def test_state_and_mode_come_along():
    mha = nn.MultiheadAttention(16, 2, dropout=0.3, dtype=torch.float64).eval()
    layer = AttentionLayer.from_mha(mha)
    assert not layer.training
    assert layer.dropout == 0.3
    assert layer.q_proj.weight.dtype == torch.float64
    assert len(layer.state_dict()) == 8
    with pytest.raises(ValueError, match="kdim"):
        AttentionLayer.from_mha(nn.MultiheadAttention(16, 2, kdim=8))
    with pytest.raises(ValueError, match="add_bias_kv"):
        AttentionLayer.from_mha(nn.MultiheadAttention(16, 2, add_bias_kv=True))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"dropout=1\.0"):
        AttentionLayer(16, 2, dropout=1.0)
    with pytest.raises(ValueError, match=r"d_model=10.*num_heads=4"):
        AttentionLayer(10, 4)
    with pytest.raises(ValueError, match="x "):
        AttentionLayer(16, 2)(torch.randn(4, 16))


def test_names_at_the_root():
    assert kernel_pytorch.AttentionLayer is AttentionLayer
    assert kernel_pytorch.FP8Format.E4M3.value == "e4m3"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = kernel_pytorch.Nothing
