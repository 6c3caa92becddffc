# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from loraven.eligible import find_targets


def reasons(model, **options):
    targets, skipped = find_targets(model, **options)
    assert not {target.name for target in targets} & skipped.keys()
    return [target.name for target in targets], skipped


def test_a_bert_gives_every_linear_layer(bert):
    names, skipped = reasons(bert())
    assert len(names) == 13
    assert not skipped


def test_gpt2_gives_conv1d_transposed_and_skips_the_tied_head(gpt2):
    model = gpt2()
    targets, skipped = find_targets(model)
    assert len(targets) == 8
    assert all(target.transposed for target in targets)
    fused = next(t for t in targets if t.name.endswith("0.attn.c_attn"))
    assert (fused.out_features, fused.in_features) == (192, 64)
    assert torch.equal(fused.matrix(), fused.module.weight.T)
    assert skipped == {"lm_head": "tied: its weight is 'transformer.wte.weight'"}


def test_patterns():
    model = nn.ModuleDict(
        {"a": nn.Linear(64, 64), "ab": nn.Linear(64, 64), "c": nn.Linear(64, 64)}
    )
    names, skipped = reasons(model, include=["a*"], exclude=["*b"])
    assert names == ["a"]
    assert skipped == {"ab": "excluded by '*b'", "c": "not in include"}


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Same(nn.Linear):
    """A subclass that computes what its base does."""


def _replaced():
    layer = nn.Linear(64, 64)
    layer.forward = lambda x: x
    return layer


def _sparse():
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    return layer


def _integers():
    layer = nn.Linear(64, 64)
    weight = torch.zeros(64, 64, dtype=torch.int8)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(64, 8), "too small: 8 x 64, min_features is 32"),
        (nn.Linear(64, 64, device="meta"), "meta device"),
        (parametrizations.weight_norm(nn.Linear(64, 64)), "parametrized"),
        (parametrizations.orthogonal(nn.Linear(64, 64)), "parametrized"),
        (nn.utils.spectral_norm(nn.Linear(64, 64)), "its weight is computed"),
        (nn.LazyLinear(64), "UninitializedParameter"),
        (Own(64, 64), "its own forward"),
        (_replaced(), "its own forward"),
        (_sparse(), "sparse"),
        (_integers(), r"quantized: torch\.int8"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_layers_that_can_not_be_converted(layer, reason):
    names, skipped = reasons(nn.Sequential(layer, Same(64, 64)))
    assert names == ["1"]
    assert skipped.keys() == {"0"}
    assert re.search(reason, skipped["0"])


def test_shared_modules_and_tied_weights():
    layer, a, b = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
    b.weight = a.weight
    names, skipped = reasons(nn.Sequential(layer, layer, a, b))
    assert not names
    assert skipped["0"] == "shared: the same module is '1'"
    assert skipped["2"] == "tied: its weight is '3.weight'"
    assert skipped["3"] == "tied: its weight is '2.weight'"


def test_the_model_itself_can_not_be_replaced():
    names, skipped = reasons(nn.Linear(64, 64))
    assert not names
    assert "whole model" in skipped[""]


def test_the_fused_encoder_layer_would_bypass_the_conversion():
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    names, skipped = reasons(nn.Sequential(layer))
    assert not names
    assert "activation_relu_or_gelu = 0" in skipped["0.linear1"]
    layer.activation_relu_or_gelu = 0
    names, skipped = reasons(nn.Sequential(layer))
    assert {"0.linear1", "0.linear2"} <= set(names)
