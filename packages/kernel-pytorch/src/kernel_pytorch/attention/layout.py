# SPDX-License-Identifier: Apache-2.0
"""Which positions of a sequence each rank holds.

``"contiguous"``: rank r of P holds the r-th of P equal parts. ``"zigzag"``: it holds
parts r and 2P - 1 - r of 2P, so that under a causal mask every rank has the same number
of query-key pairs. Shards have equal length on all ranks: positions from the total
length on are padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from torchworks_core.errors import InvalidValue

LAYOUTS = ("zigzag", "contiguous")


def shard_sequence(x: Tensor, dim: int, group: Any, layout: str = "zigzag") -> Tensor:
    """Return this rank's part of ``x``; no communication.

    Args:
        x: The whole tensor, equal on all ranks.
        dim: The dimension of the sequence, of length N.
        group: ProcessGroup, 1-D DeviceMesh, or None for one device.
        layout: ``"zigzag"`` or ``"contiguous"``.

    Returns:
        ``x`` with length 2 * ceil(N / 2P) (zigzag) or ceil(N / P) in ``dim``; padding
        is 0 (False).

    Raises:
        InvalidValue: an unknown layout, or a mesh of more than one dimension.

    Example:
        >>> shard_sequence(torch.arange(3), 0, None)
        tensor([0, 1, 2, 0])
    """
    _, rank, world = resolve(group)
    return take_shard(x, dim, rank, world, layout)


def unshard_sequence(
    x: Tensor, dim: int, group: Any, layout: str, total_length: int
) -> Tensor:
    """Collect the shards of all ranks, without their padding; no gradient.

    Args:
        x: This rank's shard, as from `shard_sequence`.
        dim: The dimension of the sequence.
        group: As in `shard_sequence`.
        layout: As in `shard_sequence`.
        total_length: Length of the whole sequence.

    Returns:
        The whole tensor, equal on all ranks.

    Raises:
        InvalidValue: an unknown layout, or a length that is not that of a shard.

    Example:
        >>> part = shard_sequence(torch.arange(3), 0, None)
        >>> unshard_sequence(part, 0, None, "zigzag", 3)
        tensor([0, 1, 2])
    """
    group, _, world = resolve(group)
    local = shard_length(total_length, world, layout)
    if x.shape[dim] != local:
        why = f"a shard of {total_length} tokens on {world} ranks has {local}"
        raise InvalidValue(f"length {x.shape[dim]} in dimension {dim}", why)
    parts = [x.detach().contiguous()]
    if world > 1:
        parts = [torch.empty_like(parts[0]) for _ in range(world)]
        dist.all_gather(parts, x.detach().contiguous(), group=group)
    return join_shards(parts, dim, layout, total_length)


def shard_positions(total_length: int, group: Any, layout: str = "zigzag") -> Tensor:
    """Return the position of each token of this rank's shard, int64 on the CPU.

    Positions from ``total_length`` on are padding.

    Raises:
        InvalidValue: as `shard_sequence`.

    Example:
        >>> shard_positions(3, None).tolist()
        [0, 1, 2, 3]
    """
    _, rank, world = resolve(group)
    parts = segments(total_length, rank, world, layout)
    return torch.cat([torch.arange(part.start, part.stop) for part in parts])


def resolve(group: Any) -> tuple[Any, int, int]:
    """Return process group, own rank in it, and its size; None is one device.

    Raises:
        InvalidValue: a mesh of more than one dimension, or this process is not in the
            group.
    """
    if group is None:
        return None, 0, 1
    if hasattr(group, "get_group"):
        if group.ndim != 1:
            raise InvalidValue(f"device mesh of {group.ndim} dimensions", "needs 1")
        group = group.get_group()
    rank = dist.get_rank(group)
    if rank < 0:
        raise InvalidValue("group", "this process is not a member of it")
    return group, rank, dist.get_world_size(group)


def check_layout(layout: str) -> None:
    """Raise InvalidValue unless ``layout`` is known."""
    if layout not in LAYOUTS:
        raise InvalidValue(f"layout={layout!r}", f"it must be one of {LAYOUTS}")


def shard_length(total_length: int, world: int, layout: str) -> int:
    """Return the length of one shard, padding included.

    Example:
        >>> shard_length(10, 4, "zigzag"), shard_length(10, 4, "contiguous")
        (4, 3)
    """
    check_layout(layout)
    if layout == "zigzag":
        return 2 * -(-total_length // (2 * world))
    return -(-total_length // world)


def segments(
    total_length: int, rank: int, world: int, layout: str
) -> tuple[range, ...]:
    """Return the position ranges that ``rank`` holds, in order, with padding.

    Example:
        >>> segments(16, 1, 4, "zigzag")
        (range(2, 4), range(12, 14))
    """
    local = shard_length(total_length, world, layout)
    if layout == "contiguous":
        return (range(rank * local, (rank + 1) * local),)
    part, late = local // 2, 2 * world - 1 - rank
    early = range(rank * part, (rank + 1) * part)
    return early, range(late * part, (late + 1) * part)


def take_shard(x: Tensor, dim: int, rank: int, world: int, layout: str) -> Tensor:
    """Cut the shard of any rank out of ``x``; differentiable."""
    dim, total = dim % x.ndim, x.shape[dim]
    parts = []
    for part in segments(total, rank, world, layout):
        start, stop = min(part.start, total), min(part.stop, total)
        piece = x.narrow(dim, start, stop - start)
        missing = len(part) - (stop - start)
        widths = (0, 0) * (x.ndim - 1 - dim) + (0, missing)
        parts.append(pad(piece, widths) if missing else piece)
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)


def join_shards(
    parts: list[Tensor], dim: int, layout: str, total_length: int
) -> Tensor:
    """Put the shards of all ranks together, and drop padding; differentiable."""
    if layout == "zigzag":
        halves = [part.tensor_split(2, dim) for part in parts]
        parts = [half[0] for half in halves] + [half[1] for half in halves[::-1]]
    return torch.cat(parts, dim).narrow(dim, 0, total_length)
