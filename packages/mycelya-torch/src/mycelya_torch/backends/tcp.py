# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""A worker behind ``python -m mycelya_torch.server``, over TCP or TLS."""

import ipaddress
import socket
import ssl
import time

from mycelya_torch import _handshake, _tls
from mycelya_torch._errors import MachineDiedError
from mycelya_torch.backends.base import Backend, Settings
from torchworks_core.errors import NotReady


class TcpBackend(Backend):
    """The token is proved before anything else is said, also at each redial."""

    resumable = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._proved: socket.socket | None = None
        self._is_stopped = False

    def start(self, deadline: float) -> None:
        """Dial and prove the token, so that a wrong one is known at once."""
        try:
            self._proved = self._dial(deadline)
        except OSError as error:
            what = f"{self.settings.machine_id} can't reach {self.settings.address}"
            raise MachineDiedError(f"{what}: {error}") from error

    def connect(self, deadline: float) -> socket.socket:
        """Return the connection of `start`, or a new one."""
        if self._is_stopped:
            raise NotReady(f"machine {self.settings.machine_id} is stopped")
        sock, self._proved = self._proved, None
        return sock or self._dial(deadline)

    def stop(self, grace: float) -> None:
        """Close what was never used; the server ends the worker."""
        self._is_stopped = True
        if self._proved is not None:
            self._proved.close()

    def _dial(self, deadline: float) -> socket.socket:
        given = self.settings
        host, port = split(given.address or "")
        wants_tls = bool(given.tls_ca or given.tls_fingerprint)
        sock = open_socket(host, port, deadline)
        try:
            elsewhere = not is_loopback(sock.getpeername()[0])
            if not wants_tls and (given.insecure or not elsewhere):
                _handshake.prove_as_client(sock, given.token or "", b"", deadline)
                return sock
            tls = _tls.wrap_client(sock, host, given.tls_ca, given.tls_fingerprint)
            return prove_over_tls(tls, given.token or "", _tls.digest(tls), deadline)
        except BaseException:
            sock.close()
            raise


def split(address: str) -> tuple[str, int]:
    """Return host and port.

    Example:
        >>> split("[::1]:80")
        ('::1', 80)
    """
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def open_socket(host: str, port: int, deadline: float) -> socket.socket:
    """Return a socket whose timeout is what is left until ``deadline``.

    Raises:
        OSError: nobody answers there.
    """
    left = max(deadline - time.monotonic(), 0.01)
    sock = socket.create_connection((host, port), timeout=left)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def prove_over_tls(
    tls: ssl.SSLSocket, token: str, cert: bytes, deadline: float
) -> socket.socket:
    """Prove the token, and return a plain socket that stands for the TLS one."""
    try:
        _handshake.prove_as_client(tls, token, cert, deadline)
        return _tls.relay(tls)
    except BaseException:
        tls.close()
        raise


def is_loopback(address: str) -> bool:
    """Return whether an IP address is one of this computer only.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
        (True, False)
    """
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback
