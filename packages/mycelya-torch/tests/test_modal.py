# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The modal provider, with a module that stands in for ``modal``.

Its sandbox is our own server with TLS on the loopback, which plays the tunnel.
"""

import contextlib
import inspect
import os
import signal
import socket
import sys
import threading
import time
import types

import pytest
import torch

import mycelya_torch
from mycelya_torch import MachineDiedError, RemoteMachine, _tls
from mycelya_torch.backends import modal as backend
from mycelya_torch.backends.tcp import split

pytestmark = pytest.mark.fast


class FakeImage:
    """Records what it is built from."""

    def __init__(self, steps=()):
        self.steps = steps

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **options: FakeImage(
            (*self.steps, (name, args, tuple(sorted(options.items()))))
        )


class AuthError(Exception):
    pass


class FakeModal(types.ModuleType):
    """Counts sandboxes; ``refuse`` is raised when one is asked for."""

    def __init__(self, start):
        super().__init__("modal")
        fake = self
        self.refuse, self.tunnel_fails, self.terminate_fails = None, None, None
        self.created, self.terminated = [], 0
        self.building, self.built = threading.Event(), threading.Event()
        self.built.set()
        self.exception = types.SimpleNamespace(AuthError=AuthError)
        self.Image = types.SimpleNamespace(
            debian_slim=lambda **options: FakeImage((("debian_slim", options),))
        )
        self.Secret = types.SimpleNamespace(from_dict=lambda values: values)
        self.App = types.SimpleNamespace(
            lookup=lambda name, create_if_missing: (name, create_if_missing)
        )

        class Sandbox:
            @staticmethod
            def create(*command, **options):
                if fake.refuse is not None:
                    raise fake.refuse
                fake.building.set()
                fake.built.wait(30)
                fake.created.append((command, options))
                return Sandbox(options["secrets"][0]["MYCELYA_TOKEN"])

            def __init__(self, token):
                self.status = None
                self.server = start(token)

            def tunnels(self, timeout):
                if fake.tunnel_fails is not None:
                    raise fake.tunnel_fails
                host, _, port = self.server.address.rpartition(":")
                assert host == "127.0.0.1"
                tunnel = types.SimpleNamespace(tls_socket=("localhost", int(port)))
                return {backend.PORT: tunnel}

            def poll(self):
                return self.status

            def terminate(self):
                if fake.terminate_fails is not None:
                    raise fake.terminate_fails
                fake.terminated += 1
                self.server.stop()

        self.Sandbox = Sandbox


class Tunnel:
    """A TLS end in front of a server without TLS, as Modal's."""

    def __init__(self, process, certificate):
        self._process = process
        self._context, _ = _tls.server_context(*certificate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            try:
                tls = self._context.wrap_socket(sock, server_side=True)
            except OSError:
                sock.close()
                continue
            outside = _tls.relay(tls)
            inside = socket.create_connection(split(self._process.address))
            ends = (outside, inside)
            threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, outside, inside):
        with outside, inside:
            ends = (inside, outside)
            back = threading.Thread(target=self._pump, args=ends, daemon=True)
            back.start()
            self._pump(outside, inside)
            back.join()

    @staticmethod
    def _pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def stop(self):
        self._listener.close()
        self._process.stop()


@pytest.fixture
def modal(monkeypatch, certificate, serve):
    tunnels = []

    def start(token):
        tunnels.append(Tunnel(serve("--device", "cpu", token=token), certificate))
        return tunnels[-1]

    fake = FakeModal(start)
    monkeypatch.setitem(sys.modules, "modal", fake)
    # The tunnel's certificate is signed by nobody whom the system knows.
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    monkeypatch.setattr(backend.metadata, "version", lambda name: "1.2.3")
    yield fake
    for tunnel in tunnels:
        tunnel.stop()


@pytest.fixture
def empty(monkeypatch):
    """A ``modal`` whose sandboxes have no server inside."""
    fake = FakeModal(lambda token: types.SimpleNamespace(stop=lambda: None))
    monkeypatch.setitem(sys.modules, "modal", fake)
    monkeypatch.setattr(backend.metadata, "version", lambda name: "1.2.3")
    fake.tunnel_fails = ConnectionError("no tunnel yet")
    return fake


def eventually(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


@pytest.mark.critical
def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "modal", None)
    with pytest.raises(ImportError, match=r"mycelya-torch\[modal\]"):
        RemoteMachine("modal", "T4")


def test_machine_in_a_sandbox(modal):
    with RemoteMachine("modal", "A100", options={"region": "eu"}) as machine:
        x = torch.arange(5.0, device=machine.device())
        assert (x * 2).tolist() == [0, 2, 4, 6, 8]
        assert machine.worker_pid is None
        assert machine.gpu_type == "A100"
    ((command, options),) = modal.created
    assert command[:3] == ("python", "-m", "mycelya_torch.server")
    assert "--token-file" not in command
    assert options["gpu"] == "A100"
    assert options["region"] == "eu"
    assert options["encrypted_ports"] == [backend.PORT]
    assert options["timeout"] == 24 * 3600
    idle = command[command.index("--exit-when-idle") + 1]
    assert 30 <= float(idle) <= 300
    assert options["app"] == ("mycelya-torch", True)
    (secret,) = options["secrets"]
    assert set(secret) == {"MYCELYA_TOKEN"}
    assert secret["MYCELYA_TOKEN"] not in " ".join(command)
    assert modal.terminated == 1


def test_image_has_the_client_s_torch_and_this_package(modal, tmp_path):
    steps = repr(backend.make_image(modal, None).steps)
    release = torch.__version__.partition("+")[0]
    assert f"torch=={release}" in steps
    assert "mycelya-torch==1.2.3" in steps
    assert "--no-build-isolation" in steps
    wheel = tmp_path / "mycelya_torch-9.tar.gz"
    wheel.write_bytes(b"")
    steps = repr(backend.make_image(modal, wheel).steps)
    assert "pip install --no-build-isolation /packages/mycelya_torch-9.tar.gz" in steps


