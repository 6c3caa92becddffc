# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Weights that the worker reads itself; the client only gets their descriptions."""

import math
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import torch

from mycelya_torch import _logging
from mycelya_torch._device import index_of, manager
from mycelya_torch._errors import ProtocolError
from torchworks_core.errors import InvalidValue

StateDict = dict[str, torch.Tensor]


def load_huggingface_state_dicts(
    repo_id: str,
    device: torch.device | str,
    *,
    path: str = "",
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, StateDict]:
    """Have a machine read the safetensors files of a model repository.

    The weights never pass through this process. Entries that are stored once under
    two names share a storage; where ``save_pretrained`` left a tied head out of the
    file, ``lm_head.weight`` is a second name of the input embedding.

    Args:
        repo_id: A folder of the worker's computer, else a repository of the hub. A
            server allows folders below its ``--hub-root``, and the hub with
            ``--allow-hub``.
        device: A device of a machine.
        path: Only this folder of the repository; keys are relative to it.
        revision: Branch, tag or commit of a repository of the hub.
        progress: Called with the number of files read and of all files.

    Returns:
        Folder of the repository (``""`` is its root) -> name -> tensor on ``device``.

    Raises:
        RuntimeError: the device is none of a machine, or the worker can't read the
            repository; then nothing is loaded. Without safetensors files the text
            says what to do.
        ValueError: ``path`` leads out of the repository.
    """
    index = index_of(_checked(device, "device"))
    request = {"repo_id": _text(repo_id), "path": _folder(path), "revision": revision}
    machine = manager.at(index)
    listing = machine.request({"do": "list", **request}, "load")
    token, files = _field(listing, "token", int), _field(listing, "files", int)
    for number in range(files):
        machine.request({"do": "load", "token": token, "file": number}, "load")
        _logging.machine.info("%s: %d of %d files", repo_id, number + 1, files)
        if progress is not None:
            progress(number + 1, files)
    found = machine.request({"do": "describe", "token": token}, "load")
    dicts, sizes = _field(found, "dicts", dict), _field(found, "storages", list)
    whole = [torch.ops.mycelya.unannounced(index, _size(size)) for size in sizes]
    ids = [torch.ops.mycelya.storage_id(tensor) for tensor in whole]
    machine.request({"do": "adopt", "token": token, "ids": ids}, "load")
    for tensor in whole:
        torch.ops.mycelya.announced(tensor)
    return {
        folder: {name: _tensor(whole, entry) for name, entry in entries.items()}
        for folder, entries in dicts.items()
    }


def _checked(device: Any, name: str) -> torch.device:
    device = torch.device(device)
    if device.type != "mycelya":
        raise RuntimeError(
            f"{name} is {device}, but weights are loaded by a machine: give "
            "machine.device()"
        )
    return device


def _text(repo_id: Any) -> str:
    if not isinstance(repo_id, str) or not repo_id:
        raise InvalidValue(f"repo_id {repo_id!r}", "it is no name and no folder")
    return repo_id


def _folder(path: Any) -> str:
    parts = PurePosixPath(path).parts
    if ".." in parts or PurePosixPath(path).is_absolute() or "\\" in str(path):
        raise InvalidValue(f"path {path!r}", "it leads out of the repository")
    return "/".join(parts)


def _field(message: Any, name: str, kind: type) -> Any:
    value = message.get(name) if isinstance(message, dict) else None
    if not isinstance(value, kind):
        raise ProtocolError(f"the worker's answer has no usable {name!r}")
    return value


def _size(nbytes: Any) -> int:
    if not isinstance(nbytes, int) or not 0 <= nbytes < 1 << 38:
        raise ProtocolError("the worker named an impossible size")
    return nbytes


def _tensor(whole: list[torch.Tensor], entry: Any) -> torch.Tensor:
    problem = ProtocolError("the worker named an impossible tensor")
    try:
        number, name, shape = entry
        dtype, tensor = getattr(torch, name), whole[number]
        elements = math.prod(shape)
    except (AttributeError, IndexError, TypeError, ValueError):
        raise problem from None
    if not isinstance(dtype, torch.dtype) or min(shape, default=0) < 0:
        raise problem
    if elements * dtype.itemsize != tensor.numel():
        raise problem
    # `data`: a tensor of its own, no view of the bytes that autograd would follow.
    tensor = tensor.view(dtype).view(shape).data
    _logging.log_tensor("loaded", tensor)
    return tensor
