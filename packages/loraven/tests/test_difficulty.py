# SPDX-License-Identifier: Apache-2.0
"""The figures of a router against least squares, loops, and simulation."""

import math

import pytest
import torch

from loraven.difficulty import (
    choose,
    coin,
    examples_needed,
    fit_offset,
    fit_ridge,
    limit,
    logs,
    misses_allowed,
    oracle,
)

STRENGTHS = (30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0)


def random(seed):
    return torch.Generator().manual_seed(seed)


def reference_ridge(x, y, strength):
    """A function x -> y by least squares with one more row for each feature."""
    x, y = x.double(), y.double()
    mean, deviation = x.mean(0), x.std(0, correction=0)
    z = (x - mean) / deviation
    bottom = math.sqrt(strength) * torch.eye(z.shape[1], dtype=z.dtype)
    rows = torch.cat([z, bottom])
    right = torch.cat([y - y.mean(0), y.new_zeros(z.shape[1], y.shape[1])])
    found = torch.linalg.lstsq(rows, right).solution
    return lambda v: (v.double() - mean) / deviation @ found + y.mean(0)


@pytest.mark.critical
@pytest.mark.parametrize("sizes", [(60, 7), (20, 33)])
@pytest.mark.parametrize("strength", [0.3, 30.0, 3000.0])
def test_ridge_is_least_squares_with_a_penalty(sizes, strength):
    x = torch.randn(*sizes, generator=random(0)) * 3 + 5
    y = torch.randn(sizes[0], 3, generator=random(1))
    new = torch.randn(9, sizes[1], generator=random(2))
    found = fit_ridge(x, y, (strength,))
    expected = reference_ridge(x, y, strength)
    assert torch.allclose(found.predict(new), expected(new), atol=1e-9)
    assert found.strength == strength
    assert found.coefficients.dtype == torch.float64


@pytest.mark.parametrize(("noise", "features"), [(0.1, 4), (3.0, 40), (30.0, 40)])
def test_the_strength_is_that_of_the_best_cross_validation(noise, features):
    x = torch.randn(100, features, generator=random(0))
    y = x @ torch.randn(features, 2, generator=random(1)) * torch.tensor([1.0, 9.0])
    y = y + noise * y.std(0) * torch.randn(100, 2, generator=random(2))
    errors = []
    for strength in STRENGTHS:
        total = 0.0
        for fold in range(5):
            left = torch.tensor([i for i in range(100) if i % 5 == fold])
            kept = torch.tensor([i for i in range(100) if i % 5 != fold])
            fitted = reference_ridge(x[kept], y[kept], strength)
            wrong = (fitted(x[left]) - y[left]).square().sum(0)
            total += (wrong / y.double().var(0)).sum().item()
        errors.append(total)
    best = STRENGTHS[errors.index(min(errors))]
    assert fit_ridge(x, y).strength == best


def test_the_strengths_of_these_cases_differ():
    strengths = set()
    for noise, features in [(0.1, 4), (3.0, 40), (30.0, 40)]:
        x = torch.randn(100, features, generator=random(0))
        y = x @ torch.randn(features, 2, generator=random(1))
        y = y + noise * y.std(0) * torch.randn(100, 2, generator=random(2))
        strengths.add(fit_ridge(x, y).strength)
    assert len(strengths) == 3


def test_constant_features_and_a_constant_level_change_nothing():
    x = torch.randn(50, 4, generator=random(0))
    y = x[:, :2] * 2 + 1
    constant = torch.full((50, 1), 0.1)
    plain = fit_ridge(x, y)
    more = fit_ridge(torch.cat([x, constant], 1), torch.cat([y, constant], 1))
    assert more.strength == plain.strength
    # A value of that feature that was never seen carries no weight.
    new = torch.cat([x[:5], torch.full((5, 1), 7.0)], 1)
    assert torch.allclose(more.predict(new)[:, :2], plain.predict(x[:5]))
    assert torch.allclose(more.predict(new)[:, 2], torch.tensor(0.1).double())


