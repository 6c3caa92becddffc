# SPDX-License-Identifier: Apache-2.0
"""The pieces of context parallelism: whole sequence in, whole sequence out.

Over ranks: each rank has the whole input, works on its shard, and gets the whole
output; `scatter_sequence`, `gather_sequence` and `sum_gradients` make every gradient on
every rank equal to that of one device, given that every rank computes the same loss.
In one process, `kernel_pytorch.attention.serial.serial_ring` does the same over a list
of devices. `place` says which of the two it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernel_pytorch.attention.agreement import agree
from kernel_pytorch.attention.blocks import lse_dtype
from kernel_pytorch.attention.layout import (
    resolve,
    shard_length,
    take_shard,
    unshard_sequence,
)
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.shards import cut_mask
from torchworks_core.errors import InvalidValue

_log = logging.getLogger(__name__)


class Placement(NamedTuple):
    """Where context parallelism runs.

    Attributes:
        mode: ``"distributed"``, ``"multi-device"`` or ``"emulated"``.
        group: The process group, or None.
        devices: The devices of one process; empty when distributed.
    """

    mode: str
    group: Any
    devices: tuple[torch.device, ...]


def place(size: int, device_mesh: Any = None) -> Placement:
    """Decide where ``size`` shards run.

    Args:
        size: Number of shards, at least 1.
        device_mesh: A list of devices, a 1-D DeviceMesh, a ProcessGroup, or None: the
            default group if there is one, else the CUDA devices if there are enough,
            else all shards on the default device, one after the other.

    Returns:
        The placement.

    Raises:
        InvalidValue: ``size`` is below 1, or is not that of the group or the list.

    Example:
        >>> place(2, ["cpu", "cpu"]).mode, place(4).mode
        ('multi-device', 'emulated')
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InvalidValue(f"context_parallel_size={size!r}", "it must be an int >= 1")
    if isinstance(device_mesh, (list, tuple)):
        devices = tuple(torch.device(d) for d in device_mesh)
        if len(devices) != size:
            given = f"context_parallel_size={size}"
            raise InvalidValue(given, f"device_mesh lists {len(devices)} devices")
        return Placement("multi-device", None, devices)
    ready = dist.is_available() and dist.is_initialized()
    if device_mesh is not None or ready:
        mesh = dist.group.WORLD if device_mesh is None else device_mesh
        group, _, world = resolve(mesh)
        if world != size:
            why = f"the process group has {world} ranks"
            do = f"Pass a DeviceMesh of {size} ranks, or a list of devices"
            raise InvalidValue(f"context_parallel_size={size}", why, do)
        return Placement("distributed", group, ())
    if torch.cuda.device_count() >= size > 1:
        cuda = tuple(torch.device("cuda", index) for index in range(size))
        return Placement("multi-device", None, cuda)
    device = torch.get_default_device()
    if size > 1:
        _log.info("context parallelism of %d is emulated on %s", size, device)
    return Placement("emulated", None, (device,) * size)


def agree_on_length(group: Any, layout: str, local: Callable[[], int]) -> int:
    """Check this rank's arguments by ``local``, and that all ranks have one length.

    Cutting a shard may fail on one rank only, which the others must learn before they
    wait for it. On NCCL, where that costs a wait for the device, only ``local`` runs.

    Args:
        group: ProcessGroup, 1-D DeviceMesh, or None for one device.
        layout: ``"zigzag"`` or ``"contiguous"``.
        local: Raises if this rank's arguments are unusable; returns the tokens.

    Returns:
        The tokens of the whole sequence.

    Raises:
        InvalidValue: ``local`` raised on some rank, or lengths differ; the same message
            on all ranks.

    Example:
        >>> agree_on_length(None, "zigzag", lambda: 37)
        37
    """
    group, _, world = resolve(group)

    def values() -> dict[str, Any]:
        length = local()
        shard_length(length, world, layout)
        return {"tokens": length, "layout": layout}

    if world > 1 and str(dist.get_backend(group)) != "nccl":
        return agree(group, world, ("tokens", "layout"), values)["tokens"]
    return values()["tokens"]


def scatter_sequence(x: Tensor, dim: int, group: Any, layout: str) -> Tensor:
    """Take this rank's shard; backward collects the gradient of the whole tensor.

    Args:
        x: Equal on all ranks.
        dim: The dimension of the sequence.
        group: ProcessGroup, 1-D DeviceMesh, or None for one device.
        layout: ``"zigzag"`` or ``"contiguous"``.

    Example:
        >>> scatter_sequence(torch.arange(3), 0, None, "zigzag")
        tensor([0, 1, 2, 0])
    """
    return _Scatter.apply(x, dim % x.ndim, group, layout)


def gather_sequence(
    x: Tensor, dim: int, group: Any, layout: str, total_length: int
) -> Tensor:
    """Collect the shards of all ranks; backward takes this rank's shard.

    That is the true gradient if every rank computes the same loss from the result.

    Args:
        x: This rank's shard.
        dim: The dimension of the sequence.
        group: ProcessGroup, 1-D DeviceMesh, or None for one device.
        layout: ``"zigzag"`` or ``"contiguous"``.
        total_length: Tokens of the whole sequence.

    Example:
        >>> gather_sequence(torch.arange(4), 0, None, "zigzag", 3)
        tensor([0, 1, 2])
    """
    return _Gather.apply(x, dim % x.ndim, group, layout, total_length)


def sum_gradients(parameter: Tensor, group: Any) -> Tensor:
    """Return ``parameter``; backward sums its gradient over the ranks.

    A rank sees its own tokens only, so its gradient of a parameter is a part of the
    sum. Every rank must run the same backward.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> sum_gradients(w, None) is w
        True
    """
    group, _, world = resolve(group)
    return parameter if world == 1 else _SumGradients.apply(parameter, group)


def shard_mask(
    mask: MaskSpec, total_length: int, group: Any, layout: str = "zigzag"
) -> MaskSpec:
    """Cut a mask of the whole sequence to what `ring_attention` takes on this rank.

    Args:
        mask: Over ``total_length`` queries and keys.
        total_length: Tokens of the whole sequence.
        group: ProcessGroup, 1-D DeviceMesh, or None for one device.
        layout: ``"zigzag"`` or ``"contiguous"``.

    Raises:
        InvalidValue: a tensor of the mask has another length.

    Example:
        >>> mask = MaskSpec(key_padding=torch.tensor([[True, True, False]]))
        >>> shard_mask(mask, 3, None).key_padding.tolist()
        [[True, True, False, False]]
    """
    _, rank, world = resolve(group)
    return cut_mask(mask, total_length, rank, world, layout)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Any, layout: str) -> Tensor:
        ctx.settings = (dim, group, layout, x.shape[dim])
        _, rank, world = resolve(group)
        return take_shard(x, dim, rank, world, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return unshard_sequence(grads[0], *ctx.settings), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, group: Any, layout: str, total_length: int
    ) -> Tensor:
        ctx.settings = (dim, group, layout)
        return unshard_sequence(x, dim, group, layout, total_length)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dim, group, layout = ctx.settings
        _, rank, world = resolve(group)
        part = take_shard(grads[0], dim, rank, world, layout)
        return part, None, None, None, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0].to(lse_dtype(grads[0]), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total.to(grads[0].dtype), None
