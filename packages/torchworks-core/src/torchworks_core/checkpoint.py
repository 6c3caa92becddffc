# SPDX-License-Identifier: Apache-2.0
"""Tensors in safetensors files, and one JSON document that commits them.

Weights go first, to new names that hold a hash of their content; then the
document is replaced atomically; then weights that it no longer names are
removed. A kill at any moment leaves the old or the new checkpoint. One process
at a time may write into a folder. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

# What is imported "as" itself is this module's to offer, too.
from torchworks_core._files import TEMPORARY, encode_json, is_text_map, open_file, short
from torchworks_core._files import read_json as read_json
from torchworks_core._files import resolve_inside as resolve_inside
from torchworks_core._files import write_atomic as write_atomic
from torchworks_core._files import write_hashed as write_hashed
from torchworks_core._files import write_json as write_json
from torchworks_core._headers import BITS, MAX_HEADER_BYTES
from torchworks_core._headers import TensorEntry as TensorEntry
from torchworks_core._headers import parse_header as parse_header
from torchworks_core._headers import read_header as read_header
from torchworks_core.errors import CorruptFile, InvalidValue, MissingFile

SCHEMA = 1
DOCUMENT = "checkpoint.json"
_KEY = "torchworks"
# What safetensors calls torch's kinds of dtypes, and the dtypes with other names.
_KINDS = {"uint": "U", "int": "I", "float": "F", "bfloat": "BF", "complex": "C"}
_OTHERS = {"bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0"}
# What a tensor may be called: any text that has a form in UTF-8, and not this one.
_USABLE = re.compile(r"(?!__metadata__\Z)[^\ud800-\udfff]+")


def save(
    folder: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    document: dict,
    *,
    document_name: str = DOCUMENT,
    stem: str = "model",
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write a checkpoint into ``folder``, replacing the one there.

    Args:
        folder: Created if missing. Files of other names are left alone.
        tensors: Dense tensors of any shape, stride and device; tensors that
            share storage are saved as independent copies. Values are not
            checked: NaN is saved as it is.
        document: JSON values; its key ``"torchworks"`` is overwritten.
        document_name: Name of the JSON document.
        stem: First part of the names of the weight files.
        max_shard_bytes: A file holds at most this, or one larger tensor.

    Raises:
        InvalidValue: a tensor or the document cannot be written, or a name is
            unusable. Raised before anything is written.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> save(folder, {"w": torch.ones(2)}, {"step": 7})
        >>> tensors, document = load(folder)
        >>> tensors["w"], document["step"]
        (tensor([1., 1.]), 7)
    """
    folder = Path(folder)
    if not re.fullmatch(r"\w[\w.-]*", stem) or max_shard_bytes < 1:
        raise InvalidValue(f"stem={stem!r}, max_shard_bytes={max_shard_bytes}")
    encode_json(document, "document")
    entry = _save_shards(folder, stem, tensors, max_shard_bytes)
    whole, keep = document | {_KEY: entry}, entry["sha256"]
    pattern = re.escape(stem) + r"-[0-9a-f]{12}(-\d{5}-of-\d{5})?\.safetensors"
    commit(folder, whole, document_name=document_name, keep=keep, pattern=pattern)


def commit(
    folder: str | os.PathLike,
    document: dict,
    *,
    document_name: str = DOCUMENT,
    keep: Iterable[str],
    pattern: str,
) -> None:
    """Make ``document`` the checkpoint of ``folder``, then remove the old files.

    For weights in another format: write them with `write_hashed`, then call this.

    Args:
        folder: An existing folder.
        document: The whole document; written as it is.
        document_name: Its file name.
        keep: Names of the files that the document relies on; they must exist.
        pattern: Regular expression; files whose whole name matches it and that
            are not in ``keep`` are removed, and so are left-over temporary files.

    Raises:
        MissingFile: a file of ``keep`` is not there; nothing was changed.
        InvalidValue: the document cannot be written; nothing was changed.
    """
    folder, kept = Path(folder), {*keep, document_name}
    path = resolve_inside(folder, document_name)
    for name in kept - {document_name}:
        if not resolve_inside(folder, name).is_file():
            raise MissingFile(f"file {str(folder / name)!r}", "it was to be committed")
    write_json(path, document)
    for file in folder.iterdir():
        old = re.fullmatch(pattern, file.name) and file.name not in kept
        if (old or TEMPORARY.fullmatch(file.name)) and not file.is_dir():
            file.unlink(missing_ok=True)


def load(
    folder: str | os.PathLike,
    *,
    document_name: str = DOCUMENT,
    device: str | torch.device = "cpu",
    verify: bool = True,
) -> tuple[dict[str, torch.Tensor], dict]:
    """Read a checkpoint written by `save`.

    Args:
        folder: Where it is.
        document_name: Name of the JSON document.
        device: Where the tensors go. They own their memory: the files may be
            replaced while the tensors live.
        verify: Compare the sha256 of each file with the document's.

    Returns:
        The tensors in the order in which they were saved, and the document,
        with its key ``"torchworks"``.

    Raises:
        MissingFile: the folder, the document or a weight file is missing.
        CorruptFile: anything is not as it was saved; names the file and tensor.
    """
    document = load_document(folder, document_name=document_name)
    weights, hashes = document[_KEY]["weights"], document[_KEY]["sha256"]
    found: dict[str, torch.Tensor] = {}
    for file, expected in hashes.items():
        try:
            path = resolve_inside(folder, file)
        except InvalidValue as error:
            raise CorruptFile(f"document {document_name!r}", str(error)) from error
        names = {name for name, home in weights.items() if home == file}
        found |= _load_shard(path, names, device, expected if verify else None)
    return {name: found[name] for name in weights}, document


