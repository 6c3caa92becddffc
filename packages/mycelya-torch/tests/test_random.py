# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Random numbers: the CPU's after the same seed, from the worker's own stream."""

import time
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from torch.nn import functional

from mycelya_torch import RemoteExecutionError

DRAWS = {
    "rand": lambda d: torch.rand(7, 3, device=d),
    "randn": lambda d: torch.randn(50, device=d),
    "randn16": lambda d: torch.randn(33, device=d, dtype=torch.bfloat16),
    "randint": lambda d: torch.randint(3, 1000, (20,), device=d),
    "randperm": lambda d: torch.randperm(100, device=d),
    "rand_like": lambda d: torch.rand_like(torch.zeros(4, 4, device=d)),
    "normal": lambda d: torch.normal(torch.zeros(9, device=d), torch.ones(9, device=d)),
    "uniform_": lambda d: torch.zeros(6, device=d).uniform_(-1, 2),
    "exponential_": lambda d: torch.zeros(6, device=d).exponential_(2),
    "cauchy_": lambda d: torch.zeros(6, device=d).cauchy_(),
    "log_normal_": lambda d: torch.zeros(6, device=d).log_normal_(),
    "geometric_": lambda d: torch.zeros(6, device=d).geometric_(0.3),
    "random_": lambda d: torch.zeros(6, device=d).random_(),
    "bernoulli": lambda d: torch.bernoulli(torch.full((40,), 0.3, device=d)),
    "bernoulli_": lambda d: torch.zeros(40, device=d).bernoulli_(0.6),
    "multinomial": lambda d: torch.multinomial(torch.ones(30, device=d), 5),
    "poisson": lambda d: torch.poisson(torch.full((10,), 3.0, device=d)),
    "dropout": lambda d: functional.dropout(torch.ones(60, device=d), 0.3),
    "dropout2d": lambda d: functional.dropout2d(torch.ones(2, 8, 2, 2, device=d)),
    "alpha_dropout": lambda d: functional.alpha_dropout(torch.ones(60, device=d), 0.1),
    "gumbel": lambda d: functional.gumbel_softmax(torch.zeros(3, 5, device=d)),
    "rrelu": lambda d: functional.rrelu(-torch.ones(9, device=d), training=True),
    "trunc": lambda d: torch.nn.init.trunc_normal_(torch.empty(9, device=d)),
    "kaiming": lambda d: torch.nn.init.kaiming_uniform_(torch.empty(4, 4, device=d)),
    "distribution": lambda d: torch.distributions.Gamma(
        torch.ones(5, device=d), torch.ones(5, device=d)
    ).sample(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_the_cpus(device, name):
    draw = DRAWS[name]
    torch.manual_seed(11)
    want = [draw("cpu"), draw("cpu")]
    torch.manual_seed(11)
    got = [draw(device), draw(device)]
    assert torch.equal(got[0].cpu(), want[0])
    assert torch.equal(got[1].cpu(), want[1])


def test_streams_are_independent(device):
    torch.manual_seed(5)
    want = torch.rand(4), torch.rand(4)
    torch.manual_seed(5)
    first = torch.rand(4, device=device).cpu()
    local = torch.rand(4)
    second = torch.rand(4, device=device).cpu()
    assert torch.equal(first, want[0])
    assert torch.equal(local, want[0])
    assert torch.equal(second, want[1])


def test_state(device):
    torch.manual_seed(3)
    state = torch.mycelya.get_rng_state(device)
    assert state.device.type == "cpu"
    assert torch.equal(state, torch.get_rng_state())
    first = torch.rand(8, device=device).cpu()
    torch.mycelya.set_rng_state(state, device)
    assert torch.equal(torch.rand(8, device=device).cpu(), first)
    torch.set_rng_state(torch.mycelya.get_rng_state(device))
    assert torch.equal(torch.rand(8, device=device).cpu(), torch.rand(8))


def test_state_from_a_cpu_generator(device):
    local = torch.Generator().manual_seed(99)
    torch.rand(5, generator=local)
    torch.mycelya.set_rng_state(local.get_state(), device)
    want = torch.rand(6, generator=local)
    assert torch.equal(torch.rand(6, device=device).cpu(), want)


def test_a_state_of_another_size_is_refused(device):
    with pytest.raises((RuntimeError, TypeError)):
        torch.mycelya.set_rng_state(torch.zeros(3, dtype=torch.uint8), device)
    torch.manual_seed(1)
    want = torch.rand(3)
    assert torch.equal(torch.rand(3, device=device).cpu(), want)


def test_generators(device):
    cpu, remote = torch.Generator(), torch.Generator(device)
    assert remote.device == device
    torch.manual_seed(0)
    before = torch.mycelya.get_rng_state(device)
    for generator in (cpu, remote):
        assert generator.manual_seed(42) is generator
        assert generator.initial_seed() == 42
    for draw in (torch.rand, torch.randn):
        want = draw(9, generator=cpu)
        got = draw(9, generator=remote, device=device)
        assert torch.equal(got.cpu(), want)
    want = torch.randperm(20, generator=cpu)
    assert torch.equal(torch.randperm(20, generator=remote, device=device).cpu(), want)
    want = torch.zeros(5).normal_(generator=cpu)
    got = torch.zeros(5, device=device).normal_(generator=remote)
    assert torch.equal(got.cpu(), want)
    assert torch.equal(torch.mycelya.get_rng_state(device), before)


def test_generator_state(device):
    generator = torch.Generator(device).manual_seed(6)
    torch.rand(3, generator=generator, device=device)
    state = generator.get_state()
    first = torch.rand(3, generator=generator, device=device).cpu()
    other = torch.Generator(device)
    other.set_state(state)
    assert torch.equal(torch.rand(3, generator=other, device=device).cpu(), first)
    clone = torch.Generator().manual_seed(0)
    clone.set_state(generator.get_state())
    want = torch.rand(3, generator=clone)
    assert torch.equal(torch.rand(3, generator=generator, device=device).cpu(), want)


def test_a_generator_of_another_device_is_refused(device):
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=device, generator=torch.Generator())


def test_fork_rng(device):
    torch.manual_seed(8)
    with torch.random.fork_rng(devices=[device.index], device_type="mycelya"):
        inside = torch.rand(5, device=device).cpu()
        torch.manual_seed(1234)
        torch.rand(5, device=device)
    assert torch.equal(torch.rand(5, device=device).cpu(), inside)


def test_seeds(device):
    torch.mycelya.manual_seed(21)
    with torch.mycelya.device(device):
        assert torch.mycelya.initial_seed() == 21
    torch.mycelya.manual_seed_all(22)
    want = torch.rand(3, generator=torch.Generator().manual_seed(22))
    assert torch.equal(torch.rand(3, device=device).cpu(), want)
    torch.mycelya.seed_all()
    assert not torch.equal(torch.rand(3, device=device).cpu(), want)


def test_checkpointing_restores_the_stream(device):
    from torch.utils.checkpoint import checkpoint

    grads = []
    for place in ("cpu", device):
        torch.manual_seed(2)
        x = torch.ones(100, device=place, requires_grad=True)
        y = checkpoint(lambda x: functional.dropout(x, 0.5), x, use_reentrant=False)
        y.sum().backward()
        assert torch.equal(x.grad.cpu(), y.detach().cpu())
        grads.append(x.grad.cpu())
    assert torch.equal(*grads)


def test_a_generator_that_waits_blocks_no_other_thread(device):
    generator = torch.Generator(device)

    def use():
        for seed in range(200):
            generator.manual_seed(seed)
            generator.get_state()

    with ThreadPoolExecutor(4) as pool:
        done, late = wait([pool.submit(use) for _ in range(4)], timeout=60)
    assert not late
    assert [one.exception() for one in done] == [None] * 4


def test_a_freed_generator_loses_no_failure(machine, device):
    generator = torch.Generator(device)
    torch.zeros(4, device=device).index_select(0, torch.tensor([7], device=device))
    time.sleep(0.3)  # the failure is here before the generator goes
    del generator
    with pytest.raises(RemoteExecutionError, match="index_select"):
        machine.synchronize()
    machine.synchronize()
