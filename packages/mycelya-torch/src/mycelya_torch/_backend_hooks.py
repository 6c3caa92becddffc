# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The module ``torch.mycelya``: what PyTorch and its users expect of a device.

A device index stands for a machine. Each machine has one stream, in which all
operations run in the order of the program.
"""

import os
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from mycelya_torch._device import SLOTS, index_of, manager
from mycelya_torch._errors import field

_U64 = 2**64
Device = torch.device | str | int | None
# The seed of the last manual_seed_all: machines that start later get it, too.
_seed_for_all: int | None = None


# torch.utils.checkpoint keeps the random state of initialized devices only.
_initialized = True


def is_available() -> bool:
    """Return whether a machine runs."""
    return next(manager.alive(), None) is not None


def device_count() -> int:
    """Return one more than the highest device index that has a machine.

    ``torch.accelerator.device_count()`` is always 32, the number of indices.
    """
    return max((index + 1 for index, _ in manager.alive()), default=0)


def current_device() -> int:
    """Return the device index that ``device="mycelya"`` stands for."""
    return torch.ops.mycelya.current_device()


def set_device(device: Device) -> None:
    """Choose the device index that ``device="mycelya"`` stands for in this thread."""
    torch.ops.mycelya.set_device(index_of(device))


class device:
    """Context manager: ``device="mycelya"`` stands for another index inside.

    As elsewhere in PyTorch, -1 changes nothing.
    """

    def __init__(self, device: Device) -> None:
        self.idx = -1 if device == -1 else index_of(device)
        self.prev_idx = -1

    def __enter__(self) -> None:
        if self.idx >= 0:
            self.prev_idx = torch.ops.mycelya.set_device(self.idx)

    def __exit__(self, *error: object) -> None:
        if self.idx >= 0:
            torch.ops.mycelya.set_device(self.prev_idx)


def synchronize(device: Device = None) -> None:
    """Wait until a machine has done all it was asked for; raise what failed."""
    index = index_of(device)
    # torch's profiler asks also where no machine was ever started.
    if torch.ops.mycelya.state(index) != "new":
        torch.ops.mycelya.synchronize(index, "synchronize")


def init() -> None:
    """Do nothing: machines are started by ``mycelya_torch.RemoteMachine``."""


_lazy_init = init


def is_initialized() -> bool:
    """Return True: there is nothing left to initialise after the import."""
    return True


def _is_in_bad_fork() -> bool:
    return torch.ops.mycelya.in_bad_fork()


# ---- random numbers ----


class _Generator:
    """The default generator of a device index; its state lives on the worker."""

    def __init__(self, index: int) -> None:
        self._index = index

    @property
    def device(self) -> torch.device:
        return torch.device("mycelya", self._index)

    def manual_seed(self, seed: int) -> "_Generator":
        seed = int(seed) % _U64
        signed = seed - _U64 if seed >= _U64 // 2 else seed
        torch.ops.mycelya.seed_default(self._index, signed)
        return self

    def seed(self) -> int:
        seed = int.from_bytes(os.urandom(8), "little")
        self.manual_seed(seed)
        return seed

    def initial_seed(self) -> int:
        return torch.ops.mycelya.default_initial_seed(self._index) % _U64

    def get_state(self) -> torch.Tensor:
        return torch.ops.mycelya.default_state(self._index)

    def set_state(self, new_state: torch.Tensor) -> "_Generator":
        torch.ops.mycelya.set_default_state(self._index, new_state)
        return self


default_generators: Sequence[_Generator] = tuple(
    _Generator(index) for index in range(SLOTS)
)


def manual_seed(seed: int) -> None:
    """Seed the current device's default generator; without a machine, remember it."""
    if current_device() in dict(manager.alive()):
        default_generators[current_device()].manual_seed(seed)
    else:
        manual_seed_all(seed)


def manual_seed_all(seed: int) -> None:
    """Seed all machines, also those that start later; ``torch.manual_seed`` does it."""
    global _seed_for_all
    _seed_for_all = int(seed)
    for index, _ in manager.alive():
        default_generators[index].manual_seed(seed)


def seed_new(index: int) -> None:
    """Give a machine that has just started the seed that all others got."""
    if _seed_for_all is not None:
        default_generators[index].manual_seed(_seed_for_all)


def seed() -> None:
    """Seed the current device's default generator from the system's randomness."""
    default_generators[current_device()].seed()


def seed_all() -> None:
    """Seed all machines alike, from the system's randomness."""
    manual_seed_all(int.from_bytes(os.urandom(8), "little"))


def initial_seed() -> int:
    """Return the seed of the current device's default generator."""
    return default_generators[current_device()].initial_seed()


def get_rng_state(device: Device = "mycelya") -> torch.Tensor:
    """Return the state of a device's default generator; one round trip."""
    return default_generators[index_of(device)].get_state()


