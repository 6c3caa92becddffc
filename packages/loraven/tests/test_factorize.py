# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import numpy as np
import pytest
import torch

from loraven.factorize import (
    InputStatistics,
    Moments,
    gauge_factors,
    output_pca,
    pivot,
)

SHAPES = [(24, 40, 300), (40, 24, 300), (32, 32, 300), (30, 40, 20), (40, 30, 20)]


def case(rows, columns, tokens, bias=True):
    """Weight, bias and inputs of uneven energy with an offset, all float64."""
    options = {"dtype": torch.float64}
    scale = torch.logspace(0, -3, columns, **options)
    mix = torch.randn(columns, columns, **options) * scale
    x = torch.randn(tokens, columns, **options) @ mix.T
    x = x + 3 * torch.randn(columns, **options)
    weight = torch.randn(rows, columns, **options)
    return weight, torch.randn(rows, **options) if bias else None, x


def exact_moments(x):
    """By numpy, without any shrinkage."""
    mean = np.mean(x.numpy(), 0)
    covariance = np.cov(x.numpy().T, bias=True)
    return Moments(torch.tensor(mean), torch.tensor(covariance), len(x), False)


def apply(factors, rank, x):
    z = x @ factors.down[:rank].T + factors.down_bias[:rank]
    return z @ factors.up[:rank] + factors.up_bias


def error(y, approximation, metric=None):
    difference = y - approximation
    weighed = difference if metric is None else difference @ metric
    return ((difference * weighed).sum() / len(y)).item()


def linear(weight, bias, x):
    y = x @ weight.T
    return y if bias is None else y + bias


@pytest.mark.critical
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_tail_is_the_error_at_every_rank(shape, bias):
    weight, b, x = case(*shape, bias)
    y = linear(weight, b, x)
    factors = output_pca(weight, b, exact_moments(x))
    energy = ((y - y.mean(0)) ** 2).sum().item() / len(y)
    assert factors.energy == pytest.approx(energy, rel=1e-10)
    assert factors.tail.shape == (factors.rank + 1,)
    for rank in range(factors.rank + 1):
        found = error(y, apply(factors, rank, x))
        assert abs(found - factors.tail[rank].item()) <= 1e-8 * energy
        if found > 1e-4 * energy:
            assert factors.tail[rank].item() == pytest.approx(found, rel=1e-8)
    assert factors.tail[-1] <= 1e-10 * energy


@pytest.mark.critical
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_no_worse_than_plain_and_cholesky_whitened_svd_at_any_rank(shape):
    weight, b, x = case(*shape)
    y = linear(weight, b, x)
    factors = output_pca(weight, b, exact_moments(x))
    root = np.linalg.cholesky(x.numpy().T @ x.numpy() / len(x))
    rivals = {"plain": np.eye(len(root)), "cholesky": root}
    gains = []
    for lower in rivals.values():
        u, s, v = np.linalg.svd(weight.numpy() @ lower, full_matrices=False)
        for rank in range(1, factors.rank):
            low = (u[:, :rank] * s[:rank]) @ v[:rank] @ np.linalg.inv(lower)
            theirs = error(y, linear(torch.tensor(low), b, x))
            ours = error(y, apply(factors, rank, x))
            assert ours <= theirs + 1e-10 * factors.energy
            gains.append(theirs / max(ours, 1e-300))
    assert max(gains) > 2


