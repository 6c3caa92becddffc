# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The three tiers, as commands; from ``packages/mycelya-torch``.

- ``pytest tests/test_regression.py::TestCriticalRegression -v``: at every commit
- ``pytest tests/test_regression.py -v``: for a review
- ``pytest tests/ -v``: everything
"""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import mycelya_torch


def network():
    return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def losses(device, steps=8):
    """Train as the README does; return every loss."""
    torch.manual_seed(0)
    model = network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data, target = torch.randn(32, 784), torch.randint(0, 10, (32,))
    found = []
    for _ in range(steps):
        x, y = data.to(device), target.to(device)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).tolist()


@pytest.mark.critical
class TestCriticalRegression:
    """What must never break; seconds."""

    def test_the_worker_is_another_process(self, machine):
        assert machine.worker_pid not in (None, os.getpid())

    def test_values_go_there_and_back(self, device):
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            x = (torch.randn(5, 7) * 3).to(dtype)
            y = x.to(device)
            assert y.device == device
            assert (y.shape, y.dtype) == (x.shape, x.dtype)
            assert torch.equal(y.cpu(), x)

    def test_the_specs_first_example(self, device):
        x = torch.randn(100, 100, device=device)
        y = torch.randn(100, 100, device=device)
        result = x @ y
        assert result.device == device
        assert result.shape == (100, 100)
        assert torch.equal(result.cpu(), x.cpu() @ y.cpu())
        ids = [mycelya_torch.get_storage_id(t) for t in (x, y, result)]
        assert ids == sorted(set(ids))

    def test_training_is_bit_equal(self, device):
        assert losses(device) == losses("cpu")

    def test_views_and_metadata_send_nothing(self, machine):
        x = torch.randn(8, 8).to(machine.device())
        machine.synchronize()
        machine.reset_stats()
        view = x[1:, 2:5].t().unsqueeze(0)
        assert (view.shape, view.is_contiguous()) == ((1, 3, 7), False)
        assert machine.stats().ops == 0
        assert machine.stats().bytes_sent == 0

    def test_operations_travel_in_batches(self, machine):
        x = torch.ones(4, device=machine.device())
        (x + 1).sum().item()
        machine.reset_stats()
        time.sleep(0.02)  # from now on records wait 2 ms for others, not 0.2
        begin = time.monotonic()
        for _ in range(1000):
            x = x * 1
        assert x.sum().item() == 4
        seconds = time.monotonic() - begin
        stats = machine.stats()
        assert stats.ops >= 1000
        # 50 to a frame; where a busy box makes fewer in 2 ms, a frame each 2 ms.
        assert stats.frames_sent <= max(20, 2 + seconds / 0.002)
        assert stats.round_trips == 1

    def test_before_a_machine_starts_there_is_nothing_to_wait_for(self):
        code = (
            "import torch, mycelya_torch; torch.mycelya.synchronize()\n"
            "with torch.profiler.profile() as ran: torch.ones(2) + 1\n"
            "print(len(ran.events()) > 0)"
        )
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr

    def test_random_numbers_are_the_cpus(self, device):
        torch.manual_seed(4)
        want = torch.randn(6)
        torch.manual_seed(4)
        assert torch.equal(torch.randn(6, device=device).cpu(), want)

    def test_a_failure_is_raised_once_and_named(self, device):
        x = torch.ones(3, device=device)
        bad = x.gather(0, torch.tensor([7], device=device))
        with pytest.raises(mycelya_torch.RemoteExecutionError, match="aten::gather"):
            bad.tolist()
        assert (x + 1).tolist() == [2, 2, 2]

    def test_wrong_shapes_raise_at_once(self, device):
        with pytest.raises(RuntimeError, match="must match the size"):
            torch.ones(3, device=device) + torch.ones(4, device=device)

    def test_machines_are_not_mixed(self, device):
        with mycelya_torch.RemoteMachine("mock") as other:
            x, y = torch.ones(2, device=device), torch.ones(2, device=other.device())
            with pytest.raises(RuntimeError, match=r"\.to\(") as caught:
                x + y
            assert str(device) in str(caught.value)
            assert str(other.device()) in str(caught.value)
            assert (x + y.to(device)).tolist() == [2, 2]

    def test_unknown_machines_are_refused(self):
        with pytest.raises(ValueError, match="modal"):
            mycelya_torch.RemoteMachine("nowhere")
        with pytest.raises(ValueError, match="A100"):
            mycelya_torch.RemoteMachine("modal")


@pytest.mark.fast
class TestFastRegression:
    """Wider and slower: still minutes at most."""

    def test_a_killed_worker_is_noticed(self):
        machine = mycelya_torch.RemoteMachine("local")
        x = torch.ones(4, device=machine.device())
        assert x.sum().item() == 4
        os.kill(machine.worker_pid, signal.SIGKILL)
        begin = time.perf_counter()
        with pytest.raises(mycelya_torch.MachineDiedError):
            x.sum().item()
        assert time.perf_counter() - begin < 1
        machine.stop()
        machine.start()
        assert torch.ones(2, device=machine.device()).tolist() == [1, 1]
        machine.stop()

    def test_copies_between_machines(self, device):
        x = torch.randn(50, 3)
        with mycelya_torch.RemoteMachine("local") as other:
            y = x.to(device).t().to(other.device())
            assert y.device == other.device()
            assert torch.equal(y.cpu(), x.t())

    def test_signatures_are_dropped_on_both_sides(self, machine):
        """More shapes than the cache holds, then the first ones again."""
        x = torch.ones(70_000).to(machine.device())
        for size in range(1, 70_000):
            x[:size] + 1
        for size in (1, 2, 3, 69_000, 69_999):
            assert (x[:size] + 1).sum().item() == 2 * size

    def test_a_full_queue_waits(self):
        with mycelya_torch.RemoteMachine("local", max_inflight_bytes=1 << 16) as small:
            x = torch.zeros(100, 100, device=small.device())
            for _ in range(5000):
                x += 1
            assert x[3, 3].item() == 5000

    def test_without_batching(self):
        with mycelya_torch.RemoteMachine("local", batching=False) as machine:
            x = torch.ones(3, device=machine.device())
            machine.synchronize()  # what waits for the start is sent together
            for _ in range(20):
                x = x + 1
            assert x.tolist() == [21, 21, 21]
            stats = machine.stats()
            assert stats.frames_sent >= stats.ops

    def test_large_transfers(self, device):
        x = torch.arange(40_000_000, dtype=torch.float32)
        y = x.to(device)
        assert torch.equal(y.cpu(), x)
        assert torch.equal(y[::2][:1000].cpu(), x[::2][:1000])
        assert torch.equal(y.view(4000, -1).t()[5:50].cpu(), x.view(4000, -1).t()[5:50])

    def test_longer_training_is_bit_equal(self, device):
        assert losses(device, 50) == losses("cpu", 50)
