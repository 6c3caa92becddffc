# SPDX-License-Identifier: Apache-2.0
import math
import warnings

import pytest
import torch

from loraven import DynamicLowRankLayer, LoRAven
from loraven.sanitize import NonFiniteGuard

BAD = (math.nan, math.inf, -math.inf)


def make(scope="batch"):
    torch.manual_seed(0)
    layer = DynamicLowRankLayer(32, 24, r_max=16, r_min=3)
    layer.random_rank_share = 0.0
    layer.rank_scope = scope
    return layer


PATHS = [
    (mode, grad, fixed)
    for mode in ("inference", "training")
    for grad in (0, 1)
    for fixed in (None, 5, 16)
]


@pytest.mark.critical
@pytest.mark.parametrize(("mode", "grad", "fixed"), PATHS)
@pytest.mark.parametrize("scope", ["batch", "row"])
def test_bad_elements_count_as_0_and_nothing_else_changes(mode, grad, fixed, scope):
    layer = make(scope)
    layer.fixed_rank = fixed
    x = torch.randn(8, 32)
    for value in BAD:
        layer._guard = NonFiniteGuard()
        dirty, clean = x.clone(), x.clone()
        dirty[2, 5] = dirty[2, 6] = value
        clean[2, 5] = clean[2, 6] = 0.0
        with torch.set_grad_enabled(bool(grad)):
            with pytest.warns(RuntimeWarning, match="2 input elements"):
                y, rank = layer(dirty, mode=mode)
            expected, same = layer(clean, mode=mode)
            assert rank == same
            assert torch.allclose(y, expected, atol=1e-6)
            assert layer.sanitized == 2
            # Warned once; counted each time.
            layer(dirty, mode=mode)
            assert layer.sanitized == 4


@pytest.mark.critical
def test_a_bad_row_changes_no_other():
    layer = make("row")
    x = torch.randn(8, 32)
    dirty = x.clone()
    dirty[3] = math.nan
    with torch.no_grad():
        y, _ = layer(x)
        with pytest.warns(RuntimeWarning, match="32 input elements"):
            again, _ = layer(dirty)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.allclose(y[others], again[others], atol=1e-6)
    assert again.isfinite().all()


@pytest.mark.critical
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_legal_outlier_passes_unchanged(mode):
    layer = make()
    layer.fixed_rank = 16
    x = torch.randn(64, 32)
    x[7, 3] = 100.0
    x[9, 4] = 1e30
    z = x.double() @ layer.V.double() @ layer.S.double()
    expected = z @ layer.U.double().T + layer.bias.double()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y, _ = layer(x, mode=mode)
        assert torch.allclose(y.double(), expected, rtol=1e-4, atol=1e-4)
    assert layer.sanitized == 0


def test_a_sum_that_overflows_is_no_bad_element():
    layer = make()
    x = torch.full((4, 32), 3e38)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            layer(x)
    assert layer.sanitized == 0


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("grad", [False, True])
def test_propagate_touches_nothing(mode, grad):
    layer = make()
    layer.nan_policy = "propagate"
    x = torch.randn(8, 32)
    x[3, 1] = math.nan
    with torch.set_grad_enabled(grad):
        y, _ = layer(x, mode=mode)
    assert y[3].isnan().all()
    assert y[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
    assert layer.sanitized == 0


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("fixed", [None, 5])
def test_raise_gives_the_first_index_in_the_shape_as_given(mode, fixed):
    layer = make()
    layer.nan_policy, layer.fixed_rank = "raise", fixed
    x = torch.randn(2, 4, 32)
    with torch.no_grad():
        layer(x, mode=mode)
        x[1, 2, 5] = math.inf
        x[1, 3, 0] = math.nan
        with pytest.raises(ValueError, match=r"x\[1, 2, 5\]=inf: 2 of 256"):
            layer(x, mode=mode)


def test_gradient_does_not_reach_what_was_replaced():
    layer = make()
    x = torch.randn(8, 32)
    x[1, 1] = math.nan
    x.requires_grad_()
    with pytest.warns(RuntimeWarning, match="1 input elements"):
        y, _ = layer(x, mode="training")
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[1, 1] == 0


def test_stats_count():
    layer = LoRAven(32, 24).eval()
    x = torch.randn(4, 32)
    x[0, :3] = math.nan
    with pytest.warns(RuntimeWarning, match="3 input elements"):
        layer(x)
    assert layer.get_performance_stats()["sanitized"] == 3


def test_guard_counts_on_the_device_of_the_input():
    guard = NonFiniteGuard()
    assert guard.counted(torch.device("cpu")).tolist() == [0.0]
    guard._count = torch.tensor(7)
    assert guard.counted(torch.device("cpu")).tolist() == [7.0]
    assert guard.count == 7
