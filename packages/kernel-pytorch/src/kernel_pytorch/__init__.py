# SPDX-License-Identifier: Apache-2.0
"""Exact attention over long sequences: streaming, ring and block-sparse.

The names live in `kernel_pytorch.attention`, `kernel_pytorch.precision` and
`kernel_pytorch.core`; they are loaded at first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["attention", "core", "precision"]


def __dir__() -> list[str]:
    parts = (importlib.import_module(f"{__name__}.{part}") for part in __all__)
    return sorted({*globals(), *__all__, *(n for part in parts for n in part.__all__)})


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    if not name.startswith("_"):
        for part in __all__:
            module = importlib.import_module(f"{__name__}.{part}")
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
