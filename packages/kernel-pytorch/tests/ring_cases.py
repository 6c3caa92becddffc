# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_ring run: four processes, started once."""

import functools
import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from reference import dense_attention, gradients, layer_reference, mask_parts

from kernel_pytorch.attention import ContextParallelAttention
from kernel_pytorch.attention.agreement import agree
from kernel_pytorch.attention.layout import (
    shard_length,
    shard_positions,
    shard_sequence,
    take_shard,
    unshard_sequence,
)
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.ring import ring_attention, ring_stats, ring_with_lse
from kernel_pytorch.attention.shards import ShardPlan

RANKS = 4
MEMBERS = {"1": [1], "2": [3, 1], "3": [0, 1, 2], "4": [0, 1, 2, 3]}
TIMEOUT, LONG_TIMEOUT = 20, 60
SHORT, LONG = (1, 7, 64, 130), (1000,)
LONG_KINDS = (
    *("none", "causal", "window", "causal_window", "causal_padding"),
    *("documents", "everything"),
)
LONGEST_KINDS = ("none", "causal", "causal_window", "causal_padding", "documents")
# Seconds after which ranks of one group give up; longer than a busy machine pauses.
STALL = 5


def cases():
    """(name, N, kind, heads, dtype, layout, with_lse) of each numeric case."""
    found = []
    for n in SHORT + LONG:
        for kind in mask_parts(1, 1, 8) if n in SHORT else LONG_KINDS:
            layout = "contiguous" if kind == "window" or n == 7 else "zigzag"
            lse = n == 64
            name = f"{n}-{kind}"
            found.append((name, n, kind, (4, 2), torch.float32, layout, lse))
    for kind in ("none", "causal", "everything"):
        name = f"130-{kind}-bf16"
        found.append((name, 130, kind, (4, 1), torch.bfloat16, "zigzag", False))
        name = f"1000-{kind}-bf16"
        found.append((name, 1000, kind, (4, 1), torch.bfloat16, "zigzag", False))
        name = f"130-{kind}-fp64"
        found.append((name, 130, kind, (3, 3), torch.float64, "contiguous", True))
    return found


def cut_parts(parts, rank, world, layout):
    found = dict(parts)
    for name in ("key_padding", "documents"):
        if name in found:
            found[name] = take_shard(found[name], 1, rank, world, layout)
    if "bias" in found and found["bias"].shape[2] > 1:
        found["bias"] = take_shard(found["bias"], 2, rank, world, layout)
    return MaskSpec(**found)


@functools.cache
def whole(case, batch=2):
    """Inputs of a case, and what one device makes of them in float64."""
    _, n, kind, heads, dtype, _, with_lse = case
    torch.manual_seed(n)
    dim = 8
    q, d_out = (torch.randn(batch, heads[0], n, dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, heads[1], n, dim).to(dtype) for _ in range(2))
    d_lse = torch.randn(batch, heads[0], n) if with_lse else None
    parts = mask_parts(batch, heads[0], n)[kind]
    wanted = gradients(
        lambda *t: dense_attention(*t, MaskSpec(**parts)), (q, k, v), d_out, d_lse
    )
    return (q, k, v), d_out, d_lse, parts, wanted


def run_case(case, group, prepared=None):
    """Return the largest error of out, lse and gradients, each relative to its size."""
    n, layout = case[1], case[5]
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    tensors, d_out, d_lse, parts, wanted = prepared or whole(case)
    mask = cut_parts(parts, rank, world, layout)

    def cut(t):
        return take_shard(t, 2, rank, world, layout)

    def function(*t):
        return ring_with_lse(*t, mask, group, layout, total_length=n)

    found = gradients(
        function,
        [cut(t) for t in tensors],
        cut(d_out),
        None if d_lse is None else cut(d_lse),
    )
    worst, real = 0.0, shard_positions(n, group, layout) < n
    for a, b in zip((*found[:2], *found[2]), (*wanted[:2], *wanted[2]), strict=True):
        b = cut(b).double()[:, :, real]
        a = a.double()[:, :, real]
        same = a == b
        assert not a.isnan().any()
        assert torch.equal(a.isinf(), b.isinf())
        if b.numel():
            size = max(1.0, b.masked_fill(~b.isfinite(), 0.0).abs().max().item())
            worst = max(worst, torch.where(same, 0.0, a - b).abs().max().item() / size)
        if not real.all():
            assert (found[0][:, :, ~real] == 0).all()
    return worst


