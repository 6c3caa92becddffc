# SPDX-License-Identifier: Apache-2.0
"""Does a level for each example pay on this data? Figures, and a verdict.

40 % of the examples teach a router, 30 % fix its offset and the level of its rivals,
and 30 % that nothing has seen tell what they cost and how often they miss. The
rivals look at no example: the cheapest level with enough coverage, and a coin between
two neighbouring levels, which a router has to beat to have learnt anything.

The verdict is "adaptive" only if the 95 % bootstrap interval of coin - router lies
above zero, with the router's own cost in it, and its misses on the unseen examples
are within two standard errors of what was asked for.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraven.batches import Output
from loraven.checks import integer
from loraven.collect import Collected, Score, collect
from loraven.difficulty import (
    Static,
    choose,
    coin,
    fit_offset,
    fit_ridge,
    limit,
    logs,
    oracle,
)
from loraven.family import find_family
from loraven.features import Features, check_functions, check_goal
from loraven.router import examples_for

__all__ = ["AuditResult", "LevelScores", "audit"]

_RESAMPLES = 1000


class LevelScores(NamedTuple):
    """One level over all examples.

    Attributes:
        level: of the conversion.
        cost: what it costs, as a share of the dense cost.
        mean: of the scores.
        p05: their 5 % quantile.
        min: the worst.
        coverage: share of examples that reach the target.
    """

    level: float
    cost: float
    mean: float
    p05: float
    min: float
    coverage: float


@dataclass(frozen=True)
class AuditResult:
    """What `audit` found. Budgets are shares of the converted layers' dense cost.

    Attributes:
        verdict: "adaptive" or "static".
        reason: one sentence with the figures that decided.
        target: the score that an example should reach.
        alpha: the share of examples that may miss it.
        n: examples in all.
        static_budget: of the cheapest level with enough coverage.
        coin_budget: of a coin between it and the level before.
        router_budget: mean over unseen examples, ``router_cost`` included; NaN if
            there is no router.
        router_violation: share of unseen examples that miss the target with it; NaN
            if there is no router.
        oracle_budget: mean of the cheapest level that is good enough, were it known.
        levels: one row for each level.
        interval: 95 % bootstrap interval of coin - router, above zero where the router
            costs less; NaN if there is no router.
        router_cost: what looking at an example costs.
        r_squared: share of the variance of log(1 - score) that the router predicts on
            unseen examples, mean over levels; NaN if there is no router.

    Example:
        >>> row = LevelScores(0.5, 0.5, 0.97, 0.91, 0.80, 0.72)
        >>> dense = LevelScores(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
        >>> print(AuditResult(
        ...     "static", "a coin costs no more.", 0.95, 0.05, 900, 1.0, 0.91, 0.92,
        ...     0.041, 0.64, (row, dense), (-0.03, 0.01), 0.001, 0.12))
        static: a coin costs no more.
        target 0.95, missed by at most 5 % of examples; 900 examples
        level    cost    mean     p05     min  coverage
          0.5   0.500  0.9700  0.9100  0.8000     0.720
            1   1.000  1.0000  1.0000  1.0000     1.000
        budget: one level 1.000, coin 0.910, router 0.920, oracle 0.640
        router: 4.1 % missed, own cost 0.0010, R2 0.12, coin - router -0.030 to 0.010
    """

    verdict: str
    reason: str
    target: float
    alpha: float
    n: int
    static_budget: float
    coin_budget: float
    router_budget: float
    router_violation: float
    oracle_budget: float
    levels: tuple[LevelScores, ...]
    interval: tuple[float, float]
    router_cost: float
    r_squared: float

    def __str__(self) -> str:
        """The whole table."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.verdict}: {self.reason}"
        yield (
            f"target {self.target:g}, missed by at most {100 * self.alpha:g} % of "
            f"examples; {self.n} examples"
        )
        yield "level    cost    mean     p05     min  coverage"
        for row in self.levels:
            yield (
                f"{row.level:>5g}  {row.cost:6.3f}  {row.mean:6.4f}  {row.p05:6.4f}  "
                f"{row.min:6.4f}  {row.coverage:8.3f}"
            )
        fitted = not math.isnan(self.router_budget)
        router = f"{self.router_budget:.3f}" if fitted else "none"
        yield (
            f"budget: one level {self.static_budget:.3f}, coin {self.coin_budget:.3f}, "
            f"router {router}, oracle {self.oracle_budget:.3f}"
        )
        if fitted:
            yield (
                f"router: {100 * self.router_violation:.1f} % missed, own cost "
                f"{self.router_cost:.4f}, R2 {self.r_squared:.2f}, coin - router "
                f"{self.interval[0]:.3f} to {self.interval[1]:.3f}"
            )


def audit(
    model: nn.Module,
    data: Iterable[Any],
    *,
    target: float = 0.95,
    alpha: float = 0.05,
    score: Score = None,
    output: Output = None,
    seed: int = 0,
    features: Features = None,
) -> AuditResult:
    """Say with figures whether choosing a level for each example pays.

    Args:
        model: from `loraven.convert`; it is afterwards as before.
        data: unlabelled inputs, in batches as for `loraven.convert`, other than the
            calibration's; a thousand examples give a clear answer. Read once.
        target: the score that an example should reach, below 1.
        alpha: the share of examples that may miss it, in (0, 1).
        score: as for `loraven.fit_router`, as are ``output`` and ``features``.
        output: picks the tensor to score.
        seed: of the split and the bootstrap.
        features: what the router looks at; what the function computes beside matrix
            products does not enter its cost.

    Returns:
        The figures; ``print`` shows them as a table. With too few examples, or
        without a level that is good enough, the verdict is "static" and says so.

    Raises:
        InvalidValue: no example, or scores that can't be used.
        NotReady: the model was not converted.
        TypeError: an argument of a wrong type.

    Example:
        >>> import torch, loraven
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU())
        >>> summary = loraven.convert(model, [torch.randn(256, 64)])
        >>> result = loraven.audit(model, [torch.randn(40, 64)])
        >>> result.verdict, result.reason
        ('static', '40 examples are too few for alpha=0.05: give at least 64.')
    """
    family = find_family(model)[1]
    target, alpha = check_goal(target, alpha)
    check_functions(score=score, output=output, features=features)
    integer("seed", seed, 0, 2**64 - 1)
    found = collect(model, data, score, output, features)
    return judge(found, family.levels, target, alpha, seed)


class _Trial(NamedTuple):
    """What one split gives; NaN without a router."""

    static: Static
    oracle: float
    router: float = math.nan
    violation: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    r_squared: float = math.nan
    unseen: int = 0


def judge(
    found: Collected, levels: tuple[float, ...], target: float, alpha: float, seed: int
) -> AuditResult:
    """`audit` on figures alone.

    Args:
        found: of all examples.
        levels: of the conversion.
        target: as for `audit`.
        alpha: as for `audit`.
        seed: as for `audit`.
    """
    needed = examples_for(alpha, 4, 3, 10)
    if len(found.scores) < needed:
        trial = _rivals(found, found.scores, found.scores, target, alpha)
    else:
        trial = _split(found, target, alpha, seed)
    verdict, reason = _verdict(trial, found, target, alpha, needed)
    return AuditResult(
        verdict=verdict,
        reason=reason,
        target=target,
        alpha=alpha,
        n=len(found.scores),
        static_budget=trial.static.cost,
        coin_budget=trial.static.coin,
        router_budget=trial.router,
        router_violation=trial.violation,
        oracle_budget=trial.oracle,
        levels=_table(found, levels, target),
        interval=trial.interval,
        router_cost=found.overhead,
        r_squared=trial.r_squared,
    )


def _rivals(
    found: Collected, known: Tensor, unseen: Tensor, target: float, alpha: float
) -> _Trial:
    best = found.costs[oracle(unseen, target)].mean().item()
    return _Trial(coin(known, found.costs, target, alpha), best)


def _split(found: Collected, target: float, alpha: float, seed: int) -> _Trial:
    """Learn, fix and try out on three parts of the examples."""
    random = torch.Generator().manual_seed(seed)
    examples = len(found.scores)
    order = torch.randperm(examples, generator=random)
    learning, fixing = examples * 4 // 10, examples * 3 // 10
    learn, fix, new = order.split([learning, fixing, examples - learning - fixing])
    ridge = fit_ridge(found.features[learn], logs(found.scores[learn]))
    margins = limit(target) - ridge.predict(found.features)
    shift = fit_offset(margins[fix], found.scores[fix], target, alpha)
    trial = _rivals(found, found.scores[fix], found.scores[new], target, alpha)
    if shift == math.inf:
        return trial
    chosen = choose(margins[new], shift)
    spent = found.costs[chosen] + found.overhead
    got = found.scores[new].gather(1, chosen[:, None])
    wrong = (limit(target) - margins[new] - logs(found.scores[new])).square().mean(0)
    spread = logs(found.scores[new]).var(0, correction=0)
    varies = spread > 0
    left = (wrong[varies] / spread[varies]).mean().item()
    return trial._replace(
        router=spent.mean().item(),
        violation=(got < target).double().mean().item(),
        interval=_interval(found, fix, spent, target, alpha, random),
        r_squared=1 - left,
        unseen=len(new),
    )


def _interval(
    found: Collected,
    fix: Tensor,
    spent: Tensor,
    target: float,
    alpha: float,
    random: torch.Generator,
) -> tuple[float, float]:
    """Of coin - router, over resampled parts that they were fixed and tried on."""
    gains = []
    for _ in range(_RESAMPLES):
        again = fix[torch.randint(len(fix), (len(fix),), generator=random)]
        rival = coin(found.scores[again], found.costs, target, alpha).coin
        drawn = torch.randint(len(spent), (len(spent),), generator=random)
        gains.append(rival - spent[drawn].mean().item())
    quantiles = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.tensor(gains, dtype=torch.float64).quantile(quantiles).tolist()
    return low, high


def _verdict(
    trial: _Trial, found: Collected, target: float, alpha: float, needed: int
) -> tuple[str, str]:
    examples = len(found.scores)
    if examples < needed:
        why = f"{examples} examples are too few for alpha={alpha:g}"
        return "static", f"{why}: give at least {needed}."
    if math.isnan(trial.router):
        good = (found.scores[:, -1] >= target).double().mean().item()
        return "static", (
            f"the largest level reaches {target:g} in {100 * good:.1f} % of examples, "
            "which guarantees no router: convert with level 1.0."
        )
    low, high = trial.interval
    coin_cost, router = trial.static.coin, trial.router
    bound = alpha + 2 * math.sqrt(alpha * (1 - alpha) / trial.unseen)
    missed = f"{100 * trial.violation:.1f} %"
    if trial.violation > bound:
        return "static", (
            f"a router misses the target in {missed} of unseen examples, more than "
            f"{100 * bound:.1f} %."
        )
    range_ = f"coin - router is {coin_cost - router:.3f}, {low:.3f} to {high:.3f}"
    if low > 0:
        return "adaptive", (
            f"a router needs {router:.3f} on average where a coin between levels needs "
            f"{coin_cost:.3f} and one level {trial.static.cost:.3f}; {range_}, and "
            f"{missed} of unseen examples miss the target."
        )
    return "static", (
        f"a router needs {router:.3f} on average, a coin between levels "
        f"{coin_cost:.3f}; {range_}, not clearly above zero."
    )


def _table(
    found: Collected, levels: tuple[float, ...], target: float
) -> tuple[LevelScores, ...]:
    rows = []
    for number, level in enumerate(levels):
        column = found.scores[:, number]
        rows.append(
            LevelScores(
                level,
                found.costs[number].item(),
                column.mean().item(),
                column.sort().values[int(0.05 * (len(column) - 1))].item(),
                column.min().item(),
                (column >= target).double().mean().item(),
            )
        )
    return tuple(rows)
