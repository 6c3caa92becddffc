# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Who may connect: the proof of the token, TLS, and what the server refuses."""

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mycelya_torch import (
    AuthenticationError,
    MachineDiedError,
    ProtocolError,
    RemoteMachine,
    _handshake,
    _tls,
)
from mycelya_torch.backends.tcp import is_loopback

pytestmark = pytest.mark.fast

TOKEN = "t" * 43
OTHER = "u" * 43


def meet(client, server):
    """Run both sides over a socketpair; return what each ended with."""
    ours, theirs = socket.socketpair()
    ended = {}

    def run(name, side, sock):
        with sock:
            sock.settimeout(5)
            try:
                side(sock)
                ended[name] = None
            except Exception as error:
                ended[name] = error

    thread = threading.Thread(target=run, args=("server", server, theirs))
    thread.start()
    run("client", client, ours)
    thread.join()
    return ended["client"], ended["server"]


def as_client(token=TOKEN, cert=b""):
    return lambda sock: _handshake.prove_as_client(sock, token, cert)


def as_server(token=TOKEN, cert=b""):
    return lambda sock: _handshake.prove_as_server(sock, token, cert)


@pytest.mark.critical
def test_both_sides_prove_the_token():
    assert meet(as_client(), as_server()) == (None, None)


@pytest.mark.critical
def test_wrong_token_is_noticed_by_the_client():
    client, server = meet(as_client(OTHER), as_server())
    assert isinstance(client, AuthenticationError)
    assert isinstance(server, ConnectionError)


@pytest.mark.critical
def test_server_refuses_a_client_without_the_token():
    def liar(sock):
        sock.sendall(struct.pack("<4sH32s", b"MYCL", 1, os.urandom(32)))
        _handshake.receive(sock, 38 + 32)
        sock.sendall(bytes(32))
        _handshake.receive(sock, 1)

    client, server = meet(liar, as_server())
    assert isinstance(server, AuthenticationError)
    assert isinstance(client, ConnectionError)


def test_proof_of_the_server_does_not_serve_as_proof_of_the_client():
    """Nothing that a server says can be sent back to it."""

    def mirror(sock):
        nonce = os.urandom(32)
        sock.sendall(struct.pack("<4sH32s", b"MYCL", 1, nonce))
        answer = _handshake.receive(sock, 38 + 32)
        sock.sendall(answer[38:])
        _handshake.receive(sock, 1)

    assert isinstance(meet(mirror, as_server())[1], AuthenticationError)


def test_proof_is_bound_to_the_certificate():
    client, _ = meet(as_client(cert=b"c" * 32), as_server(cert=b"d" * 32))
    assert isinstance(client, AuthenticationError)


def test_version_of_the_other_side_is_named():
    def newer(sock):
        sock.sendall(struct.pack("<4sH32s", b"MYCL", 9, bytes(32)))
        _handshake.receive(sock, 38)

    _, server = meet(newer, as_server())
    assert isinstance(server, ProtocolError)
    assert "version 9" in str(server)
    client, _ = meet(as_client(), newer)
    assert "version 9" in str(client)


def test_another_protocol_gets_no_answer():
    def browser(sock):
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(38))
        assert sock.recv(1) == b""

    client, server = meet(browser, as_server())
    assert client is None or isinstance(client, ConnectionError)
    assert isinstance(server, ProtocolError)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", _handshake.MAX_HELLO + 1),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        struct.pack("<I", 1) + b"\x01",
        struct.pack("<I", 5) + b"\xdf\xff\xff\xff\xff",
        struct.pack("<I", 7) + b"\x81\xa1a\xa3\xed\xa0\x80",
        struct.pack("<I", 2000) + b"\x91" * 2000,
    ],
    ids=["long", "no msgpack", "no map", "2^32 entries", "a surrogate", "deep"],
)
def test_bad_hello_is_refused(data):
    def sender(sock):
        sock.sendall(data)

    assert isinstance(meet(sender, _handshake.receive_hello)[1], ProtocolError)


GOOD_HELLO = {
    "version": 1,
    "torch": "2.13.0",
    "device": None,
    "threads": 1,
    "timeout": 30.0,
    "session": b"",
    "received": 0,
}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"torch": 2},
        {"device": 7},
        {"threads": -1},
        {"torch": "2" * 300},
        {"timeout": "long"},
        {"timeout": 0},
        {"timeout": 601},
        {"timeout": float("nan")},
        {"timeout": float("inf")},
        {"timeout": True},
        {"received": 2**63},
        {"session": b"x" * 17},
        {"session": "text"},
        {"received": True},
    ],
    ids=lambda change: str(change)[:40],
)
def test_each_field_of_a_hello_is_checked(change):
    _handshake.check_client(GOOD_HELLO)
    with pytest.raises(ProtocolError):
        _handshake.check_client({**GOOD_HELLO, **change})