def run_disagreements(group):
    """Return the message this rank got for each way to disagree."""
    rank = dist.get_rank(group)
    q = torch.randn(1, 2, 4, 8)
    odd = rank == 1
    keep = torch.ones(1, 4, dtype=torch.bool)
    calls = {
        "causal": lambda: {"mask": MaskSpec(causal=odd)},
        "window": lambda: {"mask": MaskSpec(window=5 if odd else 6)},
        "layout": lambda: {"layout": "contiguous" if odd else "zigzag"},
        "bad layout": lambda: {"layout": "spiral" if odd else "zigzag"},
        "scale": lambda: {"scale": 0.5 if odd else 0.25},
        "check": lambda: {"check": "always" if odd else None},
        "bad check": lambda: {"check": "allways"},
        "dtype": lambda: {"q": q.double() if odd else q},
        "rank of q": lambda: {"q": q[0] if odd else q},
        "batch": lambda: {"q": torch.cat([q, q]) if odd else q},
        "not a tensor": lambda: {"q": None if odd else q},
        "total_length": lambda: {"total_length": 15 if odd else 16},
        "gradient": lambda: {"q": q.clone().requires_grad_(odd)},
        "padding": lambda: {
            "mask": MaskSpec(key_padding=torch.ones(1, 4, dtype=torch.bool))
            if odd
            else MaskSpec()
        },
        "short padding": lambda: {
            "mask": MaskSpec(key_padding=keep[:, : 3 if odd else 4])
        },
        "documents": lambda: {
            "mask": MaskSpec(
                documents=torch.zeros(1, 4, dtype=torch.int64 if odd else torch.int32)
            )
        },
        "bias with grad": lambda: {
            "mask": MaskSpec(bias=torch.zeros(16, requires_grad=True))
        },
    }
    messages = {}
    for name, make in calls.items():
        options = make()
        x = options.pop("q", q)
        try:
            ring_attention(x, x, x, group=group, **options)
            messages[name] = "nothing raised"
        except (ValueError, NotImplementedError) as error:
            messages[name] = f"{type(error).__name__}: {error}"
    try:
        agree(group, RANKS, ("count",), lambda: {"count": 2**70 if odd else 1})
        messages["too large"] = "nothing raised"
    except ValueError as error:
        messages["too large"] = f"{type(error).__name__}: {error}"
    return messages


def run_stats(group, n=512, dim=16):
    """Return what the ring did for some masks: pairs, steps, bytes."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    q = torch.randn(1, 2, n // world, dim, requires_grad=True)
    ids = (torch.arange(n) // (n // 4))[None]
    found = {}
    for name, parts, layout in (
        ("causal", {"causal": True}, "zigzag"),
        ("causal contiguous", {"causal": True}, "contiguous"),
        ("full", {}, "zigzag"),
        ("window", {"causal": True, "window": 16}, "contiguous"),
        ("window zigzag", {"causal": True, "window": 16}, "zigzag"),
        ("documents", {"documents": ids}, "contiguous"),
    ):
        mask = cut_parts(parts, rank, world, layout)
        out = ring_attention(q, q, q, mask, group=group, layout=layout)
        forward = vars(ring_stats())
        out.sum().backward()
        found[name] = [forward, vars(ring_stats())]
    return found


def run_sharding(group):
    """Check that shards are the positions they claim, and join to the whole."""
    torch.manual_seed(0)
    for n in (0, 1, 5, 24, 31):
        x = torch.randn(2, n, 3)
        for layout in ("zigzag", "contiguous"):
            part = shard_sequence(x, 1, group, layout)
            positions = shard_positions(n, group, layout)
            world = dist.get_world_size(group)
            assert part.shape[1] == shard_length(n, world, layout) == len(positions)
            real = positions < n
            assert torch.equal(part[:, real], x[:, positions[real]])
            assert (part[:, ~real] == 0).all()
            assert torch.equal(unshard_sequence(part, 1, group, layout, n), x)
    return True


def run_layer(group, n=37, width=16, heads=4):
    """Return the largest error of ContextParallelAttention over ranks.

    With whole sequences each rank has all gradients; with shards it has its part of
    the parameters' gradients, which are summed here.
    """
    worst, layout = 0.0, "zigzag"
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    for kind, causal in (("none", False), ("padding", True), ("float_bias", False)):
        parts = mask_parts(2, heads, n)[kind]
        given = next(iter(parts.values()), None)
        for inputs in ("full", "sharded"):
            torch.manual_seed(1)
            options = {"num_kv_heads": 2, "bias": True, "causal": causal}
            layer = ContextParallelAttention(
                width, heads, world, group, inputs=inputs, **options
            )
            assert layer.mode == "distributed"
            x = torch.randn(2, n, width, requires_grad=True)
            d_out = torch.randn(2, n, width)
            want, _ = layer_reference(layer, x, MaskSpec(causal, **parts))
            leaves = [x, *layer.parameters()]
            expected = torch.autograd.grad(want, leaves, d_out.double())
            if inputs == "full":
                y = layer(x, given)
                found = torch.autograd.grad(y, leaves, d_out)
            else:

                def cut(t, dim=1):
                    return take_shard(t, dim, rank, world, layout)

                mask = None if given is None else cut(given, given.ndim - 2)
                mask = cut(given) if kind == "padding" else mask
                y = layer(cut(x), mask, total_length=n)
                grads = list(torch.autograd.grad(y, leaves, cut(d_out)))
                for grad in grads:
                    dist.all_reduce(grad, group=group)
                y = unshard_sequence(y, 1, group, layout, n)
                found = grads
            pairs = zip([y.detach(), *found], [want, *expected], strict=True)
            for one, other in pairs:
                size = max(1.0, other.abs().max().item())
                worst = max(worst, (one - other).abs().max().item() / size)
    return worst


def run_layer_refusals(group):
    """Return what this rank is told of a length, a size and a mask that don't fit."""
    told, rank = [], dist.get_rank(group)
    for size, tokens, keys in (
        (RANKS, 9 + rank, None),
        (RANKS + 1, 9, None),
        (RANKS, 9, 9 - rank),
    ):
        mask = None if keys is None else torch.ones(1, keys)
        try:
            layer = ContextParallelAttention(8, 2, size, group)
            layer(torch.randn(1, tokens, 8), mask)
            told.append("nothing raised")
        except ValueError as error:
            told.append(str(error))
    return told


