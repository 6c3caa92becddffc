# SPDX-License-Identifier: Apache-2.0
"""The planner: which ranks and forms of a layer are worth running, at what cost.

Decisions:
- The gauge form is refused at a rank where it would lose digits in float32.
- Costs are integers, so a budget can be checked exactly. Those of one function have
  one unit and can be added up over layers.
- Latencies are measured, not derived from counts, and a layer stays dense wherever
  a reduced form is not 3 % faster.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraven.factorize import Factors, Pivots

# What is imported "as" itself is this module's to offer, too.
from loraven.runners import FORMS as FORMS
from loraven.runners import form_macs as form_macs
from loraven.runners import plain_gauge as plain_gauge
from loraven.runners import run_dense as run_dense
from loraven.runners import run_gauge as run_gauge
from loraven.runners import run_prefix as run_prefix
from torchworks_core.errors import InvalidValue

__all__ = [
    "FORMS",
    "Choice",
    "LatencyTable",
    "choices",
    "cost_function",
    "form_macs",
    "gauge_is_safe",
    "plain_gauge",
    "run_dense",
    "run_gauge",
    "run_prefix",
    "safe_ranks",
]

Cost = Callable[[int, int, int, str], float]
_Whole = Callable[[int, int, int, str], int]
# Largest interpolation weight, and largest deviation in float32, of a gauge form.
_MAX_WEIGHT, _MAX_DEVIATION = 100.0, 1e-4
_PICOJOULES = 1e9
# Of one layer's cost, so that thousands of them fit 63 bits.
_MOST_BITS = 50
_MARGIN = 0.03


@torch.no_grad()
def safe_ranks(down: Tensor, pivots: Pivots, ranks: Sequence[int]) -> dict[int, bool]:
    """At which ranks the gauge form is as good as the prefix form in float32.

    A rank is refused when an interpolation weight exceeds 100, or when on random
    inputs the output deviates by more than 1e-4 (relative, Frobenius) once the
    skeleton's output and the interpolation are rounded to float32.

    Args:
        down: (R, in), of the prefix form.
        pivots: `loraven.factorize.pivot` of its other factor.
        ranks: Each from 1 to R.

    Example:
        >>> import torch
        >>> from loraven.factorize import Moments, output_pca, pivot
        >>> moments = Moments(torch.zeros(8), torch.eye(8), 100, False)
        >>> factors = output_pca(torch.randn(8, 8), None, moments)
        >>> safe_ranks(factors.down, pivot(factors.up), [2, 4])
        {2: True, 4: True}
    """
    if bad := [rank for rank in ranks if not 1 <= rank <= len(down)]:
        raise InvalidValue(f"rank={bad[0]}", f"the factors allow 1 to {len(down)}")
    lower = pivots.lower
    generator = torch.Generator(device="cpu").manual_seed(0)
    x = torch.randn(down.shape[1], 8, generator=generator).to(lower)
    z = down.detach().to(lower) @ x
    weights, done, found = lower[:, :0], 0, {}
    for rank in sorted(set(ranks)):
        # From one rank to the next by block elimination: all ranks together cost
        # no more than the largest one alone.
        block = torch.linalg.solve_triangular(
            lower[done:rank, done:rank],
            lower[rank:, done:rank],
            upper=False,
            left=False,
            unitriangular=True,
        )
        head, weights = weights[: rank - done], weights[rank - done :]
        weights, done = torch.cat([weights - block @ head, block], 1), rank
        exact = lower[:, :rank] @ (pivots.upper[:rank, :rank] @ z[:rank])
        found[rank] = _agrees(weights, exact, rank)
    return found


def _agrees(weights: Tensor, exact: Tensor, rank: int) -> bool:
    """Whether interpolation from the first outputs, in float32, gives the others."""
    if weights.numel() and not weights.abs().max() <= _MAX_WEIGHT:
        return False
    skeleton = exact[:rank].float()
    got = torch.cat([skeleton, weights.float() @ skeleton])
    return bool((got - exact).norm() <= _MAX_DEVIATION * exact.norm())


def gauge_is_safe(factors: Factors, pivots: Pivots, rank: int) -> bool:
    """`safe_ranks` of one rank."""
    return safe_ranks(factors.down, pivots, [rank])[rank]


class Choice(NamedTuple):
    """One way to run a layer.

    Attributes:
        rank: Of the reduced map; min(in, out) for the dense form.
        form: "dense", "prefix" or "gauge".
        cost: Of one row, an integer in the unit of the cost that was asked for.
    """

    rank: int
    form: str
    cost: int


def choices(
    factors: Factors,
    pivots: Pivots,
    out: int,
    in_: int,
    *,
    multiple: int = 8,
    cost: str | Cost = "macs",
) -> list[Choice]:
    """The ways to run a layer that are worth running.

    Args:
        factors: From `loraven.factorize.output_pca`.
        pivots: `loraven.factorize.pivot` of ``factors.up``.
        out: Outputs of the layer.
        in_: Its inputs.
        multiple: Ranks are multiples of it.
        cost: "macs", "energy", or what `cost_function` returned for all layers.

    Returns:
        Costs and ranks strictly ascending, the dense form last. Reduced forms are
        there if they are cheaper than dense (by 3 % where latency is measured) and
        no other form of at least their rank costs as little; unsafe gauge forms
        are not.

    Raises:
        InvalidValue: an unknown cost, or one that is not a positive integer.

    Example:
        >>> import torch
        >>> from loraven.factorize import Moments, output_pca, pivot
        >>> moments = Moments(torch.zeros(32), torch.eye(32), 100, False)
        >>> factors = output_pca(torch.randn(32, 32), None, moments)
        >>> found = choices(factors, pivot(factors.up), 32, 32, multiple=16)
        >>> [tuple(choice) for choice in found]
        [(16, 'gauge', 768), (32, 'dense', 1024)]
    """
    price = cost_function(cost)
    dense = Choice(min(out, in_), "dense", _priced(price, out, in_, 0, "dense"))
    limit = dense.cost * (1 - getattr(price, "margin", 0.0))
    found: dict[str, list[Choice]] = {}
    for form in ("prefix", "gauge"):
        every = [
            Choice(rank, form, _priced(price, out, in_, rank, form))
            for rank in range(multiple, factors.rank + 1, multiple)
        ]
        found[form] = [choice for choice in every if choice.cost < limit]
    safe = safe_ranks(factors.down, pivots, [choice.rank for choice in found["gauge"]])
    gauge = [choice for choice in found["gauge"] if safe[choice.rank]]
    kept: list[Choice] = []
    for choice in sorted(found["prefix"] + gauge, key=lambda c: (c.cost, -c.rank)):
        if not kept or choice.rank > kept[-1].rank:
            kept.append(choice)
    return [*kept, dense]


def _priced(price: _Whole, out: int, in_: int, rank: int, form: str) -> int:
    found = price(out, in_, rank or min(out, in_), form)
    if not isinstance(found, int) or found < 1:
        what = f"cost {found!r} of a {out} x {in_} layer, rank {rank}, {form}"
        why, do = "a positive integer is needed", "Pass the cost through cost_function"
        raise InvalidValue(what, why, do)
    return found


def cost_function(
    cost: str | Cost,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> _Whole:
    """Turn a kind of cost into a function (out, in, rank, form) -> int.

    Call it once for all layers: the integers of one function can be added up.

    Args:
        cost: "macs": multiply-accumulates of one row. "latency": `LatencyTable`,
            nanoseconds of ``rows`` rows. "energy": picojoules of one row by the
            nominal `loraven.energy.EnergyEstimator`. Or a function of the four that
            returns a positive number; it is scaled by one power of two, fixed at
            the first call, and rounded up (dense: down).
        rows: Needed for "latency": how many rows a forward has.
        dtype: For "latency".
        device: For "latency".

    Raises:
        InvalidValue: an unknown kind, or "latency" without rows.

    Example:
        >>> cost_function("macs")(64, 64, 16, "gauge")
        1792
        >>> half = cost_function(lambda out, in_, rank, form: 0.5)
        >>> half(64, 64, 64, "dense") == half(64, 64, 16, "prefix")
        True
    """
    if callable(cost):
        whole = isinstance(cost, (LatencyTable, _Integers))
        whole = whole or cost in (form_macs, _energy)
        return cast(_Whole, cost) if whole else _Integers(cost)
    if cost == "macs":
        return form_macs
    if cost == "energy":
        return _energy
    if cost == "latency" and rows is not None:
        return LatencyTable(rows, dtype, device)
    why = "latency needs rows" if cost == "latency" else "unknown"
    do = "Give 'macs', 'latency' (with rows), 'energy' or a function"
    raise InvalidValue(f"cost={cost!r}", why, do)


def _energy(out: int, in_: int, rank: int, form: str) -> int:
    """Picojoules of one row of the two-factor layer with as many weights."""
    from loraven.energy import EnergyEstimator, get_default_hardware_profile

    estimate = EnergyEstimator(get_default_hardware_profile()).estimate
    equal = form_macs(out, in_, rank, form) / (out + in_)
    whole = max(1, math.floor(equal))
    low, high = estimate((in_, out), whole), estimate((in_, out), whole + 1)
    return round((low + (high - low) * (equal - whole)) * _PICOJOULES)


class _Integers:
    """A user's cost as integers that share one scale."""

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        # Of the power of two that all costs are multiplied by.
        self.shift: int | None = None

    def __call__(self, out: int, in_: int, rank: int, form: str) -> int:
        found = self.cost(out, in_, rank, form)
        what = f"cost {found!r} of a {out} x {in_} layer, rank {rank}, {form}"
        try:
            value = float(found)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if isinstance(found, str | bytes | bool) or not 0 < value < math.inf:
            raise InvalidValue(what, "it is not a positive finite number")
        if self.shift is None:
            # The first layer is worth about 2**36, so 2**17 such layers fit 53 bits.
            self.shift = 36 - math.frexp(value)[1]
        mantissa, exponent = math.frexp(value)
        if exponent + self.shift > _MOST_BITS:
            why = f"it is more than 2**{_MOST_BITS - 36} times the first layer's cost"
            raise InvalidValue(what, why, "Costs that are added up are in one unit")
        scaled = math.ldexp(mantissa, exponent + self.shift)
        whole = math.floor(scaled) if form == "dense" else math.ceil(scaled)
        # As cheap as can be told beside the first layer.
        return max(1, whole)


