# SPDX-License-Identifier: Apache-2.0
"""Energy, time and memory of a low-rank layer from a table of hardware figures.

E = E_compute + E_memory + E_static, all in mJ for a whole batch:

- macs = batch·min(r(in+out), in·out), FLOPs = flops_per_mac·macs;
- bytes = bytes_per_element·(weights + batch·(in+out+r));
- E_compute = FLOPs·e_flop·dvfs/η with η = clip(utilization, 0.05, 1): badly used
  units burn more for each FLOP, so η divides;
- E_memory = bytes·(e_l1 + miss1·e_l2 + miss2·e_dram), miss = max(0, 1 - size/bytes);
- E_static = 1000·P_idle·t·max(0.5, 1 + 0.01·(°C - 65)), P_idle = 0.1·TDP where the
  profile has no idle_power, t = max(FLOPs/(2·cores·frequency·η), bytes/bandwidth).

Decisions:
- The figures of the default profile are nominal: 1 nJ a FLOP is about 1400 times
  what an H200 needs at its peak in bfloat16 (700 W / 989 TFLOP/s). `source` says so;
  `calibrate_energy` measures a profile.
- A rank may exceed the smaller size: such a layer would run dense, as the
  minimum above says. `DynamicLowRankLayer` does so only with many rows: with few,
  two factors beyond the minimum run, and the formula is below what they take.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from loraven.checks import dimensions, integer, number
from torchworks_core.errors import InvalidValue, nearest

_FLOPS_PER_MAC, _PER_FLOP, _PER_ACCESS = 2.0, 1e-6, 1e-7
# Optional keys and their defaults; idle_power's follows from the TDP.
_OPTIONAL: dict[str, Any] = {
    "idle_power": None,
    "memory_bandwidth": 9e11,
    "dvfs_factor": 1.0,
    "bytes_per_element": 4.0,
    "source": "nominal",
}
_DIVISORS = {"gpu_cores", "base_frequency", "memory_bandwidth", "bytes_per_element"}


def get_default_hardware_profile() -> dict[str, Any]:
    """Return the default hardware figures; a fresh dict for each call.

    Returns:
        ``dram_energy_per_byte``, ``l2_cache_energy_per_byte``,
        ``l1_cache_energy_per_byte`` (mJ a byte), ``compute_energy_per_flop`` (mJ),
        ``l1_cache_size``, ``l2_cache_size`` (bytes), ``gpu_cores``,
        ``base_frequency`` (Hz), ``thermal_design_power`` (W). They are nominal: no
        device was measured.

    Example:
        >>> get_default_hardware_profile()["thermal_design_power"]
        250.0
    """
    return {
        "dram_energy_per_byte": 1e-6,
        "l2_cache_energy_per_byte": 1e-7,
        "l1_cache_energy_per_byte": 1e-8,
        "compute_energy_per_flop": 1e-6,
        "l1_cache_size": 64 * 1024,
        "l2_cache_size": 1024 * 1024,
        "gpu_cores": 5120,
        "base_frequency": 1.5e9,
        "thermal_design_power": 250.0,
    }


class PerfEstimator(ABC):
    """Estimates a figure of a layer from a hardware profile.

    Args:
        hardware_profile: Keys as in `get_default_hardware_profile`; a key that is
            missing takes the default. Optional keys: ``idle_power`` (W),
            ``memory_bandwidth`` (bytes/s), ``dvfs_factor``, ``bytes_per_element``,
            ``source`` (text). The mapping is copied.

    Attributes:
        hardware_profile: The copy, as given.

    Raises:
        TypeError: not a mapping, or a value of the wrong type.
        InvalidValue: an unknown key, or a value that is negative or not finite, or
            zero where it divides.

    Example:
        >>> class Weights(PerfEstimator):
        ...     def estimate(self, layer_dims, rank):
        ...         return float(rank * sum(layer_dims))
        >>> Weights({"gpu_cores": 132}).estimate((64, 32), 8)
        768.0
    """

    def __init__(self, hardware_profile: Mapping[str, Any]) -> None:
        if not isinstance(hardware_profile, Mapping):
            kind = type(hardware_profile).__name__
            raise TypeError(f"hardware_profile must be a mapping, not {kind}")
        self.hardware_profile = dict(hardware_profile)
        defaults = get_default_hardware_profile() | _OPTIONAL
        given = self.hardware_profile.items()
        checked = {key: _checked(key, value, defaults) for key, value in given}
        self._profile: dict[str, Any] = defaults | checked

    @abstractmethod
    def estimate(self, layer_dims: tuple[int, int], rank: int) -> float:
        """Estimate the figure of a layer (in_features, out_features) at a rank."""


class EnergyEstimator(PerfEstimator):
    """Energy of a low-rank layer in mJ by the formulas of this module.

    Args:
        hardware_profile: As for `PerfEstimator`.
        flops_per_mac: FLOPs of one multiply-accumulate, above 0.
        energy_per_flop: mJ. Wins over the profile's ``compute_energy_per_flop``
            where it differs from this signature's default.
        energy_per_memory_access: mJ a byte of the second cache; wins over the
            profile's ``l2_cache_energy_per_byte`` likewise.

    Attributes:
        source: ``"nominal"``, or ``"calibrated:<device>:<date>"``.

    Raises:
        TypeError: an argument has the wrong type.
        InvalidValue: an argument or an entry of the profile is out of range.

    Example:
        >>> estimator = EnergyEstimator(get_default_hardware_profile())
        >>> round(estimator.estimate((512, 512), rank=64), 3), estimator.source
        (0.194, 'nominal')
    """

    def __init__(
        self,
        hardware_profile: Mapping[str, Any],
        flops_per_mac: float = _FLOPS_PER_MAC,
        energy_per_flop: float = _PER_FLOP,
        energy_per_memory_access: float = _PER_ACCESS,
    ) -> None:
        super().__init__(hardware_profile)
        found = self._profile
        self.flops_per_mac = number("flops_per_mac", flops_per_mac, above=True)
        per_flop = number("energy_per_flop", energy_per_flop)
        per_access = number("energy_per_memory_access", energy_per_memory_access)
        if per_flop == _PER_FLOP:
            per_flop = float(found["compute_energy_per_flop"])
        if per_access == _PER_ACCESS:
            per_access = float(found["l2_cache_energy_per_byte"])
        self.energy_per_flop, self.energy_per_memory_access = per_flop, per_access
        self.source: str = found["source"]
        self._idle_watts = found["idle_power"]
        if self._idle_watts is None:
            self._idle_watts = 0.1 * found["thermal_design_power"]

    def estimate(
        self,
        layer_dims: tuple[int, int],
        rank: int,
        batch_size: int = 1,
        utilization: float = 0.8,
        temperature: float = 65.0,
    ) -> float:
        """Estimate the energy of one forward of the whole batch, in mJ.

        Args:
            layer_dims: (in_features, out_features), each at least 1.
            rank: At least 1.
            batch_size: Rows, at least 1.
            utilization: Share of the compute units in use, in [0, 1]; below 0.05 it
                counts as 0.05.
            temperature: In °C; scales the idle power only.

        Raises:
            TypeError: an argument has the wrong type.
            InvalidValue: an argument is out of range, or the profile's figures
                are so extreme that the energy is not finite.
        """
        parts = self._parts(layer_dims, rank, batch_size, utilization, temperature)
        total = parts[0] + parts[1] + parts[2]
        if not math.isfinite(total):
            do = "Correct the entries of hardware_profile; see breakdown()"
            raise InvalidValue(f"energy={total!r}", "not finite", do)
        return total

    def breakdown(
        self,
        layer_dims: tuple[int, int],
        rank: int,
        batch_size: int = 1,
        utilization: float = 0.8,
        temperature: float = 65.0,
    ) -> dict[str, float]:
        """Split `estimate` into ``compute``, ``memory`` and ``static`` mJ.

        Arguments and errors as for `estimate`.

        Example:
            >>> estimator = EnergyEstimator(get_default_hardware_profile())
            >>> sorted(estimator.breakdown((64, 64), 8))
            ['compute', 'memory', 'static']
        """
        parts = self._parts(layer_dims, rank, batch_size, utilization, temperature)
        return dict(zip(("compute", "memory", "static"), parts, strict=True))

    def estimate_all(
        self, layer_dims: tuple[int, int], rank: int, batch_size: int = 1
    ) -> dict[str, float]:
        """Estimate energy, time and memory of one forward of the whole batch.

        Args:
            layer_dims: (in_features, out_features), each at least 1.
            rank: At least 1.
            batch_size: Rows, at least 1.

        Returns:
            ``energy_mj``; ``latency_ms``, the t of the module's formulas;
            ``memory_mb``, weights and activations in 10^6 bytes; ``flops`` of the
            batch; ``params``, weights without bias.

        Raises:
            TypeError: an argument has the wrong type.
            InvalidValue: an argument is out of range.
        """
        energy = self.estimate(layer_dims, rank, batch_size)
        weights, flops, moved = self._work(layer_dims, rank, batch_size)
        return {
            "energy_mj": energy,
            "latency_ms": 1000.0 * self._seconds(flops, moved, 0.8),
            "memory_mb": moved / 1e6,
            "flops": flops,
            "params": float(weights),
        }

    def _work(
        self, layer_dims: tuple[int, int], rank: int, batch: int
    ) -> tuple[int, float, float]:
        """Return the number of weights, FLOPs, and bytes."""
        inside, outside = dimensions(layer_dims)
        rank, batch = integer("rank", rank), integer("batch_size", batch)
        weights = min(rank * (inside + outside), inside * outside)
        elements = weights + batch * (inside + outside + rank)
        moved = self._profile["bytes_per_element"] * elements
        return weights, self.flops_per_mac * batch * weights, moved

    def _seconds(self, flops: float, moved: float, efficiency: float) -> float:
        found = self._profile
        peak = 2.0 * found["gpu_cores"] * found["base_frequency"] * efficiency
        return max(flops / peak, moved / found["memory_bandwidth"])

    def _parts(
        self,
        layer_dims: tuple[int, int],
        rank: int,
        batch: int,
        utilization: float,
        temperature: float,
    ) -> tuple[float, float, float]:
        _, flops, moved = self._work(layer_dims, rank, batch)
        efficiency = max(number("utilization", utilization, 0.0, 1.0), 0.05)
        heat = max(0.5, 1 + 0.01 * (number("temperature", temperature, -273.15) - 65))
        found = self._profile
        compute = flops * self.energy_per_flop * found["dvfs_factor"] / efficiency
        first = max(0.0, 1.0 - found["l1_cache_size"] / moved)
        second = max(0.0, 1.0 - found["l2_cache_size"] / moved)
        per_byte = found["l1_cache_energy_per_byte"]
        per_byte += first * self.energy_per_memory_access
        per_byte += second * found["dram_energy_per_byte"]
        seconds = self._seconds(flops, moved, efficiency)
        return compute, moved * per_byte, 1000.0 * self._idle_watts * seconds * heat


def _checked(key: Any, value: Any, known: Mapping[str, Any]) -> float | str:
    if key not in known:
        close = nearest(str(key), known)
        do = f"Did you mean {close!r}?" if close else f"Known: {', '.join(known)}"
        raise InvalidValue(f"hardware_profile key {key!r}", "it is unknown", do)
    name = f"hardware_profile[{key!r}]"
    if key != "source":
        return number(name, value, above=key in _DIVISORS)
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, not {type(value).__name__}")
    return value
