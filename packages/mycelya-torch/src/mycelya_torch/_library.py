# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Finds the native library and loads it into torch.

The library is built for one minor version of torch, which the build writes into
``_C.torch`` beside it; it is read before loading, as a library for another torch
may not even load.
"""

import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
_REINSTALL = (
    "reinstall with `pip install --no-build-isolation --force-reinstall --no-deps "
    "mycelya-torch`"
)
_loaded = False


def minor(version: str) -> str:
    """Return the first two numbers of a version.

    Example:
        >>> minor("2.13.0+cpu")
        '2.13'
    """
    return ".".join(version.split(".")[:2])


def load() -> None:
    """Load the library, once.

    Raises:
        ImportError: it is missing, or was built for another torch.
    """
    global _loaded
    if _loaded:
        return
    path = _find()
    note = path.with_suffix(".torch")
    if note.is_file():
        _check(note.read_text().strip())
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        why = error.__cause__ or error
        text = f"{path.name} of mycelya_torch can't be loaded ({why}): {_REINSTALL}"
        raise ImportError(text) from error
    _check(torch.ops.mycelya.built_for())
    _loaded = True


def _find() -> Path:
    if sys.platform == "win32":
        raise ImportError(
            "mycelya_torch has no Windows build: use Linux, for example WSL"
        )
    names = ("_C.so", "_C.dylib")
    for name in names:
        if (FOLDER / name).is_file():
            return FOLDER / name
    raise ImportError(
        f"mycelya_torch has no native library ({' or '.join(names)}) in {FOLDER}: "
        "build it with `pip install --no-build-isolation -e packages/mycelya-torch` "
        f"in a checkout, or {_REINSTALL}"
    )


def _check(built_for: str) -> None:
    if built_for != minor(torch.__version__):
        raise ImportError(
            f"mycelya_torch was built for torch {built_for}, but torch "
            f"{torch.__version__} is running: {_REINSTALL}"
        )
