# SPDX-License-Identifier: Apache-2.0
"""Trains a small attention model with the sequence split over processes.

``python train_ring.py [--steps 20] [--tokens 512] [--processes 2]`` prints the loss,
which is the same for any number of processes. The task: the next
token is the one that stood 16 positions before it.
"""

import argparse
import os
import socket

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kernel_pytorch.attention import MaskSpec, ring_attention, shard_sequence

VOCABULARY, WIDTH, HEADS, DISTANCE = 32, 64, 4, 16


class Model(nn.Module):
    """One attention block over a shard of the sequence."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(tokens + 1, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(
        self, ids: Tensor, positions: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        """Return the logits of the next tokens, ``[batch, shard, VOCABULARY]``."""
        x = self.embed(ids) + self.position(positions)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mask = MaskSpec(causal=True)
        out = ring_attention(q, k, v, mask, group=group, total_length=self.tokens)
        return self.head(x + out.transpose(1, 2).flatten(2))


def run(rank: int, port: int, given: argparse.Namespace) -> None:
    tokens = given.tokens
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=given.processes)
    group = dist.group.WORLD
    torch.manual_seed(0)  # the same model and text on both ranks
    model = Model(tokens)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(given.steps):
        text = torch.randint(VOCABULARY, (4, DISTANCE))
        text = text.repeat(1, tokens // DISTANCE + 2)[:, : tokens + 1]
        # Counted from 1: shards are padded with zeros.
        places = torch.arange(1, tokens + 1).expand(4, -1)
        whole = text[:, :-1], text[:, 1:], places
        ids, following, positions = (shard_sequence(x, 1, group) for x in whole)
        logits = model(ids, positions, group)
        known = positions >= DISTANCE  # before that, nothing has come again
        loss = cross_entropy(logits[known], following[known], reduction="sum")
        total = known.sum().double()
        dist.all_reduce(total)
        (loss / total).backward()
        mean = loss.detach() / total
        dist.all_reduce(mean)
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)  # each rank has its shard's part
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {mean:.4f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run, (port, given), nprocs=given.processes)


if __name__ == "__main__":
    main()
