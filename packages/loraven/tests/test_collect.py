# SPDX-License-Identifier: Apache-2.0
"""What `collect` finds against plain loops over budgets."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from loraven import at_budget, convert, get_budget, revert, set_budget
from loraven.collect import collect
from loraven.family import find_family
from loraven.features import look

LEVELS = (0.3, 0.6, 1.0)


@pytest.fixture
def converted(bert, sentences):
    """A converted BERT at its middle level, and unseen batches."""
    model = bert()
    convert(model, sentences(), levels=LEVELS, sensitivity=False)
    set_budget(model, 0.6)
    return model, sentences(batches=2, seed=5)


def pooled_output(model, batch):
    with torch.no_grad():
        y = model(**batch).last_hidden_state
    keep = batch["attention_mask"].unsqueeze(-1)
    return (y * keep).sum(1) / keep.sum(1)


@pytest.mark.critical
def test_scores_are_those_of_each_budget_against_the_dense_model(converted):
    model, batches = converted
    found = collect(model, iter(batches), None, None, None)
    assert get_budget(model) == 0.6
    assert found.scores.shape == (32, 3)
    assert found.scores.dtype == found.features.dtype == torch.float64
    dense = at_budget(model, 1.0)
    for number, level in enumerate(LEVELS):
        small = at_budget(model, level)
        expected = torch.cat(
            [
                torch.cosine_similarity(
                    pooled_output(dense, b), pooled_output(small, b)
                )
                for b in batches
            ]
        )
        assert torch.allclose(found.scores[:, number], expected.double(), atol=1e-6)
    assert found.scores[:, 0].max() < 0.999
    assert (found.scores[:, 2] == 1).all()
    layers = find_family(model)[1].modules
    rows = [look(model, layers, None, (), batch)[0] for batch in batches]
    assert torch.allclose(found.features, torch.cat(rows).double())
    assert found.site == 0
    summary = find_family(model)[1].summary.levels
    assert found.costs.tolist() == [summary[level].cost_fraction for level in LEVELS]


def test_what_a_router_costs_is_counted(converted):
    model, batches = converted
    found = collect(model, batches, None, None, None)
    dense = 0
    for name, module in revert(model).named_modules():
        # All of them were converted; the pooler runs once for each sentence.
        if isinstance(module, nn.Linear):
            rows = 16 if "pooler" in name else 16 * 12
            dense += 2 * rows * module.weight.numel()
    own = 2 * (2 * 16 * 12 * 64 + 16 * 129) + 32 * 129 * 3
    assert found.overhead == pytest.approx(own / dense)
    assert 0.001 < found.overhead < 0.02


class Patches(nn.Module):
    """A convolution that is not converted comes first, and dropout and a state."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.norm = nn.BatchNorm1d(32)
        self.up, self.drop = nn.Linear(32, 64), nn.Dropout(0.5)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        x = self.norm(self.patch(x).flatten(2)).transpose(1, 2)
        return x + self.down(self.drop(self.up(x)).relu())


def test_what_runs_before_the_first_layer_is_part_of_the_cost():
    model = Patches()
    x = torch.randn(40, 3, 16, 16)
    convert(model, [x], levels=(0.5, 0.8, 1.0), sensitivity=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = collect(model, [x], None, None, None)
    with FlopCounterMode(display=False) as counter:
        model.patch(x)
    macs = counter.get_total_flops() // 2
    own = macs + 2 * 40 * 16 * 32 + 40 * 65 + 40 * 65 * 3
    assert found.overhead == pytest.approx(own / (40 * 16 * 2 * 32 * 64))
    # It ran in evaluation mode, and is in training mode as before.
    assert model.training
    assert model.drop.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert (found.scores[:, 2] == 1).all()


def test_a_score_and_an_output_of_ones_own(converted):
    model, batches = converted

    def score(reference, output):
        assert reference.shape == (16, 64)
        return -(reference - output).square().mean(1)

    found = collect(model, batches, score, lambda y: y.pooler_output, None)
    dense, small = at_budget(model, 1.0), at_budget(model, 0.3)
    with torch.no_grad():
        sides = [m(**batches[1]).pooler_output for m in (dense, small)]
    expected = -(sides[0] - sides[1]).square().mean(1)
    assert torch.allclose(found.scores[16:, 0], expected.double(), atol=1e-6)
    assert (found.scores[:, 2] == 0).all()
    free = collect(model, batches, None, None, lambda b: b["input_ids"][:, :3])
    assert free.site == -1
    assert torch.equal(free.features[16:], batches[1]["input_ids"][:, :3].double())


def test_without_a_dense_level_the_dense_model_is_the_reference(mlp):
    model, x = mlp(), torch.randn(400, 64)
    expected = model(x).detach()
    convert(model, [x], levels=(0.4, 0.8), sensitivity=False)
    found = collect(model, [x[:50], x[50:]], None, None, None)
    with torch.no_grad():
        scores = [
            torch.cosine_similarity(at_budget(model, level)(x), expected)
            for level in (0.4, 0.8)
        ]
    assert torch.allclose(found.scores, torch.stack(scores, 1).double(), atol=1e-6)
    assert found.scores.max() < 1


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (lambda a, b: torch.full((16,), 1.5), ValueError, "some are above 1"),
        (lambda a, b: torch.full((16,), torch.nan), ValueError, "they hold NaN"),
        (lambda a, b: torch.full((16,), -torch.inf), ValueError, "NaN or infinity"),
        (lambda a, b: torch.zeros(15), ValueError, "15 scores for 16 examples"),
        (lambda a, b: torch.zeros(16, 1), ValueError, r"shape is \(16, 1\)"),
        (lambda a, b: 0.5, TypeError, "returned a float"),
        (lambda a, b: torch.ones(16) * 1j, TypeError, "complex"),
    ],
)
def test_scores_that_are_none_leave_the_model_as_it_was(
    converted, score, error, message
):
    model, batches = converted
    with pytest.raises(error, match=message):
        collect(model, batches, score, None, None)
    assert get_budget(model) == 0.6
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_data_that_are_none(converted):
    model, (batch, _) = converted
    with pytest.raises(ValueError, match="data: it has no example"):
        collect(model, [], None, None, None)
    empty = {key: value[:0] for key, value in batch.items()}
    with pytest.raises(ValueError, match="data: it has no example"):
        collect(model, [empty], None, None, None)
    with pytest.raises(TypeError, match="data is an iterable of batches"):
        collect(model, batch, None, None, None)
    with pytest.raises(RuntimeError, match="was not converted"):
        collect(nn.Linear(64, 64), [batch], None, None, None)
    bad = torch.full((16, 2), torch.inf)
    with pytest.raises(ValueError, match="features: they hold NaN or infinity"):
        collect(model, [batch], None, None, lambda _: bad)
