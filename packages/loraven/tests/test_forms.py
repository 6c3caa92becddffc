# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from loraven.factorize import Moments, gauge_factors, output_pca, pivot
from loraven.forms import (
    FORMS,
    Choice,
    LatencyTable,
    choices,
    cost_function,
    form_macs,
    gauge_is_safe,
    run_dense,
    run_gauge,
    run_prefix,
    safe_ranks,
)

LEADS = [(), (1,), (15,), (16,), (64,), (3, 5), (4, 8), (0,), (2, 0), (2, 2, 5)]
# The bound on the difference from float64, relative to the output's norm.
LIMITS = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}


def factorised(out, in_, decay=-2.0):
    weight = torch.randn(out, in_, dtype=torch.float64)
    mix = torch.randn(in_, in_, dtype=torch.float64)
    mix = mix * torch.logspace(0, decay, in_, dtype=torch.float64)
    mean = torch.randn(in_, dtype=torch.float64)
    moments = Moments(mean, mix @ mix.T, 10 * in_, False)
    factors = output_pca(weight, torch.randn(out), moments)
    return factors, pivot(factors.up)


def exact(factors, rank, x):
    """The map of that rank as one dense matrix, in float64."""
    matrix = factors.up[:rank].T @ factors.down[:rank]
    offset = factors.up[:rank].T @ factors.down_bias[:rank] + factors.up_bias
    return x.double() @ matrix.T + offset


def prefix_arguments(factors, rank, dtype):
    down, bias = factors.down[:rank].to(dtype), factors.down_bias[:rank].to(dtype)
    return down, bias, factors.up[:rank].to(dtype).t(), factors.up_bias.to(dtype)


def gauge_arguments(factors, pivots, rank, dtype):
    gauge = gauge_factors(factors, pivots, rank)
    weights = [gauge.skeleton, gauge.skeleton_bias]
    weights += [gauge.interpolation, gauge.interpolation_bias]
    return [*(value.to(dtype) for value in weights), gauge.order.argsort()]


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 512)])
def test_every_form_is_the_map_at_every_number_of_rows(shape, dtype, lead):
    factors, pivots = factorised(*shape)
    x = torch.randn(*lead, shape[1]).to(dtype)
    for rank in (1, 8, 24):
        expected = exact(factors, rank, x)
        arguments = gauge_arguments(factors, pivots, rank, dtype)
        found = [
            run_prefix(x, *prefix_arguments(factors, rank, dtype)),
            run_gauge(x, *arguments),
            run_gauge(x, *arguments, contiguous=False),
        ]
        for y in found:
            assert (y.dtype, y.shape) == (dtype, expected.shape)
            # Rounding is relative to the full output, whose norm this bounds.
            size = expected.norm() + x.double().norm() * factors.energy**0.5
            assert (y.double() - expected).norm() <= LIMITS[dtype] * size
        assert found[0].is_contiguous()
        assert found[1].is_contiguous()


@pytest.mark.parametrize("contiguous", [True, False])
def test_inputs_of_another_width_are_never_cut_into_other_rows(contiguous):
    factors, pivots = factorised(24, 512)
    prefix = prefix_arguments(factors, 8, torch.float32)
    gauge = gauge_arguments(factors, pivots, 8, torch.float32)
    for x in (torch.randn(64, 256), torch.randn(2, 32, 256), torch.randn(16 * 512)):
        with pytest.raises((RuntimeError, IndexError)):
            run_prefix(x, *prefix)
        with pytest.raises((RuntimeError, IndexError)):
            run_gauge(x, *gauge, contiguous=contiguous)


def test_a_view_is_returned_only_when_asked_for_and_can_be_an_input():
    factors, pivots = factorised(40, 40)
    arguments = gauge_arguments(factors, pivots, 8, torch.float64)
    x = torch.randn(4, 8, 40, dtype=torch.float64)
    y = run_gauge(x, *arguments, contiguous=False)
    assert y.stride() == (8, 1, 32)
    assert y.view(4, 8, 5, 8).shape == (4, 8, 5, 8)
    prefix = prefix_arguments(factors, 8, torch.float64)
    for run in (
        lambda x: run_prefix(x, *prefix),
        lambda x: run_gauge(x, *arguments),
        lambda x: run_gauge(x, *arguments, contiguous=False),
    ):
        assert torch.allclose(run(y), exact(factors, 8, y), atol=1e-9)
        half = y[:, ::2, :]
        assert torch.allclose(run(half), exact(factors, 8, half), atol=1e-9)


