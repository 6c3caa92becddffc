# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Counts, and the exact line of each wait."""

import concurrent.futures
import dis
import inspect
import sys
import threading

import pytest
import torch

import mycelya_torch
from mycelya_torch import MachineStats, SyncForbiddenError, SyncPoint

pytestmark = pytest.mark.fast


def here():
    """Return the caller's file and line."""
    frame = inspect.currentframe().f_back
    return frame.f_code.co_filename, frame.f_lineno


def only(machine):
    (point,) = machine.stats().sync_points
    return point


@pytest.mark.critical
def test_counts(both):
    x = torch.ones(4, 4, device=both.device())
    x.sum().item()
    both.reset_stats()
    for _ in range(10):
        y = x + x
    y[1:, 2:].t().unsqueeze(0)
    stats = both.stats()
    assert isinstance(stats, MachineStats)
    assert stats.ops == 10
    assert stats.cache_hits + stats.cache_misses == 10
    assert stats.round_trips == 0
    assert stats.sync_points == ()
    y.sum().item()
    stats = both.stats()
    assert stats.ops == 11
    assert stats.round_trips == 1
    assert 1 <= stats.frames_sent <= 11
    assert stats.bytes_sent > 0
    assert stats.bytes_received > 0
    assert stats.storages_live >= 2
    assert stats.bytes_live >= 2 * 64


def test_reading_a_value_names_the_line(both):
    x = torch.ones(3, device=both.device())
    x.sum().item()
    both.reset_stats()
    for _ in range(3):
        file, line = here(); x.sum().item()  # fmt: skip # noqa: E702
    point = only(both)
    assert (point.filename, point.line) == (file, line)
    assert point.function == "test_reading_a_value_names_the_line"
    assert point.reason == "read value"
    assert point.count == 3
    assert point.seconds > 0


def test_copy_to_cpu_names_the_line(both):
    x = torch.ones(30, device=both.device())
    both.synchronize()
    both.reset_stats()
    file, line = here(); x.cpu()  # fmt: skip # noqa: E702
    point = only(both)
    assert (point.filename, point.line, point.reason) == (file, line, "copy to cpu")


def test_dynamic_shape_names_the_operator(both):
    x = torch.ones(3, device=both.device())
    both.synchronize()
    both.reset_stats()
    file, line = here(); torch.nonzero(x)  # fmt: skip # noqa: E702
    point = only(both)
    assert (point.filename, point.line) == (file, line)
    assert point.reason == "dynamic shape: aten::nonzero"
    assert both.stats().dynamic_ops == 1


def test_synchronize_names_the_line(both):
    both.reset_stats()
    file, line = here(); both.synchronize()  # fmt: skip # noqa: E702
    point = only(both)
    assert (point.filename, point.line, point.reason) == (file, line, "synchronize")


def test_wait_inside_torch_names_the_line_outside_of_it(both):
    x = torch.ones(3, device=both.device())
    both.synchronize()
    both.reset_stats()
    file, line = here(); repr(x)  # fmt: skip # noqa: E702
    points = both.stats().sync_points
    assert points
    assert {(point.filename, point.line) for point in points} == {(file, line)}


def test_wait_in_backward(both):
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * grad.sum().item()

    x = torch.ones(3, device=both.device(), requires_grad=True)
    loss = Reads.apply(x).sum()
    both.synchronize()
    both.reset_stats()
    loss.backward()
    # The function's own frame is in the thread of autograd.
    assert [point.function for point in both.stats().sync_points] == ["backward"]


def test_most_expensive_first():
    cheap = SyncPoint("a.py", 1, "f", "read value", 1, 0.1)
    dear = SyncPoint("b.py", 2, "g", "load", 2, 0.5)
    numbers = dict.fromkeys(list(MachineStats.__dataclass_fields__)[:-1], 1000)
    text = str(MachineStats(**numbers, sync_points=(dear, cheap)))
    assert "bytes_sent" in text
    assert "1,000" in text
    assert text.index("load at b.py:2 in g") < text.index("read value at a.py:1 in f")


def test_order_of_the_points(both):
    x = torch.ones(300, 300, device=both.device())
    x.sum().item()
    both.reset_stats()
    for _ in range(20):
        (x @ x).sum().item()
    x[0, 0].item()
    seconds = [point.seconds for point in both.stats().sync_points]
    assert len(seconds) == 2
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.critical
def test_forbid_sync(both):
    x = torch.ones(3, device=both.device())
    with mycelya_torch.forbid_sync():
        y = x + 1
        for wait in (lambda: y.sum().item(), y.cpu, lambda: torch.nonzero(y)):
            with pytest.raises(SyncForbiddenError):
                wait()
        with pytest.raises(SyncForbiddenError):
            both.synchronize()
        with mycelya_torch.forbid_sync():
            pass
        with pytest.raises(SyncForbiddenError):
            y.tolist()
    assert y.tolist() == [2, 2, 2]


