# SPDX-License-Identifier: Apache-2.0
"""Timings that can be compared: warm-up, interleaved runs, medians, intervals.

The two sides of a comparison run in turns and swap who goes first, so that a
drift of the machine meets both. The ratio is the median of the paired ratios;
its interval is the distribution-free one between two order statistics (David
and Nagaraja, Order Statistics, 3rd edition, 2003, section 7.1).
"""

import gc
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from torchworks_core.devices import detect
from torchworks_core.errors import InvalidValue

Clock = str | Callable[[], float]
_Function = Callable[[], Any]
_Timer = Callable[[_Function], float]
_CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the quartiles, and every repeat."""

    median: float
    low: float
    high: float
    times: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Seconds of two functions, and their ratio.

    Attributes:
        a_median: Median seconds of one call of ``a``.
        b_median: The same of ``b``.
        ratio: Median of the paired ratios a/b; below 1, ``a`` is faster.
        low: Lower end of the ratio's interval.
        high: Upper end of it.
        coverage: Chance that the interval holds the true median: at least 0.95
            from 6 repeats on.
        a: All timings of ``a``.
        b: All timings of ``b``.
    """

    a_median: float
    b_median: float
    ratio: float
    low: float
    high: float
    coverage: float
    a: Timing
    b: Timing


def measure(
    fn: Callable[[], Any],
    *,
    repeats: int = 15,
    warmup: int = 3,
    calls: int = 1,
    clock: Clock = "wall",
    device: str | torch.device | None = None,
) -> Timing:
    """Time ``fn``.

    Args:
        fn: Called without arguments.
        repeats: How many timings are taken.
        warmup: Timings taken before and thrown away.
        calls: Calls in one timing, for functions faster than the clock.
        clock: ``"wall"``, ``"process"`` (CPU time of all threads), or a function
            that returns seconds.
        device: A CUDA device is timed by its own events, and other
            accelerators are waited for; ``clock`` is then not asked on CUDA.

    Raises:
        InvalidValue: a count is below 1 (warm-up: below 0), or an unknown clock.

    Example:
        >>> ticks = iter(range(100))
        >>> measure(lambda: None, clock=lambda: float(next(ticks))).median
        1.0
    """
    return _rounds([fn], repeats, warmup, _timer(clock, calls, device))[0]


def compare(
    a: Callable[[], Any],
    b: Callable[[], Any],
    *,
    repeats: int = 15,
    warmup: int = 3,
    calls: int = 1,
    clock: Clock = "wall",
    device: str | torch.device | None = None,
) -> Comparison:
    """Time ``a`` against ``b`` in turns; arguments as for `measure`.

    Raises:
        InvalidValue: as `measure`, or ``b`` takes no time that the clock sees.
    """
    left, right = _rounds([a, b], repeats, warmup, _timer(clock, calls, device))
    if min(right.times) <= 0:
        raise InvalidValue("b", "the clock saw no time pass", "Raise calls")
    ratios = sorted(x / y for x, y in zip(left.times, right.times, strict=True))
    rank, coverage = _ranks(repeats)
    found = statistics.median(ratios), ratios[rank], ratios[-1 - rank], coverage
    return Comparison(left.median, right.median, *found, left, right)


def machine() -> dict[str, Any]:
    """Describe hardware and versions, with no host name and no path.

    Example:
        >>> {"cpu", "gpus", "torch", "date"} <= set(machine())
        True
    """
    cpu, *others = detect()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpu.name,
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": cpu.total_memory and round(cpu.total_memory / 2**30, 1),
        "gpus": [device.name for device in others],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _rounds(
    functions: list[_Function], repeats: int, warmup: int, timer: _Timer
) -> list[Timing]:
    if repeats < 1 or warmup < 0:
        raise InvalidValue(f"repeats={repeats}, warmup={warmup}")
    times: list[list[float]] = [[] for _ in functions]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(-warmup, repeats):
            order = list(range(len(functions)))
            for place in order if number % 2 else order[::-1]:
                seconds = timer(functions[place])
                if number >= 0:
                    times[place].append(seconds)
    finally:
        if collecting:
            gc.enable()
    return [_timing(found) for found in times]


def _timer(clock: Clock, calls: int, device: str | torch.device | None) -> _Timer:
    """Return a function that measures the seconds of one call."""
    if calls < 1 or (isinstance(clock, str) and clock not in _CLOCKS):
        raise InvalidValue(f"calls={calls}, clock={clock!r}", f"clocks: {[*_CLOCKS]}")
    kind = torch.device(device).type if device is not None else "cpu"
    now = _CLOCKS[clock] if isinstance(clock, str) else clock
    wait = (lambda: None) if kind == "cpu" else getattr(torch, kind).synchronize

    def by_clock(fn: _Function) -> float:
        wait()
        begin = now()
        for _ in range(calls):
            fn()
        wait()
        return (now() - begin) / calls

    def by_events(fn: _Function) -> float:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(calls):
                fn()
            end.record()
            end.synchronize()
        return begin.elapsed_time(end) / 1000 / calls

    return by_events if kind == "cuda" else by_clock


def _timing(times: list[float]) -> Timing:
    ordered, rank = sorted(times), (len(times) - 1) // 4
    low, high = ordered[rank], ordered[-1 - rank]
    return Timing(statistics.median(times), low, high, tuple(times))


def _ranks(count: int) -> tuple[int, float]:
    """Rank of the interval's ends, counted from 0 at both sides, and coverage."""
    ranks = range((count + 1) // 2)
    chances = (math.comb(count, rank) / 2 ** (count - 1) for rank in ranks)
    outside = list(itertools.accumulate(chances))
    rank = max(sum(chance <= 0.05 for chance in outside) - 1, 0)
    return rank, 1 - outside[rank]