def load_document(
    folder: str | os.PathLike, *, document_name: str = DOCUMENT
) -> dict[str, Any]:
    """Read the document of a checkpoint and check its key ``"torchworks"``.

    Raises:
        MissingFile: the folder or the document is missing.
        CorruptFile: no document of `save`, or of a newer schema.
    """
    path = resolve_inside(folder, document_name)
    document = read_json(path)
    source, entry = f"document {str(path)!r}", document.get(_KEY)
    if not isinstance(entry, dict) or type(entry.get("schema")) is not int:
        raise CorruptFile(source, f"it has no {_KEY!r} entry with a schema version")
    if entry["schema"] != SCHEMA:
        why = f"schema {entry['schema']}, this version reads {SCHEMA}"
        raise CorruptFile(source, why, "Use the torchworks-core that wrote it")
    weights, hashes = entry.get("weights"), entry.get("sha256")
    texts = is_text_map(weights) and is_text_map(hashes)
    if not texts or set(weights.values()) != set(hashes):
        raise CorruptFile(source, "weights and sha256 do not name the same files")
    return document


def _shards(tensors: Mapping[str, torch.Tensor], limit: int) -> list[list[str]]:
    """Split the names in their order, the widest dtype first within a shard."""
    shards, room = [], 0
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= tensor.nbytes
    # Readers map the file into memory: this order keeps each tensor aligned.
    return [sorted(s, key=lambda n: (-tensors[n].itemsize, n)) for s in shards]


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(name, str) or not _USABLE.fullmatch(name):
        why = "this name can't be used"
    elif not isinstance(tensor, torch.Tensor):
        why = f"a tensor was expected, not {type(tensor).__name__}"
    elif tensor.layout != torch.strided or tensor.device.type == "meta":
        why = f"it is not dense: {tensor.layout} on {tensor.device}"
    elif _dtype_name(tensor.dtype) not in BITS:
        why = f"safetensors has no {tensor.dtype}"
    else:
        return
    raise InvalidValue(f"tensor {short(name)}", why, "Convert or leave it out")


def _dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as safetensors does; where it can't, the name is not in BITS."""
    name = str(dtype).removeprefix("torch.")
    regular = re.sub("^[a-z]+", lambda kind: _KINDS.get(kind[0], "?"), name).upper()
    return _OTHERS.get(name, regular)


def _save_shards(
    folder: Path, stem: str, tensors: Mapping[str, torch.Tensor], limit: int
) -> dict[str, Any]:
    shards = _shards(tensors, limit)
    # All headers first: one may be refused, and then nothing is written.
    headers = [_header(tensors, names) for names in shards]
    folder.mkdir(parents=True, exist_ok=True)
    homes, hashes = {}, {}
    for number, (names, header) in enumerate(zip(shards, headers, strict=True), 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        write = partial(_write, header, [tensors[name] for name in names])
        file, hashes[file] = write_hashed(folder, stem, f"{part}.safetensors", write)
        homes |= dict.fromkeys(names, file)
    weights = {name: homes[name] for name in tensors}
    return {"schema": SCHEMA, "weights": weights, "sha256": hashes}


def _header(tensors: Mapping[str, torch.Tensor], names: list[str]) -> bytes:
    found, end = {}, 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        info = {"dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        found[name] = info | {"data_offsets": [begin, end]}
    raw = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise InvalidValue("tensor names", f"a header of {len(raw)} bytes")
    return len(raw).to_bytes(8, "little") + raw


def _write(header: bytes, tensors: Iterable[torch.Tensor], file: BinaryIO) -> None:
    file.write(header)
    for tensor in tensors:
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # Not reshape: with one element a contiguous tensor may have any stride.
        flat = plain.as_strided((plain.numel(),), (1,))
        file.write(flat.view(torch.uint8).numpy().data)


def _load_shard(
    path: Path, names: set[str], device: str | torch.device, expected: str | None
) -> dict[str, torch.Tensor]:
    """Check header, tensor names and hash, then map the file and copy its tensors."""
    source = f"file {str(path)!r}"
    different = read_header(path).keys() ^ names
    if different:
        which = f"tensor {short(min(different))}"
        raise CorruptFile(source, f"{which} is in the file or in the document only")
    if expected is not None:
        with open_file(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            why = f"sha256 {digest[:12]} instead of {short(expected[:12])}"
            raise CorruptFile(source, why, "Restore the file or the checkpoint")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # A copy, so that no tensor keeps the file mapped.
            return {name: file.get_tensor(name).to(device, copy=True) for name in names}
    except SafetensorError as error:
        raise CorruptFile(source, str(error)) from error
