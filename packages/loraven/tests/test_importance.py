# SPDX-License-Identifier: Apache-2.0
"""Metrics and damages by gradients, against Jacobians and against what happens."""

import pytest
import torch
from torch import nn

from loraven.factorize import InputStatistics, Moments, output_pca
from loraven.importance import DamageCurves, OutputMetrics, gradients

EXAMPLES, TOKENS = 24, 5


class Model(nn.Module):
    """Two layers on tokens, then a mean: (N, T, 6) -> (N, 4)."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(6, 8), nn.ReLU(inplace=True)
        self.second = nn.Linear(8, 4)

    def forward(self, x, valid=None):
        h = self.second(self.act(self.first(x)))
        if valid is None:
            return h.mean(1)
        return (h * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def random():
    return torch.Generator().manual_seed(0)


def collect(model, forward, projections, names=("first", "second")):
    sites = {name: getattr(model, name) for name in names}
    return list(gradients(forward, sites, projections=projections, generator=random()))


def jacobians(model, x):
    """dy/d(first's output), each example's output divided by its norm: (N, 4, T, 8)."""
    found = []
    for example in x:
        before = model.first(example[None])

        def rest(h):
            return model.second(h.relu()).mean(1)[0]

        y = rest(before)
        found.append(torch.autograd.functional.jacobian(rest, before)[:, 0] / y.norm())
    return torch.stack(found)


@pytest.mark.critical
def test_metric_is_the_mean_outer_product_of_jacobians(model):
    x = torch.randn(EXAMPLES, TOKENS, 6)
    metrics = OutputMetrics()
    for calls in collect(model, lambda: (model(x), None), 3000):
        metrics.add(calls)
    j = jacobians(model, x).double()
    exact = torch.einsum("noti,notj->ij", j, j)
    exact = exact / exact.diagonal().mean() * 0.99 + 0.01 * torch.eye(8)
    found = metrics.finish()["first"]
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.03)
    assert not torch.allclose(exact, exact.diag().diag(), atol=0.1)


def factors_of(model, x):
    inputs = {"first": x, "second": model.first(x).relu()}
    found = {}
    for name, values in inputs.items():
        statistics = InputStatistics(values.shape[-1])
        statistics.add(values.double())
        layer = getattr(model, name)
        found[name] = output_pca(layer.weight, layer.bias, statistics.finish())
    return found


@pytest.mark.critical
def test_damage_is_what_happens_at_every_rank(model):
    """`second` is followed by linear maps only, so first order is everything."""
    x = torch.randn(EXAMPLES, TOKENS, 6)
    factors = factors_of(model, x)
    curves = DamageCurves(factors)
    for calls in collect(model, lambda: (model(x), None), 3000):
        curves.add(calls)
    found = curves.finish()["second"]
    y, h, f = model(x), model.first(x).relu(), factors["second"]
    for rank in range(f.rank + 1):
        z = h.double() @ f.down[:rank].T + f.down_bias[:rank]
        less = (z @ f.up[:rank] + f.up_bias).mean(1)
        exact = ((less - y).square().sum(1) / y.square().sum(1)).mean()
        assert found[rank] == pytest.approx(float(exact), rel=0.08, abs=1e-6)
    assert found[-1] == 0
    assert (found.diff() <= 0).all()


def test_small_errors_of_a_nonlinear_part(model):
    x = torch.randn(EXAMPLES, TOKENS, 6)
    factors = factors_of(model, x)
    curves = DamageCurves(factors)
    for calls in collect(model, lambda: (model(x), None), 1000):
        curves.add(calls)
    found, f = curves.finish()["first"], factors["first"]
    rank = f.rank - 1
    z = x.double() @ f.down[:rank].T + f.down_bias[:rank]
    error = (z @ f.up[:rank] + f.up_bias).float() - model.first(x)
    step = 1e-3
    moved = model.second((model.first(x) + step * error).relu()).mean(1)
    y = model(x)
    exact = ((moved - y) / step).square().sum(1) / y.square().sum(1)
    assert found[rank] == pytest.approx(float(exact.mean()), rel=0.1)


def test_positions_that_are_not_valid_count_for_nothing(model):
    x = torch.randn(3, TOKENS, 6)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    other = torch.where(valid[..., None], x, 1e3)
    found = []
    for values in (x, other):
        metrics = OutputMetrics()
        forward = lambda v=values: (model(v, valid), valid[:, 0])  # noqa: E731
        for calls in collect(model, forward, 4):
            metrics.add(calls)
        found.append(metrics.finish()["first"])
    torch.testing.assert_close(*found)


def test_outputs_of_tokens_that_are_not_valid_have_no_gradient(model):
    x, valid = torch.randn(2, 3, 6), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    run = lambda: (model.second(model.act(model.first(x))), valid)  # noqa: E731
    (calls,) = collect(model, run, 1)
    for name in ("first", "second"):
        gradient = calls.calls[name][0].gradient
        assert (gradient[~valid] == 0).all()
        assert (gradient[valid] != 0).any(-1).all()


def test_what_outputs_of_padding_do_counts_for_nothing(model):
    """Positions mix here: padding hears of valid tokens, and they of padding."""
    x, valid = torch.randn(2, 3, 6), torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    found = []
    for scale in (1.0, 1e3):

        def forward(scale=scale):
            h = model.second(model.act(model.first(x)))
            mixed = h + h.mean(1, keepdim=True)
            return torch.where(valid[..., None], mixed, mixed * scale), valid

        (calls,) = collect(model, forward, 1)
        found.append(calls.calls["first"][0].gradient)
    torch.testing.assert_close(*found)
    assert (found[0][~valid] == 0).all()


def test_a_layer_that_runs_twice_counts_twice():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    x = torch.randn(6, 4)
    forward = lambda: (layer(x) + layer(x), None)  # noqa: E731
    (calls,) = gradients(forward, {"layer": layer}, projections=1, generator=random())
    assert len(calls.calls["layer"]) == 2
    statistics = InputStatistics(4)
    statistics.add(x)
    factors = {"layer": output_pca(layer.weight, None, statistics.finish())}
    both, one = DamageCurves(factors), DamageCurves(factors)
    both.add(calls)
    one.add(calls._replace(calls={"layer": calls.calls["layer"][:1]}))
    a, b = both.finish()["layer"], one.finish()["layer"]
    torch.testing.assert_close(a, 4 * b)


def test_what_has_no_gradient_is_refused_and_hooks_are_gone(model):
    x = torch.randn(2, 3, 6)
    with pytest.raises(ValueError, match=r"output: it has no gradient.*no_grad"):
        collect(model, lambda: (model(x).argmax(-1), None), 1)

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, fails, 1)
    assert not model.first._forward_hooks
    assert not model.first(x).requires_grad


def test_wide_layers_have_a_diagonal_metric():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2049)
    x, weights = torch.randn(5, 3), torch.linspace(0, 2, 2049)
    metrics, total = OutputMetrics(), None
    forward = lambda: (layer(x).tanh() @ weights[:, None], None)  # noqa: E731
    for calls in gradients(
        forward, {"layer": layer}, projections=2, generator=random()
    ):
        metrics.add(calls)
        squares = calls.calls["layer"][0].gradient.square().sum(0)
        total = squares if total is None else total + squares
    metric = metrics.finish()["layer"]
    assert metric.shape == (2049,)
    exact = 0.99 * total / total.mean() + 0.01
    torch.testing.assert_close(metric.float(), exact, rtol=1e-4, atol=1e-5)
    assert metric.mean() == pytest.approx(1)
    assert metric.min() >= 0.01


def test_what_is_not_finite_is_named(model):
    x = torch.randn(2, 3, 6)
    with pytest.raises(ValueError, match="output: it holds NaN or infinity"):
        collect(model, lambda: (model(x) * float("inf"), None), 1)

    def forward():
        h = model.first(x)
        return h + (h * 0).sqrt(), None

    metrics = OutputMetrics()
    for calls in collect(model, forward, 1):
        metrics.add(calls)
    with pytest.raises(ValueError, match=r"layer 'first'.*not finite"):
        metrics.finish()


def test_inputs_that_are_overwritten_later_count_as_they_were():
    class InPlace(nn.Module):
        def __init__(self, copy):
            super().__init__()
            self.layer, self.copy = nn.Linear(8, 8), copy

        def forward(self, x):
            x = x.clone()
            y = self.layer(x)
            x = x.clone() if self.copy else x
            return y + x.mul_(100.0)

    x, curves = torch.randn(32, 8), []
    for copy in (False, True):
        torch.manual_seed(0)
        model = InPlace(copy)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        moments = Moments(torch.zeros(8), torch.eye(8), 32, False)
        factors = {"layer": output_pca(model.layer.weight, None, moments)}
        damage, random = DamageCurves(factors), torch.Generator().manual_seed(0)
        for projection in gradients(
            lambda m=model: (m(x), None),
            {"layer": model.layer},
            projections=2,
            generator=random,
        ):
            damage.add(projection)
        curves.append(damage.finish()["layer"])
    assert torch.equal(*curves)


def test_an_output_of_one_number_is_judged():
    layer = nn.Linear(8, 8)
    metrics, random = OutputMetrics(), torch.Generator().manual_seed(0)
    x = torch.randn(4, 8)
    for projection in gradients(
        lambda: (layer(x).square().sum(), None),
        {"layer": layer},
        projections=1,
        generator=random,
    ):
        metrics.add(projection)
    assert metrics.finish()["layer"].shape == (8, 8)
