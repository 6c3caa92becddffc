# SPDX-License-Identifier: Apache-2.0
"""`LoRAven`: a dynamic low-rank layer that is used like nn.Linear.

The one idea: a preset turns a layer's size into ranks and an energy budget, and the
layer keeps the books: what it spent, against what it was allowed.

Decisions: a preset's budget is a multiple of the energy of its largest rank at the
batch size of each forward, so that ``low_power`` binds, ``balanced`` just fits and
``high_performance`` has slack; one given in mJ is taken as it is. An energy is that
of the columns which an inference forward computes, nominal until calibrated
(``energy_source``); training computes more. Books are plain numbers, no buffers.
"""

import math
import operator
import warnings
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraven.layers import DynamicLowRankLayer, off_graph
from loraven.reporting import wrong_sizes
from torchworks_core.errors import InvalidValue

__all__ = ["PRESETS", "LoRAven", "create_loraven_layer"]

_HISTORY = 1000


class Preset(NamedTuple):
    """Ranks over min(in, out), and the budget over the largest rank's energy."""

    rank_ratio: float
    min_rank_ratio: float
    energy_multiplier: float


PRESETS = {
    "high_performance": Preset(0.8, 0.3, 1.5),
    "balanced": Preset(0.5, 0.2, 1.0),
    "low_power": Preset(0.3, 0.1, 0.7),
}
_MODES = (*PRESETS, "custom")


class _Books:
    """Energies and budgets since the last reset, all in mJ."""

    def __init__(self) -> None:
        self.history: deque[float] = deque(maxlen=_HISTORY)
        self.last = 0.0
        self.rows = 0
        self.reset()

    def reset(self) -> None:
        self.total = self.allowed = 0.0
        self.samples = 0


