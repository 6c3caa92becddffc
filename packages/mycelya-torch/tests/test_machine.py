# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Machines: what is refused before a start, their life, and ``torch.mycelya``."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref

import pytest
import torch

from mycelya_torch import (
    CloudProvider,
    GPUType,
    MachineDiedError,
    RemoteMachine,
    get_all_machines,
)
from mycelya_torch._device import SLOTS

pytestmark = pytest.mark.fast

TOKEN = "t" * 43


@pytest.mark.critical
@pytest.mark.parametrize(
    ("arguments", "options", "problem"),
    [
        (("locl",), {}, r"local, mock, tcp, modal.*Did you mean 'local'"),
        (("local", "T4"), {}, "gpu_type 'T4'"),
        (("tcp", "T4"), {"address": "h:1", "token": TOKEN}, "gpu_type 'T4'"),
        (("modal",), {}, "T4, L4, A10G, A100, A100-40GB, A100-80GB, L40S, H100"),
        (("modal", "A10"), {}, "Did you mean 'A10G'"),
        (("mock", "nonsense"), {}, "gpu_type"),
        (("tcp",), {"token": TOKEN}, "host:port"),
        (("tcp",), {"address": "host", "token": TOKEN}, "host:port"),
        (("tcp",), {"address": "host:99999", "token": TOKEN}, "host:port"),
        (("tcp",), {"address": "host:1"}, "no token"),
        (("tcp",), {"address": "host:1", "token": "short"}, "32 bytes"),
        (
            ("tcp",),
            {"address": "h:1", "token": TOKEN, "tls_fingerprint": "ab"},
            "64 hex",
        ),
        (
            ("tcp",),
            {
                "address": "h:1",
                "token": TOKEN,
                "insecure": True,
                "tls_fingerprint": "0" * 64,
            },
            "insecure",
        ),
        (("local",), {"address": "host:1"}, "for 'tcp' only"),
        (("local",), {"timeout": 0}, "timeout"),
        (("local",), {"timeout": 601}, r"timeout=601: .*at most 600 s.*Use 600"),
        (("local",), {"timeout": 10**400}, "timeout"),
        (("local",), {"connect_timeout": float("nan")}, "connect_timeout"),
        (("local",), {"max_inflight_bytes": 10}, "max_inflight_bytes"),
        (("local",), {"max_inflight_bytes": 1 << 63}, "max_inflight_bytes"),
        (("local",), {"options": {"thread": 2}}, "Did you mean 'threads'"),
        (("local",), {"options": {"threads": 0}}, "threads=0"),
        (("mock",), {"options": {"python": "x"}}, "none for this provider"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(
    monkeypatch, arguments, options, problem
):
    monkeypatch.delenv("MYCELYA_TOKEN", raising=False)
    before = get_all_machines()
    with pytest.raises(ValueError, match=problem):
        RemoteMachine(*arguments, **options)
    assert get_all_machines() == before


def test_enums_have_the_values_of_the_strings():
    assert [one.value for one in CloudProvider] == ["local", "mock", "tcp", "modal"]
    assert [one.value for one in GPUType] == [
        *("T4", "L4", "A10G", "A100", "A100-40GB", "A100-80GB"),
        *("L40S", "H100", "H200", "B200"),
    ]
    machine = RemoteMachine(CloudProvider.MOCK, GPUType.H100, start=False)
    assert machine.provider is CloudProvider.MOCK
    assert machine.gpu_type == "H100"


@pytest.mark.critical
def test_device_computes(both):
    x = torch.randn(100, 100, device=both.device())
    y = torch.randn(100, 100, device=both.device())
    result = x @ y
    assert result.device == both.device()
    assert result.shape == (100, 100)
    assert torch.equal(result.cpu(), x.cpu() @ y.cpu())
    assert x.is_mycelya


def test_worker_is_another_process(machine):
    assert machine.worker_pid not in (None, os.getpid())
    os.kill(machine.worker_pid, 0)


def test_batching_can_be_turned_off():
    for batching in (True, False):
        with RemoteMachine("mock", batching=batching) as machine:
            x = torch.ones(4, device=machine.device())
            x.sum().item()
            machine.reset_stats()
            for _ in range(50):
                x.add_(1)
            assert x.sum().item() == 204
            stats = machine.stats()
            assert stats.ops == 51
            assert (stats.frames_sent > 25) is not batching


def test_worker_has_the_threads_of_the_client():
    threads = torch.get_num_threads()
    with RemoteMachine("local", options={"threads": 3}) as machine:
        found = torch.mycelya.get_device_properties(machine.device())
        assert getattr(found, "threads", 3) == 3
    assert torch.get_num_threads() == threads


def test_names(both):
    assert both in get_all_machines()
    assert both.machine_id.startswith(both.provider.value)
    assert both.machine_id in repr(both)
    assert f"mycelya:{both.device().index}" in repr(both)
    assert both.is_running


def test_device_is_chosen_once(both):
    device = both.device()
    assert both.device("cpu") == both.device(None, 0) == device
    torch.ones(1, device=device).item()
    if torch.mycelya.get_device_properties(device).type == "cpu":
        with pytest.raises(ValueError, match="one machine has one device"):
            both.device("cuda")
    for bad in ({"type": "tpu"}, {"index": -1}, {"type": "cpu", "index": 1}):
        with pytest.raises(ValueError, match=r"type|index"):
            both.device(**bad)


def test_a_device_that_the_worker_has_not_ends_the_start():
    machine = RemoteMachine("mock")
    device = machine.device("cuda", 99)
    with pytest.raises(MachineDiedError, match="cuda:99"):
        torch.ones(1, device=device).item()
    machine.stop()


@pytest.mark.critical
def test_start_stop_and_start_again():
    machine = RemoteMachine("mock", start=False)
    assert not machine.is_running
    with pytest.raises(RuntimeError, match="is stopped"):
        machine.device()
    with machine:
        x = torch.ones(4, device=machine.device())
        assert x.sum().item() == 4
    machine.stop()
    assert not machine.is_running
    assert machine not in get_all_machines()
    assert x.shape == (4,)
    for use in (lambda: x + 1, lambda: x.sum().item(), x.cpu):
        with pytest.raises(RuntimeError, match=f"{machine.machine_id} is stopped"):
            use()
    machine.start()
    machine.start()
    assert torch.ones(3, device=machine.device()).sum().item() == 3
    machine.stop()


def test_a_slot_is_free_when_its_last_tensor_died():
    first = RemoteMachine("mock")
    index = first.device().index
    x = torch.ones(4, device=first.device())
    first.stop()
    with RemoteMachine("mock") as second:
        assert second.device().index != index
    del x
    with RemoteMachine("mock") as third:
        assert third.device().index == index
        assert not first.is_running
        assert torch.ones(2, device=third.device()).sum().item() == 2


def test_all_slots_taken():
    tensors = []

    def use_one():
        with RemoteMachine("mock") as machine:
            tensors.append(torch.ones(1, device=machine.device()))

    for _ in range(SLOTS - sum(1 for _ in get_all_machines())):
        use_one()
    with pytest.raises(RuntimeError, match="no device index is left"):
        use_one()
    tensors.clear()
    with RemoteMachine("mock") as machine:
        assert torch.ones(1, device=machine.device()).item() == 1


def test_machines_run_until_they_are_stopped_even_without_a_name():
    device = RemoteMachine("mock").device()
    gc.collect()
    assert torch.ones(2, device=device).sum().item() == 2
    (machine,) = [m for m in get_all_machines() if m.device() == device]
    reference = weakref.ref(machine)
    machine.stop()
    del machine
    gc.collect()
    assert reference() is None


def test_copy_between_machines(machine):
    with RemoteMachine("mock") as other:
        x = torch.arange(6.0, device=machine.device()).view(2, 3)
        y = x.t().to(other.device())
        assert y.device == other.device()
        assert torch.equal(y.cpu(), x.cpu().t())
        with pytest.raises(RuntimeError, match=r"\.to\("):
            x + x.to(other.device())


def test_default_device_and_context(both):
    with both.device():
        assert torch.zeros(2).device == both.device()
    torch.set_default_device(both.device())
    try:
        assert torch.ones(3).sum().item() == 3
        both.stats()
        torch.mycelya.memory_allocated(both.device())
    finally:
        torch.set_default_device(None)


# ---- how a worker ends ----


def use_until_it_fails(x):
    while True:
        (x + 1).sum().item()


@pytest.mark.critical
def test_killed_worker():
    machine = RemoteMachine("local")
    x = torch.ones(8, device=machine.device())
    assert x.sum().item() == 8
    os.kill(machine.worker_pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(MachineDiedError, match=machine.machine_id):
        use_until_it_fails(x)
    assert time.monotonic() - begin < 1
    machine._life._thread.join(5)  # it asks the process how it ended
    with pytest.raises(MachineDiedError, match="status -9"):
        x.sum().item()
    assert not machine.is_running
    machine.stop()
    machine.start()
    assert torch.ones(2, device=machine.device()).sum().item() == 2
    machine.stop()


def test_stopped_worker_is_dead_after_the_timeout_and_is_killed():
    machine = RemoteMachine("local", timeout=1.0)
    x = torch.ones(8, device=machine.device())
    x.sum().item()
    pid = machine.worker_pid
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(MachineDiedError):
        x.sum().item()
    assert 0.5 < time.monotonic() - begin < 5
    machine.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_worker_that_fails_to_start_shows_its_last_lines(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho this python is broken >&2\nexit 7\n")
    broken.chmod(0o755)
    machine = RemoteMachine("local", options={"python": broken})
    with pytest.raises(MachineDiedError, match=r"(?s)status 7.*this python is broken"):
        torch.ones(2, device=machine.device()).sum().item()
    machine.stop()


def test_interpreter_that_is_not_there():
    with pytest.raises(RuntimeError, match="can't be started"):
        RemoteMachine("local", options={"python": "/nowhere/python"})


def test_worker_that_never_answers(tmp_path):
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    machine = RemoteMachine(
        "local", connect_timeout=0.5, options={"python": str(sleeper)}
    )
    begin = time.monotonic()
    with pytest.raises(MachineDiedError):
        torch.ones(2, device=machine.device()).sum().item()
    assert time.monotonic() - begin < 5
    machine.stop()


def run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_exit_without_stop_ends_the_worker():
    done = run("""
        import torch, mycelya_torch
        machine = mycelya_torch.RemoteMachine("local")
        x = torch.ones(3, device=machine.device())
        print(machine.worker_pid, mycelya_torch.get_storage_id(x), x.sum().item())
    """)
    assert done.returncode == 0, done.stderr
    pid, number, total = done.stdout.split()
    assert (number, total) == ("1", "3.0")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert not done.stderr


def test_exit_reports_a_failure_that_nobody_saw():
    done = run("""
        import torch, mycelya_torch
        machine = mycelya_torch.RemoteMachine("local")
        x = torch.ones(3, device=machine.device())
        x.index_select(0, torch.tensor([9], device=machine.device()))
    """)
    assert done.returncode == 0
    assert "aten::index_select failed" in done.stderr


def test_exit_with_a_dead_worker_does_not_hang():
    begin = time.monotonic()
    done = run("""
        import os, signal, torch, mycelya_torch
        machine = mycelya_torch.RemoteMachine("local")
        x = torch.ones(3, device=machine.device())
        x.sum().item()
        os.kill(machine.worker_pid, signal.SIGKILL)
        x + 1
    """)
    assert done.returncode in (0, 1)
    assert time.monotonic() - begin < 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_child_of_a_fork_is_told_to_spawn():
    done = run("""
        import os, torch, mycelya_torch
        machine = mycelya_torch.RemoteMachine("local")
        x = torch.ones(3, device=machine.device())
        x.sum().item()
        pid = os.fork()
        if pid == 0:
            seen = []
            for use in (lambda: x + 1, lambda: x.sum().item(), machine.start,
                        lambda: torch.ones(2, device="mycelya")):
                try:
                    use()
                    seen.append("no error")
                except RuntimeError as error:
                    seen.append("spawn" in str(error))
            print(seen, torch.mycelya._is_in_bad_fork(), flush=True)
            raise SystemExit(0)
        print(os.waitpid(pid, 0)[1], x.sum().item(), torch.mycelya._is_in_bad_fork())
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [
        "[True, True, True, True] True",
        "0 3.0 False",
    ]


# ---- import ----


@pytest.mark.critical
def test_import_starts_and_imports_nothing():
    done = run("""
        import sys, threading, torch
        before = set(sys.modules)
        import mycelya_torch
        new = set(sys.modules) - before
        roots = {name.partition(".")[0] for name in new}
        print(sorted(roots & {"transformers", "modal", "huggingface_hub", "ssl",
                              "safetensors", "msgpack", "asyncio"}))
        print(threading.active_count(), torch.mycelya.is_available())
        print(torch.device("mycelya", 3), torch.mycelya.device_count())
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "1 False", "mycelya:3 0"]


def test_library_for_another_torch_is_one_clear_sentence(tmp_path, monkeypatch):
    from mycelya_torch import _library

    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    monkeypatch.setattr(_library, "_loaded", False)
    with pytest.raises(ImportError, match="no native library"):
        _library.load()
    (tmp_path / "_C.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="can't be loaded"):
        _library.load()
    (tmp_path / "_C.torch").write_text("2.1\n")
    with pytest.raises(ImportError, match=r"built for torch 2\.1, but .*--no-build-"):
        _library.load()


def test_log_level_from_the_environment():
    done = run(
        """
        import torch, mycelya_torch
        with mycelya_torch.RemoteMachine("mock") as machine:
            torch.ones(2, device=machine.device()).sum().item()
        """,
        MYCELYA_LOG="machine=info,wire=debug",
    )
    assert "INFO mycelya_torch.machine: mock-" in done.stderr
    assert "DEBUG mycelya_torch.wire: mock-" in done.stderr
    assert "round_trips" in done.stderr


def test_blocking_mode_raises_at_the_line():
    done = run(
        """
        import torch, mycelya_torch
        with mycelya_torch.RemoteMachine("mock") as machine:
            x = torch.ones(3, device=machine.device())
            index = torch.tensor([9], device=machine.device())
            try:
                x.index_select(0, index)
            except IndexError as error:
                print(type(error).__name__, error.op)
            except RuntimeError as error:
                print(type(error).__name__, error.op)
        """,
        MYCELYA_BLOCKING="1",
    )
    assert "aten::index_select" in done.stdout, done.stderr


def test_interrupt_in_a_wait_leaves_the_machine_usable():
    done = run("""
        import os, signal, threading, time, torch, mycelya_torch
        with mycelya_torch.RemoteMachine("local") as machine:
            x = torch.ones(1200, 1200, device=machine.device())
            x.sum().item()
            for _ in range(40):
                x @ x
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            begin = time.monotonic()
            try:
                x.sum().item()
                print("no interrupt")
            except KeyboardInterrupt:
                print("interrupted", time.monotonic() - begin < 1.0)
            print(torch.ones(3, device=machine.device()).sum().item())
    """)
    assert done.stdout.splitlines() == ["interrupted True", "3.0"], done.stderr
