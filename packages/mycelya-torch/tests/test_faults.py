# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Workers that die or stop, signals, and who may connect."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import msgpack
import pytest
import torch

import mycelya_torch
import torchworks_core
from mycelya_torch import AuthenticationError, MachineDiedError, RemoteMachine

pytestmark = pytest.mark.fast


def busy(x, seconds=3.0):
    """Queue work for some seconds; return its result."""
    y = x
    for _ in range(int(seconds * 40)):
        y = y @ x
    return y


def big(machine):
    """Return a matrix whose product takes a while: about 25 ms on one core."""
    x = torch.full((768, 768), 1e-3, device=machine.device())
    assert x.sum().item() > 0
    return x


def catch(function, *arguments):
    """Return what a call raises, and when."""
    try:
        function(*arguments)
    except Exception as error:
        return type(error), time.monotonic()
    return None, time.monotonic()


@pytest.mark.critical
def test_killed_mid_batch_wakes_everybody_within_a_second():
    machine = RemoteMachine("local")
    x = big(machine)
    late = busy(x, 20)
    future = mycelya_torch.to_cpu_async(late)
    found = {}

    def wait(name, function):
        found[name] = catch(function)

    waits = {
        "read": lambda: late[0, 0].item(),
        "synchronize": machine.synchronize,
        "future": lambda: future.result(30),
        "control": lambda: torch.mycelya.memory_allocated(machine.device()),
    }
    threads = [threading.Thread(target=wait, args=item) for item in waits.items()]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert not found
    killed = time.monotonic()
    os.kill(machine.worker_pid, signal.SIGKILL)
    for thread in threads:
        thread.join(10)
    assert {name: kind for name, (kind, _) in found.items()} == dict.fromkeys(
        waits, MachineDiedError
    )
    assert max(when for _, when in found.values()) - killed < 1
    for use in (lambda: x + 1, lambda: x.cpu(), lambda: torch.ones(2, device=x.device)):
        assert catch(use)[0] is MachineDiedError
    assert catch(lambda: mycelya_torch.to_cpu_async(x).result(5))[0] is MachineDiedError
    assert x.shape == (768, 768)
    assert not machine.is_running
    machine.stop()
    with RemoteMachine("local") as another:
        assert torch.ones(3, device=another.device()).sum().item() == 3


def run(program, seconds=60):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def test_process_with_a_killed_worker_exits():
    """With a full queue, an unread future, and threads that wait."""
    begin = """
        import os, signal, threading, time, torch, mycelya_torch
        machine = mycelya_torch.RemoteMachine("local")
        x = torch.ones(768, 768, device=machine.device())
        x.sum().item()
        y = x
        for _ in range(400):
            y = y @ x
        future = mycelya_torch.to_cpu_async(y)
        threading.Thread(target=lambda: y.sum().item()).start()
        time.sleep(0.2)
        os.kill(machine.worker_pid, signal.SIGKILL)
        print("killed", time.time())
    """
    done = run(begin)
    left = time.time()
    assert done.returncode == 0, done.stderr
    assert left - float(done.stdout.split()[1]) < 8


@pytest.mark.critical
def test_stopped_worker_dies_after_the_timeout():
    machine = RemoteMachine("local", timeout=1.0)
    x = torch.ones(3, device=machine.device())
    assert x.sum().item() == 3
    pid = machine.worker_pid
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    kind, when = catch(lambda: x.sum().item())
    assert kind is MachineDiedError
    assert 0.6 < when - stopped < 6
    machine._life._thread.join(10)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    machine.stop()


def test_busy_worker_is_not_dead():
    with RemoteMachine("local", timeout=0.4) as machine:
        assert torch.isfinite(busy(big(machine), 1.2).sum()).item()


# ---- Ctrl-C ----
@pytest.fixture(scope="module")
def worker():
    with RemoteMachine("local", max_inflight_bytes=1 << 16) as running:
        yield running


def interrupted(function):
    """Press Ctrl-C during a call; return the seconds until it was noticed."""
    pressed = []

    def press():
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.3, press)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            function()
    finally:
        noticed = time.monotonic()
        timer.join()
    return noticed - pressed[0]