def test_ridge_refuses_what_it_cannot_use():
    x = torch.randn(10, 3)
    with pytest.raises(ValueError, match="9 examples to learn from: too few"):
        fit_ridge(x[:9], x[:9])
    with pytest.raises(ValueError, match="scores: they hold NaN"):
        fit_ridge(x, x / 0)
    with pytest.raises(ValueError, match="features: they hold NaN"):
        fit_ridge(x * torch.nan, x)
    # 1e300 is finite, the sum of its squares is not.
    for size in (1e300, 1.7e308):
        with pytest.raises(ValueError, match="square beyond float64"):
            fit_ridge(x.double().sign() * size, x)
    fit_ridge(x.double().sign() * 1e150, x)


def test_logs_and_limit_agree_and_end_at_a_millionth():
    scores = torch.tensor([-1.0, 0.0, 0.95, 1.0, 0.9999999])
    expected = [math.log(2), 0.0, math.log(0.05), math.log(1e-6), math.log(1e-6)]
    assert torch.allclose(logs(scores), torch.tensor(expected).double(), atol=1e-6)
    assert limit(0.95) == pytest.approx(math.log(0.05), abs=1e-12)


def level_of(margins, offset):
    for level, margin in enumerate(margins[:-1]):
        if margin > offset:
            return level
    return len(margins) - 1


@pytest.mark.critical
def test_choose_is_the_first_level_with_margin_enough():
    margins = torch.randn(200, 5, generator=random(0)).double()
    for offset in (-math.inf, -1.0, 0.0, margins[7, 2].item(), 2.0, math.inf):
        expected = [level_of(row, offset) for row in margins.tolist()]
        assert choose(margins, offset).tolist() == expected
    unknown = torch.full((1, 3), torch.nan)
    assert choose(unknown, -math.inf).tolist() == [2]
    kept = margins.clone()
    choose(margins, 0.0)
    assert torch.equal(margins, kept)


def searched(margins, scores, target, alpha):
    """The smallest offset by trying every margin; misses of all stricter ones count."""
    rows = list(zip(margins.tolist(), scores.tolist(), strict=True))
    offsets = sorted({m for row in margins.tolist() for m in row[:-1]} | {-math.inf})
    best, missed = math.inf, [False] * len(rows)
    for offset in reversed(offsets):
        for number, (margin, score) in enumerate(rows):
            missed[number] |= score[level_of(margin, offset)] < target
        if (sum(missed) + 1) / (len(rows) + 1) > alpha:
            break
        best = offset
    return best


def drawn(count, levels, seed, monotone=True):
    """Scores, noisy margins, and a target that no one level suits."""
    hard = torch.rand(count, 1, generator=random(seed)).double()
    steps = torch.linspace(0.2, 1.2, levels).double()
    scores = 1 - hard * (1.3 - steps).clamp_min(0)
    if not monotone:
        scores -= 0.2 * torch.rand(count, levels, generator=random(seed + 1)).double()
        scores[:, -1] = 1 - 0.3 * hard[:, 0] ** 8
    noise = torch.randn(count, levels, generator=random(seed + 2)).double()
    margins = limit(0.7) - logs(scores) + 0.5 * noise
    return margins, scores


@pytest.mark.critical
@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize("alpha", [0.02, 0.05, 0.1, 0.3, 0.4])
def test_the_offset_is_that_of_an_exhaustive_search(monotone, alpha):
    seen = set()
    for seed in range(12):
        margins, scores = drawn(60, 4, seed, monotone)
        found = fit_offset(margins, scores, 0.7, alpha)
        assert found == searched(margins, scores, 0.7, alpha)
        seen.add(math.isfinite(found))
    assert any(seen)


def test_with_scores_that_rise_only_misses_at_the_offset_itself_count():
    """Then the rule is: this offset and each larger one leave few enough misses."""
    for seed in range(12):
        margins, scores = drawn(60, 4, seed)
        offset = fit_offset(margins, scores, 0.7, 0.1)

        def misses(at, margins=margins, scores=scores):
            chosen = choose(margins, at)
            return (scores.gather(1, chosen[:, None]) < 0.7).sum().item()

        assert (misses(offset) + 1) / 61 <= 0.1
        below = math.nextafter(offset, -math.inf)
        assert (misses(below) + 1) / 61 > 0.1
        for larger in margins[margins > offset].tolist():
            assert (misses(larger) + 1) / 61 <= 0.1