def test_no_other_basis_of_that_rank_is_better():
    weight, b, x = case(24, 40, 300)
    y = linear(weight, b, x)
    factors = output_pca(weight, b, exact_moments(x))
    # The best rank-r fit of the centred outputs themselves: numpy's own SVD of them.
    s = np.linalg.svd((y - y.mean(0)).numpy(), compute_uv=False)
    for rank in range(factors.rank):
        best = (s[rank:] ** 2).sum() / len(y)
        assert factors.tail[rank].item() == pytest.approx(best, rel=1e-7)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_tail_in_a_metric_is_the_error_in_it_and_the_best_one(shape):
    weight, b, x = case(*shape)
    half = torch.randn(shape[0], shape[0], dtype=torch.float64)
    metric = half @ half.T + 0.1 * torch.eye(shape[0], dtype=torch.float64)
    y = linear(weight, b, x)
    factors = output_pca(weight, b, exact_moments(x), metric=metric)
    plain = output_pca(weight, b, exact_moments(x))
    identity = torch.eye(shape[0], dtype=torch.float64)
    same = output_pca(weight, b, exact_moments(x), metric=3 * identity)
    assert torch.allclose(same.tail, 3 * plain.tail, rtol=1e-9)
    ratios = []
    for rank in range(factors.rank + 1):
        found = error(y, apply(factors, rank, x), metric)
        assert abs(found - factors.tail[rank].item()) <= 1e-8 * factors.energy
        ratios.append(error(y, apply(plain, rank, x), metric) - found)
    assert min(ratios) >= -1e-8 * factors.energy
    assert max(ratios) > 1e-3 * factors.energy


