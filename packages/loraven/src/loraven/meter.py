# SPDX-License-Identifier: Apache-2.0
"""Joules from the counters of the hardware, or a reason why there are none.

NVIDIA: ``nvmlDeviceGetTotalEnergyConsumption``, mJ since the driver was loaded
(Volta and later), of the whole GPU. CPU: RAPL's counters under Linux's powercap
interface, of the whole machine. Samples of power are no replacement: on A100 and H100
they see a quarter of the time.

Decisions:
- A reading that can't be trusted is invalid, with the reason and NaN joules; it is
  never 0 and never a guess.
- NVML needs 2 seconds: its counter ticks every 20 to 100 ms. RAPL ticks every
  millisecond, so a tenth of a second is enough.
- Inside a container NVML names processes by their numbers outside. Where ours is not
  in the list, one process is taken for us if we hold a CUDA context.
- RAPL counters wrap, and a wrap is put right; a window in which 500 W could run
  through a counter's whole range is invalid.
- Only compute processes count as other users of a GPU: a desktop's display server
  holds a context all the time.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from torchworks_core.errors import InvalidValue, NotReady

POWERCAP = Path("/sys/class/powercap")
# Looked up at each call, so that a test can put another one here.
clock = time.perf_counter
_MOST_WATTS = 500.0


class EnergyUnavailableError(NotReady):
    """No energy counter can be read on this device."""


@dataclass
class EnergyReading:
    """Energy of a window, filled in when `measure_energy` closes it.

    Attributes:
        joules: Energy of the whole device; NaN unless ``valid``.
        seconds: Length of the window; NaN while it is open.
        valid: Whether ``joules`` can be trusted.
        reason: Why not; empty when valid.
        source: The counter, for example ``"nvml:NVIDIA H200"``; ``"none"`` without.
    """

    joules: float = math.nan
    seconds: float = math.nan
    valid: bool = False
    reason: str = "the window is still open"
    source: str = "none"


class Counter(Protocol):
    """What a device's counter offers to `measure_energy`."""

    source: str
    shortest: float

    def read(self) -> Any:
        """Read the counter; raises `EnergyUnavailableError`."""

    def joules(self, before: Any, after: Any, seconds: float) -> float:
        """Energy between two readings; raises `EnergyUnavailableError`."""

    def close(self) -> None:
        """Give the counter back."""


@contextmanager
def measure_energy(
    device: str | torch.device | None = None,
) -> Iterator[EnergyReading]:
    """Measure the energy that a device uses inside the ``with`` block.

    On CUDA the block begins and ends with a synchronisation, so that it holds all
    the work that was queued in it, and no other.

    Args:
        device: ``"cuda"``, ``"cuda:1"``, ``"cpu"``; None is the current CUDA device
            where there is one, else the CPU. Other kinds have no counter.

    Yields:
        An `EnergyReading`, filled in at the end. It is invalid, with a reason, when
        there is no counter (no driver, no right to read it, loraven[energy] not
        installed), the window was too short, the counter was reset, another process
        used the GPU, or MIG splits it.

    Example:
        >>> with measure_energy("cpu") as reading:
        ...     pass
        >>> reading.valid, math.isnan(reading.joules), bool(reading.reason)
        (False, True, True)
    """
    device = as_device(device)
    reading = EnergyReading()
    try:
        counter = open_counter(device)
    except EnergyUnavailableError as error:
        reading.reason = str(error)
        start = clock()
        try:
            yield reading
        finally:
            reading.seconds = clock() - start
        return
    try:
        yield from _window(counter, reading, waiter(device))
    finally:
        counter.close()


def open_counter(device: torch.device) -> Counter:
    """Return the energy counter of a device.

    Raises:
        EnergyUnavailableError: it has none that can be read; says why.
    """
    if device.type == "cuda":
        return NvmlCounter(device)
    if device.type == "cpu":
        return RaplCounter(POWERCAP)
    why = "only CUDA and CPU have an energy counter"
    raise EnergyUnavailableError(f"device {str(device)!r}", why)


