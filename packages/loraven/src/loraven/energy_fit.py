# SPDX-License-Identifier: Apache-2.0
"""A hardware profile fitted to measured joules: joules = a·FLOPs + b·bytes + P·seconds.

Decisions:
- FLOPs and bytes are the `EnergyEstimator`'s own figures for the shapes that run, so
  that the profile gives back what was measured at the default utilization.
- All traffic is one figure: the counter doesn't see levels of a cache. It stands
  under ``dram_energy_per_byte``, with caches of size 0.
- Relative errors are minimised, with no coefficient below 0. Three columns have
  seven subsets: the least squares of each are tried, and the best is exact.
"""

import itertools
import os
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from loraven import meter
from loraven.checks import number
from loraven.energy import EnergyEstimator
from loraven.meter import EnergyUnavailableError
from torchworks_core.devices import cpu_name
from torchworks_core.errors import InvalidValue

_UTILIZATION = 0.8
_BAD_FIT = 0.15


class Shape(NamedTuple):
    """A low-rank layer, dense from the break-even rank on, and its batch."""

    in_features: int
    out_features: int
    rank: int
    batch_size: int


class Run(NamedTuple):
    """One measured window: the work in it, its length, its energy."""

    flops: float
    moved: float
    seconds: float
    joules: float


def calibrate_energy(
    device: str | torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Measure a hardware profile for `EnergyEstimator`.

    Runs 12 layers (two sizes, two ranks, three batch sizes), each for ``seconds`` and
    a quarter more to warm up, about half a minute. Nothing else may use the device.

    Args:
        device: ``"cuda"`` or ``"cpu"``; needs a counter that can be read.
        dtype: Floating-point type of weights and inputs; the profile holds for it.
        seconds: Length of a window; at least 2 on CUDA and 0.1 on the CPU.

    Returns:
        The nine keys of `get_default_hardware_profile` and ``idle_power``,
        ``memory_bandwidth``, ``bytes_per_element``, ``source``
        (``"calibrated:<device>:<date>"``). Cores and frequency give the measured
        speed as their product; only that has a meaning. A UserWarning is given when
        the fit misses the measured energies by more than 15 % on average.

    Raises:
        TypeError: an argument has the wrong type.
        InvalidValue: ``seconds`` is too short, or ``dtype`` no floating point.
        EnergyUnavailableError: there is no counter, or a window was invalid.

    Example:
        >>> try:
        ...     profile = calibrate_energy("meta")
        ... except EnergyUnavailableError as error:
        ...     print(error)
        device 'meta': only CUDA and CPU have an energy counter.
    """
    device = meter.as_device(device)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, not {type(dtype).__name__}")
    if not dtype.is_floating_point:
        raise InvalidValue(f"dtype={dtype}", "not a floating-point type")
    length = number("seconds", seconds)
    counter = meter.open_counter(device)
    counter.close()
    if length < counter.shortest:
        why = f"the counter needs {counter.shortest:g} s"
        raise InvalidValue(f"seconds={length:g}", why)
    runs = [_measure(device, dtype, shape, length) for shape in _shapes(device)]
    return fit_profile(runs, device, dtype)


def fit_profile(
    runs: list[Run], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Fit a hardware profile to measured windows; see `calibrate_energy`."""
    joules = np.array([run.joules for run in runs])
    relative = np.array([run[:3] for run in runs]) / joules[:, None]
    fitted = nonnegative_least_squares(relative, np.ones(len(runs)))
    miss = float(np.abs(relative @ fitted - 1).mean())
    if miss > _BAD_FIT:
        text = f"the fit misses the measured energies by {miss:.0%} on average"
        warnings.warn(text, UserWarning, stacklevel=3)
    per_flop, per_byte, idle = (float(value) for value in fitted)
    speed, bandwidth = _speeds(runs)
    name, cores = _describe(device)
    return {
        "dram_energy_per_byte": 1000.0 * per_byte,
        "l2_cache_energy_per_byte": 0.0,
        "l1_cache_energy_per_byte": 0.0,
        "compute_energy_per_flop": 1000.0 * per_flop * _UTILIZATION,
        "l1_cache_size": 0,
        "l2_cache_size": 0,
        "gpu_cores": cores,
        "base_frequency": speed / (2.0 * cores * _UTILIZATION),
        "thermal_design_power": max(run.joules / run.seconds for run in runs),
        "idle_power": idle,
        "memory_bandwidth": bandwidth,
        "bytes_per_element": dtype.itemsize,
        "source": f"calibrated:{name}:{datetime.now(UTC).date().isoformat()}",
    }


def nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Minimise the norm of matrix @ x - target over x >= 0, by trying all supports.

    Args:
        matrix: Shape (rows, columns), finite, a few columns: 2^columns supports.
        target: Shape (rows,).

    Returns:
        x, shape (columns,), float64.

    Example:
        >>> nonnegative_least_squares(np.eye(2), np.array([3.0, -1.0]))
        array([3., 0.])
    """
    columns = matrix.shape[1]
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    best, least = np.zeros(columns), float(np.linalg.norm(target))
    for size in range(1, columns + 1):
        for support in itertools.combinations(range(columns), size):
            part = matrix[:, support] / scale[[*support]]
            found = np.linalg.lstsq(part, target, rcond=None)[0]
            error = float(np.linalg.norm(part @ found - target))
            if found.min() >= 0 and error < least:
                best, least = np.zeros(columns), error
                best[[*support]] = found / scale[[*support]]
    return best


def _shapes(device: torch.device) -> list[Shape]:
    large = device.type == "cuda"
    sizes = (4096, 8192) if large else (512, 1024)
    batches = (16, 512, 8192) if large else (1, 16, 256)
    ranks = (8, 1)
    found = itertools.product(sizes, ranks, batches)
    return [Shape(size, size, size // share, batch) for size, share, batch in found]


def _measure(
    device: torch.device, dtype: torch.dtype, shape: Shape, seconds: float
) -> Run:
    """Repeat one layer for the given time, after a quarter of it to warm up."""
    call = _runner(device, dtype, shape)
    wait = meter.waiter(device)
    calls, took = _repeat(call, wait, seconds / 4, 1)
    # About 20 ms between two looks at the clock.
    chunk = max(1, int(calls * 0.02 / took))
    with meter.measure_energy(device) as reading:
        calls, _ = _repeat(call, wait, seconds, chunk)
    if not reading.valid:
        raise EnergyUnavailableError(f"window of {shape}", reading.reason)
    estimator = EnergyEstimator({"bytes_per_element": dtype.itemsize})
    dims, rank, batch = shape[:2], shape.rank, shape.batch_size
    work = estimator.estimate_all(dims, rank, batch)
    moved = work["memory_mb"] * 1e6
    return Run(calls * work["flops"], calls * moved, reading.seconds, reading.joules)


def _repeat(
    call: Callable[[], Any], wait: Callable[[], None], seconds: float, chunk: int
) -> tuple[int, float]:
    """Call for at least ``seconds``; return the number of calls and their time."""
    calls, start, took = 0, meter.clock(), 0.0
    while took <= seconds:
        for _ in range(chunk):
            call()
        wait()
        calls, took = calls + chunk, meter.clock() - start
    return calls, took


def _runner(
    device: torch.device, dtype: torch.dtype, shape: Shape
) -> Callable[[], torch.Tensor]:
    inside, outside, rank, batch = shape

    def make(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device).to(dtype)

    x = make(batch, inside)
    if rank * (inside + outside) >= inside * outside:
        weight = make(outside, inside)
        return lambda: F.linear(x, weight)
    down, up = make(rank, inside), make(outside, rank)
    return lambda: F.linear(F.linear(x, down), up)


def _speeds(runs: list[Run]) -> tuple[float, float]:
    """FLOPs/s and bytes/s whose slower one explains the seconds best.

    Both are sought among those that the runs reached, by the sum of squared logs.
    """
    flops, moved, seconds = np.array([run[:3] for run in runs]).T

    def error(pair: tuple[float, float]) -> float:
        expected = np.maximum(flops / pair[0], moved / pair[1])
        return float((np.log(expected / seconds) ** 2).sum())

    pairs = itertools.product(flops / seconds, moved / seconds)
    speed, bandwidth = min(pairs, key=error)
    return float(speed), float(bandwidth)


def _describe(device: torch.device) -> tuple[str, int]:
    """The device's name, without colons, and its number of cores."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return found.name.replace(":", " "), found.multi_processor_count
    return cpu_name().replace(":", " "), os.cpu_count() or 1