def test_only_the_known_fields_of_a_hello_are_handed_on():
    given = {**GOOD_HELLO, "more": "x" * 60_000}
    assert _handshake.check_client(given) == GOOD_HELLO


def test_a_worker_s_error_has_to_be_text():
    for error in (["x"] * 9, {"a": 1}, None, 3):
        with pytest.raises(ProtocolError, match="error"):
            _handshake.check_worker({"error": error})


@pytest.mark.parametrize("token", ["", "short", " " * 40, "t" * 40 + "\udcff"])
def test_short_tokens_are_refused_and_never_shown(token):
    with pytest.raises(ValueError, match=r"32 bytes|UTF-8") as caught:
        _handshake.check_token(token)
    assert "short" not in str(caught.value)
    assert "ttt" not in repr(caught.value)


def test_relay_carries_everything_both_ways(certificate):
    context, digest = _tls.server_context(*certificate)
    listener = socket.create_server(("127.0.0.1", 0))
    data = os.urandom(3 << 20)

    def echo():
        sock, _ = listener.accept()
        with _tls.relay(context.wrap_socket(sock, server_side=True)) as plain:
            while part := plain.recv(1 << 16):
                plain.sendall(part)

    thread = threading.Thread(target=echo)
    thread.start()
    sock = socket.create_connection(listener.getsockname())
    tls = _tls.wrap_client(sock, "localhost", None, digest.hex())
    assert _tls.digest(tls) == digest
    with _tls.relay(tls) as plain:
        sender = threading.Thread(target=plain.sendall, args=(data,))
        sender.start()
        assert _handshake.receive(plain, len(data)) == data
        sender.join()
    thread.join(10)
    assert not thread.is_alive()
    listener.close()


@pytest.mark.parametrize(
    ("host", "use_ca", "fingerprint", "problem"),
    [
        ("localhost", False, None, "self-signed"),
        ("example.org", True, None, "example.org"),
        ("localhost", False, "0" * 64, "another one"),
    ],
)
def test_other_certificates_are_refused(
    certificate, host, use_ca, fingerprint, problem
):
    context, _ = _tls.server_context(*certificate)
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        sock, _ = listener.accept()
        with sock:
            try:
                context.wrap_socket(sock, server_side=True).close()
            except OSError:
                return

    thread = threading.Thread(target=accept)
    thread.start()
    with socket.create_connection(listener.getsockname()) as sock:
        ca = certificate[0] if use_ca else None
        with pytest.raises(AuthenticationError, match=problem):
            _tls.wrap_client(sock, host, ca, fingerprint)
    thread.join(10)
    listener.close()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
    ],
)
def test_loopback(address, expected):
    assert is_loopback(address) is expected


# ---- the server as a process ----


@pytest.fixture(scope="module")
def server(serve):
    return serve("--device", "cpu")


def tcp(address, token, **options):
    options = {"connect_timeout": 60.0, **options}
    return RemoteMachine("tcp", address=address, token=token, **options)


def test_server_serves_clients_one_after_the_other(server, token):
    for value in (1.0, 2.0):
        with tcp(server.address, token) as machine:
            x = torch.full((3,), value, device=machine.device())
            assert (x + x).tolist() == [2 * value] * 3
            assert machine.worker_pid is None


def test_wrong_token_is_known_at_construction(server):
    with pytest.raises(AuthenticationError, match="doesn't know this token"):
        tcp(server.address, OTHER)


def test_token_comes_from_a_file_or_the_environment(
    server, token, tmp_path, monkeypatch
):
    file = tmp_path / "token"
    file.write_text(token + "\n")
    RemoteMachine("tcp", address=server.address, token_file=file).stop()
    monkeypatch.setenv("MYCELYA_TOKEN", OTHER)
    with pytest.raises(AuthenticationError):
        RemoteMachine("tcp", address=server.address)


def test_garbage_does_not_disturb_the_server(server, token):
    for data in (b"", b"x", b"MYCL", os.urandom(200), b"MYCL\x09\x00" + bytes(32)):
        with socket.create_connection(_split(server.address)) as sock:
            sock.sendall(data)
    tcp(server.address, token).stop()


def test_at_most_sixteen_unproved_connections(server, token):
    idle = [socket.create_connection(_split(server.address)) for _ in range(16)]
    try:
        time.sleep(0.3)
        with socket.create_connection(_split(server.address)) as sock:
            sock.settimeout(5)
            assert sock.recv(1) == b""
    finally:
        for sock in idle:
            sock.close()
    time.sleep(1.0)
    tcp(server.address, token).stop()