def test_offsets_at_the_ends():
    margins, scores = drawn(60, 4, 0)
    assert fit_offset(margins, scores, -9.0, 0.05) == -math.inf
    assert fit_offset(margins, scores, 9.0, 0.05) == math.inf
    assert fit_offset(margins[:18], scores[:18], -9.0, 0.05) == math.inf
    assert fit_offset(margins[:19], scores[:19], -9.0, 0.05) == -math.inf
    # The largest level misses in 3 of 60: alpha 0.05 allows for 2.
    scores[:, -1] = 1.0
    scores[:3] = 0.0
    assert fit_offset(margins, scores, 0.7, 0.05) == math.inf
    assert math.isfinite(fit_offset(margins, scores, 0.7, 4.01 / 61))


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.07, 0.1, 1 / 3, 0.5, 0.99])
def test_how_many_misses_are_allowed_and_how_many_examples_needed(alpha):
    for count in range(200):
        fits = [k for k in range(count + 2) if (k + 1) / (count + 1) <= alpha + 1e-12]
        assert misses_allowed(count, alpha) == max(fits, default=-1)
    needed = examples_needed(alpha)
    assert misses_allowed(needed, alpha) >= 0
    assert needed == 0 or misses_allowed(needed - 1, alpha) < 0
    assert needed == math.ceil(1 / alpha - 1 - 1e-9)


@pytest.mark.critical
@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize(("count", "alpha"), [(19, 0.05), (50, 0.1), (64, 0.2)])
def test_new_examples_miss_the_target_in_at_most_alpha_of_draws(monotone, count, alpha):
    draws, missed = 1500, 0.0
    for seed in range(draws):
        margins, scores = drawn(count + 20, 4, 10_000 + 3 * seed, monotone)
        if not monotone:
            scores[:, -1] = 1.0
        offset = fit_offset(margins[:count], scores[:count], 0.7, alpha)
        chosen = choose(margins[count:], offset)
        got = scores[count:].gather(1, chosen[:, None])
        missed += (got < 0.7).double().mean().item()
    error = math.sqrt(alpha * (1 - alpha) / draws)
    assert missed / draws <= alpha + 2 * error
    # It is no guarantee by waste: with rising scores almost all of alpha is used.
    if monotone:
        assert missed / draws >= alpha - 1 / (count + 1) - 2 * error


def test_the_rivals_by_hand():
    costs = torch.tensor([0.3, 0.5, 1.0]).double()
    scores = torch.tensor([[0.0] * 3] * 20).double()
    scores[:12, 0] = 1.0
    scores[:18, 1] = 1.0
    scores[:, 2] = 1.0
    found = coin(scores, costs, 0.9, 0.05)
    # 19 of 20 needed: between 18 and 20 half way, from 0.5 to 1.
    assert found[:2] == (2, 1.0)
    assert found.coin == pytest.approx(0.75)
    found = coin(scores, costs, 0.9, 0.25)
    assert found[:2] == (1, 0.5)
    assert found.coin == pytest.approx(0.3 + 0.2 * 3 / 6)
    # 18 of 20 are just enough for 0.1, in spite of rounding.
    found = coin(scores, costs, 0.9, 0.1)
    assert (found.level, found.coin) == (1, pytest.approx(0.5))
    found = coin(scores, costs, 0.9, 0.5)
    assert found == (0, pytest.approx(0.3), pytest.approx(0.3), True)
    found = coin(scores[:, :2], costs[:2], 0.9, 0.05)
    assert found == (1, 0.5, 0.5, False)


def test_the_oracle_takes_the_first_good_level():
    scores = torch.tensor([[0.9, 0.8, 1.0], [0.1, 0.2, 0.3], [0.1, 0.9, 0.2]])
    assert oracle(scores, 0.85).tolist() == [0, 2, 1]
