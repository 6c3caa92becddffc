# SPDX-License-Identifier: Apache-2.0
"""The cheapest level for an example, from figures alone: no model runs here.

A ridge regression predicts log(1 - score) of an example at each level; an example
takes the cheapest level whose prediction lies below log(1 - target) by more than one
common offset. The offset is fixed on other examples so that the share of examples
that miss the target is controlled (conformal risk control: Angelopoulos, Bates,
Fisch, Lei & Schuster, 2022).

Decisions:
- Everything is float64 on the CPU: a score of 0.999999 is an ordinary one.
- An example counts as a miss at an offset if it misses there or at any larger one.
  Then misses never rise with the offset, even where a dearer level scores worse,
  and only so does the guarantee hold for every kind of scores. The offset is then
  one order statistic, exact, instead of a search on a grid.
- A larger offset is a stricter one. A comparison with NaN fails, so that an example
  with features that are not finite takes the largest level.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torchworks_core.errors import InvalidValue

__all__ = [
    "Ridge",
    "Static",
    "choose",
    "coin",
    "examples_needed",
    "fit_offset",
    "fit_ridge",
    "limit",
    "logs",
    "oracle",
]

STRENGTHS = (30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0)
FOLDS = 5
# Scores closer to 1 than this are equal: float32 models give no more digits.
_CLOSEST = 1e-6


class Ridge(NamedTuple):
    """A linear map of standardised features, all float64.

    Attributes:
        mean: (F,), of the features.
        scale: (F,), one over their standard deviation; 0 for a constant one.
        coefficients: (F, L).
        intercept: (L,).
        strength: of the regularisation.
    """

    mean: Tensor
    scale: Tensor
    coefficients: Tensor
    intercept: Tensor
    strength: float

    def predict(self, features: Tensor) -> Tensor:
        """(N, F) -> (N, L)."""
        scaled = (features.double() - self.mean) * self.scale
        return scaled @ self.coefficients + self.intercept


def logs(scores: Tensor) -> Tensor:
    """log(1 - score) in float64, never below log(1e-6).

    Example:
        >>> logs(torch.tensor([0.0, 1.0])).round(decimals=4)
        tensor([  0.0000, -13.8155], dtype=torch.float64)
    """
    return (1 - scores.double()).clamp_min(_CLOSEST).log()


def limit(target: float) -> float:
    """log(1 - target): what a level's prediction has to stay below."""
    return logs(torch.tensor(target, dtype=torch.float64)).item()


def fit_ridge(
    features: Tensor, targets: Tensor, strengths: tuple[float, ...] = STRENGTHS
) -> Ridge:
    """Fit with the strength that predicts best in five-fold cross-validation.

    The error is the sum over columns of squared errors, each in units of its
    column's variance. The folds are every fifth row: give rows in random order.

    Args:
        features: (N, F).
        targets: (N, L).
        strengths: to choose from.

    Raises:
        InvalidValue: values that are not finite, features whose variance is not, or
            fewer than 10 rows.

    Example:
        >>> x = torch.arange(20.0)[:, None]
        >>> line = fit_ridge(x, 2 * x, (1e-9,))
        >>> round(line.predict(torch.tensor([[30.0]])).item(), 5)
        60.0
    """
    x, y = features.double(), targets.double()
    for name, value in (("features", x), ("scores", y)):
        if not value.isfinite().all():
            raise InvalidValue(name, "they hold NaN or infinity")
    if len(x) < 2 * FOLDS:
        do = f"Give at least {2 * FOLDS}"
        raise InvalidValue(f"{len(x)} examples to learn from", "too few", do)
    # A column with an infinite deviation would count as a constant one.
    if not x.std(0, correction=0).isfinite().all():
        why = f"{x.abs().max().item():.3g} is among them, its square beyond float64"
        raise InvalidValue("features", why, "Give them in other units")
    variance = y.var(0, correction=0)
    weights = torch.where(variance > 0, 1 / variance, 0.0)
    errors = [0.0] * len(strengths)
    fold = torch.arange(len(x)) % FOLDS
    for number in range(FOLDS if len(strengths) > 1 else 0):
        kept, left = fold != number, fold == number
        for index, ridge in enumerate(_fits(x[kept], y[kept], strengths)):
            missed = (ridge.predict(x[left]) - y[left]).square().sum(0)
            errors[index] += (missed * weights).sum().item()
    best = strengths[min(range(len(strengths)), key=errors.__getitem__)]
    return _fits(x, y, (best,))[0]


def _fits(x: Tensor, y: Tensor, strengths: tuple[float, ...]) -> list[Ridge]:
    """One fit for each strength by one eigendecomposition of the smaller side."""
    mean, middle = x.mean(0), y.mean(0)
    deviation = x.std(0, correction=0)
    # What is constant but for rounding carries nothing.
    small = deviation <= 1e-9 * mean.abs().clamp_min(1e-30)
    scale = torch.where(small, 0.0, 1 / deviation)
    z, centred = (x - mean) * scale, y - middle
    wide = z.shape[1] > z.shape[0]
    values, vectors = torch.linalg.eigh(z @ z.T if wide else z.T @ z)
    right = vectors.T @ (centred if wide else z.T @ centred)
    left = z.T @ vectors if wide else vectors
    values = values.clamp_min(0)[:, None]
    return [
        Ridge(mean, scale, left @ (right / (values + strength)), middle, strength)
        for strength in strengths
    ]