def prepare_long(folder, n=4096):
    """Compute what ranks compare long sequences with, once for all of them."""
    found = {}
    for kind in LONGEST_KINDS:
        case = (kind, n, kind, (2, 1), torch.float32, "zigzag", False)
        found[kind] = whole(case, batch=1)
        whole.cache_clear()
    torch.save(found, Path(folder, "long.pt"))


def prepare(folder):
    """Compute what ranks compare ``LONG`` cases with, once for all of them."""
    found = {case[0]: whole(case) for case in cases() if case[1] in LONG}
    whole.cache_clear()
    torch.save(found, Path(folder, "cases.pt"))


def run_long(group, folder):
    """Return the largest error with 4096 tokens, by mask."""
    found = torch.load(Path(folder, "long.pt"), weights_only=True)
    return {
        kind: run_case(
            (kind, 4096, kind, (2, 1), torch.float32, "zigzag", False), group, parts
        )
        for kind, parts in found.items()
    }


def die():
    """What rank 2 does when it dies."""
    os._exit(7)


def run_death(group, failing=die):
    """Rank 2 dies in the middle of a forward pass: what do the others get?

    A rank that already has all keys may finish its forward, whose result is right; the
    gradients of its keys can't be complete, so backward must raise.
    """
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    attend, calls = ShardPlan.attend, []

    def dying(self, *args):
        calls.append(None)
        if dist.get_rank() == 2 and len(calls) == 2:
            failing()
        return attend(self, *args)

    ShardPlan.attend = dying
    begin = time.monotonic()
    try:
        ring_attention(x, x, x, group=group).sum().backward()
        told = "nothing raised"
    except RuntimeError as error:
        told = f"{type(error).__name__}: {error}"
    ShardPlan.attend = attend
    return told, time.monotonic() - begin


def run_stall(groups, folder):
    """Rank 2 stops, but its connections stay: the others must not wait for ever.

    Rank 0 wakes it up once all others are through, so that it ends by itself.
    """
    pid, rank = Path(folder, "pid"), dist.get_rank()
    if rank == 2:
        pid.write_text(str(os.getpid()))
    dist.barrier()
    found = run_death(groups["stall"], lambda: os.kill(os.getpid(), signal.SIGSTOP))
    if rank != 2:
        dist.barrier(groups["awake"])
    if rank == 0:
        os.kill(int(pid.read_text()), signal.SIGCONT)
    return found


def start(rank, folder, seconds=TIMEOUT):
    """Join the other ranks; return groups of one to four of them, by size."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=seconds),
    )
    return {name: dist.new_group(ranks) for name, ranks in MEMBERS.items()}


def long_worker(rank, folder):
    groups = start(rank, folder, LONG_TIMEOUT)
    found = {
        name: run_long(groups[name], folder)
        for name, ranks in MEMBERS.items()
        if rank in ranks
    }
    wait = timedelta(seconds=STALL)
    groups["awake"] = dist.new_group([0, 1, 3])
    groups["stall"] = dist.new_group(MEMBERS["4"], timeout=wait)
    found["stall"] = run_stall(groups, folder)
    write(folder, rank, found)
    dist.barrier()
    os._exit(0)


def worker(rank, folder):
    groups = start(rank, folder)
    known = torch.load(Path(folder, "cases.pt"), weights_only=True)
    report = {"errors": {}, "stats": {}, "layer": {}}
    for name, ranks in MEMBERS.items():
        if rank not in ranks:
            continue
        group = groups[name]
        for case in cases():
            report["errors"][f"P{name}-{case[0]}"] = run_case(
                case, group, known.get(case[0])
            )
        report["stats"][name] = run_stats(group, 480)
        run_sharding(group)
        report["layer"][name] = run_layer(group)
    report["refusals"] = run_layer_refusals(groups["4"])
    report["disagreements"] = run_disagreements(groups["4"])
    write(folder, rank, report)
    dist.barrier()
    # The others learn of the death by a closed connection or by the time-out.
    report["death"] = run_death(groups["4"])
    write(folder, rank, report)
    os._exit(0)


def write(folder, rank, report):
    Path(folder, f"rank{rank}.json").write_text(json.dumps(report))
