# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Compare a remote machine with this computer's CPU, in turns.

    python compare.py
    python compare.py --provider modal --gpu T4 --size 2048

A ratio below 1: the machine is faster. "queue" only queues the operation, "run" waits
for the result. Every row uses one thread on both sides.
"""

import argparse
import copy
from collections.abc import Callable, Iterator

import torch
from torch import nn

import mycelya_torch
from torchworks_core.bench import compare

Job = Callable[[], object]


def pairs(device: torch.device, size: int) -> Iterator[tuple[str, int, Job, Job]]:
    """Yield a name, how often a timing calls it, and the two sides."""
    x = torch.randn(8, 8)
    y = x.to(device)
    yield "queue: add, 8 x 8", 500, lambda: y + y, lambda: x + x
    yield "queue: view", 500, lambda: y[1:3], lambda: x[1:3]
    yield "run: sum().item()", 20, lambda: y.sum().item(), lambda: x.sum().item()
    a = torch.randn(size, size)
    b = a.to(device)
    name = f"run: {size} x {size} product, read one value"
    yield name, 1, lambda: (b @ b)[0, 0].item(), lambda: (a @ a)[0, 0].item()
    local = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    remote = copy.deepcopy(local).to(device)
    name = "run: 20 training steps, read the loss"
    yield name, 1, training(remote, device), training(local, torch.device("cpu"))


def training(model: nn.Module, device: torch.device) -> Job:
    optimizer = torch.optim.Adam(model.parameters())
    images, labels = torch.randn(128, 784), torch.randint(0, 10, (128,))

    def run() -> float:
        for _ in range(20):
            optimizer.zero_grad()
            output = model(images.to(device))
            loss = nn.functional.cross_entropy(output, labels.to(device))
            loss.backward()
            optimizer.step()
        return loss.item()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="compare a remote machine and the CPU")
    parser.add_argument("--provider", default="local")
    parser.add_argument("--gpu", help="for modal, for example T4")
    parser.add_argument("--address", help="for tcp: host:port of the server")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)

    with mycelya_torch.RemoteMachine(
        options.provider, options.gpu, address=options.address
    ) as machine:
        device = machine.device()
        print(f"{'':<44}{'machine':>12}{'CPU':>12}{'ratio':>9}  interval")
        for name, calls, ours, cpu in pairs(device, options.size):
            found = compare(ours, cpu, repeats=options.repeats, calls=calls)
            machine.synchronize()
            times = f"{found.a_median * 1e6:>9.1f} us{found.b_median * 1e6:>9.1f} us"
            print(f"{name:<44}{times}{found.ratio:>9.2f}  ", end="")
            print(f"{found.low:.2f} to {found.high:.2f}")


if __name__ == "__main__":
    main()
