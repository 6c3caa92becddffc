# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""``python -m mycelya_torch.server``: workers for clients that know the token.

It listens, has each connection prove the token, and only then starts a worker
process, one for each session. A client whose connection was cut finds its worker
again. The first line on stdout, once it listens, is JSON: the address, and the
fingerprint of the certificate.
"""

import argparse
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mycelya_torch import _handshake, _tls, _worker
from mycelya_torch._errors import AuthenticationError, ProtocolError
from mycelya_torch._machine import TOKEN_VARIABLE
from mycelya_torch.backends.tcp import is_loopback

MAX_UNPROVED = 16
PROOF_SECONDS = 10.0
FAILURE_DELAY = 0.5
LONGEST_IDLE = 86400.0
log = logging.getLogger("mycelya_torch.server")


class Session:
    """A worker process, and the socket over which it gets its connections."""

    def __init__(self, options: _worker.Options) -> None:
        self.id = os.urandom(16)
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._control, theirs = socket.socketpair()
        environment = {k: v for k, v in os.environ.items() if k != TOKEN_VARIABLE}
        with theirs:
            # Started by a thread that lives as long as the session: the kernel ends
            # the worker with the thread that started it.
            self._process = subprocess.Popen(
                _worker.command(sys.executable, theirs.fileno(), options),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout has one line for whoever started the server
                process_group=0,
                env=environment,
            )

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def give(self, connection: socket.socket, hello: dict[str, Any]) -> None:
        """Hand the worker a connection; a former one is cut."""
        connection.settimeout(None)
        with self._lock:
            former, self._connection = self._connection, connection
            if former is not None:
                _cut(former)
            text = _handshake.pack({**hello, "session": self.id})
            sent = socket.send_fds(self._control, [text], [connection.fileno()])
            self._control.sendall(text[sent:])

    def wait(self) -> int:
        """Return the exit status when the worker has ended."""
        status = self._process.wait()
        with self._lock:
            self._control.close()
            if self._connection is not None:
                _cut(self._connection)
        return status

    def stop(self) -> None:
        """End the worker."""
        self._process.kill()


class Server:
    """Accepts connections until it is stopped, or idle for ``options.silence``."""

    def __init__(
        self, listener: socket.socket, token: str, tls: Any, options: _worker.Options
    ) -> None:
        self._listener, self._token, self._options = listener, token, options
        self._context, self._cert = tls or (None, b"")
        self._unproved = threading.BoundedSemaphore(MAX_UNPROVED)
        self._sessions: dict[bytes, Session] = {}
        self._idle_since = time.monotonic()

    def serve(self) -> None:
        """Accept connections; a signal ends it, or that there was no session."""
        patience = self._options.silence
        self._listener.settimeout(min(patience / 4, 5.0) or None)
        while not self._is_idle():
            try:
                sock, address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:  # too many open files: others may be closed
                log.warning("no connection can be accepted: %s", error)
                time.sleep(FAILURE_DELAY)
                continue
            peer = f"{address[0]}:{address[1]}"
            if not self._unproved.acquire(blocking=False):
                log.warning("%s: refused, %d others prove theirs", peer, MAX_UNPROVED)
                sock.close()
                continue
            threading.Thread(target=self._meet, args=(sock, peer), daemon=True).start()
        log.info("no session for %g s: the end", patience)

    def _is_idle(self) -> bool:
        patience = self._options.silence
        if not patience or self._sessions:
            return False
        return time.monotonic() - self._idle_since > patience

    def stop(self) -> None:
        """End all workers."""
        self._listener.close()
        for session in list(self._sessions.values()):
            session.stop()

    def _meet(self, sock: socket.socket, peer: str) -> None:
        try:
            stream, hello = self._prove(sock, time.monotonic() + PROOF_SECONDS)
        except (OSError, AuthenticationError, ProtocolError) as error:
            log.warning("%s: refused: %s", peer, str(error) or type(error).__name__)
            return
        finally:
            self._unproved.release()
        try:
            self._host(stream, hello, peer)
        except (OSError, ProtocolError) as error:
            log.warning("%s: %s", peer, error)
            _handshake.refuse(stream, str(error))

    def _prove(
        self, sock: socket.socket, deadline: float
    ) -> tuple[socket.socket, dict[str, Any]]:
        """Return the connection and the hello of a peer that knows the token.

        One deadline holds for all of it. Any other peer is cut off, late.
        """
        stream = sock
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _handshake.limit(sock, deadline)
            if self._context is not None:
                stream = tls = self._context.wrap_socket(sock, server_side=True)
                _handshake.prove_as_server(tls, self._token, self._cert, deadline)
                stream = _tls.relay(tls)
            else:
                _handshake.prove_as_server(sock, self._token, b"", deadline)
            hello = _handshake.receive_hello(stream, deadline)
            return stream, _handshake.check_client(hello)
        except BaseException:
            time.sleep(FAILURE_DELAY)
            _cut(stream)
            raise

    def _host(self, stream: socket.socket, hello: dict[str, Any], peer: str) -> None:
        """Give a connection to its session; a new one is served to its end here."""
        if hello["session"]:
            session = self._sessions.get(hello["session"])
            if session is None:
                raise ProtocolError("this session is over: its worker has ended")
            log.info("%s: is back at worker %d", peer, session.pid)
            session.give(stream, hello)
            return
        session = Session(self._options)
        self._sessions[session.id] = session
        log.info("%s: worker %d", peer, session.pid)
        try:
            session.give(stream, hello)
        except BaseException:
            session.stop()  # it would wait for a connection for ever
            raise
        finally:
            status = session.wait()
            del self._sessions[session.id]
            self._idle_since = time.monotonic()
            log.info("%s: worker %d ended with status %d", peer, session.pid, status)


def _cut(sock: socket.socket) -> None:
    # Also where the worker still reads: a descriptor of its own is no other socket.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def _token(file: str | None) -> str:
    path = Path(file) if file else None
    if path is not None and path.exists():
        return _handshake.check_token(path.read_text())
    if token := os.environ.get(TOKEN_VARIABLE):
        return _handshake.check_token(token)
    if path is None:
        raise ValueError(
            f"there is no token: set {TOKEN_VARIABLE}, or give --token-file, which is "
            "made if it does not exist"
        )
    token = secrets.token_urlsafe(32)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "w") as opened:
        opened.write(token + "\n")
    return token


def _listen(arguments: argparse.Namespace) -> socket.socket:
    found = socket.getaddrinfo(
        arguments.bind, arguments.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    family, _, _, _, address = found[0]
    if not is_loopback(str(address[0])) and not (
        arguments.tls_cert or arguments.insecure
    ):
        raise ValueError(
            f"--bind {arguments.bind} is reachable from elsewhere: give --tls-cert and "
            "--tls-key, or --insecure where something else protects the connection"
        )
    return socket.create_server(address[:2], family=family, backlog=64)


_IDLE = """exit after so long without a client; one that is mute for so long counts as
gone; 0: never"""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mycelya_torch.server",
        description="Computes for clients of mycelya-torch that know the token.",
    )
    add = parser.add_argument
    add("--bind", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=0, help="0: a free one")
    add("--token-file", help=f"else the environment's {TOKEN_VARIABLE}")
    add("--tls-cert", help="PEM file; needed to be reachable from elsewhere")
    add("--tls-key", help="PEM file of the certificate's key")
    add("--device", choices=("cuda", "cpu"), help="else CUDA where there is one")
    add("--max-memory", type=int, default=0, help="bytes for each client")
    add("--allow-hub", action="store_true", help="clients may load from the hub")
    add("--hub-root", help="clients may load from folders below this one")
    add("--insecure", action="store_true", help="no TLS, although not on loopback")
    add("--exit-when-idle", type=float, default=0.0, metavar="SECONDS", help=_IDLE)
    parsed = parser.parse_args(arguments)
    if bool(parsed.tls_cert) != bool(parsed.tls_key):
        parser.error("--tls-cert and --tls-key belong together")
    if parsed.max_memory < 0 or not 0 <= parsed.port < 65536:
        parser.error("--max-memory must not be negative, --port is 0 to 65535")
    if not 0 <= parsed.exit_when_idle <= LONGEST_IDLE:
        parser.error(f"--exit-when-idle is 0 to {LONGEST_IDLE:g} seconds")
    if parsed.hub_root and not Path(parsed.hub_root).is_dir():
        parser.error(f"--hub-root {parsed.hub_root}: there is no such folder")
    return parsed


def _stop(*_: object) -> NoReturn:
    raise SystemExit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM, or until it is idle; return the exit status."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(name)s: %(message)s")
    parsed = _parse(arguments)
    try:
        token = _token(parsed.token_file)
        tls = None
        if parsed.tls_cert:
            tls = _tls.server_context(parsed.tls_cert, parsed.tls_key)
        listener = _listen(parsed)
    except (OSError, ValueError) as error:
        print(f"mycelya_torch.server: {error}", file=sys.stderr)
        return 2
    options = _worker.Options(
        device=parsed.device,
        max_memory=parsed.max_memory,
        hub_root=parsed.hub_root,
        allow_hub=parsed.allow_hub,
        parent=os.getpid(),
        under_server=True,
        silence=parsed.exit_when_idle,
    )
    server = Server(listener, token, tls, options)
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    ready = {"address": address, "fingerprint": tls[1].hex() if tls else None}
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
    print(json.dumps(ready), flush=True)
    try:
        server.serve()
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
