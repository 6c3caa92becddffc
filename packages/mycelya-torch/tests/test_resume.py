# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Connections that are cut: nothing is lost, nothing is done twice."""

import random
import sys
import time
from pathlib import Path

import pytest
import torch

from mycelya_torch import MachineDiedError, RemoteMachine

sys.path.insert(0, str(Path(__file__).parent))
import wire_codec as wire
from proxy import DOWN, UP, Proxy

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def server(serve):
    return serve("--device", "cpu")


@pytest.fixture(scope="module")
def cut(server, token):
    """A machine behind a proxy, and the proxy."""
    with Proxy(server.address) as proxy:
        machine = RemoteMachine("tcp", address=proxy.address, token=token, timeout=15)
        with machine:
            device = machine.device()
            assert torch.ones(3, device=device).sum().item() == 3
            yield machine, device, proxy


def train(device, steps=25):
    """Return losses and weights; with uploads, dropout and reads."""
    torch.manual_seed(11)
    with torch.device("cpu"):
        model = torch.nn.Sequential(
            torch.nn.Linear(16, 32),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(32, 1),
        )
        batches = torch.randn(steps, 8, 16)
    torch.manual_seed(12)  # the device's numbers begin as the CPU's here
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batches[step].to(device)).square().mean()
        loss.backward()
        optimizer.step()
        if step % 4 == 0:
            losses.append(loss.item())
    return losses, [p.detach().cpu() for p in model.parameters()]


@pytest.fixture(scope="module")
def expected():
    return train("cpu")


def check(found, expected):
    assert found[0] == expected[0]
    assert all(map(torch.equal, found[1], expected[1]))


def spread(proxy, every, amount, seed):
    """Plan cuts at random places of what will be sent; forget former ones."""
    del proxy.links[:-1], proxy.cuts[:]
    places, at = random.Random(seed), proxy.bytes.total()
    for _ in range(amount):
        at += places.randrange(1, 2 * every)
        proxy.cuts.append(at)


@pytest.mark.critical
@pytest.mark.parametrize("seed", range(3))
def test_training_goes_on_after_cuts_anywhere(cut, expected, seed):
    _, device, proxy = cut
    begin = proxy.bytes.total()
    check(train(device), expected)
    whole = proxy.bytes.total() - begin
    spread(proxy, whole // 8, 7, seed)
    check(train(device), expected)
    assert len(proxy.links) >= 4
    assert len(proxy.cuts) <= 4


def test_nothing_is_done_twice(cut):
    machine, device, proxy = cut
    counter = torch.zeros((), dtype=torch.int64, device=device)
    draws = torch.mycelya.get_rng_state(device)
    spread(proxy, 4000, 6, 5)
    for step in range(3000):
        counter += 1
        if step % 500 == 499:
            assert counter.item() == step + 1
    assert counter.item() == 3000
    assert len(proxy.links) >= 4
    assert torch.equal(torch.mycelya.get_rng_state(device), draws)
    assert machine.stats().relayouts == 0


def test_large_transfers_are_cut(cut):
    _, device, proxy = cut
    data = torch.randn(3 << 20)  # 12 MB
    for every in (1 << 20, 5 << 20):
        spread(proxy, every, 4, every)
        remote = data.to(device)
        assert torch.equal(remote.cpu(), data)
        noncontiguous = remote.view(1024, -1).t()
        assert torch.equal(noncontiguous.cpu(), data.view(1024, -1).t())
    assert len(proxy.links) >= 4


def test_cut_inside_headers_and_between_frames(cut):
    _, device, proxy = cut
    spread(proxy, 1, 0, 0)
    x = torch.arange(4.0, device=device)
    for offset in range(0, 40, 3):
        proxy.cuts.append(proxy.bytes.total() + offset)
        assert (x + offset).sum().item() == 6 + 4 * offset
    assert not proxy.cuts
    assert len(proxy.links) > 10


def test_a_failure_survives_a_cut(cut):
    _, device, proxy = cut
    x = torch.arange(4.0, device=device)
    spread(proxy, 1, 0, 0)
    proxy.cuts.append(proxy.bytes.total() + 300)
    y = x[torch.tensor([9], device=device)]
    with pytest.raises(IndexError, match="out of bounds"):
        y.sum().item()
    assert x.sum().item() == 6


def test_control_is_answered_once_after_a_cut(cut):
    machine, device, proxy = cut
    spread(proxy, 1, 0, 0)
    for offset in (5, 20, 30, 60):
        proxy.cuts.append(proxy.bytes.total() + offset)
        assert torch.mycelya.get_device_properties(device).type == "cpu"
        assert torch.mycelya.memory_allocated(device) >= 0
    assert machine.is_running


def test_proxy_sees_acknowledgements(cut):
    """Without them both sides would keep everything."""
    _, device, proxy = cut
    x = torch.ones(3, device=device)
    for _ in range(200):
        x.sum().item()
    assert proxy.frames[UP, wire.ACK] >= 2
    assert proxy.frames[DOWN, wire.WORKER_ACK] >= 2


def test_longer_than_the_timeout_is_the_end(server, token):
    with Proxy(server.address) as proxy:
        machine = RemoteMachine("tcp", address=proxy.address, token=token, timeout=1)
        x = torch.ones(3, device=machine.device())
        assert x.sum().item() == 3
        proxy.refuses = True
        proxy.links[0].cut()
        begin = time.monotonic()
        with pytest.raises(MachineDiedError, match="not restored within 1 s"):
            x.sum().item()
        assert 0.5 < time.monotonic() - begin < 8
        with pytest.raises(MachineDiedError):
            x + 1
        machine.stop()


def test_stop_while_the_connection_is_lost(server, token):
    with Proxy(server.address) as proxy:
        machine = RemoteMachine("tcp", address=proxy.address, token=token)
        x = torch.ones(3, device=machine.device())
        assert x.sum().item() == 3
        proxy.refuses = True
        proxy.links[0].cut()
        begin = time.monotonic()
        machine.stop()
        assert time.monotonic() - begin < 15
        with pytest.raises(RuntimeError, match="is stopped"):
            x + 1
