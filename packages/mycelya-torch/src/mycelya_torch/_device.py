# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which machine a device index stands for.

There are 32 indices, as autograd sizes its threads once. An index is given out
again only when no storage of its former machine is left.
"""

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from torchworks_core.errors import InvalidValue, NotReady

if TYPE_CHECKING:
    from mycelya_torch._life import Life

SLOTS = 32
ALIVE = ("starting", "running", "resuming")


class DeviceManager:
    """Device index <-> the life of a machine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: list[Life | None] = [None] * SLOTS

    def claim(self, life: "Life") -> int:
        """Return a free index, which ``life`` now has.

        Raises:
            NotReady: all are taken.
        """
        with self._lock:
            for index, former in enumerate(self._slots):
                if former is None or self._is_free(index, former):
                    self._slots[index] = life
                    return index
        why = f"there are {SLOTS} device indices, and each has a machine or its tensors"
        do = "Stop machines that aren't needed, and drop their tensors"
        raise NotReady("no device index is left", why, do)

    def release(self, index: int, life: "Life") -> None:
        """Take back the index of a machine that never opened."""
        with self._lock:
            if self._slots[index] is life:
                self._slots[index] = None

    def at(self, index: int) -> "Life":
        """Return the machine at an index.

        Raises:
            RuntimeError: there is none.
        """
        life = self._slots[index] if 0 <= index < SLOTS else None
        if life is None:
            do = "Make one with mycelya_torch.RemoteMachine"
            raise NotReady(f"device mycelya:{index}", "it has no machine", do)
        return life

    def alive(self) -> Iterator[tuple[int, "Life"]]:
        """Yield the machines that run, or are about to."""
        for index, life in enumerate(list(self._slots)):
            if life is not None and life.state in ALIVE:
                yield index, life

    def starting(self) -> list["Life"]:
        """Return the machines that have not opened yet, and may never do."""
        return [life for life in self._slots if life is not None and not life.is_begun]

    def forget(self) -> None:
        """Drop everything: after a fork the machines belong to the parent."""
        self._lock = threading.Lock()
        self._slots = [None] * SLOTS

    def is_at(self, index: int, life: "Life") -> bool:
        """Return whether the index still stands for this life of a machine."""
        return self._slots[index] is life

    @staticmethod
    def _is_free(index: int, life: "Life") -> bool:
        return life.is_over and torch.ops.mycelya.live_storages(index) == 0


manager = DeviceManager()


def index_of(device: "torch.device | str | int | None") -> int:
    """Return the device index that a user means; the current one for None.

    Raises:
        RuntimeError: it is a device of another kind.
        ValueError: there is no such index.
    """
    if device is not None and not isinstance(device, int):
        device = torch.device(device)
        if device.type != "mycelya":
            raise RuntimeError(f"a mycelya device is needed, but this is {device}")
        device = device.index
    if device is None:
        return torch.ops.mycelya.current_device()
    if not 0 <= device < SLOTS:
        raise InvalidValue(f"device index {device}", f"it is 0 to {SLOTS - 1}")
    return device


def require(tensor: torch.Tensor) -> None:
    """Refuse what is no tensor of a machine.

    Raises:
        RuntimeError: names what it is.
    """
    if not isinstance(tensor, torch.Tensor):
        kind = type(tensor).__name__
        raise RuntimeError(f"a mycelya tensor is needed, but this is a {kind}")
    if tensor.device.type != "mycelya":
        raise RuntimeError(
            f"a mycelya tensor is needed, but this one is on {tensor.device}: move it "
            "with .to(machine.device())"
        )
