# SPDX-License-Identifier: Apache-2.0
"""What `kernel_pytorch.py` measures in processes of their own: memory, and a ring.

A file that can be imported by its name: new processes import what they run.
"""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.attention import (
    MaskSpec,
    RingAttentionLayer,
    attention,
    ring_attention,
    ring_stats,
    shard_sequence,
)

HEADS, DIM = 8, 64
LAYER_TOKENS, LAYER_WIDTH, RING_TOKENS = 65536, 512, 8192
Job = Callable[[], object]


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [1, HEADS, tokens, DIM]."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, DIM) for _ in range(3))
    return q, k, v


def ring_rank(rank: int, world: int, folder: str) -> None:
    """Run one rank, and write its pairs, bytes sent and memory."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    group = dist.group.WORLD
    leaves = [shard_sequence(t, 2, group) for t in inputs(RING_TOKENS)]
    leaves = [t.requires_grad_() for t in leaves]
    small = [t[:, :, :64].detach() for t in leaves]
    ring_attention(*small, group=group)
    kept: list[Tensor] = []
    mask = MaskSpec(causal=True)
    memory = high_water(lambda: kept.append(ring_attention(*leaves, mask, group=group)))
    pairs, sent = ring_stats().pairs, ring_stats().bytes_sent
    kept[0].backward(torch.ones_like(kept[0]))
    pairs += 2 * ring_stats().pairs
    sent += ring_stats().bytes_sent
    Path(folder, str(rank)).write_text(f"{pairs} {sent} {memory}")
    dist.barrier()
    dist.destroy_process_group()


def in_process(name: str) -> int:
    """Run one of `_MEMORY` in a fresh process; bytes above what it held before."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bytes")
        mp.spawn(_measured, (name, str(path)), nprocs=1)
        return int(path.read_text())


def _measured(_: int, name: str, path: str) -> None:
    Path(path).write_text(str(high_water(_MEMORY[name]())))


def high_water(work: Job) -> int:
    """Bytes by which this process's memory grows at most while ``work`` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the mark
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def sdpa_layer(layer: RingAttentionLayer, x: Tensor) -> Tensor:
    """The same layer as most models write it."""
    q, k, v = layer.project(x)
    return layer.merge(scaled_dot_product_attention(q, k, v))


def _layer_job(ours: bool) -> Job:
    options = {"window": 256} if ours else {}
    layer = RingAttentionLayer(LAYER_WIDTH, HEADS, device="cpu", **options)
    run = layer if ours else functools.partial(sdpa_layer, layer)
    with torch.no_grad():
        run(torch.randn(1, 600, LAYER_WIDTH))
    x = torch.randn(1, LAYER_TOKENS, LAYER_WIDTH)

    def work() -> None:
        with torch.no_grad():
            run(x)

    return work


def _window_job() -> Job:
    small = torch.randn(1, 1, 4096, DIM)
    mask = MaskSpec(causal=True, window=1024)
    attention(small, small, small, mask)
    q, k, v = (torch.randn(1, 1, 1_000_000, DIM) for _ in range(3))
    return lambda: attention(q, k, v, mask)


def _alone_job() -> Job:
    torch.set_num_threads(1)
    q, k, v = (t.requires_grad_() for t in inputs(RING_TOKENS))
    attention(q[:, :, :64], k[:, :, :64], v[:, :, :64])
    return functools.partial(attention, q, k, v, MaskSpec(causal=True))


_MEMORY: dict[str, Callable[[], Job]] = {
    "layer": lambda: _layer_job(True),
    "sdpa_layer": lambda: _layer_job(False),
    "window": _window_job,
    "alone": _alone_job,
}
