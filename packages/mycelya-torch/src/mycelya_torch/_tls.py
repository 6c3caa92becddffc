# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""TLS ends here: a thread carries bytes between an ssl socket and a plain one.

The native library and the worker see a descriptor only. One thread serves both
directions, as an ssl socket must not be used by two at once.
"""

import hashlib
import select
import socket
import ssl
import threading
from pathlib import Path

from mycelya_torch._errors import AuthenticationError, ProtocolError

_CHUNK = 256 << 10
_WANTED = {
    ssl.SSLWantReadError: select.POLLIN,
    ssl.SSLWantWriteError: select.POLLOUT,
    BlockingIOError: 0,
}


def wrap_client(
    sock: socket.socket, host: str, ca: str | None, fingerprint: str | None
) -> ssl.SSLSocket:
    """Speak TLS to a server, which has the certificate that we expect.

    Args:
        sock: A connected socket.
        host: The name that the certificate must carry, unless there is a fingerprint.
        ca: A file of certificates to trust instead of the system's.
        fingerprint: SHA-256 of the server's certificate in hex: trust it alone.

    Raises:
        AuthenticationError: it has another certificate.
        ProtocolError: it doesn't speak TLS.
    """
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if fingerprint:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        tls = context.wrap_socket(sock, server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        text = f"the certificate of {host} is refused: {error.verify_message}"
        raise AuthenticationError(text) from error
    except ssl.SSLEOFError as error:
        raise ConnectionError(f"{host} closed the connection") from error
    except ssl.SSLError as error:
        raise ProtocolError(f"{host} doesn't speak TLS as needed: {error}") from error
    found = digest(tls).hex()
    if fingerprint and found != fingerprint.replace(":", "").lower():
        tls.close()
        raise AuthenticationError(f"the certificate of {host} is another one: {found}")
    return tls


def digest(tls: ssl.SSLSocket) -> bytes:
    """Return the SHA-256 of the certificate that the other side showed."""
    return hashlib.sha256(tls.getpeercert(binary_form=True) or b"").digest()


def server_context(cert: str, key: str) -> tuple[ssl.SSLContext, bytes]:
    """Return a server's context, and the SHA-256 of its certificate.

    Raises:
        OSError: the files can't be read, or don't belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert, key)
    first, mark, _ = Path(cert).read_text().partition("-----END CERTIFICATE-----")
    begin = first.index("-----BEGIN CERTIFICATE-----")
    der = ssl.PEM_cert_to_DER_cert(first[begin:] + mark)
    return context, hashlib.sha256(der).digest()


def relay(tls: ssl.SSLSocket) -> socket.socket:
    """Return a plain socket that stands for ``tls``, until either end closes."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(
        target=_Relay(tls, ours).run, name="mycelya-tls", daemon=True
    )
    thread.start()
    return theirs


class _Relay:
    def __init__(self, tls: ssl.SSLSocket, plain: socket.socket) -> None:
        self._tls, self._plain = tls, plain
        self._outward = memoryview(b"")  # to be sent over TLS
        self._inward = memoryview(b"")
        self._is_open = True

    def run(self) -> None:
        poll = select.poll()
        masks: dict[socket.socket, int] = {}
        try:
            self._tls.setblocking(False)
            self._plain.setblocking(False)
            while self._is_open or self._inward or self._outward:
                wanted = self._step()
                if wanted is None:
                    continue
                for sock, mask in wanted.items():
                    if mask and masks.get(sock) != mask:
                        poll.register(sock, mask)
                    elif not mask and masks.get(sock):
                        poll.unregister(sock)  # a hang-up would be told all the time
                masks = wanted
                poll.poll()
            self._tls.unwrap()
        except (OSError, ValueError):
            pass  # cut: both ends see it below, which is all there is to tell
        finally:
            self._plain.close()
            self._tls.close()

    def _step(self) -> dict[socket.socket, int] | None:
        """Move what can be moved; None if anything did, else what to wait for."""
        moved = False
        wanted = {self._tls: 0, self._plain: 0}
        if self._inward:
            count = self._try(self._plain.send, self._inward, self._plain, 4, wanted)
            self._inward = self._inward[count or 0 :]
            moved |= count is not None
        elif self._is_open:
            data = self._try(self._tls.recv, _CHUNK, self._tls, 1, wanted)
            self._inward = memoryview(data or b"")
            moved |= self._note(data)
        if self._outward:
            count = self._try(self._tls.send, self._outward, self._tls, 4, wanted)
            self._outward = self._outward[count or 0 :]
            moved |= count is not None
        elif self._is_open:
            data = self._try(self._plain.recv, _CHUNK, self._plain, 1, wanted)
            self._outward = memoryview(data or b"")
            moved |= self._note(data)
        return None if moved else wanted

    def _note(self, data: bytes | None) -> bool:
        if data == b"":
            self._is_open = False
        return data is not None

    @staticmethod
    def _try(call, argument, sock, direction, wanted):
        """Return what the call does, or None and note what it waits for."""
        try:
            return call(argument)
        except tuple(_WANTED) as error:
            wanted[sock] |= _WANTED[type(error)] or direction
            return None
