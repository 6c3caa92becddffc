# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Starts that are interrupted, stopped or late; and ends of the right machine."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from mycelya_torch import MachineDiedError, RemoteMachine
from mycelya_torch._device import manager
from mycelya_torch.backends.local import LocalBackend
from mycelya_torch.backends.mock import MockBackend

pytestmark = pytest.mark.fast


def eventually(condition):
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


class Held:
    """A backend's ``start``, which waits before it does what it does."""

    def __init__(self, monkeypatch, kind):
        self.begun, self.go, self.backends = threading.Event(), threading.Event(), []
        real = kind.start

        def start(backend, deadline):
            self.backends.append(backend)
            self.begun.set()
            assert self.go.wait(20)
            real(backend, deadline)

        monkeypatch.setattr(kind, "start", start)


def test_stop_of_a_dead_machine_leaves_its_successor_alone():
    first = RemoteMachine("mock")
    index = first.device().index
    torch.ops.mycelya.fail(index, "it was killed")
    first._life._thread.join(10)
    with RemoteMachine("mock") as second:
        assert second.device().index == index
        for use in (first.device, first.stats, first.synchronize):
            with pytest.raises(RuntimeError, match="is stopped"):
                use()
        first.stop()
        assert second.is_running
        assert torch.ones(2, device=second.device()).sum().item() == 2


def test_time_of_the_provider_does_not_count_for_the_worker(monkeypatch):
    real_start, real_connect, left = MockBackend.start, MockBackend.connect, []

    def start(backend, deadline):
        time.sleep(0.8)
        real_start(backend, deadline)

    def connect(backend, deadline):
        left.append(deadline - time.monotonic())
        return real_connect(backend, deadline)

    monkeypatch.setattr(MockBackend, "start", start)
    monkeypatch.setattr(MockBackend, "connect", connect)
    with RemoteMachine("mock", connect_timeout=2) as machine:
        assert torch.ones(2, device=machine.device()).sum().item() == 2
    assert left[0] > 1.5


def test_interrupted_start_leaves_no_worker(monkeypatch):
    held = Held(monkeypatch, LocalBackend)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        RemoteMachine("local")
    assert time.monotonic() - begin < 5
    (life,) = manager.starting()
    held.go.set()
    life._thread.join(20)
    assert not life._thread.is_alive()
    with pytest.raises(ProcessLookupError):
        os.kill(held.backends[0].pid, 0)
    assert life not in manager._slots
    assert life.owner is None


def test_interrupt_right_after_the_start_leaves_no_worker(monkeypatch):
    lives = []

    def interrupted(index):
        lives.append(manager.at(index))
        raise KeyboardInterrupt

    monkeypatch.setattr("mycelya_torch._machine._seed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RemoteMachine("local")
    (life,) = lives
    assert life.state == "stopped"
    with pytest.raises(ProcessLookupError):
        os.kill(life.backend.pid, 0)


def test_stop_by_another_thread_ends_a_start(monkeypatch):
    held = Held(monkeypatch, MockBackend)
    machine = RemoteMachine("mock", start=False)
    seen = []

    def start():
        try:
            machine.start()
        except RuntimeError as error:
            seen.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    assert held.begun.wait(10)
    machine.stop()
    thread.join(10)
    assert seen
    assert "was stopped while it started" in seen[0]
    held.go.set()
    eventually(lambda: not manager.starting())
    machine.start()
    assert torch.ones(2, device=machine.device()).sum().item() == 2
    machine.stop()


def test_failed_start_keeps_its_error_and_the_failed_stop_is_a_note(monkeypatch):
    def refuse(*_):
        raise ValueError("the first error")

    def stop(backend, grace):
        raise OSError("the second error")

    monkeypatch.setattr(MockBackend, "start", refuse)
    monkeypatch.setattr(MockBackend, "stop", stop)
    with pytest.raises(ValueError, match="the first error") as caught:
        RemoteMachine("mock")
    assert "the second error" in caught.value.__notes__
    assert not manager.starting()


def test_failed_stop_of_a_dead_machine_is_told(monkeypatch):
    def stop(backend, grace):
        raise OSError("it can't be ended")

    machine = RemoteMachine("mock")
    device = machine.device()
    monkeypatch.setattr(MockBackend, "stop", stop)
    monkeypatch.setattr(MockBackend, "explain", lambda backend: "it fell")
    torch.ops.mycelya.fail(device.index, "it was killed")
    machine._life._thread.join(10)
    with pytest.raises(MachineDiedError, match=r"it fell.*it can't be ended"):
        torch.ones(2, device=device).sum().item()
    with pytest.raises(OSError, match="it can't be ended"):
        machine.stop()
    monkeypatch.undo()
    machine.stop()


def test_end_of_the_program_waits_for_a_start_that_was_given_up():
    program = """
        import os, signal, threading, time
        from mycelya_torch import RemoteMachine
        from mycelya_torch.backends.mock import MockBackend as Backend

        def start(backend, deadline, real=Backend.start):
            time.sleep(2.0)
            real(backend, deadline)
            print("made", flush=True)

        def stop(backend, grace, real=Backend.stop):
            real(backend, grace)
            print("ended" if backend._thread else "nothing yet", flush=True)

        Backend.start, Backend.stop = start, stop
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            RemoteMachine("mock")
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n") == [
        *("nothing yet", "interrupted", "made", "ended", "")
    ]
    assert not done.stderr


def test_interrupt_at_the_end_of_the_program_still_stops_the_others():
    program = """
        import torch
        from mycelya_torch import RemoteMachine
        from mycelya_torch.backends.mock import MockBackend as Backend
        stopped = []

        def stop(backend, grace, real=Backend.stop):
            real(backend, grace)
            print("stop", flush=True)
            raise KeyboardInterrupt

        Backend.stop = stop
        machines = [RemoteMachine("mock"), RemoteMachine("mock")]
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("stop") == 2
    assert done.stderr.count("KeyboardInterrupt") == 2
    assert "Traceback" not in done.stderr
