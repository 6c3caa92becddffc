# SPDX-License-Identifier: Apache-2.0
"""The native block-sparse kernel: where it is, whether it can run, and its arguments.

Decisions:

- The library is loaded once, after torch, whose OpenMP runtime it then shares.
- It is loaded only if its SHA-256 is the one in ``build.json`` beside it: loading a
  truncated library can end the process instead of raising an error.
- The instruction set is chosen for each call; ``KP_ISA`` (``avx512``, ``avx2`` or
  ``generic``) lowers it, for tests and for comparing.
- A child of ``fork`` runs with one thread, because the parent's OpenMP threads do not
  exist there and waiting for them never ends.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from torchworks_core.errors import OutOfMemory

FOLDER = Path(__file__).resolve().parent.parent / "_native"
ABI = 2
ISAS = ("generic", "avx2", "avx512")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_BAD_ARGUMENT, _NO_MEMORY = 1, 2
_forked = False

_STRIDED = ("q", "k", "v", "dout")
_POINTERS = ("q", "k", "v", "dout")
_POINTERS_2 = ("extra_k", "extra_v", "extra_weight", "out", "lse", "dlse")
_POINTERS_3 = ("dq", "dk", "dv", "dextra_k", "dextra_v", "counts", "blocks")
_SIZES = ("batch", "heads", "kv_heads", "q_len", "kv_len", "dim")


class Arguments(ctypes.Structure):
    """``kp_args`` of ``csrc/kernel_pytorch/block_sparse.h``, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(f"{name}_stride", ctypes.c_int64 * 3) for name in _STRIDED]
        + [(name, ctypes.c_void_p) for name in _POINTERS_2 + _POINTERS_3]
        + [(name, ctypes.c_int64) for name in ("index_batch", "width", "block")]
        + [(name, ctypes.c_void_p) for name in ("key_padding", "documents")]
        + [(name, ctypes.c_int64) for name in ("positions", "causal", "window")]
        + [(name, ctypes.c_int64) for name in _SIZES]
        + [("scale", ctypes.c_double)]
        + [(name, ctypes.c_int64) for name in ("dtype", "isa", "threads")]
    )


class ChoiceArguments(ctypes.Structure):
    """``kp_choice`` of the same file."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("counts", "blocks", "missed", "logits")]
        + [(name, ctypes.c_double) for name in ("keep", "coverage")]
        + [("remainder", ctypes.c_int64)]
    )


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native kernel runs here.

    Args:
        available: True if block-sparse attention on CPU tensors uses it.
        isa: The instruction set it uses: ``avx512``, ``avx2``, ``generic`` or "".
        threads: Threads it uses.
        path: The library's file.
        reason: Why it isn't available; "" if it is.
    """

    available: bool
    isa: str
    threads: int
    path: str
    reason: str


class Unusable(Exception):
    """The library can't be used; the text is the reason."""


def native_status() -> NativeStatus:
    """Say whether the native kernel runs, with which instruction set, or why not.

    Example:
        >>> status = native_status()
        >>> status.available == (status.reason == "")
        True
    """
    path = str(FOLDER / "libkp.so")
    try:
        isa = ISAS[_isa(_library(FOLDER))]
    except Unusable as unusable:
        return NativeStatus(False, "", threads(), path, str(unusable))
    return NativeStatus(True, isa, threads(), path, "")


def threads() -> int:
    """Threads that the kernel uses: torch's number, and 1 in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def dtype_code(dtype: torch.dtype) -> int | None:
    """The kernel's number for ``dtype``; None if it has no code for it."""
    return _DTYPES.get(dtype)


def call(
    name: str, tensors: Mapping[str, Tensor | None], **numbers: int | float
) -> bool:
    """Run ``kp_bs_forward`` or ``kp_bs_backward``.

    Args:
        name: ``"forward"`` or ``"backward"``.
        tensors: The pointer fields of `Arguments`; q, k, v and dout may be strided
            in all but the last dimension, the others must be contiguous.
        **numbers: The other fields, without strides, isa and threads.

    Returns:
        False if the kernel refused an argument, so that nothing was computed.

    Raises:
        OutOfMemory: the kernel found no room for its buffers.
        Unusable: there is no library.
    """
    library = _library(FOLDER)
    args = _arguments(library, tensors, numbers)
    code = getattr(library, f"kp_bs_{name}")(ctypes.byref(args))
    return _done(code, f"block_sparse_attention ({name})")


def select(
    tensors: Mapping[str, Tensor | None],
    results: Mapping[str, Tensor | None],
    how: Mapping[str, int | float],
    **numbers: int | float,
) -> bool:
    """Run ``kp_bs_select``.

    Args:
        tensors: q and k, which may be strided in all but the last dimension, and the
            mask's tensors.
        results: The pointer fields of `ChoiceArguments`, contiguous.
        how: Its other fields.
        **numbers: As for `call`.

    Returns:
        As `call`.

    Raises:
        OutOfMemory: the kernel found no room for its buffers.
        Unusable: there is no library.
    """
    library = _library(FOLDER)
    args = _arguments(library, tensors, numbers)
    choice = ChoiceArguments(**how)
    for field, tensor in results.items():
        if tensor is not None:
            setattr(choice, field, tensor.data_ptr())
    code = library.kp_bs_select(ctypes.byref(args), ctypes.byref(choice))
    return _done(code, "build_block_index")


def _arguments(
    library: ctypes.CDLL,
    tensors: Mapping[str, Tensor | None],
    numbers: Mapping[str, int | float],
) -> Arguments:
    args = Arguments(isa=_isa(library), threads=threads(), **numbers)
    for field, tensor in tensors.items():
        if tensor is None:
            continue
        setattr(args, field, tensor.data_ptr())
        if field in _STRIDED:
            setattr(args, f"{field}_stride", (ctypes.c_int64 * 3)(*tensor.stride()[:3]))
    return args


def _done(code: int, what: str) -> bool:
    if code == _NO_MEMORY:
        why = "the kernel found no room for its copies of keys, values and gradients"
        raise OutOfMemory(what, why, "Use shorter inputs or fewer threads")
    return code != _BAD_ARGUMENT


def _isa(library: ctypes.CDLL) -> int:
    """Number of the instruction set to use."""
    best = library.kp_best_isa()
    wish = os.environ.get("KP_ISA", "")
    if not wish:
        return best
    if wish not in ISAS or ISAS.index(wish) > best:
        have = ", ".join(ISAS[: best + 1])
        raise Unusable(f"KP_ISA={wish} is not one of {have}, which this machine has")
    return ISAS.index(wish)


@cache
def _load(folder: Path) -> ctypes.CDLL | str:
    """The library in ``folder``, or the reason why there is none."""
    try:
        record = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        if reason := record.get("reason"):
            return str(reason)
        path = folder / "libkp.so"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != record.get("sha256"):
            return f"{path.name} is not the file that was built: it is corrupt"
        library = ctypes.CDLL(str(path))
        bytes_ = ctypes.c_int64()
        found = library.kp_abi(ctypes.byref(bytes_)), bytes_.value
    except FileNotFoundError as missing:
        return f"{Path(missing.filename).name} is missing: the kernel was not built"
    except (OSError, ValueError, AttributeError) as broken:
        return f"the library can't be loaded: {broken}"
    size = ctypes.sizeof(Arguments) + ctypes.sizeof(ChoiceArguments)
    if found != (ABI, size):
        return "the library was built for another version of kernel-pytorch"
    return library


def _library(folder: Path) -> ctypes.CDLL:
    found = _load(folder)
    if isinstance(found, str):
        raise Unusable(found)
    return found


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)
