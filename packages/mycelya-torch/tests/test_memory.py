# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Device tensors own no local memory, and nothing is left behind."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch

from mycelya_torch import RemoteMachine

MANY = 100_000
needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="needs /proc"
)
# In a process of its own, so that nothing else allocates meanwhile.
BIG = """
import os, torch, mycelya_torch

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

with mycelya_torch.RemoteMachine("local") as machine:
    device = machine.device()
    torch.ones(1000, device=device).sum().item()
    machine.synchronize()
    before = resident()
    big = [torch.full((1 << 26,), 2.0, device=device) for _ in range(8)]  # 2 GiB
    assert big[7][5].item() == 2
    print(resident() - before, machine.stats().bytes_live)
"""
SMALL = BIG.replace("(1 << 26,)", "(8,)").replace("range(8)", f"range({MANY})")


def numbers(code):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def resident():
    """Bytes of this process in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live(machine):
    """Storages and bytes, here and on the worker."""
    gc.collect()
    machine.synchronize()
    torch.ones(1, device=machine.device())  # sends what the deleters left
    machine.synchronize()
    stats = machine.stats()
    device = machine.device()
    return stats.storages_live, stats.bytes_live, torch.mycelya.memory_allocated(device)


def test_the_worker_is_another_process(machine):
    assert machine.worker_pid not in (None, os.getpid())
    os.kill(machine.worker_pid, 0)


@needs_proc
def test_two_gigabytes_leave_this_process_alone():
    grown, held = numbers(BIG)
    assert held >= 2 << 30
    assert grown <= 20 << 20


@needs_proc
def test_a_live_tensor_costs_little():
    grown, held = numbers(SMALL)
    assert held >= MANY * 32
    # What Python and torch need for any tensor is in it, too.
    assert grown / MANY <= 600


def test_many_operations_leave_nothing(machine):
    device = machine.device()
    x = torch.randn(8, 8, device=device)
    before = live(machine)
    for _ in range(MANY // 4):
        y = x + x
        y = (y * x)[2:]
        y.mul_(2)
        y.sum()
    assert machine.stats().ops >= MANY
    del y
    assert live(machine) == before


def test_training_leaves_nothing(machine):
    device = machine.device()
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).to(device)
    optimizer = torch.optim.Adam(net.parameters())
    x = torch.randn(4, 8, device=device)

    def step():
        optimizer.zero_grad()
        net(x).sum().backward()
        optimizer.step()

    step()
    before = live(machine)
    for _ in range(200):
        step()
    assert live(machine) == before


def test_errors_leave_nothing(machine):
    x = torch.ones(4, device=machine.device())
    before = live(machine)
    for _ in range(50):
        with pytest.raises(IndexError, match="out of"):
            x[torch.tensor([9], device=machine.device())].tolist()
        with pytest.raises(RuntimeError, match="size"):
            x + torch.ones(3, device=machine.device())
    assert live(machine) == before


def test_dynamic_shapes_leave_nothing(machine):
    x = torch.arange(20, device=machine.device())
    before = live(machine)
    for _ in range(100):
        assert x[x > 12].numel() == 7
        assert len(x.unique(return_counts=True)) == 2
        x.nonzero()
    assert live(machine) == before


def test_large_results_are_freed_at_once(machine):
    """The worker's peak is a few results, however many are made."""
    device = machine.device()
    x = torch.ones(1 << 20, device=device)
    machine.synchronize()
    torch.mycelya.reset_peak_memory_stats(device)
    start = torch.mycelya.max_memory_allocated(device)
    for _ in range(200):
        y = x + 1
    machine.synchronize()
    assert y[0].item() == 2
    assert torch.mycelya.max_memory_allocated(device) <= start + 8 * x.nbytes


def test_four_threads(machine):
    """Each thread has its own numbers; together they do 4 x 10,000 operations."""
    device = machine.device()
    before = live(machine)
    found, wrong = {}, []

    def work(number):
        try:
            x = torch.full((4,), float(number), device=device)
            total = torch.zeros(4, device=device)
            for step in range(5_000):
                total += x
                y = x * step
                if step % 1000 == 999:
                    wrong.extend(v for v in y.tolist() if v != number * step)
            found[number] = total.tolist()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert found == {n: [n * 5000.0] * 4 for n in range(4)}
    assert live(machine) == before


def test_threads_that_make_and_free(machine):
    """Tensors are made in one thread and freed in another."""
    import queue

    device = machine.device()
    before = live(machine)
    line, sums = queue.Queue(maxsize=50), []

    def make():
        for number in range(2000):
            line.put(torch.full((16,), float(number), device=device))
        line.put(None)

    def take():
        while (tensor := line.get()) is not None:
            sums.append(tensor.sum())
            if len(sums) % 500 == 0:
                sums[:] = [torch.stack(sums).sum()]

    threads = [threading.Thread(target=one) for one in (make, take)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(tensor.item() for tensor in sums) == 16 * 2000 * 1999 / 2
    sums.clear()
    assert live(machine) == before


@needs_proc
def test_a_stopped_machine_frees_its_memory_and_then_its_index():
    """The worker's memory at the stop, the index with the last tensor here."""
    size = 256 << 20
    # The worker of a mock machine has its tensors in this process.
    with RemoteMachine("mock") as machine:
        device = machine.device()
        x = torch.full((size,), 1, dtype=torch.uint8, device=device)
        machine.synchronize()
        assert machine.stats().bytes_live == size
        held = resident()
    assert resident() <= held - 0.9 * size
    assert torch.ops.mycelya.live_storages(device.index) == 1
    with RemoteMachine("mock") as other:
        assert other.device() != device
    del x
    with RemoteMachine("mock") as other:
        assert other.device() == device
        assert other.stats().bytes_live == 0
