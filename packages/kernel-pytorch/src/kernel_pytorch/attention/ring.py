# SPDX-License-Identifier: Apache-2.0
"""Exact attention over a sequence that is spread over ranks.

K and V travel round the ring while each rank attends from its own queries (Liu et al.,
Ring Attention with Blockwise Transformers, 2023; zigzag shards: Zhu et al., 2024).
Decisions:

- Step i on rank r works on the keys of rank r - i. Steps that no rank needs, which
  follows from positions and document ids alone, are neither computed nor sent: keys
  jump straight to the next step that somebody needs.
- The transfer of the next keys is posted before the current ones are worked on.
- In backward dK and dV travel with K and V, in fp32, and come home after the last step;
  only q, k, v, out and lse of the own shard are kept for it.
- What runs on one shard (`ShardPlan`) knows nothing of communication; the serial ring
  of `kernel_pytorch.attention.context_parallel` uses it, too.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernel_pytorch.attention.agreement import agree_once, gather
from kernel_pytorch.attention.blocks import INF, check_qkv, checked_scale
from kernel_pytorch.attention.layout import resolve, shard_length
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.partial import refuse_trained_bias
from kernel_pytorch.attention.shards import Keys, ShardPlan
from kernel_pytorch.attention.tiling import counting
from torchworks_core.errors import InvalidValue

_FIELDS = (
    *("batch", "heads", "kv_heads", "local_length", "head_dim", "dtype", "device"),
    *("causal", "window", "key_padding", "documents", "bias", "total_length"),
    *("layout", "scale", "needs_gradient"),
)


@dataclass(frozen=True)
class RingStats:
    """What the last ring call of this thread did.

    Attributes:
        steps: Steps worked on, the own keys included, of all ``world`` ones.
        bytes_sent: Bytes this rank sent, forward or backward.
        pairs: Query-key pairs in the tiles this rank computed.
        world: Number of ranks.
        total_length: Tokens of the whole sequence.
    """

    steps: int
    bytes_sent: int
    pairs: float
    world: int
    total_length: int


_local = threading.local()
_checked: WeakSet[Any] = WeakSet()


def ring_stats() -> RingStats:
    """Return what the last ring call (forward or backward) of this thread did.

    A backward pass belongs to the thread that ran its forward pass.

    Raises:
        InvalidValue: there was none.
    """
    last = _own_stats()
    if not last:
        raise InvalidValue("ring_stats()", "no ring attention ran in this thread")
    return last[0]


def _own_stats() -> list[RingStats]:
    """Where this thread keeps the stats of its last call, if any."""
    if not hasattr(_local, "last"):
        _local.last = []
    return _local.last


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec | None = None,
    *,
    group: Any,
    layout: str = "zigzag",
    scale: float | None = None,
    total_length: int | None = None,
    check: str | None = None,
) -> Tensor:
    """Attend from this rank's queries to the keys of all ranks; collective.

    Args:
        q: This rank's shard [B, H, n, D], n as `shard_sequence` makes it.
        k: [B, Hkv, n, D]; H must be a multiple of Hkv.
        v: Like ``k``.
        mask: ``key_padding`` [B, n] and ``documents`` [B, n] are shards, too; ``bias``
            has this rank's n rows and all ``total_length`` keys in global order.
        group: ProcessGroup, 1-D DeviceMesh, or None for one device.
        layout: ``"zigzag"`` or ``"contiguous"``.
        scale: Factor of the scores; None is 1 / sqrt(D).
        total_length: Tokens without padding; None is n times the number of ranks.
        check: ``"always"`` compares the arguments of all ranks at each call also on
            NCCL, where that waits for the device; with None it is done at the first
            call of a group. Other backends always compare.

    Returns:
        This rank's shard of the output, [B, H, n, D], 0 in padding.

    Raises:
        InvalidValue: arguments are unusable or differ between ranks; the same message
            on all ranks, before anything is sent.
        NotImplementedError: ``mask.bias`` requires a gradient.
        RuntimeError: another rank died (from torch.distributed, within the time-out).

    Example:
        >>> q = k = v = torch.randn(1, 2, 4, 8)
        >>> out = ring_attention(q, k, v, MaskSpec(causal=True), group=None)
        >>> bool(torch.allclose(out[:, :, 0], v[:, :, 0]))
        True
    """
    return ring_with_lse(
        *(q, k, v, mask, group, layout, scale, total_length),
        check=check,
    )[0]


def ring_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec | None,
    group: Any,
    layout: str = "zigzag",
    scale: float | None = None,
    total_length: int | None = None,
    check: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As `ring_attention`, with lse [B, H, n], -inf in padding."""
    group, rank, world = resolve(group)
    mask = MaskSpec() if mask is None else mask

    def local() -> dict[str, Any]:
        if check not in (None, "always"):
            raise InvalidValue(f"check={check!r}", "it must be None or 'always'")
        check_qkv(q, k, v)
        found = _signature(q, k, v, mask, world, layout, scale, total_length, group)
        return found | {"check": check}

    fields = (*_FIELDS, "check")
    values = agree_once(group, world, fields, local, _checked, check == "always")
    plan = ShardPlan(
        mask.causal, mask.window, world, values["total_length"], layout, values["scale"]
    )
    steps = plan.steps(_document_ranges(mask.documents, plan, rank, group))
    ring = _Ring(plan, rank, group, steps, mask, _own_stats())
    return _RingAttention.apply(q, k, v, ring)


