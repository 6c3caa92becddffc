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

import hashlib
import hmac
import os
import socket
import struct
import time
from typing import Any

import msgpack

from mycelya_torch._errors import AuthenticationError, ProtocolError

VERSION = 1
MAGIC = b"MYCL"
MAX_HELLO = 64 << 10
MIN_TOKEN = 32
_OPENING = struct.Struct("<4sH32s")
_CLIENT = {
    "version": int,
    "torch": str,
    "device": (str, type(None)),
    "threads": int,
    "timeout": (int, float),
    "session": bytes,
    "received": int,
}
_WORKER = {
    "version": int,
    "torch": str,
    "device": str,
    "device_name": str,
    "cuda": bool,
    "pid": int,
    "session": bytes,
    "received": int,
}


def check_token(token: str) -> str:
    """Return a token without the white space around it.

    Raises:
        ValueError: it is too short to be a secret. It is never shown.
    """
    token = token.strip()
    if len(token.encode()) < MIN_TOKEN:
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


def prove_as_client(sock: socket.socket, token: str, cert: bytes = b"") -> None:
    """Prove the token to a server, and have the server prove it first.

    Raises:
        AuthenticationError: the server doesn't know the token, or refused ours.
        ProtocolError: it speaks something else.
    """
    mine = os.urandom(32)
    sock.sendall(_OPENING.pack(MAGIC, VERSION, mine))
    theirs = _open(receive(sock, _OPENING.size))
    proof = receive(sock, 32)
    if not hmac.compare_digest(proof, _proof(token, b"server", mine, theirs, cert)):
        raise AuthenticationError("the server doesn't know this token")
    sock.sendall(_proof(token, b"client", theirs, mine, cert))


def prove_as_server(sock: socket.socket, token: str, cert: bytes = b"") -> None:
    """Prove the token to a client, then have the client prove it.

    Raises:
        AuthenticationError: the client doesn't know the token.
        ProtocolError: it speaks something else.
    """
    mine = os.urandom(32)
    first = receive(sock, _OPENING.size)
    if first.startswith(MAGIC):
        # Also to another version, so that the client can name ours.
        sock.sendall(_OPENING.pack(MAGIC, VERSION, mine))
    theirs = _open(first)
    sock.sendall(_proof(token, b"server", theirs, mine, cert))
    proof = receive(sock, 32)
    if not hmac.compare_digest(proof, _proof(token, b"client", mine, theirs, cert)):
        raise AuthenticationError("the client doesn't know the token")


def receive(sock: socket.socket, count: int) -> bytes:
    """Return exactly ``count`` bytes, within the socket's timeout in all.

    Raises:
        ConnectionError: the other side closed the connection.
        TimeoutError: the bytes did not come in time.
    """
    limit = sock.gettimeout()
    end = None if limit is None else time.monotonic() + limit
    parts = bytearray()
    try:
        while len(parts) < count:
            if end is not None:
                sock.settimeout(max(end - time.monotonic(), 0.001))
            part = sock.recv(count - len(parts))
            if not part:
                raise ConnectionError("the other side closed the connection")
            parts += part
    finally:
        sock.settimeout(limit)
    return bytes(parts)


def pack(message: dict[str, Any]) -> bytes:
    """Return a hello as it is sent."""
    body = msgpack.packb(message)
    return struct.pack("<I", len(body)) + body


def receive_hello(sock: socket.socket) -> dict[str, Any]:
    """Return the other side's hello, which is a map of anything yet.

    Raises:
        ProtocolError: it is too long, or no map.
    """
    (length,) = struct.unpack("<I", receive(sock, 4))
    if length > MAX_HELLO:
        raise ProtocolError(f"a hello of {length} bytes; {MAX_HELLO} are the most")
    return unpack(receive(sock, length))


def unpack(data: bytes) -> dict[str, Any]:
    """Decode a msgpack map, strictly.

    Raises:
        ProtocolError: it is none.
    """
    try:
        message = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"that is no msgpack: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError("that is no msgpack map")
    return message


def check_client(hello: dict[str, Any]) -> dict[str, Any]:
    """Return a client's hello if it is one.

    Raises:
        ProtocolError: something is missing, or has another type.
    """
    return _check(hello, _CLIENT)


def check_worker(hello: dict[str, Any]) -> dict[str, Any]:
    """Return a worker's hello if it is one.

    Raises:
        ProtocolError: something is missing, or the worker reports a problem.
    """
    if "error" in hello:
        raise ProtocolError(str(hello["error"])[:4000])
    return _check(hello, _WORKER)


def _check(hello: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    for name, kinds in fields.items():
        value = hello.get(name)
        bad = not isinstance(value, kinds) or (kinds is int and value < 0)
        if bad or (isinstance(value, bool) and kinds is not bool):
            raise ProtocolError(f"a hello without a usable {name!r}")
    if hello["version"] != VERSION:
        raise ProtocolError(f"a hello of version {hello['version']}, not {VERSION}")
    return hello