@pytest.mark.parametrize("rows", [3, 40])
def test_gradients_pass_through_every_form(rows):
    factors, pivots = factorised(12, 10)
    x = torch.randn(rows, 10, dtype=torch.float64, requires_grad=True)
    gauge = gauge_arguments(factors, pivots, 4, torch.float64)
    prefix = prefix_arguments(factors, 4, torch.float64)
    runs = [
        lambda x: run_prefix(x, *prefix),
        lambda x: run_gauge(x, *gauge),
        lambda x: run_gauge(x, *gauge, contiguous=False),
    ]
    weight = torch.randn(rows, 12, dtype=torch.float64)
    (expected,) = torch.autograd.grad((exact(factors, 4, x) * weight).sum(), x)
    for run in runs:
        (got,) = torch.autograd.grad((run(x) * weight).sum(), x)
        assert torch.allclose(got, expected, atol=1e-10)
    assert torch.autograd.gradcheck(runs[0], x[:2])


@pytest.mark.parametrize("rows", [7, 32])
def test_macs_are_what_torch_counts(rows):
    factors, pivots = factorised(24, 40)
    x = torch.randn(rows, 40)
    weight = torch.randn(24, 40)
    for rank in (3, 8, 24):
        gauge = gauge_arguments(factors, pivots, rank, torch.float32)
        prefix = prefix_arguments(factors, rank, torch.float32)
        runs = {
            "dense": [lambda: run_dense(x, weight, None, False)],
            "prefix": [lambda p=prefix: run_prefix(x, *p)],
            "gauge": [
                lambda g=gauge: run_gauge(x, *g),
                lambda g=gauge: run_gauge(x, *g, contiguous=False),
            ],
        }
        for form in FORMS:
            for run in runs[form]:
                with FlopCounterMode(display=False) as counter:
                    run()
                macs = form_macs(24, 40, rank, form)
                assert counter.get_total_flops() == 2 * rows * macs


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("dtype", LIMITS)
def test_dense_is_bit_equal_to_linear_and_conv1d(dtype, lead):
    x = torch.randn(*lead, 12).to(dtype)
    for module in (torch.nn.Linear(12, 20), torch.nn.Linear(12, 20, bias=False)):
        module = module.to(dtype)
        assert torch.equal(run_dense(x, module.weight, module.bias, False), module(x))
    conv = Conv1D(20, 12).to(dtype)
    torch.nn.init.normal_(conv.bias)
    assert torch.equal(run_dense(x, conv.weight, conv.bias, True), conv(x))
    plain = run_dense(x, conv.weight, None, True)
    assert torch.allclose(plain.float(), x.float() @ conv.weight.float(), atol=2e-2)


def test_choices_are_those_of_brute_force():
    factors, pivots = factorised(48, 32)
    found = choices(factors, pivots, 48, 32, multiple=4)
    ways = [(48 * 32, 32, "dense")]
    for rank, form in itertools.product(range(4, 33, 4), ("prefix", "gauge")):
        extra = 0 if form == "prefix" else rank
        cost = rank * (48 + 32 - extra)
        ways += [(cost, rank, form)] if cost < 48 * 32 else []
    best = [
        way
        for way in ways
        if not any(o is not way and o[0] <= way[0] and o[1] >= way[1] for o in ways)
    ]
    assert [(c.cost, c.rank, c.form) for c in found] == sorted(best)
    assert found[-1] == Choice(32, "dense", 48 * 32)


def test_prefix_stays_a_choice_where_it_is_cheaper():
    factors, pivots = factorised(48, 32)

    def cost(out, in_, rank, form):
        return {"dense": 1000.0, "prefix": 10.5 * rank, "gauge": 500 + rank}[form]

    found = choices(factors, pivots, 48, 32, cost=cost_function(cost))
    assert [c[:2] for c in found] == [
        (8, "prefix"),
        (16, "prefix"),
        (24, "prefix"),
        (32, "prefix"),
        (32, "dense"),
    ]
    costs = [choice.cost for choice in found]
    assert costs[0] / costs[-1] == pytest.approx(0.084, rel=1e-9)
    # Rounded against the reduced forms, so that no budget is ever passed.
    assert costs[0] * 1000 >= costs[-1] * 84