@dataclass(frozen=True, eq=False)
class _Ring:
    plan: ShardPlan
    rank: int
    group: Any
    steps: tuple[int, ...]
    mask: MaskSpec
    # Of the thread that ran forward: backward may run in one of autograd's.
    stats: list[RingStats]

    def hop(self, place: int) -> int:
        """Ranks to jump from ``steps[place]`` to the next one, or home."""
        after = self.steps[place + 1] if place + 1 < len(self.steps) else 0
        return (after - self.steps[place]) % self.plan.world

    def source(self, place: int) -> int:
        """Whose keys are here at ``steps[place]``."""
        return (self.rank - self.steps[place]) % self.plan.world

    def send(self, tensors: list[Tensor], hop: int) -> _Transfer:
        """Start to pass ``tensors`` on by ``hop`` ranks."""
        received = [torch.empty_like(t) for t in tensors]
        world, operations = self.plan.world, []
        for out, into in zip(tensors, received, strict=True):
            for kind, t, peer in (
                (dist.isend, out, (self.rank + hop) % world),
                (dist.irecv, into, (self.rank - hop) % world),
            ):
                peer = dist.get_global_rank(self.group, peer)
                operations.append(dist.P2POp(kind, t, peer, self.group))
        size = sum(t.numel() * t.element_size() for t in tensors)
        return _Transfer(dist.batch_isend_irecv(operations), tensors, received, size)


