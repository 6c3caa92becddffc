# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraven import DynamicLowRankLayer, RankScheduler


class Fixed(RankScheduler):
    """Proposes what it was told."""

    def __init__(self, rank):
        self.rank, self.calls = rank, []

    def schedule_rank(self, complexity_scores, budget=None, **kwargs):
        self.calls.append((complexity_scores, budget, kwargs))
        return self.rank


def make(in_features=32, out_features=24, r_max=16, r_min=3, **options):
    torch.manual_seed(0)
    layer = DynamicLowRankLayer(in_features, out_features, r_max, r_min, **options)
    # Decisions that differ from row to row.
    with torch.no_grad():
        layer.scorer.output.weight.mul_(6)
        layer.gate.linear.weight.normal_(std=0.7)
    return layer


def open_gates(layer):
    with torch.no_grad():
        layer.gate.linear.weight.zero_()
        layer.gate.linear.bias.fill_(2.0)
    return layer


def formula(layer, x, rank):
    """The specified product in float64."""
    V, S, U = layer.V.double(), layer.S.double(), layer.U.double()
    y = x.double() @ V[:, :rank] @ S[:rank, :rank].T @ U[:, :rank].T
    return y if layer.bias is None else y + layer.bias.double()


def row_by_row(layer, x):
    """Rank scope 'row' in plain Python and float64."""
    out = []
    for row in x:
        score = layer.scorer(row).double().item()
        rank = layer.r_min + score * (layer.r_max - layer.r_min)
        gates = layer.gate(row)
        keep = torch.zeros(layer.r_max, dtype=torch.float64)
        for j in range(layer.r_max):
            block = j * layer.num_blocks // layer.r_max
            is_open = block == 0 or gates[block] >= 0.5
            keep[j] = float(j + 0.5 <= rank and is_open)
        z = row.double() @ layer.V.double() @ layer.S.double() * keep
        out.append(z @ layer.U.double().T + layer.bias.double())
    return torch.stack(out)


@pytest.mark.critical
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (9, 32), (2, 5, 32), (2, 1, 3, 32)])
def test_formula_at_every_rank_and_shape(bias, grad, shape):
    layer = open_gates(make(bias=bias))
    x = torch.randn(shape)
    for rank in range(3, 17):
        layer.scheduler = Fixed(rank)
        for fixed in (None, rank):
            layer.fixed_rank = fixed
            for _ in range(3):
                with torch.set_grad_enabled(grad):
                    y, found = layer(x)
                assert found == layer.current_rank == rank
                assert y.shape == (*shape[:-1], 24)
                assert torch.allclose(y.double(), formula(layer, x, rank), atol=2e-5)


def test_views_have_the_specified_orientation():
    layer = make()
    assert layer.V.shape == (32, 16)
    assert layer.S.shape == (16, 16)
    assert layer.U.shape == (24, 16)
    assert torch.equal(layer.S, torch.diag(layer.scale.detach()))
    with pytest.raises(AttributeError):
        layer.V = torch.zeros(32, 16)
    assert "r_max=16" in repr(layer)


def test_start_has_the_output_variance_of_linear():
    torch.manual_seed(1)
    layer = DynamicLowRankLayer(256, 128, r_max=128, r_min=16, bias=False)
    layer.fixed_rank = 128
    y, _ = layer(torch.randn(4000, 256))
    assert y.var().item() == pytest.approx(1 / 3, rel=0.05)
    eye = torch.eye(128)
    assert torch.allclose(layer.down @ layer.down.T, eye, atol=1e-5)
    assert torch.allclose(layer.up @ layer.up.T, eye, atol=1e-5)
    decay = (1 + torch.arange(128) / 16) ** -0.5
    ratio = layer.scale / decay
    assert torch.allclose(ratio, ratio[0].expand(128))


def test_no_rows_leave_the_rank():
    layer = make(init_rank=7)
    for mode in ("inference", "training"):
        y, rank = layer(torch.randn(0, 5, 32), mode=mode)
        assert y.shape == (0, 5, 24)
        assert rank == layer.current_rank == 7
    assert layer.rank_history == []
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.critical
def test_training_value_equals_row_inference_and_plain_python():
    layer = make()
    layer.random_rank_share = 0.0
    x = torch.randn(40, 32)
    y, used = layer(x, mode="training")
    expected = row_by_row(layer, x)
    assert torch.allclose(y.double(), expected, atol=2e-5)
    layer.rank_scope = "row"
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, rank = layer(x)
        assert torch.allclose(y.double(), expected, atol=2e-5)
        assert rank == used


@pytest.mark.critical
def test_every_parameter_learns_at_the_first_step():
    torch.manual_seed(0)
    layer = DynamicLowRankLayer(32, 24, r_max=16)
    x, target = torch.randn(64, 32), torch.randn(64, 24)
    y, _ = layer(x, mode="training")
    loss = (y - target).pow(2).mean() + 0.02 * layer.expected_cost
    loss.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert layer.scorer.hidden.weight.grad.abs().sum(1).gt(0).sum() > 16
    # Block 0 never closes, so its gate has nothing to learn.
    assert layer.gate.linear.weight.grad.abs().sum(1).gt(0).tolist() == [False] + 7 * [
        True
    ]