def test_failure_is_answered_late(server):
    with socket.create_connection(_split(server.address)) as sock:
        sock.settimeout(5)
        begin = time.monotonic()
        sock.sendall(b"HTTP" + bytes(34))
        assert sock.recv(1) == b""
        assert time.monotonic() - begin > 0.4


def test_unknown_session_is_refused(server, token):
    with socket.create_connection(_split(server.address)) as sock:
        sock.settimeout(5)
        _handshake.prove_as_client(sock, token)
        sock.sendall(_handshake.pack({**GOOD_HELLO, "session": b"x" * 16}))
        with pytest.raises(ProtocolError, match="session is over"):
            _handshake.check_worker(_handshake.receive_hello(sock))


def test_another_torch_is_refused(server, token):
    with socket.create_connection(_split(server.address)) as sock:
        sock.settimeout(60)
        _handshake.prove_as_client(sock, token)
        sock.sendall(_handshake.pack({**GOOD_HELLO, "torch": "1.0.0"}))
        with pytest.raises(ProtocolError, match=r"torch 1\.0\.0"):
            _handshake.check_worker(_handshake.receive_hello(sock))


def test_tls_by_fingerprint_and_by_ca(serve, certificate, token):
    cert, key = certificate
    server = serve("--tls-cert", cert, "--tls-key", key, "--device", "cpu")
    fingerprint = server.ready["fingerprint"]
    with tcp(server.address, token, tls_fingerprint=fingerprint) as machine:
        x = torch.arange(200_000, device=machine.device())
        assert torch.equal(x.cpu(), torch.arange(200_000))
    by_name = server.address.replace("127.0.0.1", "localhost")
    with pytest.raises(AuthenticationError, match="another one"):
        tcp(server.address, token, tls_fingerprint="00" * 32)
    tcp(by_name, token, tls_ca=cert).stop()
    with pytest.raises((ProtocolError, MachineDiedError)):
        tcp(server.address, token)  # speaks no TLS
    assert server.stop() == 0


def test_nobody_listens(token):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(MachineDiedError, match="can't reach"):
        tcp(address, token)


def run_server(*arguments, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "MYCELYA_TOKEN"}
    return subprocess.run(
        [sys.executable, "-m", "mycelya_torch.server", *arguments],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "problem"),
    [
        ((), {}, "there is no token"),
        ((), {"MYCELYA_TOKEN": "short"}, "32 bytes"),
        (("--bind", "0.0.0.0"), {"MYCELYA_TOKEN": TOKEN}, "reachable from elsewhere"),
        (("--tls-cert", "c.pem"), {"MYCELYA_TOKEN": TOKEN}, "belong together"),
        (("--hub-root", "/nowhere"), {"MYCELYA_TOKEN": TOKEN}, "no such folder"),
    ],
    ids=["no token", "short token", "open bind", "no key", "no folder"],
)
def test_server_refuses_to_start(arguments, environment, problem):
    done = run_server(*arguments, **environment)
    assert done.returncode == 2
    assert problem in done.stderr
    assert not done.stdout


def test_server_makes_a_token_file(serve, token, tmp_path, monkeypatch):
    file = tmp_path / "token"
    monkeypatch.setenv("MYCELYA_TOKEN", "")
    server = serve("--token-file", str(file), "--device", "cpu")
    # The fixture's environment has a token, which wins over a file to be made.
    assert not file.exists()
    assert server.stop() == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "mycelya_torch.server", "--token-file", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert "address" in process.stdout.readline()
        assert file.stat().st_mode & 0o777 == 0o600
        assert len(file.read_text().strip()) >= 32
    finally:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0


def test_server_listens_on_the_loopback_by_default(server):
    assert server.address.startswith("127.0.0.1:")


def test_workers_end_with_a_killed_server(serve, token):
    server = serve("--device", "cpu")
    machine = tcp(server.address, token, timeout=2.0)
    torch.ones(2, device=machine.device()).sum().item()
    children = _children(server.process.pid)
    server.process.kill()
    server.process.wait()
    end = time.monotonic() + 5
    while any(map(_is_alive, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert children
    assert not any(map(_is_alive, children))
    with pytest.raises(MachineDiedError):
        machine.synchronize()
    machine.stop()


def _split(address):
    host, _, port = address.rpartition(":")
    return host, int(port)


def _children(pid):
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc to find a server's workers")
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return [int(one) for one in found]


def _is_alive(pid):
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