@dataclass(frozen=True, eq=False)
class _Transfer:
    requests: list[Any]
    # Kept so that memory being sent is not given to somebody else.
    sent: list[Tensor]
    received: list[Tensor]
    size: int

    def wait(self) -> list[Tensor]:
        for request in self.requests:
            request.wait()
        return self.received


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring
    ) -> tuple[Tensor, Tensor]:
        plan, sent = ring.plan, 0
        state = plan.start(q)
        travelling = Keys.of(k, v, ring.mask).pack()
        with counting() as work:
            for place in range(len(ring.steps)):
                transfer = None
                if place + 1 < len(ring.steps):
                    transfer = ring.send(travelling, ring.hop(place))
                    sent += transfer.size
                keys = Keys.unpack(travelling, ring.mask)
                plan.attend(ring.rank, ring.source(place), q, keys, ring.mask, state)
                if transfer is not None:
                    travelling = transfer.wait()
        out, lse = state[0].to(q.dtype), state[1]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        ctx.set_materialize_grads(False)
        _note(ring, sent, work.pairs)
        return out, lse

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]  (the decorator hides the signature)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring: _Ring = ctx.ring
        plan, sent = ring.plan, 0
        # Even a rank whose output nobody used must pass the others' gradients on.
        d_out = torch.zeros_like(out) if grads[0] is None else grads[0]
        d_lse = grads[1]
        if d_lse is not None:
            d_lse = d_lse.masked_fill(lse == -INF, 0.0)
        dq = torch.zeros_like(q, dtype=lse.dtype)
        travelling = Keys.of(k, v, ring.mask).pack()
        coming: _Transfer | None = None
        home: list[Tensor] = []
        with counting() as work:
            for place in range(len(ring.steps)):
                transfer = None
                if place + 1 < len(ring.steps):
                    transfer = ring.send(travelling, ring.hop(place))
                    sent += transfer.size
                home = plan.attend_backward(
                    *(ring.rank, ring.source(place), (q, out, lse), (d_out, d_lse)),
                    *(Keys.unpack(travelling, ring.mask), ring.mask, dq),
                )
                if coming is not None:
                    home = [a.add_(b) for a, b in zip(home, coming.wait(), strict=True)]
                if transfer is not None:
                    travelling = transfer.wait()
                coming = None
                if hop := ring.hop(place):
                    coming = ring.send(home, hop)
                    sent += coming.size
        dk, dv = home if coming is None else coming.wait()
        _note(ring, sent, work.pairs)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _note(ring: _Ring, sent: int, pairs: float) -> None:
    plan = ring.plan
    stats = RingStats(len(ring.steps), sent, pairs, plan.world, plan.total_length)
    ring.stats[:] = [stats]


def _document_ranges(
    documents: Tensor | None, plan: ShardPlan, rank: int, group: Any
) -> Tensor | None:
    """Smallest and largest id of each rank: int64 [world, B, 2]."""
    if documents is None or plan.world == 1:
        return None
    return gather(plan.document_range(documents, rank), group, plan.world)


def _signature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec,
    world: int,
    layout: str,
    scale: float | None,
    total_length: int | None,
    group: Any,
) -> dict[str, Any]:
    """Check this rank's arguments; return what must be equal on all ranks."""
    refuse_trained_bias(mask)
    batch, heads, length, dim = q.shape
    total = length * world if total_length is None else total_length
    wanted = shard_length(total, world, layout)
    if total_length is None and layout == "zigzag" and length % 2:
        raise InvalidValue(f"local length {length}", "zigzag shards have even length")
    if length != wanted or k.shape[2] != wanted:
        why = f"{total} tokens on {world} ranks ({layout}) make shards of {wanted}"
        raise InvalidValue(f"q has {length} and k {k.shape[2]} tokens", why)
    if world > 1 and q.is_cuda and str(dist.get_backend(group)) == "gloo":
        raise InvalidValue("q on CUDA", "gloo sends CPU tensors", "Use an NCCL group")
    _check_mask(mask, q, total)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    kinds = {name: str(t.dtype) for name, t in mask.tensors().items()}
    found = (batch, heads, k.shape[1], length, dim, str(q.dtype)[6:], q.device.type)
    found += (mask.causal, mask.window)
    found += tuple(kinds.get(name) for name in ("key_padding", "documents"))
    found += ("bias" in kinds, total, layout)
    found += (checked_scale(scale, dim), grad)
    return dict(zip(_FIELDS, found, strict=True))


def _check_mask(mask: MaskSpec, q: Tensor, total: int) -> None:
    for name, part in mask.tensors().items():
        shape = tuple(part.shape)
        if part.device != q.device:
            raise InvalidValue(f"{name} on {part.device}", f"q is on {q.device}")
        if name != "bias" and shape != (q.shape[0], q.shape[2]):
            wanted = f"the shard must have shape {(q.shape[0], q.shape[2])}"
            raise InvalidValue(f"{name} of shape {shape}", wanted)
        if name == "bias":
            full = (*q.shape[:3], total)
            padded = (1,) * (4 - part.ndim) + shape
            if any(x not in (1, y) for x, y in zip(padded, full, strict=True)):
                why = f"it must broadcast to {full}: own rows, all keys"
                raise InvalidValue(f"bias of shape {shape}", why)