def test_forbid_sync_is_of_one_thread(both):
    x = torch.ones(3, device=both.device())
    with mycelya_torch.forbid_sync(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: x.sum().item()).result() == 3


def test_to_cpu_async(both):
    x = torch.arange(12.0, device=both.device()).view(3, 4)
    both.synchronize()
    both.reset_stats()
    with mycelya_torch.forbid_sync():
        futures = [mycelya_torch.to_cpu_async(part) for part in (x, x.t(), x[1, 2:])]
    done, waiting = concurrent.futures.wait(futures, timeout=30)
    assert len(done) == 3
    assert not waiting
    assert torch.equal(futures[0].result(), torch.arange(12.0).view(3, 4))
    assert torch.equal(futures[1].result(), torch.arange(12.0).view(3, 4).t())
    assert futures[2].result().tolist() == [6, 7]
    assert both.stats().sync_points == ()


def test_to_cpu_async_reports_failures(both):
    x = torch.zeros(4, device=both.device())
    bad = x.index_select(0, torch.tensor([9], device=both.device()))

    def read():
        return mycelya_torch.to_cpu_async(bad).result(30)

    with pytest.raises(mycelya_torch.RemoteExecutionError):
        read()
    with pytest.raises(RuntimeError, match="cpu"):
        mycelya_torch.to_cpu_async(torch.ones(2))


@pytest.mark.skipif(sys.gettrace() is not None, reason="something else traces")
def test_interrupt_anywhere_leaves_no_read_into_freed_memory(both, monkeypatch):
    """Each read that was begun is completed, whoever waits for it."""
    completed = []
    finish = torch.ops.mycelya.finish_read

    def counted(index, ticket, reason):
        completed.append(ticket)
        finish(index, ticket, reason)

    monkeypatch.setattr(torch.ops.mycelya, "finish_read", counted)
    x = torch.arange(4.0, device=both.device())
    mycelya_torch.to_cpu_async(x).result(30)
    before = both.stats().round_trips - len(completed)
    left = 0
    former = {}

    def trace(frame, event, argument):
        nonlocal left
        frame.f_trace_opcodes = True
        if event == "opcode":
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            # Python looks for signals after calls, and where a function begins.
            if name == "RESUME" or former.get(frame, "").startswith("CALL"):
                left -= 1
            former[frame] = name
            if left == 0:
                raise KeyboardInterrupt
        return trace

    def interrupted(after):
        nonlocal left
        left = after
        former.clear()
        sys.settrace(trace)
        try:
            mycelya_torch.to_cpu_async(x)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    after = 1
    while interrupted(after):
        after += 1
    assert after > 20
    assert mycelya_torch.to_cpu_async(x).result(30).tolist() == [0, 1, 2, 3]
    assert both.stats().round_trips - before == len(completed)


def test_to_cpu_async_without_a_thread_begins_nothing(both, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    x = torch.ones(3, device=both.device())
    both.synchronize()
    before = both.stats().round_trips
    monkeypatch.setattr(mycelya_torch._stats, "_reads", {})
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        mycelya_torch.to_cpu_async(x)
    assert both.stats().round_trips == before


def test_to_cpu_async_of_a_dead_machine():
    import os
    import signal

    machine = mycelya_torch.RemoteMachine("local")
    x = torch.ones(500, 500, device=machine.device())
    x.sum().item()
    for _ in range(100):
        y = x @ x
    future = mycelya_torch.to_cpu_async(y)
    os.kill(machine.worker_pid, signal.SIGKILL)
    with pytest.raises(mycelya_torch.MachineDiedError):
        future.result(30)
    machine.stop()


@pytest.mark.parametrize("dims", [0, [-1], [0, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_logsumexp_of_a_new_shape_asks_nobody(machine, dims, dtype):
    there = torch.arange(35).view(5, 7).to(dtype)
    here = there.to(machine.device())
    machine.reset_stats()
    found = [torch.logsumexp(here, dims, keepdim) for keepdim in (False, True)]
    assert machine.stats().round_trips == 0
    for one, keepdim in zip(found, (False, True), strict=True):
        want = torch.logsumexp(there, dims, keepdim)
        assert (one.dtype, one.stride()) == (want.dtype, want.stride())
        assert torch.equal(one.cpu(), want)
