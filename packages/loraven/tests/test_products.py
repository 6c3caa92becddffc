# SPDX-License-Identifier: Apache-2.0
"""Both orders of multiplication give the product, its gradient and its count."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from loraven import products


@pytest.mark.critical
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 32, 33, 40, 300])
@pytest.mark.parametrize("size", [(256, 8), (256, 32), (256, 64), (24, 16)])
@pytest.mark.parametrize("biased", [False, True])
def test_project_is_the_product(rows, size, biased):
    torch.manual_seed(0)
    inside, columns = size
    x = torch.randn(inside, rows).t().requires_grad_()
    weight = torch.randn(columns, inside, requires_grad=True)
    bias = torch.randn(columns, requires_grad=True) if biased else None
    leaves = [x, weight] + ([bias] if biased else [])
    with FlopCounterMode(display=False) as counter:
        y = products.project(x, weight, bias)
    assert counter.get_total_flops() == 2 * rows * inside * columns
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = F.linear(*wide)
    assert torch.allclose(y.double(), exact, atol=1e-4)
    along = torch.randn(rows, columns)
    found = torch.autograd.grad(y, leaves, along)
    for gradient, other in zip(
        found, torch.autograd.grad(exact, wide, along.double()), strict=True
    ):
        assert torch.allclose(gradient.double(), other, atol=1e-3)


def test_the_second_order_runs_where_it_was_measured_faster(monkeypatch):
    calls, linear = [], F.linear

    def spy(*arguments):
        calls.append(len(arguments[0]))
        return linear(*arguments)

    monkeypatch.setattr(products.F, "linear", spy)
    weight = torch.randn(128, 1024)
    for rows in (1, 15, 16, 32, 85, 86, 256):
        products.project(torch.randn(rows, 1024), weight)
    assert calls == [1, 15, 86, 256]
    products.project(torch.randn(16, 1024).bfloat16(), weight.bfloat16())
    products.project(torch.randn(2, 16, 1024), weight)
    assert calls[4:] == [16, 2]


def test_autocast_reaches_both_orders():
    x, weight = torch.randn(20, 1024), torch.randn(128, 1024)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert products.project(x, weight, torch.zeros(128)).dtype == torch.bfloat16
        assert products.project(x[:2], weight).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "kind", ["forward", "before", "backward", "before backward", "other class"]
)
def test_run_calls_whatever_is_more_than_a_linear(kind):
    linear, seen = nn.Linear(64, 32), []
    if kind == "forward":
        linear.register_forward_hook(lambda *a: seen.append(1))
    elif kind == "before":
        linear.register_forward_pre_hook(lambda *a: seen.append(1))
    elif kind == "backward":
        linear.register_full_backward_hook(lambda *a: seen.append(1))
    elif kind == "before backward":
        linear.register_full_backward_pre_hook(lambda *a: seen.append(1))
    else:
        linear = nn.Sequential(linear, nn.ReLU())
    x = torch.randn(5, 64, requires_grad=True)
    y = products.run(linear, x)
    y.sum().backward()
    assert torch.equal(y, linear(x))
    assert seen or kind == "other class"
