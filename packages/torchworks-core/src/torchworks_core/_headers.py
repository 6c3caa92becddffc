# SPDX-License-Identifier: Apache-2.0
"""A strict parser for the header of a safetensors file.

It checks every sentence of https://github.com/huggingface/safetensors#format
before a byte of tensor data is read, and allocates nothing by a size that the
file claims.
"""

import math
import os
from dataclasses import dataclass
from typing import TypeGuard

from torchworks_core._files import decode_json, is_text_map, open_file, short
from torchworks_core.errors import CorruptFile

MAX_HEADER_BYTES = 100_000_000
# What a signed integer of 64 bits holds, from 0 on.
_INTS = range(2**63)
# The dtypes, by the bits of one element.
_DTYPES = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ F8_E8M0",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "I64 U64 F64 C64",
}
BITS = {name: bits for bits, names in _DTYPES.items() for name in names.split()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes ``begin`` to ``end`` (exclusive) of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(
    path: str | os.PathLike, *, max_header_bytes: int = MAX_HEADER_BYTES
) -> dict[str, TensorEntry]:
    """Read and check the header of a safetensors file.

    Raises:
        MissingFile: there is no such file.
        CorruptFile: the header breaks the format, or the file's length does not
            fit it.

    Example:
        >>> import tempfile, torch, safetensors.torch
        >>> path = tempfile.mkdtemp() + "/a.safetensors"
        >>> safetensors.torch.save_file({"w": torch.zeros(2, 3)}, path)
        >>> read_header(path)["w"].shape
        (2, 3)
    """
    source = f"file {str(path)!r}"
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > max_header_bytes or 8 + length > size:
            why = f"a header of {length} bytes in {size}, {max_header_bytes} at most"
            raise CorruptFile(source, why, "Download or convert the file again")
        raw = file.read(length)
    return parse_header(raw, size - 8 - length, 8 + length, source=source)


def parse_header(
    header_bytes: bytes, data_size: int, base: int, *, source: str = "header"
) -> dict[str, TensorEntry]:
    """Check the JSON part of a safetensors file, however it was fetched.

    Args:
        header_bytes: The header without its 8 bytes of length.
        data_size: Bytes that follow the header in the file.
        base: Byte of the file at which they begin.
        source: What to call the file in messages.

    Returns:
        The entries by tensor name, offsets counted from the file's first byte.

    Raises:
        CorruptFile: any breach of the format; nothing else is raised.

    Example:
        >>> raw = b'{"b": {"dtype": "I8", "shape": [3], "data_offsets": [0, 3]}}'
        >>> parse_header(raw, data_size=3, base=8 + len(raw))["b"].begin
        68
    """
    if header_bytes[:1] != b"{" or header_bytes.rstrip(b" ")[-1:] != b"}":
        raise CorruptFile(source, "the header is no JSON object and spaces after it")
    found = decode_json(header_bytes, source)
    if not is_text_map(found.pop("__metadata__", {})):
        raise CorruptFile(source, "__metadata__ does not map strings to strings")
    entries = {
        name: _entry(f"{source}, tensor {short(name)}", info, data_size, base)
        for name, info in found.items()
    }
    _check_cover(entries, base, base + data_size, source)
    return entries


def _entry(where: str, info: object, data_size: int, base: int) -> TensorEntry:
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFile(where, "dtype, shape and data_offsets were expected")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if type(dtype) is not str or dtype not in BITS:
        raise CorruptFile(where, f"unknown dtype {short(dtype)}")
    if not _naturals(shape):
        raise CorruptFile(where, f"shape {short(shape)} is no list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or sorted(offsets) != offsets:
        raise CorruptFile(where, f"data_offsets {short(offsets)} are no two offsets")
    begin, end = offsets
    if end > data_size:
        raise CorruptFile(where, f"it ends at byte {end} of {data_size} bytes of data")
    elements, size = _elements(shape), end - begin
    if elements is None or elements * BITS[dtype] != size * 8:
        raise CorruptFile(where, f"{dtype} {short(shape)} does not fill {size} bytes")
    return TensorEntry(dtype, tuple(shape), base + begin, base + end)


def _naturals(found: object) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(type(n) is int and n in _INTS for n in found)


def _elements(shape: list[int]) -> int | None:
    """Multiply the sizes, or return None where those that are not 0 give too much."""
    large = [size for size in shape if size > 1]
    # More than 62 of them pass the limit; a product of many would take long.
    if len(large) > 62 or math.prod(large) not in _INTS:
        return None
    return 0 if 0 in shape else math.prod(large)


def _check_cover(entries: dict, begin: int, end: int, source: str) -> None:
    for name, entry in sorted(entries.items(), key=lambda e: (e[1].begin, e[1].end)):
        if entry.begin != begin:
            kind = "overlaps the one before" if entry.begin < begin else "follows a gap"
            raise CorruptFile(f"{source}, tensor {short(name)}", f"its data {kind}")
        begin = entry.end
    if begin != end:
        raise CorruptFile(source, f"{end - begin} bytes at the end belong to no tensor")
