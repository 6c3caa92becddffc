# SPDX-License-Identifier: Apache-2.0
"""Verdicts on scores made by hand, where it is known what is right."""

import math

import pytest
import torch
from scipy.stats import binom
from torch import nn

import loraven
from loraven import AuditResult, audit, convert, fit_router, get_budget, set_budget
from loraven.auditing import LevelScores, judge
from loraven.collect import Collected
from loraven.difficulty import choose, fit_offset, fit_ridge, limit, logs

LEVELS = (0.3, 0.6, 1.0)
COSTS = torch.tensor(LEVELS).double()


def figures(count=900, seed=0, seen=1.0, overhead=0.0):
    """A third each needs the first, the second, the dense level.

    ``seen`` is the share of the deciding feature's variance that can be seen.
    """
    random = torch.Generator().manual_seed(seed)
    hard = torch.rand(count, 1, generator=random).double() * 3
    close = torch.rand(count, 3, generator=random).double()
    needed = hard.floor()
    scores = 0.96 + 0.02 * close - 0.2 * (needed > torch.arange(3)) * (1 + close)
    scores[:, 2] = 1.0
    noise = torch.rand(count, 1, generator=random).double() * 3
    sight = math.sqrt(seen) * hard + math.sqrt(1 - seen) * noise
    features = torch.cat([(sight > 1).double(), (sight > 2).double(), noise], 1)
    if seen == 0:
        features = noise.repeat(1, 3)
    return Collected(scores, features, COSTS, overhead, 0)


def same(left, right):
    """Equal, NaN to NaN."""
    return str(left) == str(right) and repr(left) == repr(right)


@pytest.mark.critical
@pytest.mark.parametrize("seed", range(4))
def test_what_can_be_seen_is_used_and_adaptive_wins(seed):
    found = judge(figures(seed=seed), LEVELS, 0.95, 0.05, seed)
    assert found.verdict == "adaptive"
    # A third at each level is the oracle's cost; a coin needs the dense level.
    assert found.oracle_budget == pytest.approx(1.9 / 3, abs=0.03)
    assert found.router_budget <= found.oracle_budget + 0.05
    assert found.static_budget == 1.0
    assert 0.9 < found.coin_budget < 0.97
    assert found.router_violation <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 270)
    low, high = found.interval
    assert 0.2 < low < found.coin_budget - found.router_budget < high < 0.4
    assert found.r_squared > 0.9
    assert f"{found.router_budget:.3f}" in found.reason


@pytest.mark.critical
@pytest.mark.parametrize("seed", range(4))
def test_what_cannot_be_seen_is_no_gain_and_static_wins(seed):
    found = judge(figures(seed=seed, seen=0.0), LEVELS, 0.95, 0.05, seed)
    assert found.verdict == "static"
    assert found.interval[0] <= 0 or "misses the target in" in found.reason
    assert found.oracle_budget < 0.7
    assert found.r_squared < 0.05


def test_a_router_that_costs_more_than_it_saves_is_not_worth_it():
    cheap = judge(figures(overhead=0.01), LEVELS, 0.95, 0.05, 0)
    dear = judge(figures(overhead=0.5), LEVELS, 0.95, 0.05, 0)
    assert (cheap.verdict, dear.verdict) == ("adaptive", "static")
    assert dear.router_budget == pytest.approx(cheap.router_budget + 0.49)
    assert (cheap.router_cost, dear.router_cost) == (0.01, 0.5)
    assert dear.interval == pytest.approx([x - 0.49 for x in cheap.interval])


def test_one_good_level_for_all_leaves_nothing_to_gain():
    given = figures()
    given.scores.fill_(0.99)
    found = judge(given, LEVELS, 0.95, 0.05, 0)
    assert found.verdict == "static"
    assert found.router_budget == found.static_budget == pytest.approx(0.3)
    assert found.interval == (0.0, 0.0)
    assert found.router_violation == 0.0


