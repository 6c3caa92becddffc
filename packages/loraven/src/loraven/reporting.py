# SPDX-License-Identifier: Apache-2.0
"""What a low-rank layer says about itself: settings, views, counts, histories.

The one idea: figures describe the last forward, and before any forward (or after
a setting changed) the one that would come next with all gates open. So `get_flops`
equals what FlopCounterMode counts, whatever path ran.

Decisions: settings are properties that refuse a wrong value where it is given. What
a copy or a pickle could not carry (the graph behind ``expected_cost``) stays behind.
"""

import operator
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from loraven.adaptive import Work
from loraven.checks import integer, number
from loraven.sanitize import NonFiniteGuard
from torchworks_core.errors import InvalidValue

__all__ = ["Last", "LowRankReport", "wrong_sizes"]

_HISTORY = 1000
_SCOPES = ("batch", "row")


@dataclass
class Last:
    """State of a layer that is no parameter, in a plain object.

    Setting an attribute of a Module takes microseconds, of this one nanoseconds.

    Attributes:
        rank: Of the last forward; before any, the initial one.
        work: What the last forward ran; None before any.
        over_budget: Whether r_min alone exceeded its budget.
        cost: ``expected_cost`` of the last training forward.
        ranks: Of the last forwards that decided one.
        complexities: Their mean scores.
    """

    rank: int
    work: Work | None = None
    over_budget: bool = False
    cost: Tensor | None = None
    ranks: deque[int] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    complexities: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))

    def note(self, rank: int, work: Work, complexity: float) -> None:
        """Take up a forward that decided its rank."""
        self.rank, self.work = rank, work
        self.ranks.append(rank)
        self.complexities.append(complexity)