def test_singular_covariance_gives_fewer_ranks():
    weight, b, x = case(40, 30, 12)
    factors = output_pca(weight, b, exact_moments(x))
    assert factors.rank == 11
    assert error(linear(weight, b, x), apply(factors, 11, x)) < 1e-9 * factors.energy
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(exact_moments(x).covariance)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_constant_inputs_leave_one_harmless_direction(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    mean = torch.ones(shape[1], dtype=torch.float64)
    moments = Moments(mean, torch.zeros(shape[1], shape[1]), 9, False)
    factors = output_pca(weight, None, moments)
    assert (factors.rank, factors.energy) == (1, 0.0)
    got = apply(factors, 1, mean[None])
    assert torch.allclose(got, mean[None] @ weight.T, atol=1e-12)


@pytest.mark.critical
@pytest.mark.parametrize("shape", SHAPES)
def test_gauge_form_of_every_rank_equals_the_prefix_form_with_one_order(shape):
    weight, b, x = case(*shape)
    factors = output_pca(weight, b, exact_moments(x))
    pivots = pivot(factors.up)
    for rank in range(1, factors.rank + 1):
        gauge = gauge_factors(factors, pivots, rank)
        assert gauge.order is pivots.order
        first = x @ gauge.skeleton.T + gauge.skeleton_bias
        rest = first @ gauge.interpolation.T + gauge.interpolation_bias
        y = torch.empty(len(x), shape[0], dtype=x.dtype)
        y[:, gauge.order] = torch.cat([first, rest], 1)
        expected = apply(factors, rank, x)
        assert (y - expected).norm() <= 1e-10 * expected.norm()
        assert gauge.interpolation.numel() == 0 or gauge.interpolation.abs().max() < 100


def test_pivots_are_partial_pivoting_of_numpy_made_by_hand():
    up = torch.randn(5, 12, dtype=torch.float64)
    u = up.T.numpy().copy()
    order = np.arange(12)
    for column in range(5):
        best = column + np.abs(u[column:, column]).argmax()
        u[[column, best]], order[[column, best]] = (
            u[[best, column]],
            order[[best, column]],
        )
        factor = u[column + 1 :, column] / u[column, column]
        u[column + 1 :] -= factor[:, None] * u[column]
    exact = pivot(up)
    assert exact.order.tolist() == order.tolist()
    assert torch.allclose(exact.lower @ exact.upper, up.T[exact.order], atol=1e-13)
    assert exact.lower.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_streamed_moments_equal_those_of_all_at_once(dtype):
    x = (torch.randn(5000, 7) * 0.1 + 300 * torch.randn(7)).to(dtype)
    statistics = InputStatistics(7)
    for part in (x[:3], x[3:3], x[3:4500].reshape(-1, 3, 7), x[4500:]):
        statistics.add(part)
    moments = statistics.finish()
    exact = exact_moments(x.double())
    tight = 1e-12 if dtype == torch.float64 else 3e-6
    assert (moments.tokens, moments.shrunk) == (5000, False)
    assert torch.allclose(moments.mean, exact.mean, rtol=tight)
    scale = exact.covariance.abs().max()
    assert (moments.covariance - exact.covariance).abs().max() <= tight * scale


def test_adding_goes_on_after_finish():
    x = torch.randn(100, 4)
    statistics = InputStatistics(4)
    statistics.add(x[:60])
    statistics.finish()
    statistics.add(x[60:])
    exact = exact_moments(x.double())
    assert torch.allclose(statistics.finish().covariance, exact.covariance, rtol=1e-5)


@pytest.mark.parametrize("tokens", [5, 15, 19, 20])
def test_few_tokens_shrink_by_the_rule(tokens):
    x = torch.randn(tokens, 10, dtype=torch.float64)
    statistics = InputStatistics(10)
    statistics.add(x)
    moments, exact = statistics.finish(), exact_moments(x).covariance
    if tokens < 20:
        part = min(0.5, 10 / (4 * tokens))
        level = exact.trace() / 10
        exact = (1 - part) * exact + part * level * torch.eye(10)
    assert moments.shrunk == (tokens < 20)
    assert torch.allclose(moments.covariance, exact, atol=1e-12)


def test_errors_name_what_is_wrong():
    statistics = InputStatistics(3)
    with pytest.raises(ValueError, match=r"shape \(2, 4\).*\(\.\.\., 3\)"):
        statistics.add(torch.ones(2, 4))
    with pytest.raises(ValueError, match="no input vector"):
        statistics.finish()
    statistics.add(torch.tensor([[1.0, float("nan"), 0.0]]))
    with pytest.raises(ValueError, match="NaN"):
        statistics.finish()
    with pytest.raises(ValueError, match="in_features=0"):
        InputStatistics(0)
    weight, b, x = case(4, 3, 20)
    moments = exact_moments(x)
    with pytest.raises(ValueError, match=r"bias of shape \(4, 1\)"):
        output_pca(weight, b[:, None], moments)
    with pytest.raises(ValueError, match="weight: it holds NaN"):
        output_pca(weight * torch.inf, b, moments)
    with pytest.raises(ValueError, match="positive definite"):
        output_pca(weight, b, moments, metric=torch.zeros(4, 4))
    factors = output_pca(weight, b, moments)
    with pytest.raises(ValueError, match=r"rank=4.*1 to 3"):
        gauge_factors(factors, pivot(factors.up), 4)
    with pytest.raises(ValueError, match="R <= out"):
        pivot(torch.ones(3, 2))


PROCESS = """
import sys, torch
from loraven.factorize import InputStatistics
rank, file = int(sys.argv[1]), sys.argv[2]
store = torch.distributed.FileStore(file, 3)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=3)
statistics = InputStatistics(4)
x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) + 5
part = [x[:400], x[:0], x[400:] * 3][rank]
statistics.add(part)
statistics.all_reduce()
torch.save(tuple(statistics.finish()), file + str(rank))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_add_up_their_tokens(tmp_path):
    file = str(tmp_path / "store")
    command = [sys.executable, "-c", PROCESS]
    started = [subprocess.Popen([*command, str(rank), file]) for rank in range(3)]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) + 5
    exact = exact_moments(torch.cat([x[:400], x[400:] * 3]).double())
    for rank in range(3):
        mean, covariance, tokens, _ = torch.load(file + str(rank))
        assert tokens == 500
        assert torch.allclose(mean, exact.mean, rtol=1e-6)
        assert torch.allclose(covariance, exact.covariance, rtol=1e-5)


def test_all_reduce_alone_changes_nothing():
    statistics = InputStatistics(4)
    statistics.add(torch.randn(30, 4))
    before = statistics.finish()
    statistics.all_reduce()
    assert torch.equal(statistics.finish().covariance, before.covariance)


def test_a_diagonal_metric_is_that_matrix():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    moments = Moments(torch.zeros(7), torch.eye(7), 100, False)
    diagonal = torch.linspace(0.1, 3, 5)
    one = output_pca(weight, None, moments, metric=diagonal)
    two = output_pca(weight, None, moments, metric=diagonal.diag())
    torch.testing.assert_close(one.tail, two.tail)
    torch.testing.assert_close(one.up.T @ one.down, two.up.T @ two.down)
    with pytest.raises(ValueError, match=r"metric of shape \(1, 1, 1\)"):
        output_pca(weight, None, moments, metric=torch.ones(1, 1, 1))
