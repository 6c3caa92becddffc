# SPDX-License-Identifier: Apache-2.0
"""loraven on one CUDA GPU: speed, joules and factorisation, as one line of JSON.

    PYTHONPATH=packages/loraven/src:packages/torchworks-core/src \
        python tools/gpu/loraven.py [--only H1,H4] [--dry]

H1 levels against dense at many rows; H2 decoding under CUDA graphs; H3 two plain
linears, run eagerly, against ours; H4 a calibrated estimator against the meter on
shapes that it was not fitted to; H5 joules saved against multiply-adds saved; H6
factorising one layer. Times are CUDA events, the contestants take turns, and each
one's minimum counts; a ratio above 1 means that we win. Nothing else may use the
GPU meanwhile: H4 and H5 read its energy counter, which needs nvidia-ml-py.

``--dry`` runs every function on tiny sizes, also without CUDA; its figures mean
nothing. Without CUDA and without it the exit code is 2.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# This file has the package's import name: without this line it would be imported in
# the package's place.
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from loraven import (  # noqa: E402
    EnergyEstimator,
    EnergyUnavailableError,
    NestedLinear,
    calibrate_energy,
    measure_energy,
)
from loraven.factorize import (  # noqa: E402
    Factors,
    InputStatistics,
    output_pca,
    pivot,
)
from loraven.forms import form_macs  # noqa: E402
from loraven.nested import Plan  # noqa: E402
from torchworks_core.bench import compare, machine, measure  # noqa: E402
from torchworks_core.errors import InvalidValue  # noqa: E402

Run = Callable[[], object]
FORMS = ("prefix", "gauge")
# Of an H200, for the share of it that decoding reaches; bytes in a second.
BANDWIDTH = 4.8e12


class Settings(NamedTuple):
    """What is measured, and where."""

    device: str
    dtype: torch.dtype
    dims: tuple[int, ...]
    rows: int
    decode_rows: tuple[int, ...]
    # Different layers in a decoding step: more weights than the L2 cache holds.
    layers: int
    seconds: float
    repeats: int
    held_out: tuple[tuple[int, int, int, int], ...]


REAL = Settings(
    "cuda",
    torch.bfloat16,
    (4096, 8192),
    8192,
    (1, 4, 16),
    12,
    2.5,
    30,
    (
        (6144, 6144, 768, 2048),
        (6144, 6144, 6144, 2048),
        (4096, 8192, 1024, 256),
        (8192, 4096, 4096, 4096),
        (5120, 5120, 1280, 64),
        (5120, 5120, 5120, 8192),
    ),
)
DRY = Settings(
    "cpu",
    torch.float32,
    (64,),
    32,
    (2,),
    2,
    0.1,
    2,
    ((48, 64, 16, 8), (48, 64, 48, 8)),
)


def main(arguments: list[str] | None = None) -> None:
    """Measure what was asked for, print one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(MEASURES), help="H1,H4")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    chosen = parser.parse_args(arguments)
    if not chosen.dry and not torch.cuda.is_available():
        print("No CUDA device: nothing to measure; --dry runs alone.", file=sys.stderr)
        sys.exit(2)
    settings = DRY if chosen.dry else REAL
    if chosen.dry and torch.cuda.is_available():
        settings = DRY._replace(device="cuda")
    found: dict[str, object] = {"hardware": machine(), "dry": chosen.dry}
    torch.manual_seed(0)
    for name in chosen.only.split(","):
        try:
            with torch.no_grad():
                found[name] = MEASURES[name](settings)
        except (RuntimeError, InvalidValue) as error:
            # Too little memory, no counter: said, not left out.
            found[name] = {"failed": str(error).splitlines()[0][:300]}
    print(json.dumps(found, allow_nan=False))