def test_expected_cost_is_the_share_of_columns_kept():
    layer = make()
    layer.random_rank_share = 0.0
    x = torch.randn(50, 32)
    layer(x, mode="training")
    kept = 0
    for row in x:
        rank = 3 + layer.scorer(row).item() * 13
        gates = layer.gate(row)
        for j in range(16):
            block = j * 8 // 16
            kept += j + 0.5 <= rank and bool(block == 0 or gates[block] >= 0.5)
    assert layer.expected_cost.shape == ()
    assert layer.expected_cost.item() == pytest.approx(kept / (50 * 16), abs=1e-6)


def test_a_quarter_of_the_training_rows_takes_any_rank():
    layer = open_gates(make())
    with torch.no_grad():
        layer.scorer.output.bias.fill_(-40.0)
        layer.scorer.output.weight.zero_()
    # Output 0 counts the columns that a row kept.
    with torch.no_grad():
        layer.down.fill_(1 / 32)
        layer.scale.fill_(1.0)
        layer.up.fill_(1.0)
        layer.bias.zero_()
    y, rank = layer(torch.ones(20000, 32), mode="training")
    counts = y[:, 0].detach().round().long().bincount(minlength=17) / 20000
    assert rank == 16
    assert counts[3] == pytest.approx(0.75 + 0.25 / 14, abs=0.02)
    assert torch.allclose(counts[4:17], torch.full((13,), 0.25 / 14), atol=0.006)
    y, rank = layer(torch.ones(5000, 32), mode="training", budget=0)
    assert rank == 3
    assert (y[:, 0].round() == 3).all()