class LowRankReport(nn.Module):
    """Base of `DynamicLowRankLayer`: everything but its constructor and forwards."""

    in_features: int
    out_features: int
    r_max: int
    r_min: int
    num_blocks: int
    down: nn.Parameter
    scale: nn.Parameter
    up: nn.Parameter
    scorer: nn.Module
    _guard: NonFiniteGuard
    _fixed_rank: int | None
    _gates_enabled: bool
    _rank_scope: str
    _energy_model: Any
    _random_rank_share: float
    _caps: dict
    _energies: dict
    _last: "Last"

    @property
    def V(self) -> Tensor:
        """``down`` in the formula's orientation: (in_features, r_max), a view."""
        return self.down.detach().t()

    @property
    def S(self) -> Tensor:
        """(r_max, r_max), diagonal, with ``scale`` on it."""
        return torch.diag(self.scale.detach())

    @property
    def U(self) -> Tensor:
        """``up`` in the formula's orientation: (out_features, r_max), a view."""
        return self.up.detach().t()

    @property
    def current_rank(self) -> int:
        """Largest prefix that a row of the last forward used."""
        return self._last.rank

    @property
    def rank_history(self) -> list[int]:
        """Ranks of the last 1000 forwards that decided one, oldest first."""
        return list(self._last.ranks)

    @property
    def complexity_history(self) -> list[float]:
        """Mean scores of the same forwards."""
        return list(self._last.complexities)

    @property
    def expected_cost(self) -> Tensor | None:
        """Mean share of columns that the last training forward kept: 0-dim, [0, 1].

        Differentiable; add ``price * layer.expected_cost`` to the loss.
        """
        return self._last.cost

    @property
    def over_budget(self) -> bool:
        """Whether r_min alone exceeded the last forward's budget."""
        return self._last.over_budget

    @property
    def sanitized(self) -> int:
        """Number of input elements replaced by 0; waits for an accelerator."""
        return self._guard.count

    @property
    def fixed_rank(self) -> int | None:
        """None, or the rank from r_min to r_max that runs without a decision.

        A budget still caps it. In training the scorer and the gates then get no
        gradient: give both ``requires_grad_(False)`` before you wrap the model in
        DistributedDataParallel, or wrap it with ``find_unused_parameters=True``.
        """
        return self._fixed_rank

    @fixed_rank.setter
    def fixed_rank(self, rank: int | None) -> None:
        if rank is not None:
            rank = self._last.rank = integer("fixed_rank", rank, self.r_min, self.r_max)
        self._fixed_rank, self._last.work = rank, None

    @property
    def gates_enabled(self) -> bool:
        """Whether gates run; without them all blocks are open.

        False leaves ``gate`` without gradient: for DistributedDataParallel, see
        `fixed_rank`.
        """
        return self._gates_enabled

    @gates_enabled.setter
    def gates_enabled(self, enabled: bool) -> None:
        if not isinstance(enabled, bool):
            kind = type(enabled).__name__
            raise TypeError(f"gates_enabled must be True or False, not {kind}")
        self._gates_enabled, self._last.work = enabled, None

    @property
    def random_rank_share(self) -> float:
        """Share of training rows that run with a random rank, in [0, 1]."""
        return self._random_rank_share

    @random_rank_share.setter
    def random_rank_share(self, share: float) -> None:
        self._random_rank_share = number("random_rank_share", share, 0.0, 1.0)

    @property
    def rank_scope(self) -> str:
        """``"batch"`` or ``"row"``: whose scores decide a row's rank."""
        return self._rank_scope

    @rank_scope.setter
    def rank_scope(self, scope: str) -> None:
        if scope not in _SCOPES:
            raise InvalidValue(
                f"rank_scope={scope!r}", "unknown", f"Use one of {_SCOPES}"
            )
        self._rank_scope, self._last.work = scope, None

    @property
    def nan_policy(self) -> str:
        """``"sanitize"``, ``"propagate"`` or ``"raise"``."""
        return self._guard.policy

    @nan_policy.setter
    def nan_policy(self, policy: str) -> None:
        self._guard.policy = NonFiniteGuard(policy).policy

    @property
    def energy_model(self) -> Any:
        """Estimates mJ of a whole batch; a new one forgets what the old one said.

        Its answers are kept: after changing one in place, assign it again.
        """
        return self._energy_model

    @energy_model.setter
    def energy_model(self, model: Any) -> None:
        _needs("energy_model", model, "estimate")
        self._energy_model = model
        self._caps.clear()
        self._energies.clear()

    def get_compression_ratio(self) -> float:
        """Weights executed over those of a dense layer, in (0, 1].

        Columns of the current rank and open blocks times (in_features +
        out_features), over in_features * out_features; 1.0 from where that is no
        saving.
        """
        both, dense = self._sizes()
        return min(self.columns * both / dense, 1.0)

    @property
    def columns(self) -> int:
        """Columns of the current rank whose block is open for some row."""
        work = self._last.work
        if work is None or work.columns == self.r_max:
            return self._last.rank
        return min(work.columns, self._last.rank)

    def get_flops(self, batch_size: int = 1) -> int:
        """Matrix-product FLOPs (2 per multiply-accumulate) of the current forward.

        At the current rank and open blocks, scorer and gates included, in the mode
        (training computes all columns) and along the path that the last forward
        took; what FlopCounterMode counts, with the building of a merged weight
        where the rows are so many that this costs less than the two factors.

        Args:
            batch_size: Rows, at least 0.
        """
        rows = integer("batch_size", batch_size, 0)
        work = self._planned() if self._last.work is None else self._last.work
        both, dense = self._sizes()
        macs = rows * work.columns * both
        if work.whole and self._merges(work.columns, rows):
            macs = (rows + work.columns) * dense
        if work.scored:
            hidden = getattr(self.scorer, "hidden_dim", 0)
            macs += rows * hidden * (self.in_features + 1)
        if work.gated:
            macs += rows * self.num_blocks * self.in_features
        return 2 * macs

    def _planned(self) -> Work:
        """What an inference forward at the current rank would run."""
        free = self._fixed_rank is None
        return Work(self._last.rank, True, free, free and self._gates_enabled)

    def _merges(self, rank: int, rows: int) -> bool:
        """Whether multiplying the factors with each other first is cheaper."""
        both, dense = self._sizes()
        excess = rank * both - dense
        return excess > 0 and rows * excess > rank * dense

    def _sizes(self) -> tuple[int, int]:
        inside, outside = self.in_features, self.out_features
        return inside + outside, inside * outside

    def visualize_rank_history(self, save_path: str | None = None) -> None:
        """Plot ranks and scores of the last forwards; see `plot_rank_evolution`.

        Args:
            save_path: File to write; None writes none.

        Raises:
            MissingExtra: matplotlib is not installed (an ImportError).
        """
        from loraven.plots import plot_rank_evolution

        plot_rank_evolution(self.rank_history, self.complexity_history, save_path)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler":
            _needs(name, value, "schedule_rank")
        if name == "energy_model":
            # nn.Module would register one that is a module past the property.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": replace(self._last, cost=None)}

    def extra_repr(self) -> str:
        """Sizes and ranks, for ``print(module)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"r_max={self.r_max}, r_min={self.r_min}"
        )


def _needs(name: str, value: Any, method: str) -> None:
    if not callable(getattr(value, method, None)):
        kind = type(value).__name__
        raise TypeError(f"{name} must have a method {method}; {kind} has none")


def wrong_sizes(
    sizes: dict[str, Any], high: str = "r_max", low: str = "r_min"
) -> list[str]:
    """Everything wrong with sizes and ranks, one clause each.

    Args:
        sizes: ``in_features``, ``out_features``, the two ranks, ``init_rank``, and
            others that only have to be integers of 1 or more; any may be missing.
        high: What the largest rank is called.
        low: What the smallest rank is called.

    Example:
        >>> wrong_sizes({"in_features": 8, "out_features": 4, "r_max": 9, "r_min": 0})
        ['r_min=0 is not an integer of 1 or more', 'r_max=9 is above min(8, 4)=4']
    """
    problems, fine = [], {}
    for name, value in sizes.items():
        whole = hasattr(value, "__index__") and not isinstance(value, bool)
        if not whole or operator.index(value) < 1:
            problems.append(f"{name}={value!r} is not an integer of 1 or more")
        else:
            fine[name] = value
    most, least, first = (fine.get(name) for name in (high, low, "init_rank"))
    inside, outside = fine.get("in_features"), fine.get("out_features")
    if inside and outside and most and most > min(inside, outside):
        limit = f"min({inside}, {outside})={min(inside, outside)}"
        problems.append(f"{high}={most} is above {limit}")
    if most and least and least > most:
        problems.append(f"{low}={least} is above {high}={most}")
    elif most and least and first and not least <= first <= most:
        where = f"from {low}={least} to {high}={most}"
        problems.append(f"init_rank={first} is not {where}")
    return problems