def set_rng_state(new_state: torch.Tensor, device: Device = "mycelya") -> None:
    """Set the state of a device's default generator."""
    default_generators[index_of(device)].set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    """Return one state for each device index, an empty one where no machine runs."""
    alive = dict(manager.alive())
    empty = torch.empty(0, dtype=torch.uint8, device="cpu")
    return [get_rng_state(i) if i in alive else empty for i in range(device_count())]


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Set what `get_rng_state_all` returned."""
    for index, state in enumerate(new_states):
        if len(state):
            set_rng_state(state, index)


# ---- memory: of the worker's device ----

_MEMORY = ("allocated", "reserved", "max_allocated", "total", "free")


def _memory(device: Device = None) -> dict[str, int]:
    known = manager.at(index_of(device)).request({"do": "memory"}, "synchronize")
    return {name: field(known, name, int) for name in _MEMORY}


def memory_allocated(device: Device = None) -> int:
    """Return the bytes of the tensors on the worker."""
    return _memory(device)["allocated"]


def memory_reserved(device: Device = None) -> int:
    """Return the bytes that the worker's allocator holds."""
    return _memory(device)["reserved"]


def max_memory_allocated(device: Device = None) -> int:
    """Return the largest `memory_allocated` since `reset_peak_memory_stats`."""
    return _memory(device)["max_allocated"]


def reset_peak_memory_stats(device: Device = None) -> None:
    """Begin the measurement of the largest `memory_allocated` anew."""
    manager.at(index_of(device)).request({"do": "reset_peak"}, "synchronize")


def memory_stats(device: Device = None) -> dict[str, int]:
    """Return what is known, under the names of ``torch.cuda.memory_stats``."""
    known = _memory(device)
    return {
        "allocated_bytes.all.current": known["allocated"],
        "allocated_bytes.all.peak": known["max_allocated"],
        "reserved_bytes.all.current": known["reserved"],
    }


def mem_get_info(device: Device = None) -> tuple[int, int]:
    """Return the free and the total bytes of the worker's device."""
    known = _memory(device)
    return known["free"], known["total"]


def empty_cache() -> None:
    """Have the workers' allocators give back what they don't use."""
    for _, life in manager.alive():
        life.request({"do": "empty_cache"}, "synchronize")


# ---- what the worker computes on ----


def get_device_properties(device: Device = None) -> SimpleNamespace:
    """Return the worker's device: ``name``, ``type``, ``total_memory`` and others."""
    life = manager.at(index_of(device))
    known = life.request({"do": "properties"}, "synchronize")
    field(known, "name", str)
    return SimpleNamespace(**{str(name): value for name, value in known.items()})


def get_device_name(device: Device = None) -> str:
    """Return the name of the worker's device, as ``"NVIDIA H200"`` or ``"cpu"``."""
    return get_device_properties(device).name


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Return the dtypes that ``torch.autocast("mycelya", ...)`` takes."""
    return [torch.float16, torch.bfloat16]


def is_bf16_supported() -> bool:
    """Return True: every worker computes in bfloat16."""
    return True


# ---- the one stream ----


class Stream:
    """The one stream of a machine; all its operations are in order.

    What would order streams among each other does nothing here.
    """

    def __init__(self, device: Device = None, priority: int = 0, **_: Any) -> None:
        self.device_index = index_of(device)
        self.device = torch.device("mycelya", self.device_index)
        self.stream_id = 0

    def synchronize(self) -> None:
        """Wait until the machine has done all it was asked for."""
        synchronize(self.device_index)

    def query(self) -> bool:
        """Wait, and return True: to ask costs as much as to wait."""
        self.synchronize()
        return True

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Record an event, a new one by default, and return it."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        """Do nothing on the event's own machine, else wait for it here."""
        event.wait(self)

    def wait_stream(self, stream: "Stream") -> None:
        """Do nothing for the same machine, else wait for the other one here."""
        if stream.device_index != self.device_index:
            stream.synchronize()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.device_index == self.device_index

    def __hash__(self) -> int:
        return hash((Stream, self.device_index))

    def __repr__(self) -> str:
        return f"torch.mycelya.Stream(device='{self.device}')"


class Event:
    """A point in a machine's stream that can be waited for, but not timed."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._index: int | None = None

    def record(self, stream: "Stream | None" = None) -> None:
        """Mark the present end of the stream."""
        self._index = stream.device_index if stream else current_device()

    def synchronize(self) -> None:
        """Wait until the machine has come to the mark, or further."""
        if self._index is not None:
            synchronize(self._index)

    def wait(self, stream: "Stream | None" = None) -> None:
        """Do nothing on the event's own machine, else wait for it here."""
        here = stream.device_index if stream else current_device()
        if self._index != here:
            self.synchronize()

    def query(self) -> bool:
        """Wait, and return True: to ask costs as much as to wait."""
        self.synchronize()
        return True

    def elapsed_time(self, end_event: "Event") -> float:
        """Raise: the worker's clock isn't asked. Time ``synchronize()`` instead.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "events of mycelya are not timed: measure time.perf_counter() around "
            "torch.mycelya.synchronize()"
        )


def current_stream(device: Device = None) -> Stream:
    """Return the machine's one stream."""
    return Stream(device)


def stream(stream: "Stream | None") -> "Stream":
    """Return a context manager that does nothing: there is one stream."""
    return Stream() if stream is None else stream
