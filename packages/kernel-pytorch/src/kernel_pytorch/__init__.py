# SPDX-License-Identifier: Apache-2.0
"""Exact attention over long sequences: streaming, ring and block-sparse.

The names live in `kernel_pytorch.attention`; they are loaded at first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["attention"]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    part = importlib.import_module(f"{__name__}.attention")
    if name == "attention":
        return part
    if name in part.__all__:
        return getattr(part, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