def test_unsafe_gauge_forms_are_refused():
    factors, pivots = factorised(40, 24)
    assert all(safe_ranks(factors.down, pivots, range(1, 25)).values())
    # A matrix whose partial pivoting grows: Wilkinson's, 2**(n-1) in the last column.
    lower = torch.eye(24, dtype=torch.float64) - torch.ones(24, 24).double().tril(-1)
    block = torch.cat([lower, -torch.ones(16, 24).double()])
    bad = pivots._replace(lower=block)
    verdicts = safe_ranks(factors.down, bad, range(1, 25))
    for rank, verdict in verdicts.items():
        weights = block[rank:, :rank] @ torch.linalg.inv(block[:rank, :rank])
        assert verdict == bool(weights.abs().max() <= 100)
        assert gauge_is_safe(factors, bad, rank) == verdict
    assert set(verdicts.values()) == {True, False}
    refused = [rank for rank, verdict in verdicts.items() if not verdict]
    found = choices(factors, bad, 40, 24, multiple=2)
    gauge = {choice.rank for choice in found if choice.form == "gauge"}
    assert gauge
    assert not gauge & set(refused)
    # Where the gauge form is refused the prefix form is offered while it pays.
    assert {c.rank for c in found if c.form == "prefix"} == {
        rank for rank in refused if rank % 2 == 0 and rank * 64 < 40 * 24
    }


def test_a_gauge_form_that_deviates_in_float32_is_refused():
    factors, pivots = factorised(40, 24)
    upper = pivots.upper.clone()
    upper[:8, :8] *= 1e39
    assert not gauge_is_safe(factors, pivots._replace(upper=upper), 8)


class Fixed(LatencyTable):
    """Microseconds that are given, not measured: (first call, second call) by key."""

    def __init__(self, **times):
        super().__init__(rows=1, repeats=3)
        self.times = {tuple(k.split("_")): v for k, v in times.items()}

    def _runs(self, out, in_):
        def run(times):
            # Slow at first and now and then, and first and second call in turn.
            noise = itertools.chain([8, 8, 8, 8], itertools.cycle([2, 2, 1, 1, 3, 3]))
            calls = itertools.cycle(times)
            return lambda: next(noise) * next(calls) * 1e-6

        return {(form, int(at)): run(v) for (form, at), v in self.times.items()}

    def _time(self, run):
        return run()


@pytest.mark.parametrize(("first", "second"), [(100, 40), (100, 20), (50, 40)])
def test_latency_counts_the_worse_of_first_and_second_call(first, second):
    table = Fixed(dense_0=(100, 40), prefix_8=(first, second))
    expected = 1e5 * max(first / 100, second / 40)
    assert table(64, 64, 8, "prefix") == pytest.approx(expected, abs=1)
    assert table(64, 64, 64, "dense") == 100000


def test_latency_of_a_rank_is_that_of_the_next_measured_one_and_never_falls():
    measured = {"prefix_8": (50, 50), "prefix_16": (40, 40), "prefix_24": (70, 70)}
    table = Fixed(dense_0=(100, 100), **measured, gauge_16=(120, 120))
    found = [table(64, 64, rank, "prefix") for rank in (1, 8, 16, 17, 24)]
    assert found == [50000, 50000, 50000, 70000, 70000]
    # Beyond what was measured, multiplications are no fewer than dense.
    assert table(64, 64, 25, "prefix") == 100000
    assert [table(64, 64, rank, "gauge") for rank in (9, 17)] == [120000] * 2


def test_latency_keeps_dense_unless_it_is_beaten_by_three_percent():
    factors, pivots = factorised(64, 64)
    for gauge, wins in ((96, True), (98, False)):
        table = Fixed(dense_0=(100, 100), prefix_64=(200, 200), gauge_32=(gauge, gauge))
        found = choices(factors, pivots, 64, 64, cost=table)
        forms = [choice[:2] for choice in found]
        reduced = [(32, "gauge")] if wins else []
        assert forms == [*reduced, (64, "dense")]


