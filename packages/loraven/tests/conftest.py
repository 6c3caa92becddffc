# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, wide enough to be converted."""

import pytest
import torch
from torch import nn

from torchworks_core.testing import tiny_model


def _mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 64)
    ).eval()


@pytest.fixture
def mlp():
    """A function: 64 -> 96 -> 128 -> 64, three layers that can be converted."""
    return _mlp


@pytest.fixture
def bert():
    """A function: a BERT of two layers, width 64, with a pooler, in eval mode."""

    def make(seed=0, **changes):
        from transformers import BertConfig, BertModel

        torch.manual_seed(seed)
        sizes = {
            "vocab_size": 64,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 32,
            # Wide enough that each layer clearly changes the output.
            "initializer_range": 0.15,
        }
        return BertModel(BertConfig(**sizes | changes)).eval()

    return make


@pytest.fixture
def gpt2():
    """A function: a GPT-2 of two layers, width 64, its head tied to the embedding."""

    def make(seed=0):
        return tiny_model("gpt2", seed=seed, num_hidden_layers=2)

    return make


@pytest.fixture
def sentences():
    """A function: padded batches of ids for the BERT; what is padded is id 0."""

    def make(batches=9, size=16, length=12, seed=0):
        random = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(batches):
            ids = torch.randint(1, 64, (size, length), generator=random)
            sizes = torch.randint(3, length + 1, (size, 1), generator=random)
            mask = (torch.arange(length) < sizes).long()
            found.append({"input_ids": ids * mask, "attention_mask": mask})
        return found

    return make
