# SPDX-License-Identifier: Apache-2.0
"""What exact blockwise attention costs on this CPU, against torch's own.

Both sides of a row run in turns in this run; a row shows the ratio of the fastest
repeats, above 1 where ours is faster, and in its note the ratio of the medians. Memory
is the high-water mark of a fresh process, less what it held before.
"""

import functools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
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
)
from torchworks_core.bench import compare

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench import kernel_pytorch_quality as quality  # noqa: E402
from tools.bench.kernel_pytorch_memory import (  # noqa: E402
    DIM,
    HEADS,
    LAYER_TOKENS,
    LAYER_WIDTH,
    RING_TOKENS,
    Job,
    in_process,
    inputs,
    ring_rank,
    sdpa_layer,
)

LONG = 16384
SDPA, FLEX = "torch SDPA", "compiled FlexAttention"


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
    q, k, v = inputs(LONG)
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
    leaves = [t.requires_grad_() for t in inputs(LONG)]
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

    q, k, v = inputs(LONG)
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
