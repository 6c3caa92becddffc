# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Before the first frame: proof of the token, then one hello each way.

Proof (not where the socket is inherited), K = SHA-256(token), numbers little endian:

    client: "MYCL", u16 version, 32 random bytes Nc
    server: "MYCL", u16 version, 32 random bytes Ns,
            HMAC-SHA256(K, "server" + version + Nc + Ns + cert)
    client: HMAC-SHA256(K, "client" + version + Ns + Nc + cert)

``cert`` is the SHA-256 of the server's certificate where TLS ends at the server,
else empty. A hello is a u32 length and a msgpack map of at most 64 KiB.
"""

import contextlib
import hashlib
import hmac
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import torch

from mycelya_torch import _library
from mycelya_torch._errors import AuthenticationError, ProtocolError, field

VERSION = 1
MAGIC = b"MYCL"
MAX_HELLO = 64 << 10
MIN_TOKEN = 32
# Seconds for which a cut connection may be restored. A worker that has been without
# one for longer ends itself: kPatience in csrc/mycelya/MycelyaWorkerLink.cpp.
LONGEST_TIMEOUT = 600.0
_OPENING = struct.Struct("<4sH32s")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_text(value: Any) -> bool:
    return type(value) is str and len(value) <= 256


def _is_session(value: Any) -> bool:
    return type(value) is bytes and len(value) <= 16


def _is_timeout(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= LONGEST_TIMEOUT


def _is_choice(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_flag(value: Any) -> bool:
    return type(value) is bool


_CLIENT = {
    "version": _is_count,
    "torch": _is_text,
    "device": _is_choice,
    "threads": _is_count,
    "timeout": _is_timeout,
    "session": _is_session,
    "received": _is_count,
}
_WORKER = {
    "version": _is_count,
    "torch": _is_text,
    "device": _is_text,
    "device_name": _is_text,
    "cuda": _is_flag,
    "pid": _is_count,
    "session": _is_session,
    "received": _is_count,
}


def check_token(token: str) -> str:
    """Return a token without the white space around it.

    Raises:
        ValueError: it is too short to be a secret, or no text. It is never shown.
    """
    token = token.strip()
    try:
        length = len(token.encode())
    except UnicodeEncodeError:
        raise ValueError("a token has to be text in UTF-8") from None
    if length < MIN_TOKEN:
        do = "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        text = f"a token needs {MIN_TOKEN} bytes or more; make one with `{do}`"
        raise ValueError(text)
    return token


def _proof(token: str, who: bytes, first: bytes, second: bytes, cert: bytes) -> bytes:
    key = hashlib.sha256(token.encode()).digest()
    text = who + struct.pack("<H", VERSION) + first + second + cert
    return hmac.digest(key, text, "sha256")


def _open(opening: bytes) -> bytes:
    magic, version, nonce = _OPENING.unpack(opening)
    if magic != MAGIC:
        raise ProtocolError("the other side doesn't speak the mycelya protocol")
    if version != VERSION:
        raise ProtocolError(
            f"the other side speaks version {version} of the mycelya protocol, this "
            f"one version {VERSION}: install the same mycelya-torch on both"
        )
    return nonce


def limit(sock: socket.socket, deadline: float | None) -> None:
    """Have the next call on a socket end by ``deadline``, of `time.monotonic`.

    Raises:
        TimeoutError: that is over.
    """
    if deadline is None:
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the other side took too long")
    sock.settimeout(left)


def prove_as_client(
    sock: socket.socket, token: str, cert: bytes = b"", deadline: float | None = None
) -> None:
    """Prove the token to a server, and have the server prove it first.

    Raises:
        AuthenticationError: the server doesn't know the token, or refused ours.
        ProtocolError: it speaks something else.
        TimeoutError: it was not done by ``deadline``, of `time.monotonic`.
    """
    mine = os.urandom(32)
    limit(sock, deadline)
    sock.sendall(_OPENING.pack(MAGIC, VERSION, mine))
    theirs = _open(receive(sock, _OPENING.size, deadline))
    proof = receive(sock, 32, deadline)
    if not hmac.compare_digest(proof, _proof(token, b"server", mine, theirs, cert)):
        raise AuthenticationError("the server doesn't know this token")
    limit(sock, deadline)
    sock.sendall(_proof(token, b"client", theirs, mine, cert))


def prove_as_server(
    sock: socket.socket, token: str, cert: bytes = b"", deadline: float | None = None
) -> None:
    """Prove the token to a client, then have the client prove it.

    Raises:
        AuthenticationError: the client doesn't know the token.
        ProtocolError: it speaks something else.
        TimeoutError: it was not done by ``deadline``, of `time.monotonic`.
    """
    mine = os.urandom(32)
    first = receive(sock, _OPENING.size, deadline)
    limit(sock, deadline)
    if first.startswith(MAGIC):
        # Also to another version, so that the client can name ours.
        sock.sendall(_OPENING.pack(MAGIC, VERSION, mine))
    theirs = _open(first)
    sock.sendall(_proof(token, b"server", theirs, mine, cert))
    proof = receive(sock, 32, deadline)
    if not hmac.compare_digest(proof, _proof(token, b"client", mine, theirs, cert)):
        raise AuthenticationError("the client doesn't know the token")


def receive(sock: socket.socket, count: int, deadline: float | None = None) -> bytes:
    """Return exactly ``count`` bytes.

    Args:
        sock: Keeps its timeout.
        count: How many.
        deadline: Until when, in seconds of `time.monotonic`; None: the socket's
            timeout is for all of them.

    Raises:
        ConnectionError: the other side closed the connection.
        TimeoutError: the bytes did not come in time.
    """
    former = sock.gettimeout()
    if deadline is None and former is not None:
        deadline = time.monotonic() + former
    parts = bytearray()
    try:
        while len(parts) < count:
            limit(sock, deadline)
            part = sock.recv(count - len(parts))
            if not part:
                raise ConnectionError("the other side closed the connection")
            parts += part
    finally:
        sock.settimeout(former)
    return bytes(parts)


def pack(message: dict[str, Any]) -> bytes:
    """Return a hello as it is sent."""
    body = msgpack.packb(message, unicode_errors="replace")
    return struct.pack("<I", len(body)) + body


def receive_hello(sock: socket.socket, deadline: float | None = None) -> dict[str, Any]:
    """Return the other side's hello, which is a map of anything yet.

    Raises:
        ProtocolError: it is too long, or no map.
    """
    (length,) = struct.unpack("<I", receive(sock, 4, deadline))
    if length > MAX_HELLO:
        raise ProtocolError(f"a hello of {length} bytes; {MAX_HELLO} are the most")
    return unpack(receive(sock, length, deadline))


def decode(data: bytes) -> Any:
    """Decode msgpack, strictly.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"that is no msgpack: {error}") from error


