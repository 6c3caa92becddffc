# SPDX-License-Identifier: Apache-2.0
"""All ranks agree on a call, or all raise the same error, before anything is sent.

A rank that fails alone would leave the others waiting. So no local check may raise
before this exchange: each rank sends a few numbers, and then everybody knows.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from torchworks_core.errors import InvalidValue

_TEXT = 512


def agree(
    group: Any, world: int, fields: tuple[str, ...], local: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Run ``local`` and compare its result over the ranks of ``group``.

    Args:
        group: ProcessGroup; None when ``world`` is 1.
        world: Its size.
        fields: Names of the values, in one order on all ranks.
        local: Checks this rank's arguments; returns an int, bool, float, str or None
            for each name.

    Returns:
        What ``local`` returned.

    Raises:
        InvalidValue: two ranks differ, or ``local`` raised on some rank; the same
            message on every rank, naming ranks and values.
        NotImplementedError: ``local`` raised it on the first rank that failed.

    Example:
        >>> agree(None, 1, ("heads",), lambda: {"heads": 4})
        {'heads': 4}
    """
    if world == 1:
        return local()
    values: dict[str, Any] = {}
    text, status = "", 0
    row = torch.zeros(1 + len(fields), dtype=torch.int64)
    try:
        values = local()
        text = "|".join(f"{values[name]}" for name in fields)
        numbers = [_number(values[name]) for name in fields]
        row[1:] = torch.tensor(numbers, dtype=torch.int64)
    except NotImplementedError as error:
        text, status = str(error), 2
    except Exception as error:  # whatever it is, the other ranks must hear of it
        text, status = f"{type(error).__name__}: {error}", 1
    row[0] = status
    found = gather(row, group, world).tolist()
    if all(row == found[0] for row in found) and not status:
        return values
    letters = text.encode(errors="replace")[:_TEXT].ljust(_TEXT)
    told = gather(torch.frombuffer(bytearray(letters), dtype=torch.uint8), group, world)
    texts = [bytes(row.tolist()).decode(errors="replace").strip() for row in told]
    _raise([row[0] for row in found], found, texts, fields)
    raise AssertionError  # _raise always raises


def agree_once(
    group: Any,
    world: int,
    fields: tuple[str, ...],
    local: Callable[[], dict[str, Any]],
    agreed: WeakSet[Any],
    always: bool = False,
) -> dict[str, Any]:
    """As `agree`, but on NCCL, where that waits for the device, once for each group.

    Args:
        group: As for `agree`; and so ``world``, ``fields`` and ``local``.
        world: Its size.
        fields: Names of the values.
        local: Checks this rank's arguments.
        agreed: Groups whose ranks did agree; this one is added. It holds the groups
            themselves, as a name comes again once its group was destroyed.
        always: Compare in any case.

    Returns:
        What ``local`` returned.

    Raises:
        InvalidValue: as `agree`; without a comparison what ``local`` raises.
        NotImplementedError: likewise.

    Example:
        >>> agree_once(None, 1, ("heads",), lambda: {"heads": 4}, WeakSet())
        {'heads': 4}
    """
    # Which ranks look must not depend on local facts, or some would wait for ever.
    if world > 1 and not always and group in agreed:
        return local()
    values = agree(group, world, fields, local)
    if world > 1 and str(dist.get_backend(group)) == "nccl":
        agreed.add(group)
    return values


def gather(t: Tensor, group: Any, world: int) -> Tensor:
    """Return the small CPU tensors of all ranks, stacked on the CPU."""
    device = torch.device("cpu")
    if str(dist.get_backend(group)) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    t = t.to(device).contiguous()
    parts = [torch.empty_like(t) for _ in range(world)]
    dist.all_gather(parts, t, group=group)
    return torch.stack(parts).cpu()


def _raise(
    codes: list[int], found: list[list[int]], texts: list[str], fields: tuple[str, ...]
) -> None:
    for rank, code in enumerate(codes):
        if code == 2:
            raise NotImplementedError(texts[rank])
        if code:
            raise InvalidValue(f"rank {rank}", texts[rank])
    for place, name in enumerate(fields):
        column = [row[place + 1] for row in found]
        other = next((r for r, x in enumerate(column) if x != column[0]), None)
        if other is not None:
            first, second = (texts[r].split("|")[place] for r in (0, other))
            why = f"rank 0 has {first}, rank {other} has {second}"
            raise InvalidValue(f"ranks disagree on {name}", why)


def _number(value: Any) -> int:
    """Turn a value into an int64 that is equal for equal values."""
    if isinstance(value, float):
        return struct.unpack("<q", struct.pack("<d", value))[0]
    if isinstance(value, str):
        # Not hash(): it differs between processes.
        return zlib.crc32(value.encode())
    return -1 if value is None else int(value)