class NvmlCounter:
    """The energy counter of one NVIDIA GPU, in mJ."""

    shortest = 2.0

    def __init__(self, device: torch.device) -> None:
        try:
            import pynvml
        except ImportError as error:
            do = "Install loraven[energy]"
            why = "pynvml is missing"
            raise EnergyUnavailableError("NVML", why, do) from error
        # Its error classes are made when it is imported: no type checker sees them.
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise EnergyUnavailableError("NVML", str(error)) from error
        try:
            self._open(_uuid(device))
        except pynvml.NVMLError as error:
            self.close()
            raise EnergyUnavailableError("NVML", str(error)) from error
        except BaseException:
            self.close()
            raise

    def _open(self, uuid: str) -> None:
        nvml = self._nvml
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        name = nvml.nvmlDeviceGetName(self._handle)
        self.source = f"nvml:{name.decode() if isinstance(name, bytes) else name}"
        try:
            split = nvml.nvmlDeviceGetMigMode(self._handle)[0] != 0
        except nvml.NVMLError_NotSupported:
            split = False
        if split:
            why = "MIG splits this GPU, and the counter is the whole GPU's"
            raise EnergyUnavailableError("NVML", why)
        nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def read(self) -> tuple[int, set[int]]:
        """Return the counter and the processes on the GPU."""
        nvml, handle = self._nvml, self._handle
        try:
            found = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            energy = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError as error:
            raise EnergyUnavailableError("NVML", str(error)) from error
        return energy, {process.pid for process in found}

    def joules(self, before: Any, after: Any, seconds: float) -> float:
        """Subtract; refuses a counter that fell, and a GPU with other users."""
        others = _others(before[1]) | _others(after[1])
        if others:
            why = f"{len(others)} other process(es) used the GPU"
            raise EnergyUnavailableError("NVML", why)
        if after[0] < before[0]:
            why = f"the counter fell from {before[0]} to {after[0]} mJ"
            raise EnergyUnavailableError("NVML", why, "Was the driver reloaded?")
        if after[0] == before[0]:
            raise EnergyUnavailableError("NVML", "the counter stood still")
        return (after[0] - before[0]) / 1000.0

    def close(self) -> None:
        """Balance nvmlInit."""
        self._nvml.nvmlShutdown()


class RaplCounter:
    """The CPU packages' and memory's energy counters, in µJ.

    Args:
        folder: Linux's powercap folder.
    """

    shortest = 0.1

    def __init__(self, folder: Path) -> None:
        zones = sorted(folder.glob("intel-rapl:*"))
        try:
            named = [(zone, (zone / "name").read_text().strip()) for zone in zones]
            self._zones = [zone for zone, name in named if _counts(name)]
            self._ranges = [_number(z / "max_energy_range_uj") for z in self._zones]
            self.read()
        except (OSError, ValueError) as error:
            raise EnergyUnavailableError("RAPL", f"can't be read: {error}") from error
        if not self._zones:
            why = f"no CPU package under {str(folder)!r}"
            raise EnergyUnavailableError("RAPL", why)
        names = "+".join(name for _, name in named if _counts(name))
        self.source = f"rapl:{names}"

    def read(self) -> list[int]:
        """Return the counter of each zone."""
        try:
            return [_number(zone / "energy_uj") for zone in self._zones]
        except (OSError, ValueError) as error:
            raise EnergyUnavailableError("RAPL", f"can't be read: {error}") from error

    def joules(self, before: Any, after: Any, seconds: float) -> float:
        """Subtract, a wrapped counter's range added."""
        if seconds * _MOST_WATTS * 1e6 > min(self._ranges):
            why = f"a counter may pass its whole range in {seconds:.0f} s"
            raise EnergyUnavailableError("RAPL", why, "Measure shorter windows")
        total = 0
        for first, last, size in zip(before, after, self._ranges, strict=True):
            if max(first, last) > size:
                raise EnergyUnavailableError("RAPL", "a counter left its range")
            total += last - first if last >= first else last - first + size
        if not total:
            raise EnergyUnavailableError("RAPL", "the counters stood still")
        return total / 1e6

    def close(self) -> None:
        """Do nothing: files are opened for each reading."""


def _window(
    counter: Counter, reading: EnergyReading, wait: Callable[[], None]
) -> Iterator[EnergyReading]:
    """Read, yield, read, and fill in the reading; the block's errors pass on."""
    reading.source = counter.source
    wait()
    before, failure = None, ""
    try:
        before = counter.read()
    except EnergyUnavailableError as error:
        failure = str(error)
    start = clock()
    try:
        yield reading
    except BaseException as error:
        reading.seconds = clock() - start
        reading.reason = f"the block raised {type(error).__name__}"
        raise
    wait()
    reading.seconds = clock() - start
    try:
        if failure:
            raise EnergyUnavailableError(failure)
        after = counter.read()
        reading.joules = _checked(counter, before, after, reading.seconds)
        reading.valid, reading.reason = True, ""
    except EnergyUnavailableError as error:
        reading.reason = str(error)


def _checked(counter: Counter, before: Any, after: Any, seconds: float) -> float:
    if seconds < counter.shortest:
        why = f"{seconds:.3g} s, shorter than {counter.shortest:g} s"
        raise EnergyUnavailableError("window", why, "Repeat the work in it")
    return counter.joules(before, after, seconds)


def as_device(device: str | torch.device | None) -> torch.device:
    """Check a device; None is CUDA where there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a str or device, not {type(device).__name__}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InvalidValue(f"device={device!r}", "torch knows no such") from error


def waiter(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for the device's queued work."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


def _uuid(device: torch.device) -> str:
    """NVML's name of a CUDA device: its index is another under a visibility list."""
    try:
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise EnergyUnavailableError(f"device {str(device)!r}", why) from error


def _others(pids: set[int]) -> set[int]:
    """Processes on the GPU besides this one."""
    if os.getpid() in pids:
        return pids - {os.getpid()}
    alone = len(pids) == 1 and torch.cuda.is_initialized()
    return set() if alone else pids


def _counts(name: str) -> bool:
    """Whether a zone adds to the total: the others are parts of a package."""
    return name.startswith("package") or name == "dram"


def _number(path: Path) -> int:
    return int(path.read_text())