def unpack(data: bytes) -> dict[str, Any]:
    """Decode a msgpack map, strictly.

    Raises:
        ProtocolError: it is none.
    """
    message = decode(data)
    if not isinstance(message, dict):
        raise ProtocolError("that is no msgpack map")
    return message


def check_client(hello: dict[str, Any]) -> dict[str, Any]:
    """Return what counts of a client's hello, if it is one.

    Raises:
        ProtocolError: something is missing, or can't be used.
    """
    return _check(hello, _CLIENT)


def check_worker(hello: dict[str, Any]) -> dict[str, Any]:
    """Return what counts of a worker's hello, if it is one.

    Raises:
        ProtocolError: something is missing, or the worker reports a problem.
    """
    if "error" in hello:
        raise ProtocolError(field(hello, "error", str)[:4000])
    return _check(hello, _WORKER)


def check_torch(version: str, who: str) -> None:
    """Refuse another side whose torch is not ours.

    Args:
        version: Its version of torch.
        who: What it is, as ``"client"``.

    Raises:
        ProtocolError: the minor versions differ.
    """
    mine = torch.__version__
    if _library.minor(version) != _library.minor(mine):
        raise ProtocolError(
            f"the {who} runs torch {version[:40]}, its peer torch {mine}: both need "
            "the same minor version, as operators differ between them"
        )


def refuse(sock: socket.socket, text: str) -> None:
    """Say in place of a hello why there is none, and close the socket."""
    with contextlib.suppress(OSError):  # nobody may be there to be told
        sock.sendall(pack({"error": text[:4000]}))
    sock.close()


def _check(
    hello: dict[str, Any], fields: Mapping[str, Callable[[Any], bool]]
) -> dict[str, Any]:
    for name, is_usable in fields.items():
        if not is_usable(hello.get(name)):
            raise ProtocolError(f"a hello without a usable {name!r}")
    if hello["version"] != VERSION:
        raise ProtocolError(f"a hello of version {hello['version']}, not {VERSION}")
    return {name: hello[name] for name in fields}
