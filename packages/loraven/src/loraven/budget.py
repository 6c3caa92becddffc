# SPDX-License-Identifier: Apache-2.0
"""A ledger of the energy of one sample: allocated, spent, and left over.

Decisions:
- Amounts are whole picojoules, so that no sum drifts: after any calls, consumed +
  reserved + remaining = max(usable, consumed) exactly.
- A promise may lose its cover: when others spend more than they were given, the
  ledger reserves only what is still there for the open promises together.
- The scaling factor learns from settled pairs of promise and spending alone; what
  is spent without a promise only makes the rest smaller.
- `reset` keeps the settings (``on_exhausted``, ``energy_model``).
"""

import math
from collections import deque
from threading import Lock
from typing import Any

from loraven.checks import dimensions, integer, number
from loraven.energy import EnergyEstimator, get_default_hardware_profile
from torchworks_core.errors import InvalidValue, NotReady

_PICOJOULES = 1e9
# A terajoule, in mJ: sums of amounts up to it stay far from the floats' end.
_LARGEST = 1e15
_POLICIES = ("zero", "raise")


class BudgetExhaustedException(NotReady):
    """No energy is left for a layer, and the manager's policy is to raise.

    Attributes:
        layer_id: The layer that asked.
        remaining: What was left, in mJ per sample.
        requested: What the layer would have got, in mJ per sample.

    Example:
        >>> manager = BudgetManager(total_budget=0.1)
        >>> manager.on_exhausted = "raise"
        >>> budget = manager.allocate_budget("first", 1.0, (512, 512))
        >>> try:
        ...     manager.allocate_budget("second", 1.0, (512, 512))
        ... except BudgetExhaustedException as error:
        ...     error.layer_id, error.remaining
        ('second', 0.0)
    """

    def __init__(self, layer_id: str, remaining: float, requested: float) -> None:
        self.layer_id, self.remaining = layer_id, remaining
        self.requested = requested
        why = f"{requested:g} mJ requested, {remaining:g} mJ remaining"
        do = "Call begin_sample() for each sample, or raise total_budget"
        super().__init__(f"energy budget of layer {layer_id!r}", why, do)

    def __reduce__(self) -> tuple:
        return type(self), (self.layer_id, self.remaining, self.requested)


