# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The server's patience: with peers that prove nothing, and without any client."""

import contextlib
import socket
import struct
import threading
import time

import pytest
import torch

from mycelya_torch import (
    ProtocolError,
    RemoteMachine,
    _handshake,
    _tls,
    _worker,
    server,
)
from mycelya_torch.backends.tcp import split

pytestmark = pytest.mark.fast

TOKEN = "t" * 43
OPENING = struct.pack("<4sH32s", b"MYCL", _handshake.VERSION, bytes(32))
HELLO = {
    "version": _handshake.VERSION,
    "torch": torch.__version__,
    "device": None,
    "threads": 1,
    "timeout": 0.5,
    "session": b"",
    "received": 0,
}


class Dripping:
    """Sends one byte after the other, each in time, until it is closed."""

    def __init__(self, sock):
        self._sock, self._done = sock, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._done.wait(0.1):
            try:
                self._sock.sendall(b"x")
            except OSError:
                return

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()


@pytest.mark.parametrize(
    "prove", [_handshake.prove_as_client, _handshake.prove_as_server]
)
def test_one_deadline_holds_for_the_whole_proof(prove):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(OPENING)
        begin = time.monotonic()
        with Dripping(theirs), pytest.raises(TimeoutError):
            prove(ours, TOKEN, b"", begin + 0.5)
        assert 0.4 < time.monotonic() - begin < 1.5


def slow_plain(client):
    time.sleep(1.6)
    client.sendall(OPENING)
    return client


def slow_tls(client, digest):
    tls = _tls.wrap_client(client, "localhost", None, digest.hex())
    tls.sendall(OPENING[:-10])
    return tls


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_slow_peer_is_cut_off_after_one_deadline_and_one_delay(
    monkeypatch, certificate, secure
):
    monkeypatch.setattr(server, "PROOF_SECONDS", 2.0)
    monkeypatch.setattr(server, "FAILURE_DELAY", 1.0)
    tls = _tls.server_context(*certificate) if secure else None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = server.Server(listener, TOKEN, tls, _worker.Options())
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    took = []

    def meet():
        begin = time.monotonic()
        assert serving._unproved.acquire(blocking=False)
        serving._meet(accepted, "a peer")
        took.append(time.monotonic() - begin)

    thread = threading.Thread(target=meet)
    thread.start()
    client = slow_tls(client, tls[1]) if secure else slow_plain(client)
    with client, Dripping(client):
        thread.join(20)
    assert 2.9 < took[0] < 3.9


def test_cut_client_costs_no_time_while_the_worker_does_not_read(
    monkeypatch, certificate
):
    """A hang-up that can't be acted on yet must not be polled for all the time."""
    steps = []
    step = _tls._Relay._step
    monkeypatch.setattr(
        _tls._Relay, "_step", lambda self: steps.append(1) or step(self)
    )
    context, digest = _tls.server_context(*certificate)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    kept = []
    thread = threading.Thread(
        target=lambda: kept.append(
            _tls.relay(context.wrap_socket(accepted, server_side=True))
        )
    )
    thread.start()
    tls = _tls.wrap_client(client, "localhost", None, digest.hex())
    thread.join()
    tls.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        while True:
            tls.sendall(bytes(1 << 16))
    tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    tls.close()  # with a reset
    time.sleep(0.1)
    del steps[:]
    time.sleep(0.3)
    assert len(steps) < 20
    kept[0].close()


def test_server_goes_on_when_nothing_can_be_accepted(monkeypatch):
    monkeypatch.setattr(server, "FAILURE_DELAY", 0.0)
    outcomes = [OSError(24, "Too many open files"), TimeoutError(), SystemExit(0)]

    class Listener:
        def settimeout(self, seconds):
            pass

        def accept(self):
            raise outcomes.pop(0)

    serving = server.Server(Listener(), TOKEN, None, _worker.Options())
    with pytest.raises(SystemExit):
        serving.serve()
    assert not outcomes


def test_worker_that_gets_no_connection_is_ended(monkeypatch):
    ended = []

    class Broken:
        id, pid = b"1" * 16, 1

        def __init__(self, options):
            pass

        def give(self, connection, hello):
            raise OSError("no descriptors left")

        def stop(self):
            ended.append("stopped")

        def wait(self):
            assert ended == ["stopped"]
            return 0

    monkeypatch.setattr(server, "Session", Broken)
    serving = server.Server(None, TOKEN, None, _worker.Options())
    with pytest.raises(OSError, match="no descriptors"):
        serving._host(None, dict(HELLO), "a peer")
    assert not serving._sessions


# ---- the server as a process ----


def ended(running, seconds=40):
    status = running.process.wait(seconds)
    running.stop()
    return status


def test_idle_server_ends(serve):
    assert ended(serve("--exit-when-idle", "0.5")) == 0


def test_server_with_a_client_is_not_idle(serve, token):
    running = serve("--exit-when-idle", "1", "--device", "cpu")
    with RemoteMachine(
        "tcp", address=running.address, token=token, timeout=0.9
    ) as machine:
        x = torch.ones(3, device=machine.device())
        assert x.sum().item() == 3
        time.sleep(2.5)
        assert running.process.poll() is None
        assert x.sum().item() == 3
    assert ended(running) == 0


def test_mute_client_counts_as_gone(serve, token):
    """As one whose computer was switched off: nobody closes its connection."""
    running = serve("--exit-when-idle", "1", "--device", "cpu")
    with socket.create_connection(split(running.address)) as sock:
        sock.settimeout(60)
        _handshake.prove_as_client(sock, token)
        sock.sendall(_handshake.pack(HELLO))
        _handshake.check_worker(_handshake.receive_hello(sock))
        assert ended(running) == 0


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "x"])
def test_bad_idle_time_is_refused(seconds, capsys):
    with pytest.raises(SystemExit):
        server._parse(["--exit-when-idle", seconds])
    assert "--exit-when-idle" in capsys.readouterr().err


def test_hello_beyond_the_bounds_is_refused_in_words(serve, token):
    running = serve("--device", "cpu")
    for change in ({"received": 2**63}, {"timeout": 1e9}, {"timeout": float("nan")}):
        with socket.create_connection(split(running.address)) as sock:
            sock.settimeout(30)
            _handshake.prove_as_client(sock, token)
            sock.sendall(_handshake.pack({**HELLO, **change}))
            with pytest.raises((ProtocolError, OSError)):
                _handshake.check_worker(_handshake.receive_hello(sock))
    running.stop()
    assert "Traceback" not in running.log