class LoRAven(nn.Module):
    """Low-rank linear layer whose rank follows its input within an energy budget.

    ``forward`` trains its decisions while ``self.training`` and makes them
    otherwise; call ``eval()`` before inference, as for dropout.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        mode: ``"high_performance"``, ``"balanced"``, ``"low_power"`` (largest and
            smallest rank 0.8/0.3, 0.5/0.2, 0.3/0.1 of min(in, out), budget 1.5, 1
            and 0.7 times the energy of the largest rank), or ``"custom"``.
        max_rank: Largest rank; required by ``"custom"``, else it overrides the
            preset's.
        min_rank: Smallest rank; likewise.
        energy_budget: mJ per sample, a hard cap on each forward, except that the
            smallest rank always runs. None: the preset's; no cap with ``"custom"``.
        bias: Whether a bias is added.
        device: Where the parameters live; the module never moves itself.

    Attributes:
        layer: The `DynamicLowRankLayer`.

    Raises:
        TypeError: ``energy_budget`` is no number.
        InvalidValue: Anything out of range; the message names all of it.

    Warns:
        UserWarning: ``energy_budget`` can never bind.

    Example:
        >>> layer = LoRAven(512, 256, mode="low_power").eval()
        >>> y = layer(torch.randn(8, 512))
        >>> y.shape, layer.min_rank <= layer.get_current_rank() <= layer.max_rank
        (torch.Size([8, 256]), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mode: str = "balanced",
        max_rank: int | None = None,
        min_rank: int | None = None,
        energy_budget: float | None = None,
        bias: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        ranks = _ranks(in_features, out_features, mode, max_rank, min_rank)
        sizes = {"in_features": in_features, "out_features": out_features} | ranks
        problems = _wrong_mode(mode, max_rank, min_rank)
        problems += wrong_sizes(sizes, high="max_rank", low="min_rank")
        problems += _wrong_budget(energy_budget)
        if problems:
            where = f"LoRAven({in_features!r}, {out_features!r}, mode={mode!r})"
            raise InvalidValue(where, "; ".join(problems), "Correct all of them")
        self.in_features = operator.index(in_features)
        self.out_features = operator.index(out_features)
        self.mode: str = mode
        self.max_rank = operator.index(ranks["max_rank"])
        self.min_rank = operator.index(ranks["min_rank"])
        self.energy_budget = None if energy_budget is None else float(energy_budget)
        self.layer = DynamicLowRankLayer(
            in_features,
            out_features,
            self.max_rank,
            self.min_rank,
            bias=bias,
            device=device,
        )
        self._books = _Books()
        self._warn_if_loose()

    def _warn_if_loose(self) -> None:
        if self.energy_budget is None:
            return
        most = self.layer.energy(self.max_rank)
        if self.energy_budget >= most:
            warnings.warn(
                f"energy_budget={self.energy_budget:g} mJ never binds: max_rank="
                f"{self.max_rank} takes {most:.4g} mJ per sample at batch size 1",
                UserWarning,
                stacklevel=3,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer: (..., in_features) -> (..., out_features).

        Raises:
            TypeError: ``x`` is no tensor.
            InvalidValue: Its last dimension differs from ``in_features``.
        """
        budget = off_graph(self._budget)(x)
        mode = "training" if self.training else "inference"
        y, _ = self.layer(x, budget, mode)
        off_graph(self._enter)(x, budget)
        return y

    def _budget(self, x: Tensor) -> float | None:
        """What this forward may spend, in mJ per sample."""
        return self._budget_at(self._rows(x))

    def _budget_at(self, rows: int) -> float | None:
        if self.energy_budget is not None or self.mode not in PRESETS:
            return self.energy_budget
        share = PRESETS[self.mode].energy_multiplier
        return share * self.layer.energy(self.max_rank, rows) / rows

    def _rows(self, x: Tensor) -> int:
        # What is no such input, the layer refuses in words of its own.
        size = x.numel() if isinstance(x, Tensor) else 0
        return max(size // self.in_features, 1)

    def _enter(self, x: Tensor, budget: float | None) -> None:
        if not x.numel():
            return
        books, rows = self._books, self._rows(x)
        books.rows = rows
        books.last = self.layer.energy(self.layer.columns, rows) / rows
        books.history.append(books.last)
        books.total += books.last * rows
        books.samples += rows
        if budget is not None:
            books.allowed += budget * rows

    def get_current_rank(self) -> int:
        """Largest prefix that a row of the last forward used; before, min_rank."""
        return self.layer.current_rank

    def get_budget_usage(self) -> float:
        """Energy over budget since the last reset, in [0, 1].

        0.0 before the first forward, after a reset, and without a budget.
        """
        books = self._books
        if not books.allowed:
            return 1.0 if books.total and self.energy_budget == 0 else 0.0
        return min(books.total / books.allowed, 1.0)

    def reset_budget(self) -> None:
        """Set energy totals and usage to 0; weights and histories stay."""
        self._books.reset()

    def get_performance_stats(self) -> dict[str, Any]:
        """Figures as plain Python values; energies in mJ.

        Returns:
            ``current_rank``; ``energy_consumption`` per sample of the last forward,
            0.0 before; ``energy_source``, "nominal" or "calibrated:...";
            ``total_energy`` and ``samples`` since the reset; ``energy_budget`` as
            given or, of a preset, at the last batch size; ``budget_usage``;
            ``over_budget``: min_rank alone exceeded it; ``rank_history``,
            ``complexity_history``, ``energy_history``: the last 1000;
            ``compression_ratio``; ``flops`` of the last batch, 0 before;
            ``sanitized``: input elements replaced by 0; ``mode``.
        """
        layer, books = self.layer, self._books
        return {
            "current_rank": layer.current_rank,
            "energy_consumption": books.last,
            "energy_source": str(getattr(layer.energy_model, "source", "unknown")),
            "total_energy": books.total,
            "samples": books.samples,
            "energy_budget": self._budget_at(max(books.rows, 1)),
            "budget_usage": self.get_budget_usage(),
            "over_budget": layer.over_budget,
            "rank_history": layer.rank_history,
            "complexity_history": layer.complexity_history,
            "energy_history": list(books.history),
            "compression_ratio": layer.get_compression_ratio(),
            "flops": layer.get_flops(books.rows),
            "sanitized": layer.sanitized,
            "mode": self.mode,
        }

    def extra_repr(self) -> str:
        """Mode and budget, for ``print(module)``."""
        return f"mode={self.mode!r}, energy_budget={self.energy_budget}"


def create_loraven_layer(
    in_features: int, out_features: int, mode: str = "balanced", **kwargs: Any
) -> LoRAven:
    """Make a `LoRAven`; the same arguments, the same errors.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        mode: A preset, or ``"custom"``.
        **kwargs: ``max_rank``, ``min_rank``, ``energy_budget``, ``bias``, ``device``.

    Raises:
        TypeError: An unknown keyword.
        InvalidValue: As `LoRAven`.

    Example:
        >>> create_loraven_layer(64, 32, max_rank=8, min_rank=2).max_rank
        8
    """
    return LoRAven(in_features, out_features, mode, **kwargs)


def _ranks(
    inside: Any, outside: Any, mode: Any, max_rank: Any, min_rank: Any
) -> dict[str, Any]:
    """The ranks as given, else the preset's; none where neither is known."""
    given = {"max_rank": max_rank, "min_rank": min_rank}
    found = {name: rank for name, rank in given.items() if rank is not None}
    sizes = {"in_features": inside, "out_features": outside}
    if mode not in _MODES or mode == "custom" or wrong_sizes(sizes):
        return found
    preset, short = PRESETS[mode], min(inside, outside)
    own = {
        "max_rank": max(1, round(preset.rank_ratio * short)),
        "min_rank": max(1, round(preset.min_rank_ratio * short)),
    }
    return own | found


def _wrong_mode(mode: Any, max_rank: Any, min_rank: Any) -> list[str]:
    if mode not in _MODES:
        return [f"mode={mode!r} is none of {', '.join(_MODES)}"]
    given = {"max_rank": max_rank, "min_rank": min_rank}
    missing = [name for name, rank in given.items() if rank is None]
    if mode == "custom" and missing:
        return [f"mode='custom' needs {' and '.join(missing)}"]
    return []


def _wrong_budget(budget: Any) -> list[str]:
    if budget is None:
        return []
    if isinstance(budget, (bool, str)) or not hasattr(budget, "__float__"):
        kind = type(budget).__name__
        raise TypeError(f"energy_budget must be a number, not {kind}")
    if not math.isfinite(budget) or budget < 0:
        return [f"energy_budget={budget!r} is not a finite number of 0 or more"]
    return []
