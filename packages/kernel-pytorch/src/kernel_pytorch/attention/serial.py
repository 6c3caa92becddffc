# SPDX-License-Identifier: Apache-2.0
"""The ring in one process: each shard of the sequence on its own device.

The devices of a list take their turns, and keys are copied to where they are needed;
a device may stand in the list more than once, so that the arithmetic of any number of
ranks can be run and tested on one device. On CUDA the devices work at the same time,
as their kernels are only queued.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernel_pytorch.attention.blocks import INF, check_qkv, checked_scale
from kernel_pytorch.attention.layout import join_shards, shard_length, take_shard
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.partial import lay_mask
from kernel_pytorch.attention.shards import Keys, ShardPlan, cut_mask
from torchworks_core.errors import InvalidValue


def serial_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec | None = None,
    *,
    devices: Sequence[torch.device | str],
    layout: str = "zigzag",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend in one process, each shard of the sequence on its device.

    Args:
        q: [B, H, N, D] on any device.
        k: [B, Hkv, N, D] on the same device.
        v: Like ``k``.
        mask: Of the whole sequence.
        devices: One for each shard; a device may stand there more than once.
        layout: ``"zigzag"`` or ``"contiguous"``.
        scale: Factor of the scores; None is 1 / sqrt(D).

    Returns:
        out [B, H, N, D] and lse [B, H, N] on the device of ``q``, with autograd.

    Raises:
        InvalidValue: shapes do not fit, or ``devices`` is empty.
        NotImplementedError: ``mask.bias`` requires a gradient.

    Example:
        >>> q = torch.randn(1, 2, 5, 8)
        >>> out, _ = serial_ring(q, q, q, devices=["cpu", "cpu"])
        >>> out.shape
        torch.Size([1, 2, 5, 8])
    """
    check_qkv(q, k, v)
    if not devices or q.shape[2] != k.shape[2]:
        lengths = f"q has {q.shape[2]} and k {k.shape[2]} tokens"
        raise InvalidValue(f"{len(devices)} devices, {lengths}", "lengths must agree")
    mask = MaskSpec() if mask is None else mask
    lay_mask(mask, q, k)
    length, world = q.shape[2], len(devices)
    shard_length(length, world, layout)
    scale = checked_scale(scale, q.shape[3])
    plan = ShardPlan(mask.causal, mask.window, world, length, layout, scale)
    return _SerialRing.apply(q, k, v, plan, mask, tuple(map(torch.device, devices)))


class _SerialRing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: ShardPlan,
        mask: MaskSpec,
        devices: tuple[torch.device, ...],
    ) -> tuple[Tensor, Tensor]:
        shards = _Shards(plan, mask, devices)
        outs, lses = [], []
        for rank in range(plan.world):
            part, own = shards.take(q, rank), shards.masks[rank]
            state = plan.start(part)
            for source in shards.sources(rank):
                keys = shards.keys(k, v, source, rank)
                plan.attend(rank, source, part, keys, own, state)
            outs.append(state[0].to(q.device, q.dtype))
            lses.append(state[1].to(q.device))
        out = join_shards(outs, 2, plan.layout, plan.total_length)
        lse = join_shards(lses, 2, plan.layout, plan.total_length)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.shards = shards
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    # pyrefly: ignore [bad-override]  (the decorator hides the signature)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        shards: _Shards = ctx.shards
        plan = shards.plan
        d_out = torch.zeros_like(out) if grads[0] is None else grads[0]
        d_lse = grads[1]
        if d_lse is not None:
            d_lse = d_lse.masked_fill(lse == -INF, 0.0)
        sums: list[list[Tensor] | None] = [None] * plan.world
        dqs = []
        for rank in range(plan.world):
            own = [shards.take(t, rank) for t in (q, out, lse)]
            coming = shards.take(d_out, rank)
            through = None if d_lse is None else shards.take(d_lse, rank)
            dq = torch.zeros_like(own[0], dtype=lse.dtype)
            for source in shards.sources(rank):
                found = plan.attend_backward(
                    *(rank, source, (own[0], own[1], own[2]), (coming, through)),
                    *(shards.keys(k, v, source, rank), shards.masks[rank], dq),
                )
                found = [t.to(shards.devices[source]) for t in found]
                so_far = sums[source]
                if so_far is not None:
                    found = [a.add_(b) for a, b in zip(so_far, found, strict=True)]
                sums[source] = found
            dqs.append(dq.to(q.device, q.dtype))
        pairs = [pair for pair in sums if pair is not None]
        dk, dv = ([pair[i].to(k.device, k.dtype) for pair in pairs] for i in (0, 1))
        joined = (
            join_shards(x, 2, plan.layout, plan.total_length) for x in (dqs, dk, dv)
        )
        return *joined, None, None, None


class _Shards:
    """Cuts tensors and the mask for `_SerialRing`."""

    def __init__(
        self, plan: ShardPlan, mask: MaskSpec, devices: tuple[torch.device, ...]
    ) -> None:
        self.plan, self.devices = plan, devices
        settings = (plan.world, plan.layout)
        cut = [
            cut_mask(mask, plan.total_length, r, *settings) for r in range(plan.world)
        ]
        self.masks = [_moved(m, d) for m, d in zip(cut, devices, strict=True)]
        self.steps = plan.steps(self._document_ranges(mask))

    def take(self, x: Tensor, rank: int) -> Tensor:
        part = take_shard(x, 2, rank, self.plan.world, self.plan.layout)
        return part.to(self.devices[rank])

    def sources(self, rank: int) -> list[int]:
        return [(rank - step) % self.plan.world for step in self.steps]

    def keys(self, k: Tensor, v: Tensor, source: int, rank: int) -> Keys:
        """The keys of ``source``, on the device of ``rank``."""
        mask = _moved(self.masks[source], self.devices[rank])
        k, v = (self.take(t, source).to(self.devices[rank]) for t in (k, v))
        return Keys.of(k, v, mask)

    def _document_ranges(self, mask: MaskSpec) -> Tensor | None:
        if mask.documents is None or not self.plan.total_length:
            return None
        pairs = zip(range(self.plan.world), self.masks, strict=True)
        found = [self.plan.document_range(m.documents, rank) for rank, m in pairs]
        return torch.stack(found)


def _moved(mask: MaskSpec, device: torch.device) -> MaskSpec:
    parts: dict[str, Any] = {name: t.to(device) for name, t in mask.tensors().items()}
    return replace(mask, **parts)
