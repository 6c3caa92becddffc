# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Weights that the worker reads itself; the client only gets their descriptions."""

import contextlib
import math
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import torch

from mycelya_torch import _logging, _stats
from mycelya_torch._device import index_of, manager
from mycelya_torch._errors import ProtocolError, field
from torchworks_core.errors import InvalidValue

StateDict = dict[str, torch.Tensor]
_MAX_FILES = 1 << 20
# What a file of safetensors can hold; a worker may name nothing else.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2),
        *(torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.complex64),
    )
}


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
    request = {"repo_id": _text(repo_id, "repo_id"), "path": _folder(path)}
    if revision is not None:
        _text(revision, "revision")
    listing = manager.at(index).request(
        {"do": "list", **request, "revision": revision}, "load"
    )
    token, files = field(listing, "token", int), field(listing, "files", int)
    if not 0 < files <= _MAX_FILES:
        raise ProtocolError(f"the worker found {files} files")

    def report(done: int) -> None:
        _logging.machine.info("%s: %d of %d files", repo_id, done, files)
        if progress is not None:
            progress(done, files)

    whole: list[torch.Tensor] = []
    try:
        return _load(index, token, files, report, whole)
    except BaseException:
        # In a thread, as the worker may be reading: a Ctrl-C must not wait for it.
        _stats.start_thread(f"mycelya-forget-{token}", _forgetter(index, token, whole))
        raise


def _load(
    index: int,
    token: int,
    files: int,
    report: Callable[[int], None],
    whole: list[torch.Tensor],
) -> dict[str, StateDict]:
    """Have files read and adopted; ``whole`` gets a tensor for each storage."""
    machine = manager.at(index)
    for number in range(files):
        machine.request({"do": "load", "token": token, "file": number}, "load")
        report(number + 1)
    found = machine.request({"do": "describe", "token": token}, "load")
    dicts, sizes = field(found, "dicts", dict), field(found, "storages", list)
    whole += [torch.ops.mycelya.unannounced(index, _size(size)) for size in sizes]
    ids = [torch.ops.mycelya.storage_id(tensor) for tensor in whole]
    loaded = {
        folder: {name: _tensor(whole, entry) for name, entry in entries.items()}
        for folder, entries in _maps(dicts).items()
    }
    machine.request({"do": "adopt", "token": token, "ids": ids}, "load")
    for tensor in whole:
        torch.ops.mycelya.announced(tensor)
    return loaded


def _forgetter(index: int, token: int, whole: list[torch.Tensor]) -> Callable[[], None]:
    """Return what frees, on the worker too, what an interrupted load has read."""
    life = manager.at(index)

    def forget() -> None:
        with contextlib.suppress(RuntimeError):  # it has died, or was stopped
            if life.request({"do": "forget", "token": token}, "load") is True:
                # The storages are ours: freed there when their tensors are freed here.
                for tensor in whole:
                    torch.ops.mycelya.announced(tensor)

    return forget


def _checked(device: Any, name: str) -> torch.device:
    device = torch.device(device)
    if device.type != "mycelya":
        raise RuntimeError(
            f"{name} is {device}, but weights are loaded by a machine: give "
            "machine.device()"
        )
    return device


def _text(value: Any, name: str) -> str:
    try:
        if isinstance(value, str) and value and value.encode():
            return value
    except UnicodeEncodeError:
        pass  # a file name that is no text
    raise InvalidValue(f"{name} {value!r}", "it has to be a text that is not empty")


def _folder(path: Any) -> str:
    if path == "":
        return path
    folder = PurePosixPath(_text(path, "path"))
    if ".." in folder.parts or folder.is_absolute() or "\\" in path:
        raise InvalidValue(f"path {path!r}", "it leads out of the repository")
    return "/".join(folder.parts)


def _size(nbytes: Any) -> int:
    if type(nbytes) is not int or not 0 <= nbytes < 1 << 38:
        raise ProtocolError("the worker named an impossible size")
    return nbytes


def _maps(dicts: dict[Any, Any]) -> dict[str, dict[str, Any]]:
    maps = [dicts, *dicts.values()]
    if not all(type(one) is dict and all(type(k) is str for k in one) for one in maps):
        raise ProtocolError("the worker named no state dicts")
    return dicts


def _tensor(whole: list[torch.Tensor], entry: Any) -> torch.Tensor:
    """Return the tensor that an entry describes, in the storage that it names.

    Raises:
        ProtocolError: there can be no such tensor.
    """
    problem = ProtocolError("the worker named an impossible tensor")
    if type(entry) is not list or len(entry) != 3:
        raise problem
    number, name, shape = entry
    dtype = _DTYPES.get(name) if type(name) is str else None
    if dtype is None or type(number) is not int or not 0 <= number < len(whole):
        raise problem
    if type(shape) is not list or len(shape) > 64:
        raise problem
    if not all(type(size) is int and size >= 0 for size in shape):
        raise problem
    tensor = whole[number]
    # The strides of an empty tensor are products of its other sizes.
    if math.prod(max(size, 1) for size in shape) >= 1 << 62:
        raise problem
    if math.prod(shape) * dtype.itemsize != tensor.numel():
        raise problem
    # `data`: a tensor of its own, no view of the bytes that autograd would follow.
    tensor = tensor.view(dtype).view(shape).data
    _logging.log_tensor("loaded", tensor)
    return tensor
