# SPDX-License-Identifier: Apache-2.0
"""What exact blockwise attention costs on this CPU, against torch's own.

Both sides of a row run in turns in this run; a row shows the ratio of the fastest
repeats, above 1 where ours is faster, and in its note the ratio of the medians. Memory
is the high-water mark of a fresh process, less what it held before.
"""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.attention import (
    BlockIndex,
    MaskSpec,
    RingAttentionLayer,
    attention,
    block_sparse_attention,
    build_block_index,
    ring_attention,
    ring_stats,
    shard_sequence,
)
from torchworks_core.bench import compare

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench import kernel_pytorch_quality as quality  # noqa: E402

HEADS, DIM, LONG = 8, 64, 16384
SDPA, FLEX = "torch SDPA", "compiled FlexAttention"
LAYER_TOKENS, LAYER_WIDTH, RING_TOKENS = 65536, 512, 8192
Job = Callable[[], object]


def rows() -> Iterable[dict]:
    """Yield all rows; about fifteen minutes."""
    yield from sparse_forward()
    yield sparse_training()
    yield flex()
    yield from selection()
    yield from dense()
    yield from layer()
    yield million()
    yield from ring()
    yield importing()


def sparse_forward() -> Iterable[dict]:
    """Block-sparse forward against dense, without and with the choice of blocks."""
    q, k, v = inputs()
    for ratio, block, goal in ((0.9, 64, 9.5), (0.9, 128, 9.5), (0.95, 64, 17)):
        index = spread(ratio, block)
        kept = f"{100 * index.density:.1f} % of the blocks kept"
        yield against(
            f"forward, {100 * ratio:.0f} % sparse, N=16k, blocks of {block}",
            functools.partial(block_sparse_attention, q, k, v, index),
            functools.partial(scaled_dot_product_attention, q, k, v),
            goal=f">= {goal}",
            extra=kept,
        )

    def chosen(mask: MaskSpec | None = None) -> object:
        index = build_block_index(q, k, "dynamic_threshold", mask=mask)
        return block_sparse_attention(q, k, v, index, mask)

    yield against(
        "the same, 90 %, with DYNAMIC_THRESHOLD choosing the blocks",
        chosen,
        functools.partial(scaled_dot_product_attention, q, k, v),
        goal=">= 6",
    )
    yield against(
        "the same, causal",
        lambda: chosen(MaskSpec(causal=True)),
        functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True),
        extra="against causal SDPA",
    )


