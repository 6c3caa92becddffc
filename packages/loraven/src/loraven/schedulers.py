# SPDX-License-Identifier: Apache-2.0
"""From complexity scores to a rank: an interface and two schedulers.

A scheduler only proposes a rank; the layer that asks it enforces its budget
afterwards, whatever the scheduler says.

Decisions:
- The history in r(t) = RankScheduler(score, budget, history) is the scheduler's own
  memory. Only training uses it; constant scores at inference give constant ranks.
- One transfer from the scores' device for each call; a NaN shows in the mean.
- An optimum less than 1e-6 below a whole rank counts as that rank: scores are
  single precision, and 8 must not come out as 7.
"""

import math
import random
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from loraven.checks import dimensions, integer, number
from loraven.energy import EnergyEstimator, get_default_hardware_profile
from torchworks_core.errors import InvalidValue

_MEMORY = 8
_ROUNDING = 1e-6
# Up to here Python is faster than the kernels' start.
_SMALL = 64


class RankScheduler(ABC):
    """Turns the complexity scores of a batch into one rank.

    A layer calls `schedule_rank` with the keywords ``layer_dims``, ``mode`` and
    ``batch_size``; a subclass takes those that it needs and leaves the others in
    ``**kwargs``.

    Example:
        >>> class Constant(RankScheduler):
        ...     def schedule_rank(self, complexity_scores, budget=None, **kwargs):
        ...         return 8
        >>> Constant().schedule_rank(torch.rand(4), mode="inference")
        8
    """

    @abstractmethod
    def schedule_rank(
        self,
        complexity_scores: torch.Tensor,
        budget: float | None = None,
        **kwargs: Any,
    ) -> int:
        """Propose a rank.

        Args:
            complexity_scores: Shape (B,) or (B, 1), in [0, 1], any device.
            budget: Energy of the layer in mJ per sample; None is no limit.
            **kwargs: Whatever else the layer knows.

        Returns:
            The rank.
        """


class LinearRankScheduler(RankScheduler):
    """A rank linear in the mean score, with bonuses for spread and gradient.

    With s the scores clamped to [0, 1], span = r_max - r_min and g the gradient norm:
    r_min + mean(s)·span + std(s)·diversity_factor·span + 0.2·min(g/10, 1)·span, the
    std that of a population, rounded half up, clamped to [r_min, r_max]. There is no
    energy in it: the layer applies the budget.

    Args:
        r_min: Smallest rank, at least 1.
        r_max: Largest rank, at least ``r_min``.
        diversity_factor: Weight of the spread, at least 0; 0 turns off the random
            shifts in training as well.

    Attributes:
        history: The last 8 ranks, oldest first.
        generator: A ``random.Random`` seeded with 0 for the shifts in training.

    Raises:
        InvalidValue: a rank or the factor is out of range.

    Example:
        >>> scheduler = LinearRankScheduler(r_min=4, r_max=128)
        >>> scheduler.schedule_rank(torch.tensor([0.25, 0.75]))
        69
    """

    def __init__(
        self, r_min: int = 4, r_max: int = 128, diversity_factor: float = 0.1
    ) -> None:
        self.r_min, self.r_max = _rank_range(r_min, r_max)
        self.diversity_factor = number("diversity_factor", diversity_factor)
        self.history: deque[int] = deque(maxlen=_MEMORY)
        self.generator = random.Random(0)

    def schedule_rank(
        self,
        complexity_scores: torch.Tensor,
        budget: float | None = None,
        current_loss: float | None = None,
        gradient_norm: float | None = None,
        **kwargs: Any,
    ) -> int:
        """Propose a rank by the formula of the class.

        Args:
            complexity_scores: Shape (B,) or (B, 1); clamped to [0, 1]. Without any
                score the rank is ``r_min``.
            budget: Checked and not used: the layer applies it.
            current_loss: Not used; the formula has no term for it.
            gradient_norm: At least 0; None is no bonus.
            **kwargs: ``mode="training"`` allows `enforce_diversity` to shift.

        Returns:
            A rank from ``r_min`` to ``r_max``.

        Raises:
            TypeError: an argument has the wrong type.
            InvalidValue: a score is NaN, the scores have another shape, or
                ``budget`` or ``gradient_norm`` is negative or not finite.
        """
        mean, spread = _mean_and_std(complexity_scores)
        if budget is not None:
            number("budget", budget)
        norm = 0.0 if gradient_norm is None else number("gradient_norm", gradient_norm)
        span = self.r_max - self.r_min
        rank = self.r_min + mean * span
        rank += spread * self.diversity_factor * span
        rank += min(norm / 10.0, 1.0) * 0.2 * span
        rank = self.enforce_diversity(rank, **kwargs)
        found = min(max(math.floor(rank + 0.5), self.r_min), self.r_max)
        self.history.append(found)
        return found

    def enforce_diversity(self, rank: float, **kwargs: Any) -> float:
        """Shift a rank that has been the same 8 times in a row, in training only.

        Args:
            rank: The rank before rounding.
            **kwargs: ``mode="training"``, or the rank is returned as it is.

        Returns:
            ``rank``, or ``rank`` ± diversity_factor·(r_max - r_min)/2.
        """
        stuck = len(self.history) == _MEMORY and len(set(self.history)) == 1
        if kwargs.get("mode") != "training" or not self.diversity_factor or not stuck:
            return rank
        shift = self.diversity_factor * (self.r_max - self.r_min) / 2
        return rank + self.generator.choice((-shift, shift))


