# SPDX-License-Identifier: Apache-2.0
"""Files written whole or not at all, JSON read with limits, names kept inside."""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO, TypeGuard

from torchworks_core.errors import CorruptFile, InvalidValue, MissingFile

_Write = Callable[[BinaryIO], Any]
MAX_JSON_BYTES = 16 << 20
TEMPORARY = re.compile(r"\.torchworks-[0-9a-f]{16}\.tmp")


def short(text: object) -> str:
    """Return ``text`` as printable ASCII of bounded length, for messages."""
    try:
        shown = ascii(text)
    except RecursionError:
        shown = f"a deeply nested {type(text).__name__}"
    return shown if len(shown) <= 100 else shown[:97] + "..."


def resolve_inside(
    folder: str | os.PathLike, name: str, *, root: str | os.PathLike | None = None
) -> Path:
    r"""Return the path of ``name`` in ``folder``, refusing any way out of it.

    Args:
        folder: The folder, which need not exist.
        name: A relative path with ``/`` between its parts.
        root: Symbolic links may lead anywhere below it; ``folder`` if None. For
            a snapshot in the hub's cache, whose files are links, give the
            model's cache folder.

    Raises:
        InvalidValue: ``name`` is empty, absolute, has ``..``, a backslash, a
            drive or NUL, or is a link that leads out of ``root``.

    Example:
        >>> resolve_inside("/data", "a/b.json").as_posix()
        '/data/a/b.json'
    """
    bad = not isinstance(name, str) or not name or "\0" in name or "\\" in name
    # A Windows path's anchor is a drive, a slash at the beginning, or both.
    bad = bad or ".." in name.split("/") or bool(PureWindowsPath(name).anchor)
    if not bad:
        base, target = Path(folder).resolve(), (Path(folder) / name).resolve()
        inside = target.is_relative_to(Path(root).resolve() if root else base)
        bad = target == base or not inside
    if bad:
        why = f"it leads out of the folder {str(folder)!r} or is no relative name"
        raise InvalidValue(f"file name {short(name)}", why, "Use a relative name")
    return Path(folder) / name


def _publish(folder: Path, write: _Write, name: Callable[[], str]) -> None:
    """Write a synced temporary file, then give it its name, or leave no trace."""
    temporary = folder / f".torchworks-{secrets.token_hex(8)}.tmp"
    try:
        # Mode "x" lets the umask decide; tempfile would force 0600.
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / name())
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        # Makes the new name durable.
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomic(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Replace ``path`` by what ``write`` puts into the file it is given.

    A reader, or a machine that loses power, sees the old file or the new one.
    The mode of the new file follows the umask.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> write_atomic(path, lambda file: file.write(b"whole"))
        >>> path.read_bytes()
        b'whole'
    """
    path = Path(path)
    _publish(path.parent, write, lambda: path.name)


def write_hashed(
    folder: str | os.PathLike, stem: str, suffix: str, write: Callable[[Any], Any]
) -> tuple[str, str]:
    """Write ``{stem}-{12 hex of its sha256}{suffix}`` into ``folder`` atomically.

    ``write`` gets an object that only has ``write`` and ``flush``; it is enough
    for ``torch.save``.

    Returns:
        The file's name and its sha256 in hex.
    """
    digest = hashlib.sha256()

    def name() -> str:
        return f"{stem}-{digest.hexdigest()[:12]}{suffix}"

    _publish(Path(folder), lambda file: write(_Hashing(file, digest)), name)
    return name(), digest.hexdigest()


class _Hashing:
    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest
        self.flush = file.flush

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)


def encode_json(document: dict, source: str) -> bytes:
    """Return ``document`` as UTF-8 JSON, refusing what could not be read back."""
    try:
        text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
        raw = text.encode() + b"\n"
        if not isinstance(document, dict) or len(raw) > MAX_JSON_BYTES:
            raise ValueError(f"a {type(document).__name__} of {len(raw)} bytes")
        if decode_json(raw, source) != document:
            raise ValueError("its keys or values would come back as others")
    except (TypeError, ValueError, RecursionError) as error:
        do = f"Use a dict of plain finite values, at most {MAX_JSON_BYTES} bytes"
        raise InvalidValue(source, f"it can't be written: {error}", do) from error
    return raw


def decode_json(raw: bytes, source: str) -> dict:
    """Parse a JSON object: UTF-8, no repeated key, no NaN; or CorruptFile."""
    try:
        text = raw.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(source, f"no valid JSON: {short(str(error))}") from error
    if not isinstance(found, dict):
        raise CorruptFile(source, f"a JSON object was expected, not {short(found)}")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"key {short(name)} appears twice")
        found[name] = value
    # A lone surrogate, written as an escape, would fail wherever it is printed.
    "".join(found).encode()
    return found


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def write_json(path: str | os.PathLike, document: dict) -> None:
    """Replace ``path`` atomically by ``document``, keys in their given order.

    Raises:
        InvalidValue: not a dict, NaN or infinite numbers, values JSON has no
            form for, or more than 16 MiB.
    """
    raw = encode_json(document, f"document for {str(path)!r}")
    write_atomic(path, lambda file: file.write(raw))


def read_json(path: str | os.PathLike, *, max_bytes: int = MAX_JSON_BYTES) -> dict:
    """Read a JSON object of at most ``max_bytes`` bytes.

    Raises:
        MissingFile: there is no such file.
        CorruptFile: too large, not UTF-8, not JSON, not an object, a key twice.
    """
    with open_file(path) as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise CorruptFile(f"file {str(path)!r}", f"more than {max_bytes} bytes")
    return decode_json(raw, f"file {str(path)!r}")


def is_text_map(found: object) -> TypeGuard[dict[str, str]]:
    """Tell whether ``found``, read from JSON, maps strings to strings."""
    return isinstance(found, dict) and all(type(v) is str for v in found.values())


def open_file(path: str | os.PathLike) -> BufferedReader:
    """Open a regular file for reading, or raise MissingFile."""
    if not Path(path).is_file():
        raise MissingFile(f"file {str(path)!r}", "there is no such file")
    return open(path, "rb")