def levels(settings: Settings) -> dict[str, object]:
    """H1: every form at two ranks against the dense layer, at many rows."""
    found: dict[str, object] = {}
    for dim in settings.dims:
        x = noise(settings, settings.rows, dim)
        for share in (4, 8):
            dense, nested = family(settings, dim, dim // share)
            for level, form in enumerate(FORMS):
                run = at(nested, level, x)
                name = f"d={dim} r=d/{share} {form}, {settings.rows} rows"
                ideal = dim**2 / form_macs(dim, dim, dim // share, form)
                times = against(settings, run, lambda d=dense, x=x: d(x))
                found[name] = times | {"ratio of MACs": round(ideal, 3)}
            del dense, nested
    return found


def decode(settings: Settings) -> dict[str, object]:
    """H2: some layers in a row for few rows, both sides under a CUDA graph."""
    found: dict[str, object] = {}
    for dim in settings.dims:
        dense, nested = chains(settings, dim, dim // 4)
        for rows in settings.decode_rows:
            x = noise(settings, rows, dim)
            theirs = captured(settings, lambda x=x, d=dense: d(x))
            for level, form in enumerate(FORMS):
                set_level(nested, level)
                ours = captured(settings, lambda x=x, n=nested: n(x))
                times = against(settings, ours, theirs)
                macs = form_macs(dim, dim, dim // 4, form) * settings.layers
                size = torch.empty((), dtype=settings.dtype).element_size()
                speed = macs * size / (times["ours ms"] / 1000)
                share = {"of 4.8 TB/s": round(speed / BANDWIDTH, 3)}
                found[f"d={dim} r=d/4 {form}, {rows} rows"] = times | share
        del dense, nested
    return found


def naive(settings: Settings) -> dict[str, object]:
    """H3: two nn.Linear for each layer, eager, against ours eager and as a graph."""
    found: dict[str, object] = {}
    for dim in settings.dims:
        rank, options = dim // 4, {"device": settings.device, "dtype": settings.dtype}
        pairs = nn.Sequential()
        for _ in range(settings.layers):
            pairs.append(nn.Linear(dim, rank, bias=False, **options))
            pairs.append(nn.Linear(rank, dim, **options))
        nested = chains(settings, dim, rank)[1]
        set_level(nested, 0)
        for rows in settings.decode_rows:
            x = noise(settings, rows, dim)

            def theirs(x: Tensor = x, pairs: nn.Module = pairs) -> object:
                return pairs(x)

            def eager(x: Tensor = x, nested: nn.Module = nested) -> object:
                return nested(x)

            name = f"d={dim} r=d/4 prefix, {rows} rows"
            found[f"{name}, eager"] = against(settings, eager, theirs)
            graph = captured(settings, eager)
            found[f"{name}, graph"] = against(settings, graph, theirs)
        del pairs, nested
    return found


def estimator(settings: Settings) -> dict[str, object]:
    """H4: estimated against measured joules, shapes that the fit has not seen."""
    profile = calibrate_energy(
        settings.device, dtype=settings.dtype, seconds=settings.seconds
    )
    model = EnergyEstimator(profile)
    found: dict[str, object] = {"source": model.source}
    misses = []
    for inside, outside, rank, rows in settings.held_out:
        run = two_factors(settings, inside, outside, rank, rows)
        measured = 1000 * joules_of(settings, run)
        expected = model.estimate((inside, outside), rank, batch_size=rows)
        misses.append(abs(expected / measured - 1))
        found[f"{inside} to {outside}, rank {rank}, {rows} rows"] = {
            "measured mJ": round(measured, 4),
            "estimated mJ": round(expected, 4),
        }
    found["mean error"] = round(sum(misses) / len(misses), 4)
    found["worst error"] = round(max(misses), 4)
    return found


def saving(settings: Settings) -> dict[str, object]:
    """H5: share of the joules that a level saves, over its share of multiply-adds."""
    found: dict[str, object] = {}
    for dim in settings.dims:
        x = noise(settings, settings.rows, dim)
        dense, nested = family(settings, dim, dim // 4)
        whole = joules_of(settings, lambda d=dense, x=x: d(x))
        for level, form in enumerate(FORMS):
            part = joules_of(settings, at(nested, level, x))
            macs = 1 - form_macs(dim, dim, dim // 4, form) / dim**2
            found[f"d={dim} r=d/4 {form}, {settings.rows} rows"] = {
                "dense mJ a row": round(1000 * whole / settings.rows, 6),
                "level mJ a row": round(1000 * part / settings.rows, 6),
                "joules saved": round(1 - part / whole, 4),
                "MACs saved": round(macs, 4),
                "ratio": round((1 - part / whole) / macs, 3),
            }
    return found


def factorise(settings: Settings) -> dict[str, object]:
    """H6: statistics of a stream, then the factors and pivots of one layer."""
    dim = settings.dims[0]
    weight = noise(settings, dim, dim)
    data = [noise(settings, settings.rows, dim) for _ in range(3)]
    found: dict[str, object] = {"d": dim, "tokens": 3 * settings.rows}
    statistics = InputStatistics(dim, settings.device)
    statistics.add(data[0][:64])

    def gather() -> None:
        for x in data:
            statistics.add(x)

    found["statistics s"] = seconds_of(settings, gather)
    moments = statistics.finish()

    def split() -> None:
        pivot(output_pca(weight, None, moments).up)

    # The first one loads the solver's library.
    found["factors s, first"] = seconds_of(settings, split)
    found["factors s"] = seconds_of(settings, split)
    return found


MEASURES: dict[str, Callable[[Settings], dict[str, object]]] = {
    "H1": levels,
    "H2": decode,
    "H3": naive,
    "H4": estimator,
    "H5": saving,
    "H6": factorise,
}


def noise(settings: Settings, *shape: int) -> Tensor:
    """Normal numbers in the dtype and on the device of the run."""
    return torch.randn(*shape, device=settings.device).to(settings.dtype)


def family(settings: Settings, dim: int, rank: int) -> tuple[nn.Linear, NestedLinear]:
    """A dense layer, and one with both forms of a projection of it."""
    dense = nn.Linear(dim, dim, device=settings.device, dtype=settings.dtype)
    wide = torch.randn(dim, rank, device=settings.device, dtype=torch.float64)
    up = torch.linalg.qr(wide)[0].T.contiguous()
    zeros = torch.zeros(rank + 1, device=settings.device, dtype=torch.float64)
    factors = Factors(
        up=up,
        down=up @ dense.weight.double(),
        down_bias=zeros[:rank],
        up_bias=dense.bias.double(),
        tail=zeros,
        energy=1.0,
    )
    plans = [Plan(rank, form) for form in FORMS]
    return dense, NestedLinear(dense, factors, pivot(up), plans)


def chains(settings: Settings, dim: int, rank: int) -> tuple[nn.Module, nn.Module]:
    """Several layers in a row, none of which shares its memory with another."""
    dense, nested = family(settings, dim, rank)
    count = range(settings.layers)
    both = ([copy.deepcopy(part) for _ in count] for part in (dense, nested))
    first, second = (nn.Sequential(*parts) for parts in both)
    return first, second


def set_level(chain: nn.Module, level: int) -> None:
    """Put every layer on one level."""
    for layer in chain:
        layer.set_level(level)


def at(nested: NestedLinear, level: int, x: Tensor) -> Run:
    """One forward at a level, which is set before."""

    def run() -> object:
        nested.level = level
        return nested(x)

    return run


def two_factors(
    settings: Settings, inside: int, outside: int, rank: int, rows: int
) -> Run:
    """Two matrix products, or one where the rank is full."""
    x, linear = noise(settings, rows, inside), nn.functional.linear
    if rank == min(inside, outside):
        weight = noise(settings, outside, inside)
        return lambda: linear(x, weight)
    down, up = noise(settings, rank, inside), noise(settings, outside, rank)
    return lambda: linear(linear(x, down), up)


def captured(settings: Settings, run: Run) -> Run:
    """The same work as one CUDA graph; without CUDA as it is."""
    if settings.device == "cpu":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def against(settings: Settings, ours: Run, theirs: Run) -> dict[str, float]:
    """Least milliseconds of both in turns, and theirs / ours."""
    once = measure(theirs, repeats=3, device=settings.device).median
    options = {"repeats": settings.repeats, "device": settings.device}
    pair = compare(ours, theirs, calls=max(1, round(2e-3 / once)), **options)
    mine, other = 1000 * min(pair.a.times), 1000 * min(pair.b.times)
    times = {"ours ms": round(mine, 5), "theirs ms": round(other, 5)}
    return times | {"ratio": round(other / mine, 3)}


def joules_of(settings: Settings, run: Run) -> float:
    """Joules of one call, over a window of many.

    Raises:
        EnergyUnavailableError: no counter, or a window that can't be trusted.
    """
    calls, took = repeat(settings, run, settings.seconds / 4, 1)
    # About 20 ms between two looks at the clock.
    chunk = max(1, int(calls * 0.02 / took))
    with measure_energy(settings.device) as reading:
        calls, _ = repeat(settings, run, settings.seconds, chunk)
    if not reading.valid or not math.isfinite(reading.joules):
        raise EnergyUnavailableError("the window", reading.reason)
    return reading.joules / calls


def repeat(
    settings: Settings, run: Run, seconds: float, chunk: int
) -> tuple[int, float]:
    """Call for at least some seconds; the number of calls, and how long it took."""
    calls, begin, took = 0, time.perf_counter(), 0.0
    while took <= seconds:
        for _ in range(chunk):
            run()
        wait(settings)
        calls, took = calls + chunk, time.perf_counter() - begin
    return calls, took


def seconds_of(settings: Settings, run: Run) -> float:
    """Seconds of one call, with all that it queued."""
    wait(settings)
    begin = time.perf_counter()
    run()
    wait(settings)
    return round(time.perf_counter() - begin, 4)


def wait(settings: Settings) -> None:
    """Wait for the device."""
    if settings.device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
