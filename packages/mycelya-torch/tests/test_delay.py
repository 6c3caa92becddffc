# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""A slow network costs round trips only, and those are counted.

Times are the benchmark's (`nox -s bench -- mycelya-torch`). How many operations share
a frame depends on how busy the computer is: the best of a few runs counts.
"""

import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from mycelya_torch import RemoteMachine

sys.path.insert(0, str(Path(__file__).parent))
import wire_codec as wire
from proxy import DOWN, UP, Proxy

pytestmark = pytest.mark.fast
STEPS = 300
OPS_PER_FRAME = 50


@pytest.fixture(scope="module")
def proxied():
    """A local machine behind a proxy that can delay."""
    with Proxy() as proxy:
        machine = RemoteMachine("local", start=False)
        proxy.between(machine)
        with machine:
            torch.ones(1, device=machine.device()).item()
            yield machine, proxy


class Training:
    def __init__(self, device):
        torch.manual_seed(5)
        with torch.device("cpu"):
            layers = torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
            self.model = torch.nn.Sequential(*layers)
            x, y = torch.randn(32, 64), torch.randint(10, (32,))
        self.model.to(device)
        self.x, self.y = x.to(device), y.to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters())

    def queue(self, amount):
        for _ in range(amount):
            self.optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.model(self.x), self.y)
            loss.backward()
            self.optimizer.step()
        return loss

    def steps(self, amount):
        return self.queue(amount).item()


def counted(proxied, work, delay):
    """Return result, round trips by both counts, frames up, seconds."""
    machine, proxy = proxied
    machine.synchronize()
    machine.reset_stats()
    proxy.frames.clear()
    proxy.delay = delay
    begin = time.monotonic()
    result = work()
    seconds = time.monotonic() - begin
    proxy.delay = 0
    asked = proxy.frames[UP, wire.ASK] + proxy.frames[UP, wire.CONTROL]
    assert asked == proxy.frames[DOWN, wire.REPLY] == machine.stats().round_trips
    return result, asked, proxy.frames[UP, wire.OPS], seconds


@pytest.mark.critical
def test_training_waits_for_the_loss_only(proxied):
    machine, _ = proxied
    expected = Training("cpu").steps(STEPS)
    found = []
    for delay in (0, 0.02) * 3:
        training = Training(machine.device())
        result, trips, frames, seconds = counted(
            proxied, lambda training=training: training.steps(STEPS), delay
        )
        assert result == expected
        assert trips <= 2
        found.append(machine.stats().ops / frames)
        print(f"delay {delay}: {trips} round trips, {frames} frames, {seconds:.3f} s")
    assert max(found) >= OPS_PER_FRAME, found


def test_what_waits_for_the_worker_goes_in_full_frames():
    """This depends on nothing: the worker starts when all is queued."""
    expected, gate = Training("cpu").steps(STEPS), threading.Event()
    with Proxy() as proxy:
        machine = RemoteMachine("local", start=False)
        proxy.between(machine)
        connect = machine._backend.connect
        machine._backend.connect = lambda left: gate.wait(60) and connect(left)
        with machine:
            loss = Training(machine.device()).queue(STEPS)
            gate.set()
            assert loss.item() == expected
            count = machine.stats().ops
    assert count > 40 * STEPS
    assert count / proxy.frames[UP, wire.OPS] >= 20 * OPS_PER_FRAME


def test_delay_is_there(proxied):
    machine, _ = proxied
    x = torch.ones(3, device=machine.device())
    _, trips, _, seconds = counted(
        proxied, lambda: [x.sum().item() for _ in range(5)], 0.02
    )
    assert trips == 5
    assert seconds >= 5 * 0.02


def test_uploads_and_views_wait_for_nothing(proxied):
    machine, _ = proxied
    device = machine.device()

    def work():
        x = torch.randn(300, 300).to(device)
        y = torch.cat([x, x.t()])[::2].reshape(-1)[:100].clone()
        x.resize_(10, 10).fill_(2)
        return y.add_(x.sum()).device

    _, trips, _, _ = counted(proxied, work, 0.02)
    assert trips == 0


def test_several_values_are_one_round_trip(proxied):
    """Futures wait together: all that is asked for is on its way."""
    import mycelya_torch

    machine, _ = proxied
    x = torch.arange(20.0, device=machine.device())

    def work():
        futures = [mycelya_torch.to_cpu_async(one * 2) for one in x.split(1)]
        return [future.result(30).item() for future in futures]

    values, trips, _, seconds = counted(proxied, work, 0.02)
    assert values == [2.0 * i for i in range(20)]
    assert trips == 20  # questions, each with its answer
    assert seconds < 0.02 * 20 / 2, "they waited for one another"