def sparse_training() -> dict:
    """Forward and backward, 90 % sparse."""
    leaves = [t.requires_grad_() for t in inputs()]
    index, d_out = spread(0.9, 64), torch.randn(1, HEADS, LONG, DIM)

    def both(function: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(function(*leaves), leaves, d_out)

    return against(
        "forward and backward, 90 % sparse, N=16k, blocks of 64",
        lambda: both(lambda q, k, v: block_sparse_attention(q, k, v, index)),
        lambda: both(scaled_dot_product_attention),
        goal=">= 7",
        repeats=5,
    )


def flex() -> dict:
    """The same blocks in compiled FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = inputs()
    index = spread(0.9, 128)
    lists, compiled = index.to_flex(), torch.compile(flex_attention, dynamic=False)
    begin = time.perf_counter()
    theirs = compiled(q, k, v, block_mask=lists)
    seconds = time.perf_counter() - begin
    ours = block_sparse_attention(q, k, v, index)
    difference = (ours - theirs).abs().max().item()
    return against(
        "forward, 90 % sparse, N=16k, blocks of 128",
        functools.partial(block_sparse_attention, q, k, v, index),
        lambda: compiled(q, k, v, block_mask=lists),
        peer=FLEX,
        goal=">= 1.5",
        extra=f"largest difference {difference:.0e}; its compilation took "
        f"{seconds:.0f} s, ours none",
    )


def selection() -> Iterable[dict]:
    """How well blocks are chosen by content, and what that costs."""
    for causal in (False, True):
        found = quality.selection_cost(LONG, causal=causal)
        yield {
            "measure": f"choosing the blocks, {'causal' if causal else 'full'}, N=16k",
            "value": 100 * found["share"],
            "unit": "% of dense attention's time",
            "goal": "<= 6.7",
        }
    layers = quality.encoder_layers()
    errors = quality.remainder_errors(layers)
    for share, goal in (("10 %", 0.30), ("25 %", 0.17)):
        dropped = errors[f"{share}, dropped"]
        yield {
            "measure": f"error on MiniLM, N=512, {share} of blocks of 16 kept",
            "value": errors[share],
            "unit": "relative, with the remainder",
            "goal": f"<= {goal:.2f}",
            "note": f"without the remainder {dropped:.2f}; mean of 6 layers",
        }
    for share in (0.9, 0.95):
        found = quality.coverage(layers, share)
        kept, said = 100 * found["density"], found["said"]
        yield {
            "measure": f"mass that coverage={share} holds, MiniLM",
            "value": found["held"],
            "unit": "of the softmax",
            "goal": f">= {share}",
            "note": f"{kept:.0f} % of the blocks; said {said:.3f}",
        }
    found = quality.needles()
    for who, count in found.items():
        yield {
            "measure": f"a far key that one {who} wants, N=16k, 90 % sparse",
            "value": count / 2,
            "unit": "% of 200 trials found",
            "goal": ">= 99",
        }


def dense() -> Iterable[dict]:
    """Dense attention through our plan."""
    for tokens in (1024, 4096, LONG):
        q, k, v = inputs(tokens)
        for causal in (False, True):
            mask = MaskSpec(causal=causal)
            how = "causal" if causal else "full"
            yield against(
                f"dense `attention`, {how}, N={tokens}",
                functools.partial(attention, q, k, v, mask),
                functools.partial(
                    scaled_dot_product_attention, q, k, v, is_causal=causal
                ),
                goal=">= 0.95",
                calls=16 if tokens == 1024 else 1,
            )


def layer() -> Iterable[dict]:
    """A whole layer at 64k tokens: memory, and time at 8k."""
    size = LAYER_TOKENS * LAYER_WIDTH * 4
    found = {name: in_process(name) / size for name in ("layer", "sdpa_layer")}
    yield {
        "measure": f"extra memory of a layer, N=64k, width {LAYER_WIDTH}, window 256",
        "value": found["layer"],
        "unit": "x its input",
        "goal": "<= 3.2",
        "peer": "SDPA between four nn.Linear",
        "note": f"the peer, without a window: {found['sdpa_layer']:.2f}",
    }
    ours = RingAttentionLayer(LAYER_WIDTH, HEADS, device="cpu")
    x = torch.randn(1, 8192, LAYER_WIDTH)
    with torch.no_grad():
        yield against(
            "a layer, N=8k",
            lambda: ours(x),
            lambda: sdpa_layer(ours, x),
            peer="SDPA between four nn.Linear",
            goal=">= 0.95",
        )


def million() -> dict:
    """A million tokens with a window, in a process of their own."""
    begin = time.perf_counter()
    extra = in_process("window")
    seconds = time.perf_counter() - begin
    return {
        "measure": "one million tokens, window 1,024, D=64, forward",
        "value": seconds,
        "unit": "s, start of the process included",
        "goal": "<= 60",
        "note": f"extra memory {extra / (1_000_000 * DIM * 4):.2f} N D 4 bytes "
        "(goal <= 5)",
    }


def ring() -> Iterable[dict]:
    """Two and four ranks on one machine: work and memory of each."""
    whole = in_process("alone") + 3 * RING_TOKENS * HEADS * DIM * 4
    for world in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(ring_rank, (world, folder), nprocs=world)
            found = [
                [float(part) for part in Path(folder, str(r)).read_text().split()]
                for r in range(world)
            ]
        pairs, sent, memory = (max(column) for column in zip(*found, strict=True))
        ideal = 3 * RING_TOKENS**2 / 2 / world
        yield {
            "measure": f"causal ring of {world} ranks: work of the busiest",
            "value": pairs / ideal,
            "unit": "x an equal share",
            "goal": "<= 1.01",
            "note": f"forward and backward, N={RING_TOKENS}; "
            f"{sent / 2**20:.1f} MiB sent",
        }
        memory += 3 * RING_TOKENS * HEADS * DIM * 4 // world
        yield {
            "measure": f"causal ring of {world} ranks: forward's memory of one",
            "value": memory / whole,
            "unit": "x one device's, q, k and v included",
            "goal": f"<= {1 / world + 0.1:.2f}",
            "note": f"keys and values that arrive while others are used make "
            f"{(1.5 if world == 2 else 2) / world:.2f} the least",
        }


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


def importing() -> dict:
    """What ``import kernel_pytorch`` adds to ``import torch``."""
    code = (
        "import time, torch; b = time.perf_counter(); "
        "import kernel_pytorch.attention; print(time.perf_counter() - b)"
    )
    found = [
        float(subprocess.run([sys.executable, "-c", code], **_QUIET).stdout)
        for _ in range(7)
    ]
    return {
        "measure": "import kernel_pytorch.attention, after torch",
        "value": 1000 * min(found),
        "unit": "ms",
        "goal": "<= 150",
        "note": f"median {1000 * statistics.median(found):.0f}",
    }


_QUIET = {"check": True, "capture_output": True, "text": True}


def inputs(tokens: int = LONG) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [1, HEADS, tokens, DIM]."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, DIM) for _ in range(3))
    return q, k, v


def spread(ratio: float, block: int) -> BlockIndex:
    """Keep a random choice of blocks, as many in each row."""
    q = torch.empty(1, HEADS, LONG, 1)
    rng = torch.Generator().manual_seed(0)
    return build_block_index(
        q, q, "random", sparsity_ratio=ratio, block_size=block, generator=rng
    )


def against(
    measure: str,
    ours: Job,
    theirs: Job,
    *,
    peer: str = SDPA,
    goal: str = "",
    extra: str = "",
    repeats: int = 7,
    calls: int = 1,
) -> dict:
    """Time two jobs in turns; one row."""
    found = compare(ours, theirs, repeats=repeats, warmup=1, calls=calls)
    medians = found.b_median / found.a_median
    note = f"median {medians:.2f}; ours {1000 * min(found.a.times):.0f} ms"
    return {
        "measure": measure,
        "value": min(found.b.times) / min(found.a.times),
        "unit": "x as fast",
        "peer": peer,
        "goal": goal,
        "note": f"{note}; {extra}" if extra else note,
    }


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