class EnergyAwareRankScheduler(RankScheduler):
    """The best rank among those whose energy fits the budget.

    Maximises P(r) = -alpha·(r - lo)² - beta·(r - hi)² over E(r, B)/B <= budget. hi is
    the largest rank within the budget; lo = min(need, hi) with need = r_min +
    mean(s)·(r_max - r_min). Energy wants no more than the input needs, performance
    wants the whole budget: the optimum lo + (hi - lo)·beta/(alpha + beta) is rounded
    down. It never falls when the budget or the scores rise.

    Args:
        r_min: Smallest rank, at least 1; proposed even where it exceeds the budget.
        r_max: Largest rank, at least ``r_min``.
        energy_model: Anything with ``estimate(layer_dims, rank, batch_size=...)`` in
            mJ for the whole batch. The rank is the optimum where it does not fall
            with the rank, and within the budget in any case. None is an
            `EnergyEstimator` with the default profile.
        alpha: Weight of energy, at least 0; 0 spends the budget.
        beta: Weight of performance, at least 0; 0 spends only the need.

    Raises:
        TypeError: ``energy_model`` has no method ``estimate``.
        InvalidValue: a rank or weight is out of range, or both weights are 0.

    Example:
        >>> scheduler = EnergyAwareRankScheduler(r_min=4, r_max=64)
        >>> scores, dims = torch.full((8,), 0.5), (512, 512)
        >>> [scheduler.schedule_rank(scores, b, dims) for b in (0.0, 0.1, 1.0)]
        [4, 34, 36]
    """

    def __init__(
        self,
        r_min: int = 4,
        r_max: int = 128,
        energy_model: Any | None = None,
        alpha: float = 1.0,
        beta: float = 0.1,
    ) -> None:
        self.r_min, self.r_max = _rank_range(r_min, r_max)
        self.alpha, self.beta = number("alpha", alpha), number("beta", beta)
        if not self.alpha + self.beta:
            raise InvalidValue("alpha=0, beta=0", "nothing to optimise", "Raise one")
        if energy_model is None:
            energy_model = EnergyEstimator(get_default_hardware_profile())
        if not callable(getattr(energy_model, "estimate", None)):
            kind = type(energy_model).__name__
            raise TypeError(
                f"energy_model must have a method estimate; {kind} has none"
            )
        self.energy_model = energy_model
        self._warned = False

    def schedule_rank(
        self,
        complexity_scores: torch.Tensor,
        budget: float | None = None,
        layer_dims: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> int:
        """Propose the rank of the class's optimum.

        Args:
            complexity_scores: Shape (B,) or (B, 1); clamped to [0, 1]. Without any
                score the rank is ``r_min``.
            budget: In mJ per sample, at least 0; None is no limit.
            layer_dims: (in_features, out_features). With a budget and without sizes
                (r_max, r_max) is assumed, with one warning.
            **kwargs: ``batch_size``, the B of E(r, B); by default one row a score.

        Returns:
            A rank from ``r_min`` to ``r_max`` within the budget and no larger than
            a size of the layer, or ``r_min``.

        Raises:
            TypeError: an argument has the wrong type.
            InvalidValue: a score is NaN, the scores have another shape, or an
                argument is out of range.
        """
        mean, _ = _mean_and_std(complexity_scores)
        count = len(complexity_scores)
        rows = integer("batch_size", kwargs.get("batch_size", count), 0)
        fits = self._fits(budget, layer_dims, max(rows, 1))
        most = self.r_max if layer_dims is None else min(self.r_max, *layer_dims)
        high = self._largest(fits, max(most, self.r_min))
        if high == self.r_min or not count:
            return self.r_min
        need = self.r_min + mean * (self.r_max - self.r_min)
        low, share = min(need, high), self.beta / (self.alpha + self.beta)
        best = math.floor(low + (high - low) * share + _ROUNDING)
        found = min(max(best, self.r_min), high)
        # Only a model whose energy falls somewhere with the rank takes a step.
        while found > self.r_min and not fits(found):
            found -= 1
        return found

    def _fits(
        self, budget: float | None, dims: tuple[int, int] | None, rows: int
    ) -> Callable[[int], bool]:
        """Return the test whether a rank's energy a row is within the budget."""
        if dims is not None:
            dims = dimensions(dims)
        if budget is None:
            return lambda rank: True
        limit = number("budget", budget)
        if dims is None:
            self._warn()
            dims = (self.r_max, self.r_max)
        estimate = self.energy_model.estimate
        return lambda rank: estimate(dims, rank, batch_size=rows) / rows <= limit

    def _largest(self, fits: Callable[[int], bool], most: int) -> int:
        """Return the largest rank up to ``most`` that fits, or ``r_min``."""
        if fits(most):
            return most
        inside, outside = self.r_min, most
        while outside - inside > 1:
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if fits(middle) else (inside, middle)
        return inside

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            size = self.r_max
            text = f"a budget without layer_dims: ({size}, {size}) is assumed"
            warnings.warn(text, UserWarning, stacklevel=4)


def _rank_range(r_min: int, r_max: int) -> tuple[int, int]:
    low, high = integer("r_min", r_min), integer("r_max", r_max)
    if high < low:
        what = f"r_min={low}, r_max={high}"
        raise InvalidValue(what, "the largest rank is below the smallest")
    return low, high


def _mean_and_std(scores: torch.Tensor) -> tuple[float, float]:
    """Mean and population std of the clamped scores; (0, 0) without scores."""
    if not isinstance(scores, torch.Tensor):
        kind = type(scores).__name__
        raise TypeError(f"complexity_scores must be a Tensor, not {kind}")
    if scores.dim() not in (1, 2) or scores.shape[1:] not in ((), (1,)):
        what = f"complexity_scores of shape {tuple(scores.shape)}"
        raise InvalidValue(what, "one score a row is needed", "Give (B,) or (B, 1)")
    count = scores.numel()
    if count == 0:
        return 0.0, 0.0
    if count == 1:
        # The case where the decision's own time counts: no kernel but the transfer.
        mean, std = scores.item(), 0.0
        mean = mean if math.isnan(mean) else min(max(mean, 0.0), 1.0)
    elif count <= _SMALL and scores.is_cpu:
        mean, std = _short(scores.detach().reshape(-1).tolist())
    else:
        wide = scores if scores.dtype == torch.float64 else scores.float()
        pair = torch.std_mean(wide.detach().clamp(0.0, 1.0), correction=0)
        std, mean = torch.stack(pair).tolist()
    if math.isnan(mean):
        do = "Find out where they come from: a layer's input was not finite, perhaps"
        raise InvalidValue("complexity_scores", "they hold NaN", do)
    return mean, std


def _short(values: list[float]) -> tuple[float, float]:
    count = len(values)
    mean = sum(values) / count
    if math.isnan(mean):
        return mean, 0.0
    if min(values) < 0.0 or max(values) > 1.0:
        values = [min(max(value, 0.0), 1.0) for value in values]
        mean = sum(values) / count
    apart = [value - mean for value in values]
    return mean, math.sqrt(sum([gap * gap for gap in apart]) / count)