@pytest.mark.critical
@pytest.mark.parametrize("wait", ["read", "synchronize", "control", "future"])
def test_interrupt_in_a_wait(worker, wait):
    x = big(worker)
    late = busy(x, 1.5)
    future = mycelya_torch.to_cpu_async(late)
    use = {
        "read": late.cpu,
        "synchronize": worker.synchronize,
        "control": lambda: torch.mycelya.memory_allocated(x.device),
        "future": lambda: future.result(30),
    }[wait]
    assert interrupted(use) <= 0.2
    # The late answer is dropped, and the machine goes on.
    for i in range(3):
        assert torch.full((2,), i, device=x.device).tolist() == [i, i]
    assert torch.isfinite(future.result(30)).all()


def test_interrupt_while_the_queue_is_full(worker):
    x = torch.zeros(1000, device=worker.device())
    assert x.sum().item() == 0
    os.kill(worker.worker_pid, signal.SIGSTOP)

    def fill():
        while True:
            x.add_(1)

    try:
        assert interrupted(fill) <= 0.2
        data = torch.ones(4 << 20)
        assert interrupted(lambda: data.to(x.device)) <= 0.2
    finally:
        os.kill(worker.worker_pid, signal.SIGCONT)
    assert x[0].item() == x[-1].item() > 0
    assert torch.equal(data.to(x.device).cpu(), data)


# ---- who may connect ----
def listening(pid):
    """Return the hexadecimal addresses at which a process listens."""
    descriptors = Path("/proc", str(pid), "fd").iterdir()
    links = {os.readlink(one) for one in descriptors if one.is_symlink()}
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path("/proc", str(pid), "net", name).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
                found.append(fields[1].partition(":")[0])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_server_is_on_the_loopback_and_refuses_wrong_tokens(serve, token):
    server = serve()
    assert listening(server.process.pid) == ["0100007F"]
    for _ in range(2):
        with pytest.raises(AuthenticationError):
            RemoteMachine("tcp", address=server.address, token="x" * 43)
    with RemoteMachine("tcp", address=server.address, token=token) as machine:
        assert torch.ones(3, device=machine.device()).sum().item() == 3


CLIENT = """
    import sys, torch, mycelya_torch
    with mycelya_torch.RemoteMachine("tcp", address=sys.argv[1]) as machine:
        x = torch.arange(4.0, device=machine.device())
        print(x.sum().item(), flush=True)
        sys.stdin.readline()
        print((x + 1).sum().item(), flush=True)
"""


@pytest.mark.slow
def test_server_of_another_checkout_and_venv_serves_two_clients(tmp_path, token):
    """Nothing is shared with the clients but the port."""
    package = Path(mycelya_torch.__file__).parent
    core = Path(torchworks_core.__file__).parent
    for folder in (package, core):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, tmp_path / "checkout" / folder.name, ignore=skip)
    venv = tmp_path / "venv"
    command = [sys.executable, "-m", "venv", "--without-pip", str(venv)]
    subprocess.run(command, check=True)
    places = {str(Path(m.__file__).parents[1]) for m in (torch, msgpack)}
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join(sorted(places)))
    python = str(venv / "bin" / "python")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "checkout")}
    environment["MYCELYA_TOKEN"] = token
    where = "import mycelya_torch, sys; print(mycelya_torch.__file__, sys.prefix)"
    done = subprocess.run(
        [python, "-c", where], env=environment, cwd=tmp_path, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.split()[0].startswith(str(tmp_path / "checkout"))
    assert done.stdout.split()[1] == str(venv)
    server = subprocess.Popen(
        [python, "-m", "mycelya_torch.server"], env=environment, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        address = json.loads(server.stdout.readline())["address"]
        program = [sys.executable, "-c", textwrap.dedent(CLIENT), address]
        clients = [
            subprocess.Popen(
                program, env={**os.environ, "MYCELYA_TOKEN": token},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(2)
        ]  # fmt: skip
        # Both at the same time: each says its first number before either goes on.
        assert [client.stdout.readline() for client in clients] == ["6.0\n"] * 2
        for client in clients:
            out, _ = client.communicate("go\n", timeout=60)
            assert (out, client.returncode) == ("10.0\n", 0)
    finally:
        server.terminate()
        server.communicate(timeout=20)
