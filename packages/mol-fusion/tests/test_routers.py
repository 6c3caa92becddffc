# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from mol import LinearAdapter, SimpleRouter, TokenLevelRouter
from mol.adapters import resize
from mol.cache import RunningMeanLayer
from mol.routers import entropy, load_balance

KINDS = [SimpleRouter, TokenLevelRouter]


def _router(kind, experts=3, **options):
    router = kind(4, experts, **options)
    with torch.no_grad():
        router.weight.normal_()
        router.bias.normal_()
    return router


def _reference(router, stream, mask):
    """Plain loops in float64."""
    weight, bias = (p.detach().double().numpy() for p in (router.weight, router.bias))
    out = np.zeros((*stream.shape[:2], len(bias)))
    for b in range(stream.shape[0]):
        for t in range(stream.shape[1]):
            seen = stream[b, t].double().numpy()
            if isinstance(router, SimpleRouter):
                past = [
                    stream[b, i].double().numpy() for i in range(t + 1) if mask[b, i]
                ]
                seen = np.mean(past, 0) if past else np.zeros(4)
            scores = (weight @ seen + bias) / router.temperature
            powers = np.exp(scores - scores.max())
            out[b, t] = powers / powers.sum()
    return torch.tensor(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_weights_equal_plain_loops(kind, temperature):
    router = _router(kind, temperature=temperature)
    stream = torch.randn(2, 6, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1]])
    expected = _reference(router, stream, mask)
    assert torch.allclose(router(stream, mask).double(), expected, atol=1e-6)


@pytest.mark.critical
@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_nothing(kind):
    router, stream = _router(kind), torch.randn(2, 6, 4)
    changed = stream.clone()
    changed[:, 4:] += 100
    assert torch.equal(router(stream)[:, :4], router(changed)[:, :4])


def test_simple_router_continues_from_its_state():
    router, stream = _router(SimpleRouter), torch.randn(2, 6, 4)
    state = RunningMeanLayer()
    steps = [router(stream[:, t : t + 1], None, state) for t in range(6)]
    assert torch.allclose(torch.cat(steps, 1), router(stream), atol=1e-6)


def test_nan_behind_padding_stays_there():
    router, stream = _router(SimpleRouter), torch.randn(1, 4, 4)
    stream[:, 0] = math.nan
    mask = torch.tensor([[0, 1, 1, 1]])
    assert router(stream, mask)[:, 1:].isfinite().all()


def test_low_precision_stream_is_weighed_in_float32():
    router = _router(SimpleRouter)
    weights = router(torch.randn(1, 3, 4).bfloat16())
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.sum(-1), torch.ones(1, 3))


def test_start_weights_hold_for_any_stream():
    router = SimpleRouter(4, 3, temperature=2.0)
    router.start_at([0.7, 0.2, 0.1])
    weights = router(torch.randn(2, 5, 4))
    assert torch.allclose(weights, torch.tensor([0.7, 0.2, 0.1]).expand(2, 5, 3))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"hidden_dim": 0, "num_experts": 2}, ValueError),
        ({"hidden_dim": 4, "num_experts": 0}, ValueError),
        ({"hidden_dim": 4, "num_experts": 2, "temperature": 0.0}, ValueError),
        ({"hidden_dim": 4, "num_experts": 2, "temperature": math.nan}, ValueError),
        ({"hidden_dim": 4, "num_experts": 2, "top_k": 1}, NotImplementedError),
    ],
)
def test_bad_router_arguments(options, error):
    with pytest.raises(error):
        SimpleRouter(**options)


def test_entropy_and_balance_by_hand():
    weights = torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]])
    mask = torch.tensor([[1, 1, 0]])
    assert entropy(weights, mask).item() == pytest.approx(math.log(2) / 2, abs=1e-6)
    chosen = torch.tensor([[[True, False], [True, False], [False, True]]])
    # f = (1, 0), P = (0.75, 0.25): 2 * 0.75
    assert load_balance(weights, chosen, mask).item() == pytest.approx(1.5)
    # f = (2/3, 1/3), P = (1.75/3, 1.25/3)
    expected = 2 * (2 * 1.75 + 1.25) / 9
    assert load_balance(weights, chosen).item() == pytest.approx(expected)
    empty = torch.zeros(1, 3)
    assert entropy(weights, empty).item() == 0.0


def test_balance_gradient_flows_through_the_weights():
    router = _router(TokenLevelRouter)
    weights = router(torch.randn(2, 3, 4))
    load_balance(weights, weights > 0.3).backward()
    assert router.weight.grad.abs().sum() > 0


def test_adapter_starts_as_the_rectangular_identity():
    x = torch.randn(2, 3, 5)
    assert torch.equal(LinearAdapter(5, 5)(x), x)
    assert torch.equal(LinearAdapter(5, 3)(x), x[..., :3])
    assert torch.equal(LinearAdapter(5, 7)(x), resize(x, 7))
    assert LinearAdapter(5, 3, bias=False).bias is None
    adapter = LinearAdapter(5, 3)
    assert (adapter.input_dim, adapter.output_dim) == (5, 3)


def test_adapter_takes_a_narrower_map():
    adapter = LinearAdapter(5, 4)
    weight, bias = torch.randn(2, 3), torch.randn(2)
    adapter.assign(weight, bias)
    x = torch.randn(6, 5)
    expected = resize(x[:, :3] @ weight.T + bias, 4)
    assert torch.allclose(adapter(x), expected, atol=1e-6)


def test_resize_pads_and_truncates():
    x = torch.randn(2, 4)
    assert resize(x, 4) is x
    assert torch.equal(resize(x, 6), torch.cat([x, torch.zeros(2, 2)], -1))
    assert torch.equal(resize(resize(x, 6), 4), x)
