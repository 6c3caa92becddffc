# SPDX-License-Identifier: Apache-2.0
"""Tiny real models, saved once, and the base models they are compared with."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mol import MoLConfig, fuse
from torchworks_core.testing import save_tiny

transformers_logging.disable_progress_bar()

WIDE = {"hidden_size": 96, "head_dim": 24, "intermediate_size": 160}
SCALED = {
    "scale_attn_by_inverse_layer_idx": True,
    "hidden_size": 80,
    "num_hidden_layers": 3,
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Name -> folder: gpt2 (64), llama (96), and gpt2 whose blocks know their index."""
    root = tmp_path_factory.mktemp("models")
    kinds = {"gpt2": ("gpt2", {}), "llama": ("llama", WIDE), "scaled": ("gpt2", SCALED)}
    return {
        name: str(save_tiny(root / name, family, seed=number, **overrides))
        for number, (name, (family, overrides)) in enumerate(kinds.items())
    }


@pytest.fixture(scope="session")
def base(folders):
    """Name -> the model as transformers loads it."""
    return {
        name: AutoModelForCausalLM.from_pretrained(folder).eval()
        for name, folder in folders.items()
    }


@pytest.fixture
def copied(folders, tmp_path):
    """A function: a private copy of a model's folder, to be damaged."""

    def copy(name, as_name="copy"):
        return shutil.copytree(folders[name], tmp_path / as_name)

    return copy


@pytest.fixture
def ids():
    return torch.randint(0, 256, (2, 20))


@pytest.fixture
def make(folders):
    """A function: ``make("gpt2", "llama", stream=...)`` -> a fused runtime."""

    def build(*names, **options):
        return fuse(MoLConfig([folders[name] for name in names], **options))

    return build


@pytest.fixture(scope="session")
def stir():
    """A function: random adapters and routers, so that every expert matters."""

    def apply(runtime, seed=0):
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in runtime.model.streams.layers.named_parameters():
                noise = torch.randn(value.shape, generator=random)
                value.add_(noise * (0.3 if "router" in name else 0.05))
        return runtime

    return apply