def test_missing_credentials_name_both_ways(modal):
    modal.refuse = AuthError("Token missing")
    with pytest.raises(
        RuntimeError, match=r"(?s)Token missing.*modal setup.*MODAL_TOKEN_ID"
    ):
        RemoteMachine("modal", "T4")
    assert modal.created == []


def test_refusal_has_modals_text_and_the_gpu(modal):
    modal.refuse = ValueError("no capacity left")
    with pytest.raises(RuntimeError, match=r"GPU B200.*no capacity left"):
        RemoteMachine("modal", "B200")
    assert mycelya_torch.get_all_machines() == []


def test_tunnel_that_does_not_come_leaves_nothing_running(modal):
    modal.tunnel_fails = ValueError("timed out waiting for H200")
    machine = RemoteMachine("modal", "H200")
    with pytest.raises(MachineDiedError, match="timed out waiting for H200"):
        torch.ones(2, device=machine.device()).sum().item()
    machine.stop()
    assert modal.terminated == 1


def test_sandbox_that_ended(modal):
    machine = RemoteMachine("modal", "L4", timeout=2.0)
    x = torch.ones(3, device=machine.device())
    assert x.sum().item() == 3
    sandbox = machine._life.backend._sandbox
    sandbox.status = 137
    sandbox.server.stop()

    def use():
        while True:
            x.sum().item()

    with pytest.raises(MachineDiedError, match=r"GPU L4.*status 137"):
        use()
    machine.stop()
    assert modal.terminated == 1


@pytest.mark.parametrize("seconds", [0, -1, 86401, 0.5, "60", True])
def test_time_limit_is_checked_before_anything_starts(empty, seconds):
    with pytest.raises(ValueError, match="sandbox_timeout"):
        RemoteMachine("modal", "T4", options={"sandbox_timeout": seconds})
    assert not empty.building.is_set()


def test_time_limit_is_handed_on(empty):
    options = {"sandbox_timeout": 77}
    RemoteMachine("modal", "T4", options=options).stop()
    ((_, given),) = empty.created
    assert given["timeout"] == 77


def test_interrupt_in_the_constructor_ends_the_sandbox(empty):
    empty.built.clear()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        RemoteMachine("modal", "T4")
    assert time.monotonic() - begin < 5
    assert not empty.created  # Modal is still at work
    empty.built.set()
    eventually(lambda: empty.terminated == 1)
    assert len(empty.created) == 1
    assert mycelya_torch.get_all_machines() == []
    eventually(lambda: not list(mycelya_torch._device.manager.starting()))


def test_stop_during_the_start_ends_the_sandbox(empty):
    empty.built.clear()
    machine = RemoteMachine("modal", "T4", start=False)
    failures = []

    def start():
        try:
            machine.start()
        except RuntimeError as error:
            failures.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    assert empty.building.wait(10)
    machine.stop()
    thread.join(5)
    assert "was stopped while it started" in failures[0]
    assert not machine.is_running
    empty.built.set()
    eventually(lambda: empty.terminated == 1)


def test_failed_termination_is_told_and_can_be_tried_again(empty):
    machine = RemoteMachine("modal", "T4")
    empty.terminate_fails = ConnectionError("no way to Modal")
    with pytest.raises(RuntimeError, match=r"(?s)no way to Modal.*still be running"):
        machine.stop()
    assert not machine.is_running
    assert empty.terminated == 0
    empty.terminate_fails = None
    machine.stop()
    assert empty.terminated == 1


def test_failed_termination_does_not_hide_the_first_error(empty, monkeypatch, capfd):
    empty.terminate_fails = ConnectionError("no way to Modal")
    seed = RuntimeError("the first error")
    monkeypatch.setattr(
        mycelya_torch._machine, "_seed", lambda index: (_ for _ in ()).throw(seed)
    )
    with pytest.raises(RuntimeError, match="the first error") as caught:
        RemoteMachine("modal", "T4")
    assert any("no way to Modal" in note for note in caught.value.__notes__)


def test_failed_termination_of_a_dead_machine_is_told(empty):
    empty.terminate_fails = ConnectionError("no way to Modal")
    empty.tunnel_fails = ValueError("no tunnel at all")
    machine = RemoteMachine("modal", "T4")
    device = machine.device()
    machine._life._thread.join(10)
    with pytest.raises(MachineDiedError, match=r"(?s)no tunnel at all.*no way to"):
        torch.ones(2, device=device).sum().item()
    empty.terminate_fails = None
    machine.stop()
    assert empty.terminated == 1


def test_only_ten_functions_know_modal():
    functions = [
        function
        for _, function in inspect.getmembers(backend, inspect.isfunction)
        if function.__module__ == backend.__name__
    ]
    assert len(functions) <= 10


def test_real_module_has_what_is_used():
    real = pytest.importorskip("modal")
    assert "create_if_missing" in inspect.signature(real.App.lookup).parameters
    wanted = {"app", "image", "secrets", "gpu", "timeout", "encrypted_ports"}
    wanted |= {"region", "cpu", "memory"}
    assert wanted <= set(inspect.signature(real.Sandbox.create).parameters)
    for name in ("tunnels", "poll", "terminate"):
        assert hasattr(real.Sandbox, name)
    assert issubclass(real.exception.AuthError, Exception)
    for name in (
        "debian_slim",
        "apt_install",
        "pip_install",
        "run_commands",
        "add_local_file",
    ):
        assert hasattr(real.Image, name)
    assert hasattr(real.Secret, "from_dict")