def choose(margins: Tensor, offset: float) -> Tensor:
    """The cheapest level whose margin exceeds the offset, else the last level.

    Args:
        margins: (N, L), `limit` minus the predicted log(1 - score); levels in order
            of their cost. The last column has no influence.
        offset: from `fit_offset`; larger is stricter.

    Returns:
        (N,) int64.

    Example:
        >>> choose(torch.tensor([[-1.0, 0.5, 0.7], [-2.0, -1.0, -1.0]]), 0.0).tolist()
        [1, 2]
    """
    good = margins > offset
    good[:, -1] = True
    return good.int().argmax(1)


def misses_allowed(count: int, alpha: float) -> int:
    """The largest k with (k + 1) / (count + 1) <= alpha; -1 if there is none.

    Example:
        >>> misses_allowed(18, 0.05), misses_allowed(19, 0.05), misses_allowed(59, 0.05)
        (-1, 0, 2)
    """
    # 0.07 * 100 is a little above 7 in floats.
    return int(alpha * (count + 1) + 1e-9) - 1


def examples_needed(alpha: float) -> int:
    """How many examples an offset needs at least.

    Example:
        >>> examples_needed(0.05)
        19
    """
    count = max(0, int(1 / alpha) - 2)
    while misses_allowed(count, alpha) < 0:
        count += 1
    return count


def fit_offset(margins: Tensor, scores: Tensor, target: float, alpha: float) -> float:
    """The smallest offset that keeps the expected share of misses within ``alpha``.

    For examples and a new one in random order, the chance that the new one misses
    the target at the level that `choose` gives it is at most ``alpha``.

    Args:
        margins: (N, L) as for `choose`, of a fit that has not seen these examples.
        scores: (N, L), what the levels really score.
        target: the score to reach.
        alpha: in (0, 1).

    Returns:
        A margin; ``-inf`` if the first level does for all examples, or ``inf`` if
        no offset will do: too few examples, or the last level misses too often.

    Example:
        >>> margins = torch.tensor([[float(i), 9.0] for i in range(19)])
        >>> scores = torch.tensor([[0.1 if i < 5 else 0.9, 1.0] for i in range(19)])
        >>> fit_offset(margins, scores, 0.5, 0.05)
        4.0
    """
    allowed = misses_allowed(len(margins), alpha)
    if allowed < 0:
        return torch.inf
    # A level is chosen for offsets from the largest margin before it up to its own.
    own = margins.double().nan_to_num(nan=-torch.inf, posinf=torch.inf)
    own[:, -1] = torch.inf
    before = own.cummax(1).values.roll(1, 1)
    before[:, 0] = -torch.inf
    missed = (scores < target) & (own > before)
    # Above this offset an example never misses.
    ends = torch.where(missed, own, -torch.inf).amax(1)
    ordered = ends.sort(descending=True).values
    return ordered[allowed].item() if allowed < len(ordered) else -torch.inf


class Static(NamedTuple):
    """What one level, and two by lot, cost for the same coverage.

    Attributes:
        level: the cheapest that reaches the coverage, else the last.
        cost: its cost.
        coin: cost of a coin between it and the level before, thrown so that the
            expected coverage is just enough.
        reached: whether the level reaches the coverage.
    """

    level: int
    cost: float
    coin: float
    reached: bool


def coin(scores: Tensor, costs: Tensor, target: float, alpha: float) -> Static:
    """The rivals of a router: no look at the example at all.

    Args:
        scores: (N, L).
        costs: (L,), ascending.
        target: the score to reach.
        alpha: the share of examples that may miss it.

    Example:
        >>> scores = torch.tensor([[0.8, 1.0], [1.0, 1.0]])
        >>> coin(scores, torch.tensor([0.5, 1.0]), 0.9, 0.25)
        Static(level=1, cost=1.0, coin=0.75, reached=True)
    """
    # Counts, so that 19 of 20 reaches 0.95.
    hits = (scores >= target).sum(0).tolist()
    needed = (1 - alpha) * len(scores)
    prices = costs.tolist()
    level = next((i for i, hit in enumerate(hits) if hit >= needed - 1e-9), None)
    if level is None:
        return Static(len(prices) - 1, prices[-1], prices[-1], False)
    price = prices[level]
    if level > 0:
        share = (needed - hits[level - 1]) / (hits[level] - hits[level - 1])
        share = min(1.0, max(0.0, share))
        price = prices[level - 1] + share * (price - prices[level - 1])
    return Static(level, prices[level], price, True)


def oracle(scores: Tensor, target: float) -> Tensor:
    """The cheapest level that reaches the target, else the last: (N,) int64."""
    good = scores >= target
    good[:, -1] = True
    return good.int().argmax(1)
