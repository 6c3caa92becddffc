# SPDX-License-Identifier: Apache-2.0
"""Fuse transformer blocks, or whole models, of different pretrained families.

``import mol`` loads neither torch nor transformers; the names below are
resolved on first use (PEP 562).
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

from mol.config import ModelInfo, MoLConfig
from mol.errors import NotYetBuilt, UnsupportedArchitectureError

if TYPE_CHECKING:
    from mol.adapters import LinearAdapter
    from mol.align import AlignReport
    from mol.modeling import MoLForCausalLM, MoLModelConfig
    from mol.routers import SimpleRouter, TokenLevelRouter
    from mol.runtime import MoLRuntime, fuse
    from mol.verify import VerifyReport

_HOME = {
    "AlignReport": "mol.align",
    "LinearAdapter": "mol.adapters",
    "MoLForCausalLM": "mol.modeling",
    "MoLModelConfig": "mol.modeling",
    "MoLRuntime": "mol.runtime",
    "SimpleRouter": "mol.routers",
    "TokenLevelRouter": "mol.routers",
    "VerifyReport": "mol.verify",
    "fuse": "mol.runtime",
}

_LATER = ("BottleneckAdapter", "MoLTrainer", "merge", "text_dataset")

__all__ = [
    "AlignReport",
    "LinearAdapter",
    "MoLConfig",
    "MoLForCausalLM",
    "MoLModelConfig",
    "MoLRuntime",
    "ModelInfo",
    "SimpleRouter",
    "TokenLevelRouter",
    "UnsupportedArchitectureError",
    "VerifyReport",
    "fuse",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("mol-fusion")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _LATER:
        raise NotYetBuilt(
            f"mol.{name} is not built yet",
            "this release holds the first slice of mol-fusion",
            "Wait for a later release",
        )
    raise AttributeError(f"module 'mol' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