class BudgetManager:
    """Shares the energy of one sample among layers, and learns how much they need.

    Call `begin_sample` for each sample or batch, `allocate_budget` before a layer
    and `update_energy_consumption` after it. All methods may be called from several
    threads.

    Args:
        total_budget: Energy of all layers in mJ per sample, above 0, at most 1e15.
        window_size: Settled allocations that the scaling factor looks at, at least 1.
        safety_margin: Share of the total that is never given away, in [0, 1].
        adaptation_rate: Step of the scaling factor's logarithm, at least 0.

    Attributes:
        on_exhausted: What `allocate_budget` does when nothing is left: ``"zero"``
            (default) returns 0.0, ``"raise"`` raises `BudgetExhaustedException`.
        energy_model: Gives a layer's dense energy by ``estimate(layer_dims, rank,
            batch_size=1)`` in mJ; an `EnergyEstimator` with the default profile.

    Raises:
        TypeError: an argument has the wrong type.
        InvalidValue: an argument is out of range.

    Example:
        >>> manager = BudgetManager(total_budget=1.0, safety_margin=0.1)
        >>> budget = manager.allocate_budget("mlp", 0.5, (512, 512))
        >>> manager.update_energy_consumption("mlp", budget / 2)
        >>> round(manager.get_budget_status()["remaining_budget"], 3)
        0.7
    """

    def __init__(
        self,
        total_budget: float = 10.0,
        window_size: int = 100,
        safety_margin: float = 0.1,
        adaptation_rate: float = 0.01,
    ) -> None:
        self.total_budget = number(
            "total_budget", total_budget, high=_LARGEST, above=True
        )
        self.window_size = integer("window_size", window_size)
        self.safety_margin = number("safety_margin", safety_margin, 0.0, 1.0)
        self.adaptation_rate = number("adaptation_rate", adaptation_rate)
        usable = self.total_budget * (1 - self.safety_margin)
        self._usable = math.floor(usable * _PICOJOULES)
        self.on_exhausted = "zero"
        self.energy_model: Any = EnergyEstimator(get_default_hardware_profile())
        self._lock = Lock()
        self.reset()

    @property
    def on_exhausted(self) -> str:
        """``"zero"`` or ``"raise"``; another value raises InvalidValue."""
        return self._on_exhausted

    @on_exhausted.setter
    def on_exhausted(self, policy: str) -> None:
        if policy not in _POLICIES:
            do = "Give 'zero' or 'raise'"
            raise InvalidValue(f"on_exhausted={policy!r}", "unknown policy", do)
        self._on_exhausted = policy

    def allocate_budget(
        self,
        layer_id: str,
        complexity_score: float,
        layer_dims: tuple[int, int],
        performance_priority: float = 1.0,
    ) -> float:
        """Promise energy to a layer.

        The promise is complexity · E_dense(layer_dims) · (0.5 + 0.5·priority) ·
        scaling factor, and never more than what remains. A second promise to the
        same layer replaces the first, if that one is not settled.

        Args:
            layer_id: Any name; `update_energy_consumption` settles it.
            complexity_score: In [0, 1].
            layer_dims: (in_features, out_features).
            performance_priority: At least 0; 1 neither raises nor lowers.

        Returns:
            The promised energy in mJ per sample; 0.0 when nothing is left.

        Raises:
            TypeError: an argument has the wrong type.
            InvalidValue: an argument is out of range.
            BudgetExhaustedException: nothing is left and ``on_exhausted`` is
                ``"raise"``. The ledger is as before after any error.
        """
        _check_id(layer_id)
        score = number("complexity_score", complexity_score, 0.0, 1.0)
        priority = number("performance_priority", performance_priority)
        dims = dimensions(layer_dims)
        # Outside the lock: this may be the user's own code.
        dense = self.energy_model.estimate(dims, min(dims), batch_size=1)
        base = score * number("estimated energy", dense)
        with self._lock:
            adjusted = base * (0.5 + 0.5 * priority) * self._scaling
            wanted = math.floor(number("requested energy", adjusted * _PICOJOULES))
            others = self._promised - self._open.get(layer_id, 0)
            free = max(self._usable - self._consumed - others, 0)
            if wanted and not free and self._on_exhausted == "raise":
                raise BudgetExhaustedException(layer_id, 0.0, adjusted)
            granted = min(wanted, free)
            self._open[layer_id] = granted
            self._promised = others + granted
        return granted / _PICOJOULES

    def update_energy_consumption(
        self,
        layer_id: str,
        actual_energy: float,
        performance_metric: float | None = None,
    ) -> None:
        """Settle a layer's promise with what the layer really used.

        Args:
            layer_id: As for `allocate_budget`. Without an open promise the energy
                is consumed, and the scaling factor learns nothing.
            actual_energy: In mJ per sample, from 0 to 1e15; may exceed the promise.
            performance_metric: Higher is better, an accuracy for example. A drop
                from the first half of the window to the second raises the scaling
                factor.

        Raises:
            TypeError: an argument has the wrong type.
            InvalidValue: an energy that is negative or not finite, or a metric that
                is not finite. The ledger is as before.
        """
        _check_id(layer_id)
        energy = number("actual_energy", actual_energy, high=_LARGEST)
        actual = round(energy * _PICOJOULES)
        metric = performance_metric
        if metric is not None:
            metric = number("performance_metric", metric, -math.inf)
        with self._lock:
            self._consumed += actual
            granted = self._open.pop(layer_id, None)
            if granted is not None:
                self._promised -= granted
                self._learn(granted, actual, metric)

    def get_budget_status(self) -> dict[str, float]:
        """Report the ledger.

        Returns:
            In mJ per sample: ``total_budget``; ``usable_budget``, the total less
            the margin; ``consumed``; ``reserved`` for open promises;
            ``remaining_budget``. Further ``utilization``, consumed over usable, at
            most 1; ``scaling_factor``; ``allocations``, the number of open promises;
            ``exhausted``, 1.0 when nothing remains, else 0.0.
        """
        with self._lock:
            consumed, reserved, remaining = self._picojoules()
            used = consumed / self._usable if self._usable else 1.0
            return {
                "total_budget": self.total_budget,
                "usable_budget": self._usable / _PICOJOULES,
                "consumed": consumed / _PICOJOULES,
                "reserved": reserved / _PICOJOULES,
                "remaining_budget": remaining / _PICOJOULES,
                "utilization": min(used, 1.0),
                "scaling_factor": self._scaling,
                "allocations": float(len(self._open)),
                "exhausted": float(remaining == 0),
            }

    def begin_sample(self) -> None:
        """Start a new sample: nothing consumed, nothing promised, all learnt kept."""
        with self._lock:
            self._clear()

    def reset(self) -> None:
        """Forget all allocations, spending and learning; the settings stay."""
        with self._lock:
            self._clear()
            self._scaling = 1.0
            self._window: deque[tuple[int, int, float | None]] = deque()
            self._metrics: deque[float] = deque()
            self._sums = (0, 0)

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            state = self.__dict__ | {"_open": dict(self._open)}
            state |= {key: state[key].copy() for key in ("_window", "_metrics")}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock = Lock()

    def _clear(self) -> None:
        self._consumed = self._promised = 0
        self._open: dict[str, int] = {}

    def _picojoules(self) -> tuple[int, int, int]:
        """Return consumed, reserved, remaining; in whole picojoules."""
        left = max(self._usable - self._consumed, 0)
        reserved = min(self._promised, left)
        return self._consumed, reserved, left - reserved

    def _learn(self, granted: int, actual: int, metric: float | None) -> None:
        """Move the scaling factor by the window's surplus and the metric's drop."""
        given, used = self._sums
        if len(self._window) == self.window_size:
            old_granted, old_actual, old_metric = self._window.popleft()
            given, used = given - old_granted, used - old_actual
            if old_metric is not None:
                self._metrics.popleft()
        self._window.append((granted, actual, metric))
        if metric is not None:
            self._metrics.append(metric)
        self._sums = given, used = given + granted, used + actual
        surplus = max(1 - used / given, -1.0) if given else -float(used > 0)
        error = surplus + (_drop([*self._metrics]) if self._metrics else 0.0)
        # An exponent this large is clipped below whatever it is.
        step = math.exp(max(min(self.adaptation_rate * error, 2.0), -2.0))
        self._scaling = min(max(self._scaling * step, 0.5), 2.0)


def _drop(metrics: list[float]) -> float:
    """Relative drop of the mean from the first half to the second, in [0, 1]."""
    half = len(metrics) // 2
    if not half:
        return 0.0
    before = sum(metrics[:half]) / half
    after = sum(metrics[half:]) / (len(metrics) - half)
    # Not a number for sums beyond the floats: no drop can be told from them.
    drop = (before - after) / abs(before) if before else 0.0
    return min(drop, 1.0) if drop > 0 else 0.0


def _check_id(layer_id: str) -> None:
    if not isinstance(layer_id, str):
        raise TypeError(f"layer_id must be a str, not {type(layer_id).__name__}")