@pytest.mark.critical
@pytest.mark.parametrize("grad", [True, False])
def test_closing_a_gate_changes_the_output(grad):
    layer = open_gates(make())
    layer.scheduler = Fixed(12)
    x = torch.randn(6, 32)
    for block in range(1, 8):
        open_gates(layer)
        with torch.no_grad():
            layer.gate.linear.bias[block] = -1.0
        with torch.set_grad_enabled(grad):
            y, rank = layer(x)
        keep = torch.tensor([float(j * 8 // 16 != block) for j in range(12)])
        z = x @ layer.V[:, :12] * layer.scale[:12] * keep
        expected = z @ layer.U[:, :12].T + layer.bias
        assert rank == 12
        assert torch.allclose(y, expected, atol=1e-5)
        assert layer.columns == keep.sum()
    # Block 0 has no say.
    open_gates(layer)
    with torch.no_grad():
        layer.gate.linear.bias[0] = -9.0
        y, _ = layer(x)
    assert torch.allclose(y.double(), formula(layer, x, 12), atol=2e-5)
    layer.gates_enabled = False
    with torch.no_grad():
        layer.gate.linear.bias.fill_(-9.0)
        y, _ = layer(x)
    assert torch.allclose(y.double(), formula(layer, x, 12), atol=2e-5)


@pytest.mark.critical
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), rank=st.integers(3, 16), rows=st.integers(1, 9))
def test_gates_per_row_equal_plain_python(seed, rank, rows):
    layer = make(num_gate_blocks=5)
    layer.scheduler = Fixed(rank)
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))
    opened = layer.gate(x) >= 0.5
    opened[:, 0] = True
    keep = opened[:, [j * 5 // 16 for j in range(rank)]].float()
    z = x @ layer.V[:, :rank] * layer.scale[:rank] * keep
    expected = z @ layer.U[:, :rank].T + layer.bias
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, _ = layer(x)
        assert torch.allclose(y, expected, atol=1e-5)
        assert layer.columns == keep.any(0).sum()


@pytest.mark.critical
def test_a_row_of_row_scope_depends_on_no_other():
    layer = make()
    layer.rank_scope = "row"
    x = torch.randn(12, 32)
    with torch.no_grad():
        y, prefix = layer(x)
        alone = torch.cat([layer(row[None])[0] for row in x])
        assert torch.allclose(y, alone, atol=1e-5)
        # The hardest row fixes the prefix: then the others are bit-equal whatever
        # the rest is.
        ranks = 3 + layer.scorer(x).flatten() * 13
        hardest = int(ranks.argmax())
        other = x.roll(5, 0)
        keep = [hardest, (hardest + 1) % 12]
        other[keep] = x[keep]
        again, same = layer(other)
    assert same == prefix
    assert torch.equal(again[keep], y[keep])


def test_batch_scope_asks_the_scheduler_with_the_documented_keywords():
    layer = open_gates(make())
    layer.scheduler = Fixed(9)
    x = torch.randn(4, 5, 32)
    layer(x, budget=1.0)
    scores, budget, kwargs = layer.scheduler.calls[0]
    assert scores.shape == (20,)
    assert torch.allclose(scores, layer.scorer(x).flatten(), atol=1e-6)
    assert budget == 1.0
    assert kwargs == {"layer_dims": (32, 24), "mode": "inference", "batch_size": 20}
    assert not scores.requires_grad


@pytest.mark.parametrize("found", [math.nan, math.inf, None, "8", [8]])
def test_a_proposal_that_is_no_rank_names_the_scheduler(found):
    layer = make()
    layer.scheduler = Fixed(found)
    if found == "8":
        assert layer(torch.randn(2, 32))[1] == 8
        return
    with pytest.raises(ValueError, match=r"Fixed\.schedule_rank returned"):
        layer(torch.randn(2, 32))


class Stairs:
    """An energy model whose figures are easy to invert."""

    def __init__(self, step):
        self.step = step

    def estimate(self, layer_dims, rank, batch_size=1):
        return batch_size * (rank // self.step + 1 / batch_size)


@pytest.mark.critical
@settings(deadline=None, max_examples=150)
@given(
    proposal=st.one_of(st.integers(-(10**9), 10**9), st.floats(-100.0, 100.0)),
    budget=st.floats(0, 12),
    rows=st.integers(1, 5),
    step=st.integers(1, 4),
    fixed=st.booleans(),
    mode=st.sampled_from(["inference", "training"]),
)
def test_budget_binds_whatever_is_proposed(proposal, budget, rows, step, fixed, mode):
    layer = make()
    layer.scheduler, layer.energy_model = Fixed(proposal), Stairs(step)
    if fixed:
        layer.fixed_rank = max(3, min(16, math.floor(proposal)))
    _, rank = layer(torch.randn(rows, 32), budget=budget, mode=mode)
    energy = layer.energy_model.estimate
    fitting = [
        r for r in range(3, 17) if energy((32, 24), r, batch_size=rows) / rows <= budget
    ]
    cap = max(fitting, default=3)
    assert 3 <= rank <= cap
    assert layer.over_budget == (not fitting)
    if mode == "inference" or fixed:
        assert rank == max(3, min(math.floor(proposal), cap))


def test_budget_zero_runs_the_smallest_rank_and_says_so():
    layer = make()
    _, rank = layer(torch.randn(4, 32), budget=0)
    assert rank == 3
    assert layer.over_budget
    layer(torch.randn(4, 32))
    assert not layer.over_budget
    layer.energy_model = Stairs(1)
    assert layer.energy(5, 2) == 11.0


def test_histories_follow_decisions_and_stay_bounded():
    layer = open_gates(make())
    x = torch.randn(4, 32)
    with torch.no_grad():
        layer.fixed_rank = 5
        layer(x)
        assert layer.rank_history == []
        layer.fixed_rank = None
        for i in range(1010):
            layer.scheduler = Fixed(3 + i % 14)
            layer(x)
    assert layer.rank_history == [3 + i % 14 for i in range(10, 1010)]
    assert layer.complexity_history == pytest.approx(
        [layer.scorer(x).mean().item()] * 1000
    )
    layer(x, mode="training")
    assert len(layer.rank_history) == len(layer.complexity_history) == 1000
    assert layer.rank_history[-1] == layer.current_rank
    assert not list(layer.buffers())


def test_a_fixed_rank_asks_nobody():
    layer = make(init_rank=6)
    layer.scheduler = Fixed("nobody")
    assert layer.current_rank == 6
    layer.fixed_rank = 11
    assert layer.current_rank == 11
    x = torch.randn(4, 32)
    y, rank = layer(x, mode="training")
    assert rank == 11
    assert layer.expected_cost.item() == pytest.approx(11 / 16)
    assert torch.allclose(y.double(), formula(layer, x, 11), atol=2e-5)
    assert layer.scorer.hidden.weight.grad is None


@pytest.mark.critical
@pytest.mark.parametrize("part", ["hidden", "output"])
@pytest.mark.parametrize("scope", ["batch", "row"])
def test_a_diverged_scorer_counts_as_1_in_both_modes(part, scope):
    layer, x = open_gates(make()), torch.randn(20, 32)
    layer.rank_scope, layer.random_rank_share = scope, 0.0
    with torch.no_grad():
        getattr(layer.scorer, part).weight.fill_(math.nan)
        y, rank = layer(x)
        trained, same = layer(x, mode="training")
    assert rank == same == layer.r_max
    assert torch.allclose(y, trained, atol=1e-5)
    assert layer.complexity_history == [1.0, 1.0]


@pytest.mark.critical
@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_a_budget_caps_every_row(spread):
    layer, x = open_gates(make()), torch.randn(20, 32)
    layer.rank_scope = "row"
    with torch.no_grad():
        layer.scorer.output.weight.mul_(spread)
        layer.scorer.output.bias.fill_(1.5)
        for cap in (3, 7, 12):
            budget = layer.energy(cap, 20) / 20
            y, rank = layer(x, budget=budget)
            ranks = 3 + layer.scorer(x)[:, 0] * 13
            each = (ranks.clamp(max=cap) + 0.5).floor().int().tolist()
            assert rank == max(each) <= cap
            exact = [
                formula(layer, row[None], r) for row, r in zip(x, each, strict=True)
            ]
            assert torch.allclose(y.double(), torch.cat(exact), atol=1e-5)
