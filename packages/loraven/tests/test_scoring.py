# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from loraven import GateNetwork, LightweightScorer
from loraven.scoring import column_blocks, gate_mask, rank_mask, row_ranks


def test_scorer_is_the_specified_network_and_treats_rows_alone():
    scorer = LightweightScorer(12, hidden_dim=5)
    x = torch.randn(7, 3, 12)
    first, second = scorer.hidden, scorer.output
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    logit = hidden @ second.weight.T + second.bias
    expected = 1 / (1 + (-logit).exp())
    assert torch.allclose(scorer(x), expected, atol=1e-6)
    assert scorer(x).shape == (7, 3, 1)
    # No statistic of the batch: other rows may be anything.
    other = x.clone()
    other[1:] = 1e6
    assert torch.equal(scorer(other)[0], scorer(x)[0])


def test_gates_start_open_whatever_the_input():
    gate = GateNetwork(12, num_blocks=3)
    values = gate(torch.randn(50, 12) * 100)
    assert torch.allclose(values, torch.full((50, 3), 1 / (1 + math.exp(-2))))


def test_arguments_are_kept():
    scorer = LightweightScorer(12, 5, torch.device("cpu"), torch.float64)
    assert (scorer.in_features, scorer.hidden_dim) == (12, 5)
    assert (scorer.device, scorer.dtype) == (torch.device("cpu"), torch.float64)
    assert scorer.hidden.weight.dtype == torch.float64
    gate = GateNetwork(12, 5, torch.device("cpu"), torch.float64)
    assert (gate.in_features, gate.num_blocks) == (12, 5)
    assert (gate.device, gate.dtype) == (torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("kind", [LightweightScorer, GateNetwork])
@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (4.0, 4), (True, 4)])
def test_wrong_sizes_are_named(kind, sizes):
    with pytest.raises(ValueError, match="integers of 1 or more"):
        kind(*sizes)


@pytest.mark.critical
def test_masks_are_exactly_0_or_1_for_every_rank():
    ranks = torch.linspace(0, 13, 1301)
    mask = rank_mask(ranks, 12, 0.75)
    expected = [[j + 0.5 <= r for j in range(12)] for r in ranks.tolist()]
    assert torch.equal(mask, torch.tensor(expected).float())
    gates = torch.rand(400, 5)
    values = gate_mask(gates, 12)
    for row, gate in zip(values.tolist(), gates.tolist(), strict=True):
        blocks = [i * 5 // 12 for i in range(12)]
        assert row == [float(b == 0 or gate[b] >= 0.5) for b in blocks]


@pytest.mark.critical
def test_masks_carry_the_gradient_of_the_soft_ones():
    ranks = (torch.rand(6) * 10).requires_grad_()
    weight = torch.randn(6, 12)
    (rank_mask(ranks, 12, 0.75) * weight).sum().backward()
    again = ranks.detach().double().requires_grad_()
    soft = torch.sigmoid((again[:, None] - torch.arange(12) - 0.5) / 0.75)
    (soft * weight).sum().backward()
    assert torch.allclose(ranks.grad.double(), again.grad, atol=1e-5)
    gates = torch.rand(6, 4, requires_grad=True)
    (gate_mask(gates, 12) * weight).sum().backward()
    blocks = weight.reshape(6, 4, 3).sum(-1)
    blocks[:, 0] = 0
    assert torch.allclose(gates.grad, blocks, atol=1e-5)


def test_ranks_are_linear_in_the_score_capped_and_never_nan():
    scores = torch.tensor([0.0, 0.25, 1.0, math.nan])
    assert row_ranks(scores, 4, 12, 12).tolist() == [4, 6, 12, 12]
    assert row_ranks(scores, 4, 12, 5).tolist() == [4, 5, 5, 5]
    assert row_ranks(scores.bfloat16(), 4, 12, 12).dtype == torch.float32


def test_blocks_split_the_columns_evenly():
    for columns in (1, 7, 8, 48, 100):
        for blocks in range(1, min(columns, 9)):
            found = column_blocks(columns, blocks, "cpu")
            counts = found.bincount(minlength=blocks)
            assert found[0] == 0
            assert found.diff().ge(0).all()
            assert counts.max() - counts.min() <= 1