class LatencyTable:
    """Measured nanoseconds of each form, asked as (out, in, rank, form).

    For each new (out, in) the dense form and up to 8 ranks of both reduced forms run
    in turns on random numbers, each twice in a row: the first call finds other
    weights in the caches, the second its own. The minimum of the repeats counts, and
    of the two ratios to the dense form the worse one. A rank costs what the next
    measured rank above it costs, so the planner chooses among measured ones only.

    Args:
        rows: Rows of one forward, >= 1.
        dtype: Of inputs and weights.
        device: Where to measure.
        repeats: >= 1.
        contiguous: As for `run_gauge`.

    Attributes:
        margin: Share by which a reduced form must beat dense, 0.03.

    Raises:
        InvalidValue: rows or repeats below 1.

    Example:
        >>> table = LatencyTable(rows=4, repeats=2)
        >>> table(64, 64, 16, "prefix") > 0
        True
    """

    margin = _MARGIN

    def __init__(
        self,
        rows: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        repeats: int = 20,
        contiguous: bool = True,
    ) -> None:
        if rows < 1 or repeats < 1:
            raise InvalidValue(f"rows={rows}, repeats={repeats}", "below 1")
        self.rows, self.repeats, self.contiguous = rows, repeats, contiguous
        self._options = {"dtype": dtype, "device": torch.device(device)}
        # Of its own: measuring is to change no random number of the user's.
        self._generator = torch.Generator(device).manual_seed(0)
        self._measured: dict[tuple[int, int], dict[tuple[str, int], int]] = {}

    def __call__(self, out: int, in_: int, rank: int, form: str) -> int:
        """Nanoseconds of one forward of all rows."""
        form_macs(out, in_, rank, form)
        if (out, in_) not in self._measured:
            self._measured[out, in_] = self._measure(out, in_)
        found = self._measured[out, in_]
        if form == "dense":
            return found["dense", 0]
        ours = [(at, value) for (name, at), value in found.items() if name == form]
        enough = [value for at, value in ours if at >= rank]
        return min(enough) if enough else max(found["dense", 0], ours[-1][1])

    @torch.no_grad()
    def _measure(self, out: int, in_: int) -> dict[tuple[str, int], int]:
        runs = self._runs(out, in_)
        best = {key: [math.inf, math.inf] for key in runs}
        for turn in range(self.repeats + 2):
            for key, run in runs.items():
                cold = self._time(run)
                # A call of a millisecond does not mind where its weights were.
                hot = self._time(run) if cold < 1e-3 else cold
                if turn >= 2:
                    best[key] = [min(best[key][0], cold), min(best[key][1], hot)]
        dense = best["dense", 0]
        found: dict[tuple[str, int], int] = {}
        for (form, rank), times in best.items():
            worse = max(time / base for time, base in zip(times, dense, strict=True))
            below = (value for (name, _), value in found.items() if name == form)
            # Ranks ascend, and no rank counts as faster than a smaller one.
            found[form, rank] = max([math.ceil(worse * dense[0] * 1e9), *below])
        return found

    def _runs(self, out: int, in_: int) -> dict[tuple[str, int], Callable[[], Tensor]]:
        """What is measured: only ranks whose multiplications are fewer than dense."""
        full = min(out, in_)
        ends = {"prefix": out * in_ / (out + in_), "gauge": float(full)}
        runs = {("dense", 0): self._dense(out, in_)}
        for form, end in ends.items():
            # The last part is the dense form's own cost; multiples of 8 run best.
            every = (end * part / 9 for part in range(1, 9))
            ranks = {max(1, math.floor(rank / 8) * 8) for rank in every}
            make = self._prefix if form == "prefix" else self._gauge
            for rank in sorted(ranks):
                runs[form, rank] = make(out, in_, rank)
        return runs

    def _time(self, run: Callable[[], Tensor]) -> float:
        device = self._options["device"]
        wait = device.type != "cpu"
        if wait:
            torch.accelerator.synchronize(device)
        begin = time.perf_counter()
        run()
        if wait:
            torch.accelerator.synchronize(device)
        return time.perf_counter() - begin

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, **self._options)

    def _dense(self, out: int, in_: int) -> Callable[[], Tensor]:
        x, weight, bias = (
            self._random(*s) for s in ((self.rows, in_), (out, in_), (out,))
        )
        return lambda: linear(x, weight, bias)

    def _prefix(self, out: int, in_: int, rank: int) -> Callable[[], Tensor]:
        x, down, up = (
            self._random(*s) for s in ((self.rows, in_), (rank, in_), (rank, out))
        )
        down_bias, up_bias = self._random(rank), self._random(out)
        return lambda: run_prefix(x, down, down_bias, up.t(), up_bias)

    def _gauge(self, out: int, in_: int, rank: int) -> Callable[[], Tensor]:
        x, skeleton = self._random(self.rows, in_), self._random(rank, in_)
        rest = self._random(out - rank, rank)
        biases = self._random(rank), self._random(out - rank)
        device = self._options["device"]
        inverse = torch.randperm(out, generator=self._generator, device=device)
        arguments = skeleton, biases[0], rest, biases[1], inverse, self.contiguous
        return lambda: run_gauge(x, *arguments)
