# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mol.gates import BayesGate, mix


def regret_bound(tokens, experts, share):
    return math.log(experts) - (tokens - 1) * math.log(1 - share + share / experts)


def _reference(likelihood, share):
    """Weights before each token, and the loss of the mixture, in float64."""
    tokens, experts = likelihood.shape
    weight = np.full(experts, 1 / experts)
    loss, weights = 0.0, []
    for t in range(tokens):
        weights.append(weight)
        mixed = (weight * likelihood[t]).sum()
        loss -= math.log(mixed)
        weight = (1 - share) * weight * likelihood[t] / mixed + share / experts
    return np.array([*weights[1:], weight]), loss


def _loss(log_weight, likelihood):
    """Loss of the mixture when each token is weighed by what came before."""
    before = torch.full((1, likelihood.shape[-1]), -math.log(likelihood.shape[-1]))
    before = torch.cat([before, log_weight[0, :-1]])
    return -(before + likelihood[0].log()).logsumexp(-1).sum().item()


@pytest.mark.critical
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 40),
    experts=st.integers(1, 4),
    share=st.sampled_from([0.0, 0.02, 0.05, 0.5, 0.99]),
)
def test_gate_equals_plain_float64_and_keeps_its_bound(seed, tokens, experts, share):
    random = np.random.default_rng(seed)
    # Adversarial: now and then a model holds the truth for all but impossible.
    likelihood = random.uniform(1e-3, 1, (tokens, experts))
    likelihood[random.uniform(size=likelihood.shape) < 0.2] = 1e-6
    seen = torch.tensor(likelihood, dtype=torch.float32)[None]
    known = torch.ones(1, tokens, dtype=torch.bool)
    actual = BayesGate(experts, share)(seen.log(), known)
    expected, loss = _reference(likelihood, share)
    assert np.allclose(actual[0].exp().numpy(), expected, atol=2e-5)
    best = -np.log(likelihood).sum(0).min()
    assert loss <= best + regret_bound(tokens, experts, share) + 1e-9
    assert _loss(actual, seen) == pytest.approx(loss, rel=1e-4, abs=1e-4)


def test_bound_is_tight_without_share():
    # One model is certain of every token, the other excludes the first.
    likelihood = np.array([[1.0, 1e-12], [1.0, 1.0]])
    _, loss = _reference(likelihood, 0.0)
    assert loss == pytest.approx(regret_bound(2, 2, 0.0))


def test_unknown_positions_do_not_count():
    seen = torch.randn(2, 5, 2)
    known = torch.tensor([[True] * 5, [False, False, True, False, True]])
    whole = BayesGate(2, 0.02)(seen, known)
    short = BayesGate(2, 0.02)(seen[1:, [2, 4]], torch.ones(1, 2, dtype=torch.bool))
    assert torch.allclose(whole[1, -1], short[0, -1])
    assert torch.allclose(whole[1, :2].exp(), torch.full((2, 2), 0.5))


def test_continuing_equals_one_call():
    gate, seen = BayesGate(3, 0.05), torch.randn(2, 9, 3)
    known = torch.ones(2, 9, dtype=torch.bool)
    whole = gate(seen, known)
    first = gate(seen[:, :4], known[:, :4])
    rest = gate(seen[:, 4:], known[:, 4:], first[:, -1])
    assert torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-6)


def test_impossible_tokens_and_nan_behind_padding_stay_finite():
    seen = torch.tensor([[[-math.inf, -math.inf], [math.nan, 0.0], [-1.0, -2.0]]])
    known = torch.tensor([[True, False, True]])
    assert BayesGate(2, 0.02)(seen, known).isfinite().all()
    assert BayesGate(2, 0.0)(seen, known).isfinite().all()


def test_mixture_is_a_distribution():
    log_probs = torch.randn(2, 3, 4, 11).log_softmax(-1)
    log_weight = torch.randn(2, 3, 4).log_softmax(-1)
    mixed = mix(log_weight, log_probs).exp()
    assert torch.allclose(mixed.sum(-1), torch.ones(2, 3), atol=1e-6)
    expected = (log_weight.exp()[..., None] * log_probs.exp()).sum(2)
    assert torch.allclose(mixed, expected, atol=1e-6)


def test_huge_differences_count_and_exclusion_by_all_does_not():
    seen = torch.tensor([[[-11000.0, -15000.0], [-math.inf, -math.inf]]])
    weight = BayesGate(2, 0.0)(seen, torch.ones(1, 2, dtype=torch.bool)).exp()
    assert weight.tolist() == [[[1.0, 0.0], [1.0, 0.0]]]


@pytest.mark.parametrize(("experts", "share"), [(0, 0.1), (2, 1.0), (2, -0.1)])
def test_bad_gate_arguments(experts, share):
    with pytest.raises(ValueError, match=r"experts|share"):
        BayesGate(experts, share)
