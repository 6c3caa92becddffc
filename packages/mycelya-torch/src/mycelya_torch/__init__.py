# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""A PyTorch device whose tensors live in another process or on another machine.

Importing registers the device ``mycelya`` and ``torch.mycelya``; it starts nothing.
"""

import ctypes

import torch

from mycelya_torch import _library

_library.load()

from mycelya_torch import _backend_hooks, _errors, _logging, _stats  # noqa: E402
from mycelya_torch._device import require as _require  # noqa: E402
from mycelya_torch._errors import (  # noqa: E402
    AuthenticationError,
    MachineDiedError,
    ProtocolError,
    RemoteError,
    RemoteExecutionError,
    SyncForbiddenError,
)
from mycelya_torch._machine import (  # noqa: E402
    CloudProvider,
    GPUType,
    RemoteMachine,
    get_all_machines,
)
from mycelya_torch._state_dict import load_huggingface_state_dicts  # noqa: E402
from mycelya_torch._stats import (  # noqa: E402
    MachineStats,
    SyncPoint,
    forbid_sync,
    to_cpu_async,
)

__all__ = [
    "AuthenticationError",
    "CloudProvider",
    "GPUType",
    "MachineDiedError",
    "MachineStats",
    "ProtocolError",
    "RemoteError",
    "RemoteExecutionError",
    "RemoteMachine",
    "SyncForbiddenError",
    "SyncPoint",
    "forbid_sync",
    "get_all_machines",
    "get_metadata_hash",
    "get_storage_id",
    "load_huggingface_state_dicts",
    "to_cpu_async",
]


def get_storage_id(tensor: torch.Tensor) -> int:
    """Return the number of a tensor's storage: unique in this process, from 1.

    Raises:
        RuntimeError: it is no tensor of a machine.

    Example:
        >>> get_storage_id(torch.ones(2))
        Traceback (most recent call last):
            ...
        RuntimeError: a mycelya tensor is needed, but this one is on cpu: move it ...
    """
    _require(tensor)
    return torch.ops.mycelya.storage_id(tensor)


def get_metadata_hash(tensor: torch.Tensor) -> int:
    """Return a 64-bit FNV-1a hash of a tensor's metadata, for debugging.

    It is computed over little-endian int64 words: storage id, dtype number, storage
    offset, dimensions, sizes, strides, and conj | neg << 1. Two tensors may share it.

    Raises:
        RuntimeError: it is no tensor of a machine.
    """
    _require(tensor)
    return torch.ops.mycelya.metadata_hash(tensor) & (2**64 - 1)


def _register() -> None:
    python = ctypes.pythonapi
    functions = (
        python.PyGILState_Ensure,
        python.PyGILState_Release,
        python.PyErr_CheckSignals,
        python.PyErr_Occurred,
        python.PyErr_Clear,
        python.PyGILState_Check,
        python.PyEval_SaveThread,
        python.PyEval_RestoreThread,
        _stats.CALLBACK,
    )
    addresses = [ctypes.cast(one, ctypes.c_void_p).value for one in functions]
    torch.ops.mycelya.set_hooks(addresses)
    # In CPython the address of an object is its id; the classes live for ever.
    torch.ops.mycelya.set_error_types([id(kind) for kind in _errors.BY_KIND])
    torch.utils.rename_privateuse1_backend("mycelya")
    torch._register_device_module("mycelya", _backend_hooks)
    torch.utils.generate_methods_for_privateuse1_backend(
        for_tensor=True,
        for_module=True,
        for_packed_sequence=True,
        for_storage=True,
    )
    _logging.from_environment()


_register()