@pytest.mark.critical
def test_every_figure_is_that_of_the_same_split_by_hand():
    given = figures(seen=0.7, overhead=0.02)
    found = judge(given, LEVELS, 0.95, 0.1, 7)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(7))
    learn, fix, new = order[:360], order[360:630], order[630:]
    ridge = fit_ridge(given.features[learn], logs(given.scores[learn]))
    margins = limit(0.95) - ridge.predict(given.features)
    offset = fit_offset(margins[fix], given.scores[fix], 0.95, 0.1)
    chosen = choose(margins[new], offset).tolist()
    spent = [LEVELS[i] for i in chosen]
    got = [given.scores[n, i].item() for n, i in zip(new.tolist(), chosen, strict=True)]
    assert found.router_budget == pytest.approx(sum(spent) / 270 + 0.02)
    assert found.router_violation == sum(s < 0.95 for s in got) / 270
    hits = (given.scores[fix] >= 0.95).sum(0)
    assert hits[1] < 243 <= hits[2]
    share = (243 - hits[1]) / (hits[2] - hits[1])
    assert found.static_budget == 1.0
    assert found.coin_budget == pytest.approx((0.6 + share * 0.4).item())
    best = (given.scores[new] >= 0.95).int().argmax(1)
    assert found.oracle_budget == pytest.approx(COSTS[best].mean().item())
    wrong = (ridge.predict(given.features[new]) - logs(given.scores[new]))[:, :2]
    spread = logs(given.scores[new])[:, :2]
    spread = spread - spread.mean(0)
    expected = 1 - (wrong.square().sum(0) / spread.square().sum(0)).mean()
    assert found.r_squared == pytest.approx(expected.item())
    row = found.levels[0]
    column = given.scores[:, 0].sort().values
    coverage = (column >= 0.95).double().mean()
    expected = (0.3, 0.3, column.mean(), column[44], column[0], coverage)
    assert tuple(row) == pytest.approx(tuple(map(float, expected)))
    assert (found.target, found.alpha, found.n) == (0.95, 0.1, 900)


def test_the_interval_is_about_as_wide_as_fresh_data_vary():
    gains = []
    for seed in range(25):
        found = judge(figures(seed=100 + seed, seen=0.9), LEVELS, 0.95, 0.1, 0)
        gains.append(found.coin_budget - found.router_budget)
    low, high = found.interval
    spread = 2 * 1.96 * torch.tensor(gains).std().item()
    # The offset's own spread is not in the interval: the router is a given one.
    assert 0.4 < (high - low) / spread < 1.5


def test_the_interval_has_the_spread_of_the_rival_in_it():
    random = torch.Generator().manual_seed(0)
    good = torch.rand(900, generator=random) < 0.85
    scores = torch.stack([good.double(), torch.ones(900).double()], 1)
    # There is nothing to see, so that the router always takes the dense level: all
    # that varies is how many of the resampled examples the cheap level is enough for.
    costs = torch.tensor([0.3, 1.0]).double()
    given = Collected(scores, torch.zeros(900, 3).double(), costs, 0.0, 0)
    found = judge(given, (0.3, 1.0), 0.95, 0.1, 5)
    assert found.router_budget == 1.0
    order = torch.randperm(900, generator=torch.Generator().manual_seed(5))
    hits = binom(270, good[order[360:630]].double().mean().item())

    def gain(count):
        share = (243 - count) / (270 - count)
        return 0.3 + 0.7 * min(1, max(0, share)) - 1

    # More hits are a cheaper coin. The quantiles of 1000 draws are a little off.
    low, high = found.interval
    assert gain(hits.ppf(0.985)) <= low <= gain(hits.ppf(0.965))
    assert gain(hits.ppf(0.035)) <= high <= gain(hits.ppf(0.015))
    assert high - low > 0.1


@pytest.mark.parametrize("count", [1, 5, 63])
def test_too_few_examples_are_a_static_verdict_that_says_so(count):
    given = figures(count)
    found = judge(given, LEVELS, 0.95, 0.05, 0)
    assert found.verdict == "static"
    assert found.reason == (
        f"{count} examples are too few for alpha=0.05: give at least 64."
    )
    for value in (found.router_budget, found.router_violation, *found.interval):
        assert math.isnan(value)
    best = (given.scores >= 0.95).int().argmax(1)
    assert found.oracle_budget == pytest.approx(COSTS[best].mean().item())
    assert "router none" in str(found)
    assert not math.isnan(judge(figures(64), LEVELS, 0.95, 0.05, 0).router_budget)


def test_without_a_level_that_is_good_enough_the_verdict_is_static():
    given = figures()
    given.scores[::8, 2] = 0.5
    found = judge(given, LEVELS, 0.95, 0.05, 0)
    assert found.verdict == "static"
    assert "reaches 0.95 in 87.4 % of examples" in found.reason
    assert "convert with level 1.0" in found.reason
    assert (found.static_budget, found.coin_budget) == (1.0, 1.0)
    assert math.isnan(found.router_budget)


