# SPDX-License-Identifier: Apache-2.0
"""What each of two gloo processes runs; a spawned process needs a module to import."""

import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import loraven
from loraven.nested import NestedLinear

RANKS = 2


def make(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU()
    return nn.Sequential(*layers, nn.Linear(64, 64)).eval()


def data(rank):
    """The calibration data of one rank: its own, and not of equal size."""
    random = torch.Generator().manual_seed(rank)
    mix = torch.logspace(0, -1.5, 64)
    sizes = (220, 130) if rank else (180, 160, 90)
    return [torch.randn(n, 64, generator=random) * mix + rank for n in sizes]


def converted(batches, **options):
    model = make()
    summary = loraven.convert(model, batches, levels=(0.3, 0.6, 1.0), **options)
    return model, summary


def train(rank):
    """Two steps of DDP on the factors of the smallest level, in their training form."""
    model, _ = converted(data(rank))
    teacher = make()
    loraven.set_budget(model, 0.3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = [m for m in model.modules() if isinstance(m, NestedLinear)]
    assert all(m.plans[0].form != "dense" for m in layers)
    names = ("up", "down", "down_bias", "up_bias")
    factors = [getattr(m, name) for m in layers for name in names]
    for layer in layers:
        layer.training_form = True
    for factor in factors:
        factor.requires_grad_(True)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(factors, lr=0.05)
    losses, x = [], torch.cat(data(rank))
    for _ in range(6):
        optimizer.zero_grad()
        loss = (parallel(x) - teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert loraven.set_budget(parallel, 0.6) == 0.6
    return losses, {name: t.clone() for name, t in model.state_dict().items()}


def failing(rank):
    """Only rank 1 fails: neither waits for the other, neither is changed."""

    def batches():
        yield data(rank)[0]
        if rank == 1:
            raise OSError("disk gone")

    model = make()
    try:
        loraven.convert(model, batches())
    except (OSError, RuntimeError) as error:
        changed = any(isinstance(m, NestedLinear) for m in model.modules())
        return type(error).__name__, str(error), changed
    return "nothing", "", True


class Choosing(nn.Module):
    """Which layer runs depends on the process."""

    def __init__(self, rank):
        super().__init__()
        self.rank, self.layers = rank, nn.ModuleList(nn.Linear(64, 64) for _ in "ab")

    def forward(self, x):
        return self.layers[self.rank](x)


def parting(rank):
    try:
        loraven.convert(Choosing(rank), data(rank))
    except RuntimeError as error:
        return str(error)
    return "nothing"


class Crossing(nn.Module):
    """In which order its layers run depends on the process."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in "ab")
        self.order = (0, 1) if rank == 0 else (1, 0)

    def forward(self, x):
        inputs = x, 3 * x + 1
        return sum(self.layers[i](inputs[i]) for i in self.order)


def crossing(rank, batches):
    model = Crossing(rank)
    loraven.convert(model, batches)
    return {name: value.clone() for name, value in model.state_dict().items()}


def worker(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("error")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    model, summary = converted(data(rank))
    report = {
        "state": model.state_dict(),
        "plans": [list(map(tuple, m.plans)) for m in model if hasattr(m, "plans")],
        "tokens": summary.tokens,
        "costs": [found.cost_fraction for found in summary.levels.values()],
        # Without random projections, that are others in a single process.
        "plain": converted(data(rank), sensitivity=False)[0].state_dict(),
        "failing": failing(rank),
        "parting": parting(rank),
        "crossing": crossing(rank, data(rank)),
    }
    report["losses"], report["trained"] = train(rank)
    torch.save(report, Path(folder, f"rank{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()
