# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Train a small classifier on a remote machine: ordinary PyTorch, one new device.

    python train.py
    python train.py --provider modal --gpu T4
    MYCELYA_TOKEN=... python train.py --provider tcp --address 127.0.0.1:8000

The data are made up, in the shape of MNIST: ten patterns of 28 x 28 points with noise.
The loss is read ten times; everything between two readings is only queued.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mycelya_torch

SIZE, CLASSES, BATCH = 28 * 28, 10, 64


def make_data(patterns: torch.Tensor, count: int) -> TensorDataset:
    labels = torch.randint(0, CLASSES, (count,))
    return TensorDataset(patterns[labels] + 4 * torch.randn(count, SIZE), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description="train on a remote machine")
    parser.add_argument("--provider", default="local")
    parser.add_argument("--gpu", help="for modal, for example T4")
    parser.add_argument("--address", help="for tcp: host:port of the server")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)
    patterns = torch.randn(CLASSES, SIZE)
    data = make_data(patterns, options.steps * BATCH)
    batches = DataLoader(data, batch_size=BATCH)
    test_images, test_labels = make_data(patterns, 1000).tensors

    with mycelya_torch.RemoteMachine(
        options.provider, options.gpu, address=options.address
    ) as machine:
        device = machine.device()
        model = nn.Sequential(
            nn.Linear(SIZE, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, CLASSES)
        ).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step, (images, labels) in enumerate(batches, 1):
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            if step % max(options.steps // 10, 1) == 0:
                print(f"step {step:>5}  loss {loss.item():.4f}")
        model.eval()
        with torch.no_grad():
            found = model(test_images.to(device)).argmax(1).cpu()
        accuracy = (found == test_labels).float().mean().item()
        print(f"accuracy on new data: {accuracy:.1%}")
        print(machine.stats())


if __name__ == "__main__":
    main()
