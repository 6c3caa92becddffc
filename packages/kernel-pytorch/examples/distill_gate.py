# SPDX-License-Identifier: Apache-2.0
"""Distil the gates of a small language model, and see what that is worth.

A byte-level model is trained with dense attention on Python's own source files, then
its gates. It prints, on files it was not trained on, the cross entropy with dense and
with sparse attention, and how much of the attention mass the chosen blocks hold,
against as many blocks chosen by the true mass.

    python examples/distill_gate.py --tokens 2048 --block 16
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

from kernel_pytorch.attention import (
    DynamicSparseAttention,
    MaskSpec,
    attention,
    distill_gate,
)
from kernel_pytorch.attention.gate import true_block_mass


class Block(nn.Module):
    """A transformer block that can attend densely, too."""

    def __init__(self, width, heads, **options):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = DynamicSparseAttention(
            width, heads, pattern="learned", causal=True, **options
        )
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dense = True

    def forward(self, x):
        """Map [B, N, width] to the same."""
        h = self.first(x)
        if self.dense:
            parts = self.attention.project(h)
            h = self.attention.merge(attention(*parts, MaskSpec(causal=True)))
        else:
            h = self.attention(h)
        x = x + h
        return x + self.mlp(self.second(x))


class Model(nn.Module):
    """Logits of the next byte, from the last three and from what attention finds."""

    def __init__(self, width, layers, heads, **options):
        super().__init__()
        self.embed = nn.ModuleList(nn.Embedding(256, width) for _ in range(3))
        blocks = [Block(width, heads, **options) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens):
        """Map [B, N] to [B, N, 256]."""
        x = 0.0
        for back, embed in enumerate(self.embed):
            x = x + embed(pad(tokens, (back, 0))[:, : tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))

    def sparse(self, wanted):
        """Choose sparse or dense attention."""
        for block in self.blocks:
            block.dense = not wanted


def loss_of(model, tokens):
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def corpus():
    """Bytes of the standard library, and of files held out."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    held = [file for n, file in enumerate(files) if n % 8 == 0]
    rest = [file for n, file in enumerate(files) if n % 8]
    return [
        torch.frombuffer(
            bytearray(b"".join(file.read_bytes() for file in part)), dtype=torch.uint8
        )
        for part in (rest, held)
    ]


def sample(text, batch, length, rng):
    starts = torch.randint(len(text) - length - 1, (batch,), generator=rng)
    return torch.stack([text[s : s + length + 1].long() for s in starts.tolist()])


def train(model, text, given, rng):
    """Train on short samples, and for the last fifth of the steps on long ones."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, given.steps)
    started, short = time.monotonic(), min(512, given.tokens)
    for step in range(given.steps):
        length = short if step < 0.8 * given.steps else given.tokens
        batch = given.batch * given.tokens // length
        loss = loss_of(model, sample(text, batch, length, rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, given.steps // 10) == 0:
            seconds = time.monotonic() - started
            print(f"step {step} loss {float(loss):.3f} {seconds:.0f} s", flush=True)


@torch.no_grad()
def evaluate(model, batches):
    return sum(float(loss_of(model, tokens)) for tokens in batches) / len(batches)


@torch.no_grad()
def inputs_of(model, batches):
    """What each attention layer is given, with dense attention everywhere."""
    found = [[] for _ in model.blocks]
    hooks = [
        block.first.register_forward_hook(lambda m, i, out, f=f: f.append(out))
        for block, f in zip(model.blocks, found, strict=True)
    ]
    model.sparse(False)
    for tokens in batches:
        model(tokens[:, :-1])
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def recall(layer, inputs):
    """Share of the mass in the chosen blocks, in as many of the best, and in those.

    The last with the diagonal block among them, which a causal row always keeps.
    """
    totals = torch.zeros(4, dtype=torch.float64)
    for x in inputs:
        q, k, _ = layer.project(x)
        mass = true_block_mass(q, k, MaskSpec(causal=True), layer.block_size)
        kept = layer.block_index(x).block_mask()
        own = torch.eye(mass.shape[-1], dtype=torch.bool)
        found = [mass[kept].sum()]
        for first in (mass, mass.masked_fill(own, 2.0)):
            order = first.argsort(-1, descending=True)
            within = torch.arange(mass.shape[-1]) < kept.sum(-1, keepdim=True)
            found.append(mass.gather(-1, order)[within].sum())
        totals += torch.stack([*found, mass.sum()]).double()
    return (totals[:3] / totals[3]).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (
        *(("tokens", 2048), ("block", 16), ("width", 128), ("layers", 2)),
        *(("heads", 4), ("batch", 2), ("steps", 600), ("gate-steps", 400)),
        *(("threads", 0),),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ratio", type=float, default=0.9)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--keep", type=Path, help="file of the trained model")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    options = {"sparsity_ratio": given.ratio, "block_size": given.block}
    model = Model(given.width, given.layers, given.heads, **options)
    text, held = corpus()
    if given.keep and given.keep.exists():
        model.load_state_dict(torch.load(given.keep, weights_only=True), strict=False)
    else:
        train(model, text, given, rng)
        if given.keep:
            state = {k: v for k, v in model.state_dict().items() if ".gate." not in k}
            torch.save(state, given.keep)
    rng.manual_seed(1)
    taught = [sample(text, given.batch, given.tokens, rng) for _ in range(8)]
    tests = [sample(held, given.batch, given.tokens, rng) for _ in range(4)]
    dense = evaluate(model, tests)
    print(f"dense: cross entropy {dense:.4f}")
    lessons, unseen = inputs_of(model, taught), inputs_of(model, tests)
    for when in ("untrained", "distilled"):
        if when == "distilled":
            for block, batches in zip(model.blocks, lessons, strict=True):
                losses = distill_gate(
                    block.attention, batches, steps=given.gate_steps, lr=given.lr
                )
                print(f"KL {losses[0]:.4f} to {sum(losses[-8:]) / 8:.4f}")
        model.sparse(True)
        found = evaluate(model, tests)
        print(f"{when}: cross entropy {found:.4f}, {100 * (found / dense - 1):+.2f} %")
        for n, (block, batches) in enumerate(zip(model.blocks, unseen, strict=True)):
            got, best, fair = recall(block.attention, batches)
            told = f"layer {n}: {got:.4f} of the mass, {got / best:.4f} of what as many"
            told += f" of the best hold, {got / fair:.4f} with the diagonal among them"
            print(told)


if __name__ == "__main__":
    main()
