# SPDX-License-Identifier: Apache-2.0
"""Runs a byte-level transformer over a document of 128k tokens, on one CPU.

``python long_document.py [--tokens 131072] [--layers 2] [--window 1024]`` prints time
and memory of the forward pass, how far the start of it lies from ordinary dense
attention, and what one more layer with content-chosen sparse attention computes. The
document is text that comes with Python. The weights are random: what is shown is the
cost, and that the numbers are right.
"""

import argparse
import resource
import time
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.attention import create_ring_attention, create_sparse_attention

WIDTH, HEADS, CHECKED = 256, 4, 2048


class Block(nn.Module):
    """Attention and a feed-forward part, both behind a norm."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        wide = 2 * WIDTH
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, wide), nn.GELU(), nn.Linear(wide, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] to the same."""
        x = x + self.attention(self.norms[0](x))
        for part in x.split(8192, dim=1):  # so that the wide layer stays small
            part += self.feed(self.norms[1](part))
        return x


def dense(block: Block, x: Tensor, window: int) -> Tensor:
    """The same block by torch's attention and a mask of tokens x tokens."""
    y, layer = block.norms[0](x), block.attention
    q, k, v = layer.project(y)
    i = torch.arange(x.shape[1])
    far = i[:, None] - i
    mask = (far >= 0) & (far < window)
    x = x + layer.merge(scaled_dot_product_attention(q, k, v, mask))
    return x + block.feed(block.norms[1](x))


def document(tokens: int) -> Tensor:
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    text = (text * (tokens // len(text) + 1))[:tokens]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]


def memory() -> float:
    """The most memory this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--window", type=int, default=1024)
    given = parser.parse_args()
    torch.manual_seed(0)
    embed = nn.Embedding(256, WIDTH)
    options = {"causal": True, "window": given.window, "device": "cpu"}
    blocks = [
        Block(create_ring_attention(WIDTH, HEADS, **options))
        for _ in range(given.layers)
    ]
    ids = document(given.tokens)
    before, begin = memory(), time.perf_counter()
    x = embed(ids)
    for block in blocks:
        x = block(x)
    seconds = time.perf_counter() - begin
    extra = memory() - before
    print(f"{given.tokens} tokens, {given.layers} layers: {seconds:.1f} s")
    print(f"memory: {extra:.0f} MiB more, the result is {x.nbytes / 2**20:.0f} MiB")
    print(f"the scores of one head would be {given.tokens**2 * 4 / 2**30:.1f} GiB")
    start = embed(ids[:, :CHECKED])
    for block in blocks:
        start = dense(block, start, given.window)
    error = (start - x[:, :CHECKED]).abs().max()
    print(f"largest difference from dense attention: {error:.1e}")
    sparse = create_sparse_attention(WIDTH, HEADS, sparsity_ratio=0.95, causal=True)
    begin = time.perf_counter()
    sparse(x)
    stats = sparse.get_sparsity_stats()
    print(
        f"sparse layer over all tokens: {time.perf_counter() - begin:.1f} s by "
        f"{stats.kernel}, {100 * stats.density:.1f} % of the blocks"
    )


if __name__ == "__main__":
    main()
