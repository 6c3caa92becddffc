# SPDX-License-Identifier: Apache-2.0
"""kernel-pytorch on one CUDA GPU: speed against peers, as one line of JSON.

``PYTHONPATH=packages/kernel-pytorch/src:packages/torchworks-core/src python
tools/gpu/kernel_pytorch.py [--quick]``. Times are CUDA events, the contestants take
turns, and each one's minimum counts; a ratio above 1 means that we win.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

# This file has the package's import name: without this line it would be imported in
# the package's place.
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import (  # noqa: E402
    scaled_dot_product_attention as sdpa,
)

from kernel_pytorch.attention import (  # noqa: E402
    BlockIndex,
    MaskSpec,
    attention,
    block_sparse_attention,
)
from kernel_pytorch.attention.block_sparse import kernel_for  # noqa: E402
from torchworks_core.bench import compare, machine  # noqa: E402

Run = Callable[[], object]


def main() -> None:
    """Measure all, print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short inputs, no Flex")
    quick = parser.parse_args().quick
    torch.set_default_device("cuda")
    torch.manual_seed(0)
    length = 4096 if quick else 32_768
    found: dict[str, object] = {"hardware": machine()}
    for dim in (64, 128):
        for block in (64, 128):
            name = f"sparse N={length} H=8 D={dim} block={block} bf16 90 %"
            found[name] = sparse(length, dim, block, flex=not quick)
    found["exact causal"] = long(2**16 if quick else 2**20)
    print(json.dumps(found))


def sparse(length: int, dim: int, block: int, *, flex: bool) -> dict[str, object]:
    """Forward and backward with one block of ten kept, chosen at random."""
    blocks = length // block
    noise = torch.rand(1, 8, blocks, blocks)
    most = noise.topk(round(blocks * 0.1), -1).indices
    kept = torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, most, True)
    index = BlockIndex.from_block_mask(kept, block, length, length)
    q, k, v = inputs(length, dim)
    peers = dense(q, k, v)
    if flex:
        from torch.nn.attention.flex_attention import flex_attention

        compiled, mask = torch.compile(flex_attention), index.to_flex()
        peers["flex"] = lambda: compiled(q, k, v, block_mask=mask)

    def ours() -> object:
        return block_sparse_attention(q, k, v, index)

    found: dict[str, object] = {"kernel": kernel_for(q, index)}
    found["density"] = round(index.density, 4)
    found["forward"] = against(quiet(ours), {n: quiet(p) for n, p in peers.items()})
    slope = torch.randn_like(q)
    found["backward"] = against(
        gradient(ours, (q, k, v), slope),
        {n: gradient(p, (q, k, v), slope) for n, p in peers.items()},
    )
    return found


def long(length: int) -> dict[str, object]:
    """Exact causal attention of 8 heads of 64 through our plan, and its memory."""
    q, k, v = inputs(length, 64)
    mask, slope = MaskSpec(causal=True), torch.randn_like(q)
    peers = dense(q, k, v, causal=True)

    def ours() -> Tensor:
        return attention(q, k, v, mask)

    found: dict[str, object] = {"tokens": length}
    quiet_peers = {name: quiet(peer) for name, peer in peers.items()}
    found["forward"] = against(quiet(ours), quiet_peers, repeats=5)

    def train(run: Run) -> Run:
        return lambda: torch.autograd.grad(run(), (q, k, v), slope)

    peer = {"sdpa": train(peers["sdpa"])}
    found["forward and backward"] = against(train(ours), peer, repeats=5)
    found["memory beside inputs / bytes of q"] = {
        "ours": extra_memory(quiet(ours), q),
        "sdpa": extra_memory(quiet(peers["sdpa"]), q),
    }
    return found


def inputs(length: int, dim: int) -> list[Tensor]:
    """Make q, k and v of 8 heads."""
    options = {"dtype": torch.bfloat16, "requires_grad": True}
    return [torch.randn(1, 8, length, dim, **options) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> dict[str, Run]:
    """Torch's dense attention: its own choice, and two backends by name."""

    def by(backend: SDPBackend) -> Run:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v, is_causal=causal)

        return run

    return {
        "sdpa": lambda: sdpa(q, k, v, is_causal=causal),
        "sdpa flash": by(SDPBackend.FLASH_ATTENTION),
        "sdpa cudnn": by(SDPBackend.CUDNN_ATTENTION),
    }


def quiet(run: Run) -> Run:
    """Run it as in inference."""

    def without_grad() -> object:
        with torch.no_grad():
            return run()

    return without_grad


def gradient(run: Run, tensors: tuple[Tensor, ...], slope: Tensor) -> Run:
    """Run the backward pass alone, again and again; the forward pass once."""
    kept: list[Tensor] = []

    def backward() -> object:
        if not kept:
            kept.append(run())
        return torch.autograd.grad(kept[0], tensors, slope, retain_graph=True)

    return backward


def against(ours: Run, peers: dict[str, Run], repeats: int = 9) -> dict[str, object]:
    """Least milliseconds of both in turns, and peer / ours, for each peer."""
    found: dict[str, object] = {}
    for name, peer in peers.items():
        try:
            pair = compare(ours, peer, repeats=repeats, device="cuda")
        except RuntimeError as error:
            # A backend that this GPU or shape lacks: said, not left out.
            found[name] = str(error).splitlines()[0][:200]
            continue
        mine, theirs = 1000 * min(pair.a.times), 1000 * min(pair.b.times)
        times = {"ours ms": round(mine, 4), "theirs ms": round(theirs, 4)}
        found[name] = times | {"ratio": round(theirs / mine, 3)}
    return found


def extra_memory(run: Run, q: Tensor) -> float:
    """Greatest memory beyond what was there, in multiples of q."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    most = torch.cuda.max_memory_allocated() - before
    return round(most / (q.numel() * q.element_size()), 3)


if __name__ == "__main__":
    main()
