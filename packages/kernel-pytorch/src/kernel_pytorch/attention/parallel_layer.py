# SPDX-License-Identifier: Apache-2.0
"""ContextParallelAttention: one sequence's attention over several devices.

Whole sequences in and out: each rank computes its shard, and the gradients of the
input and of the parameters are on every rank those of one device, so that an optimizer
needs no reduction over the group. In one process the shards run over a list of devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kernel_pytorch.attention.context_parallel import (
    agree_on_length,
    gather_sequence,
    place,
    scatter_sequence,
    shard_mask,
    sum_gradients,
)
from kernel_pytorch.attention.layer_base import (
    ProjectedAttention,
    join_heads,
    split_heads,
)
from kernel_pytorch.attention.layout import check_layout
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.partial import lay_mask
from kernel_pytorch.attention.ring import ring_with_lse
from kernel_pytorch.attention.serial import serial_ring
from torchworks_core.errors import InvalidValue

_INPUTS = ("full", "sharded")


class ContextParallelAttention(ProjectedAttention):
    """Exact self-attention whose sequence is split over devices.

    Args:
        d_model: Width of the input and the output.
        num_heads: Heads; must divide ``d_model``.
        context_parallel_size: Number of shards.
        device_mesh: A list of devices (one process; a device may stand there more than
            once), a 1-D DeviceMesh, a ProcessGroup, or None: the default group if
            there is one, else the CUDA devices if there are enough, else all shards on
            the default device, one after the other.
        num_kv_heads: Heads of keys and values; None is ``num_heads``.
        head_dim: Width of a head; None is ``d_model // num_heads``.
        causal: Whether queries see no later keys.
        window: w: keys with |i - j| < w are seen.
        layout: ``"zigzag"`` or ``"contiguous"``.
        inputs: ``"full"``: the whole sequence in and out, equal on all ranks, given
            that each computes the same loss. ``"sharded"``: this rank's shard in and
            out; parameter gradients are parts, to be summed over the ranks.
        bias: Whether the four projections have one.
        max_sequence_length: A longer sequence is refused; None sets no limit.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        mode: ``"distributed"``, ``"multi-device"`` or ``"emulated"``.

    Raises:
        InvalidValue: an argument is unusable, or ``context_parallel_size`` is not the
            size of the group or of the list.

    Example:
        >>> layer = ContextParallelAttention(16, 4, 2, ["cpu", "cpu"], causal=True)
        >>> layer(torch.randn(2, 10, 16)).shape, layer.mode
        (torch.Size([2, 10, 16]), 'multi-device')
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        context_parallel_size: int,
        device_mesh: Any = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        window: int | None = None,
        layout: str = "zigzag",
        inputs: str = "full",
        bias: bool = False,
        max_sequence_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_layout(layout)
        if inputs not in _INPUTS:
            raise InvalidValue(f"inputs={inputs!r}", f"it must be one of {_INPUTS}")
        placement = place(context_parallel_size, device_mesh)
        if inputs == "sharded" and not placement.group and context_parallel_size > 1:
            why = "a process without a group holds every shard"
            raise InvalidValue("inputs='sharded'", why, "Pass a group, or use 'full'")
        super().__init__(
            d_model,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=bias,
            causal=causal,
            window=window,
            max_sequence_length=max_sequence_length,
            device=device,
            dtype=dtype,
        )
        self.context_parallel_size = context_parallel_size
        self.layout, self.inputs, self.placement = layout, inputs, placement

    @property
    def mode(self) -> str:
        """``"distributed"``, ``"multi-device"`` or ``"emulated"``."""
        return self.placement.mode

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        total_length: int | None = None,
    ) -> Tensor:
        """Attend; collective if distributed.

        Args:
            hidden_states: [B, N, d_model], whole or this rank's shard.
            attention_mask: [B, N], 1 = may be attended to, 0 = not; or, with more
                dimensions, bool (True = may attend) or float (added to the scores),
                broadcast to [B, heads, N, N], for shards [B, heads, N, whole N].
            total_length: With shards, the tokens of all of them without padding.

        Returns:
            Like ``hidden_states``.

        Raises:
            InvalidValue: shapes don't fit, the sequence is too long, or ranks disagree.
        """
        x, sharded = hidden_states, self.inputs == "sharded"
        if total_length is not None and not sharded:
            why = "inputs='full' sees the whole sequence"
            raise InvalidValue(f"total_length={total_length}", why, "Leave it out")
        group = self.placement.group
        if group is None and not sharded:
            return self._in_one_process(x, attention_mask)
        if sharded:
            total = total_length or _tokens(x) * self.context_parallel_size
            mask = self._checked_mask(x, attention_mask, total)
            q, k, v = self.project(x)
            place = (group, self.layout, None, total_length)
            return self.merge(ring_with_lse(q, k, v, mask, *place)[0])
        return self._over_ranks(x, attention_mask)

    def _in_one_process(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        mask = self._checked_mask(x, attention_mask, _tokens(x))
        q, k, v = self.project(x)
        devices = self.placement.devices
        if self.mode == "emulated":
            devices = (q.device,) * len(devices)
        out, _ = serial_ring(q, k, v, mask, devices=devices, layout=self.layout)
        return self.merge(out)

    def _over_ranks(self, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        group, layout, length = self.placement.group, self.layout, 0

        def local() -> int:
            mask = self._checked_mask(x, attention_mask, _tokens(x))
            probe = x.new_empty(1).expand(len(x), self.num_heads, x.shape[1], 1)
            lay_mask(mask, probe, probe)
            return x.shape[1]

        length = agree_on_length(group, layout, local)
        mask = self._checked_mask(x, attention_mask, _tokens(x))
        mask = shard_mask(mask, length, group, layout)
        x = scatter_sequence(x, 1, group, layout)
        q = split_heads(self._call(self.q_proj, x), self.num_heads)
        k = split_heads(self._call(self.k_proj, x), self.num_kv_heads)
        v = split_heads(self._call(self.v_proj, x), self.num_kv_heads)
        out, _ = ring_with_lse(q, k, v, mask, group, layout, None, length)
        y = self._call(self.out_proj, join_heads(out))
        return gather_sequence(y, 1, group, layout, length)

    def _call(self, projection: nn.Module, x: Tensor) -> Tensor:
        """Call a projection so that its gradients are summed over the ranks."""
        group = self.placement.group
        named = projection.named_parameters()
        summed = {name: sum_gradients(p, group) for name, p in named}
        return functional_call(projection, summed, (x,))

    def _checked_mask(self, x: Tensor, given: Tensor | None, total: int) -> MaskSpec:
        self.check_input(x, total)
        return self.mask_of(given, *x.shape[:2], pair_keys=total)


def _tokens(x: Tensor) -> int:
    return x.shape[1] if x.ndim == 3 else 0
