# SPDX-License-Identifier: Apache-2.0
"""What the scorer and the gates are for: easy inputs get few columns, hard ones many.

Easy rows use a rank-2 part of a linear map, hard rows a rank-32 part; both have the
same norm, so nothing but the input's direction tells them apart.
"""

import pytest
import torch

from loraven import DynamicLowRankLayer

SIZE, STEPS, PRICE = 64, 1500, 0.02


def _task():
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE))[0]
    target = torch.linalg.qr(torch.randn(SIZE, SIZE))[0] * 4

    def sample(count, kind=None):
        hard = torch.rand(count) < 0.5
        if kind is not None:
            hard = torch.full((count,), kind == "hard")
        wide = torch.randn(count, 32) / 32**0.5
        thin = torch.zeros(count, 32)
        thin[:, :2] = torch.randn(count, 2) / 2**0.5
        x = torch.where(hard[:, None], wide, thin) @ basis[:, :32].T
        return x * 8, x @ target

    return sample


def _train(sample, price, steps=STEPS):
    layer = DynamicLowRankLayer(SIZE, SIZE, r_max=48, r_min=2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y = sample(256)
        error = (layer(x, mode="training")[0] - y).square().mean()
        optimizer.zero_grad()
        (error + price * layer.expected_cost).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    return layer


@torch.no_grad()
def _measure(layer, sample, kind):
    """Rank and relative error of a batch of one kind; mean of the rows' own ranks."""
    x, y = sample(512, kind)
    predicted, rank = layer(x)
    error = ((predicted - y).square().mean() / y.square().mean()).item()
    ranks = layer.r_min + layer.scorer(x) * (layer.r_max - layer.r_min)
    return rank, error, (ranks + 0.5).floor().mean().item()


@pytest.mark.slow
@pytest.mark.critical
@pytest.mark.parametrize("seed", range(5))
def test_hard_inputs_get_at_least_four_times_the_rank(seed):
    torch.manual_seed(seed)
    sample = _task()
    layer = _train(sample, PRICE)
    easy, easy_error, easy_mean = _measure(layer, sample, "easy")
    hard, hard_error, hard_mean = _measure(layer, sample, "hard")
    assert hard >= 4 * easy
    assert hard_mean >= 4 * easy_mean
    assert easy_error <= 0.01
    assert hard_error <= 0.01
    # Columns beyond the task's rank are closed by the gates, not by the prefix.
    assert layer.columns <= hard


@pytest.mark.slow
def test_without_a_price_nothing_pulls_ranks_down():
    torch.manual_seed(0)
    sample = _task()
    layer = _train(sample, 0.0, steps=400)
    easy, _, _ = _measure(layer, sample, "easy")
    hard, _, _ = _measure(layer, sample, "hard")
    assert hard < 4 * easy