def test_latency_measures_only_what_could_be_faster():
    runs = LatencyTable(rows=2)._runs(96, 48)
    assert len(runs) > 8
    for form, rank in runs:
        macs = form_macs(96, 48, rank, form)
        assert macs <= 96 * 48
        assert runs[form, rank]().shape == (2, 96)
        assert form == "dense" or rank % 8 == 0 or rank == 1


def test_costs_by_name_and_by_function():
    assert cost_function("macs")(8, 4, 2, "prefix") == 24
    table = cost_function("latency", rows=2, dtype=torch.float64)
    assert isinstance(table, LatencyTable)
    assert (table.rows, cost_function(table)) == (2, table)
    energy = cost_function("energy")
    # The estimator's own figure where a two-factor layer exists.
    from loraven.energy import EnergyEstimator, get_default_hardware_profile

    estimator = EnergyEstimator(get_default_hardware_profile())
    picojoules = estimator.estimate((512, 256), 64) * 1e9
    assert energy(256, 512, 64, "prefix") == pytest.approx(picojoules, abs=1)
    found = [energy(256, 512, 64, form) for form in ("gauge", "prefix", "dense")]
    assert found == sorted(found)
    assert choices(*factorised(48, 32), 48, 32, cost="energy")[-1].form == "dense"


def test_float_costs_share_one_scale():
    cost = cost_function(lambda out, in_, rank, form: out * in_ * 1e-12)
    small, large = cost(8, 8, 8, "dense"), cost(64, 64, 64, "dense")
    assert small > 2**30
    assert large / small == pytest.approx(64, rel=1e-9)
    third = cost_function(lambda out, in_, rank, form: 1 / 3)
    assert third(8, 8, 4, "prefix") == third(8, 8, 8, "dense") + 1


def test_errors_name_what_is_wrong():
    factors, pivots = factorised(16, 16)
    with pytest.raises(ValueError, match="form='diagonal'"):
        form_macs(4, 4, 2, "diagonal")
    with pytest.raises(ValueError, match="cost='time'"):
        cost_function("time")
    with pytest.raises(ValueError, match="latency needs rows"):
        choices(factors, pivots, 16, 16, cost="latency")
    for value in (0.0, -1.0, float("nan"), float("inf"), 0):
        with pytest.raises(ValueError, match="16 x 16 layer"):
            choices(factors, pivots, 16, 16, cost=lambda *_, value=value: value)
    with pytest.raises(ValueError, match="rank=17"):
        safe_ranks(factors.down, pivots, [3, 17])
    with pytest.raises(ValueError, match="rows=0"):
        LatencyTable(0)


def test_costs_of_any_size_are_added_up():
    for unit in (1e-300, 5e-324, 1e300):
        cost = cost_function(lambda out, in_, rank, form, u=unit: rank * u)
        assert cost(64, 64, 64, "dense") > cost(64, 64, 32, "prefix") >= 1
    # Beside a much dearer layer they are as cheap as can be told.
    cost = cost_function(lambda out, in_, rank, form: 1.0 if out > 8 else 1e-30)
    assert cost(64, 64, 64, "dense") > 2**30
    assert cost(8, 8, 8, "dense") == cost(8, 8, 4, "prefix") == 1


@pytest.mark.parametrize("found", [None, "1", "a", True, 10**400, float("nan"), -1])
def test_costs_that_are_no_positive_numbers_are_refused(found):
    cost = cost_function(lambda out, in_, rank, form: found)
    with pytest.raises(ValueError, match="of a 8 x 4 layer, rank 2, prefix"):
        cost(8, 4, 2, "prefix")


def test_costs_that_do_not_fit_beside_the_first_are_refused():
    cost = cost_function(lambda out, in_, rank, form: float(out) ** 20)
    assert cost(8, 8, 8, "dense") > 1
    with pytest.raises(ValueError, match=r"more than 2\*\*14 times the first"):
        cost(800, 8, 8, "dense")


def test_measuring_changes_no_random_number():
    before = torch.get_rng_state()
    LatencyTable(rows=2, repeats=1)(16, 16, 8, "prefix")
    assert torch.equal(torch.get_rng_state(), before)