def test_a_router_that_misses_too_often_on_unseen_examples_is_no_gain():
    given = figures(seed=3)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    # The unseen examples are harder than those that the offset was fixed on.
    given.scores[order[630:], 0] -= 0.3
    found = judge(given, LEVELS, 0.95, 0.05, 0)
    assert found.verdict == "static"
    assert found.router_violation > 0.2
    assert "more than 7.7 %" in found.reason


def test_the_same_seed_gives_the_same_figures_and_another_one_others():
    one, two = (judge(figures(seen=0.8), LEVELS, 0.95, 0.05, 3) for _ in range(2))
    assert same(one, two)
    assert not same(one, judge(figures(seen=0.8), LEVELS, 0.95, 0.05, 4))


def test_the_table():
    found = judge(figures(overhead=0.01), LEVELS, 0.95, 0.05, 0)
    lines = str(found).splitlines()
    assert lines[0] == f"adaptive: {found.reason}"
    assert lines[1] == "target 0.95, missed by at most 5 % of examples; 900 examples"
    assert lines[2].split() == ["level", "cost", "mean", "p05", "min", "coverage"]
    assert [line.split()[0] for line in lines[3:6]] == ["0.3", "0.6", "1"]
    assert f"coin {found.coin_budget:.3f}, router {found.router_budget:.3f}" in lines[6]
    assert "own cost 0.0100" in lines[7]
    assert max(map(len, lines[1:])) <= 88
    assert all(isinstance(row, LevelScores) for row in found.levels)
    assert all(type(value) is float for value in found.levels[0])


def test_auditing_a_model_leaves_it_alone_and_agrees_with_its_own_scores(
    bert, sentences
):
    model = bert()
    convert(model, sentences(), levels=LEVELS, sensitivity=False)
    set_budget(model, 0.6)
    data = sentences(batches=6, seed=3)
    found = audit(model, data, target=0.9, alpha=0.1)
    assert isinstance(found, AuditResult)
    assert loraven.audit is audit
    assert get_budget(model) == 0.6
    assert found.n == 96
    assert found.levels[2][2:] == (1.0, 1.0, 1.0, 1.0)
    assert found.levels[0].mean < found.levels[1].mean < 1
    assert found.verdict in ("static", "adaptive")
    assert 0 < found.router_cost < 0.02
    assert found.router_budget <= 1 + found.router_cost
    free = audit(model, data, features=lambda b: b["input_ids"][:, :2])
    ratio = (2 + 2 * 3) / (2 * 12 * 64 + 129 + 129 * 3)
    assert free.router_cost == pytest.approx(ratio * found.router_cost)


class Uneven(nn.Module):
    """Inputs differ in how much they have in directions that are dropped first."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.down(self.up(x).relu())


def uneven(count, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 64, generator=random)
    hard = 10 ** (-2.5 * torch.rand(count, 1, generator=random))
    return torch.cat([x[:, :12], x[:, 12:] * hard], 1)


@pytest.mark.critical
def test_on_a_model_the_right_features_make_the_difference():
    torch.manual_seed(0)
    model = Uneven().eval()
    convert(model, [uneven(500, 1)], levels=(0.4, 0.6, 0.8, 1.0), sensitivity=False)
    data = [uneven(500, 2), uneven(500, 3)]

    def strength(batch):
        return batch[:, 12:].norm(dim=1, keepdim=True).log()

    seeing = audit(model, data, features=strength)
    blind = audit(model, data, features=lambda x: torch.randn(len(x), 3))
    assert seeing.verdict == "adaptive", str(seeing)
    assert blind.verdict == "static", str(blind)
    assert seeing.coin_budget == blind.coin_budget
    # The router that is then made is the one that was audited, but for its split.
    routed = fit_router(model, data, features=strength)
    routed(uneven(1000, 4))
    mean = sum(routed.last_levels) / 1000
    assert mean == pytest.approx(seeing.router_budget, abs=0.05)


def test_wrong_arguments_are_refused_before_any_work():
    model, data = nn.Sequential(nn.Linear(64, 64)), [torch.randn(200, 64)]
    with pytest.raises(RuntimeError, match="was not converted"):
        audit(model, data)
    convert(model, data, levels=(0.5, 1.0), sensitivity=False)
    given = ("target", 1.0), ("target", 2.0), ("alpha", 0.0), ("alpha", 1.5)
    for name, value in (*given, ("seed", -1), ("seed", 2**64)):
        with pytest.raises(ValueError, match=f"{name}={value}: "):
            audit(model, data, **{name: value})
    for wrong in ({"target": "x"}, {"output": 1}, {"score": 1}, {"features": 1}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            audit(model, data, **wrong)
    with pytest.raises(ValueError, match="data: it has no example"):
        audit(model, [])
