# SPDX-License-Identifier: Apache-2.0
"""Counted FLOPs, and that inference never answers from other weights."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from loraven import DynamicLowRankLayer, RankScheduler


class Fixed(RankScheduler):
    def __init__(self, rank):
        self.rank = rank

    def schedule_rank(self, complexity_scores, budget=None, **kwargs):
        return self.rank


def make(r_max=16, r_min=3, rank=10, size=(32, 24), **options):
    torch.manual_seed(0)
    layer = DynamicLowRankLayer(*size, r_max, r_min, **options)
    layer.scheduler = Fixed(rank)
    return layer


def counted(layer, x, grad=False, **options):
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        layer(x, **options)
    return counter.get_total_flops()


@pytest.mark.critical
@pytest.mark.parametrize("shape", [(32,), (1, 32), (7, 32), (2, 40, 32)])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rank", [3, 4, 9, 12, 13, 16])
def test_flops_are_what_torch_counts(shape, grad, rank):
    # From rank 14 on the factors cost more than the dense layer, and 80 rows pay for
    # their product.
    rows = torch.Size(shape[:-1]).numel()
    x = torch.randn(shape)
    layer = make(rank=rank)

    def check(**options):
        assert counted(layer, x, grad, **options) == layer.get_flops(rows)
        assert 0 < layer.get_compression_ratio() <= 1

    check()
    check(mode="training")
    check(budget=0.0)
    layer.rank_scope = "row"
    check()
    layer.rank_scope = "batch"
    layer.gates_enabled = False
    check()
    layer.gates_enabled = True
    for block in (1, 3, 7):
        with torch.no_grad():
            layer.gate.linear.bias[block] = -2.0
        check()
    with torch.no_grad():
        layer.gate.linear.weight.normal_()
    check()
    layer.fixed_rank = rank
    check()
    check(mode="training")


@pytest.mark.critical
def test_flops_before_any_forward_are_those_of_the_next():
    x = torch.randn(5, 32)
    for rank in (3, 10, 16):
        for setting in ({}, {"gates_enabled": False}, {"fixed_rank": rank}):
            layer = make(rank=rank, init_rank=rank, scorer_hidden=7)
            for name, value in setting.items():
                setattr(layer, name, value)
            planned = layer.get_flops(5)
            assert counted(layer, x) == planned == layer.get_flops(5)
            assert layer.get_flops() * 5 == planned


@pytest.mark.critical
@pytest.mark.parametrize("grad", [False, True])
def test_a_closed_gate_saves_flops(grad):
    layer, x = make(rank=12), torch.randn(6, 32)
    before = counted(layer, x, grad)
    for block in range(2, 6):
        with torch.no_grad():
            layer.gate.linear.bias[block] = -1.0
        after = counted(layer, x, grad)
        # Blocks 2 to 5 lie between r_min and the rank: two columns each.
        assert before - after == 2 * 6 * 2 * (32 + 24)
        before = after
    assert layer.get_compression_ratio() == pytest.approx(4 * 56 / (32 * 24))


@pytest.mark.critical
def test_many_rows_run_by_the_merged_weight_where_that_is_cheaper():
    layer = make(rank=16)
    dense, factors = 32 * 24, 16 * (32 + 24)
    for fixed in (16, None):
        layer.fixed_rank = fixed
        beside = 0 if fixed else 32 * (32 + 1) + 8 * 32
        for rows in (1, 64, 96, 97, 200):
            macs = min(rows * factors, (rows + 16) * dense) + rows * beside
            x = torch.randn(rows, 32)
            assert counted(layer, x) == 2 * macs == layer.get_flops(rows)
            with torch.no_grad():
                y, _ = layer(x)
                exact = (x @ layer.V @ layer.S @ layer.U.T) + layer.bias
            assert torch.allclose(y, exact, atol=1e-5)
    assert layer.get_compression_ratio() == 1.0


def test_compression_before_break_even_is_the_share_of_weights():
    layer = make(rank=10)
    layer(torch.randn(2, 32))
    assert layer.get_compression_ratio() == pytest.approx(10 * 56 / (32 * 24))


def _edits():
    """What can happen to weights, as functions of a layer."""

    def step(layer):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        layer(torch.randn(8, 32), mode="training")[0].square().sum().backward()
        optimizer.step()

    def adam(layer, **options):
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, **options)
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    def load(layer):
        other = DynamicLowRankLayer(32, 24, layer.r_max, layer.r_min)
        layer.load_state_dict(other.state_dict())

    def assign(layer):
        other = DynamicLowRankLayer(32, 24, layer.r_max, layer.r_min)
        layer.load_state_dict(other.state_dict(), assign=True)

    def scale(layer):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.7)

    def pointer(layer):
        vector = nn.utils.parameters_to_vector(layer.parameters())
        nn.utils.vector_to_parameters(1.3 * vector.detach(), layer.parameters())

    def behind(layer):
        # A no_grad forward between forward and backward, a step that moves no
        # version counter, and no gradient left afterwards.
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.3, fused=True)
        y, _ = layer(torch.randn(8, 32), mode="training")
        with torch.no_grad():
            layer(torch.randn(6, 32))
        y.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def average(layer):
        for parameter in layer.parameters():
            parameter.data.mul_(0.5).add_(torch.randn_like(parameter), alpha=0.5)

    def foreach(layer):
        torch._foreach_mul_([p.data for p in layer.parameters()], 1.5)

    def numpy(layer):
        for parameter in layer.parameters():
            parameter.detach().numpy()[:] *= 2

    def swap(layer):
        layer.down = nn.Parameter(torch.randn_like(layer.down))
        layer.scorer.hidden.weight = nn.Parameter(torch.randn(32, 32))

    def view(layer):
        layer.V.mul_(2.0)

    return {
        "sgd": step,
        "adam": adam,
        "adam foreach": lambda layer: adam(layer, foreach=True),
        "adam fused": lambda layer: adam(layer, fused=True),
        "load_state_dict": load,
        "load_state_dict assign": assign,
        "in place": scale,
        "vector_to_parameters": pointer,
        "fused step around an evaluation": behind,
        "average through parameter.data": average,
        "foreach on parameter.data": foreach,
        "numpy": numpy,
        "new Parameter": swap,
        "through a view": view,
        "double": lambda layer: layer.double(),
        "requires_grad_": lambda layer: layer.requires_grad_(False),
        "eval": lambda layer: layer.eval(),
    }


@pytest.mark.critical
@pytest.mark.parametrize("name", list(_edits()))
@pytest.mark.parametrize("fixed", [None, 9, 16])
@pytest.mark.parametrize("rank", [9, 16])
@pytest.mark.parametrize("rows", [6, 200])
def test_no_answer_comes_from_earlier_weights(name, fixed, rank, rows):
    layer = make(rank=rank)
    layer.fixed_rank = fixed
    x = torch.randn(rows, 32)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    _edits()[name](layer)
    x = x.to(layer.down.dtype)
    with torch.no_grad():
        again, used = layer(x)
        # A copy has seen no forward and can have kept nothing.
        fresh, same = copy.deepcopy(layer)(x)
    assert used == same
    assert torch.equal(again, fresh)
    if fixed:
        exact = (x @ layer.V[:, :used] * layer.scale[:used]) @ layer.up[:used]
        assert torch.allclose(again, exact + layer.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.critical
def test_gradients_reach_the_parameters():
    layer = make(rank=16)
    x = torch.randn(6, 32)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    y, _ = layer(x)
    y.square().sum().backward()
    for parameter in (layer.down, layer.scale, layer.up, layer.bias):
        assert parameter.grad.abs().sum() > 0
    assert layer.scorer.hidden.weight.grad is None


def test_functional_call_parametrize_and_replaced_networks():
    layer, x = make(rank=9), torch.randn(6, 32)
    with torch.no_grad():
        before, _ = layer(x)
        doubled = {"up": layer.up * 2, "bias": layer.bias * 2}
        y, _ = torch.func.functional_call(layer, doubled, (x,))
        assert torch.allclose(y, 2 * before, atol=1e-5)
        assert torch.allclose(layer(x)[0], before, atol=1e-6)

        class Half(nn.Module):
            def forward(self, weight):
                return weight / 2

        other = copy.deepcopy(layer)
        other.bias.zero_()
        nn.utils.parametrize.register_parametrization(other, "down", Half())
        y, _ = other(x)
        assert torch.allclose(y, (before - layer.bias) / 2, atol=1e-5)
        seen = []
        layer.scorer.register_forward_hook(lambda *all_: seen.append(all_))
        layer(x)
        assert len(seen) == 1
        layer.gate = nn.Sequential(nn.Linear(32, 8), nn.Sigmoid())
        nn.init.constant_(layer.gate[0].bias, 50.0)
        assert torch.allclose(layer(x)[0], before, atol=1e-5)


def test_inference_mode_and_tensors_of_it():
    x = torch.randn(6, 32)
    with torch.inference_mode():
        layer = make(rank=9)
        first, _ = layer(x)
        layer.down.mul_(2)
        layer.bias.zero_()
        second, _ = layer(x)
    assert not torch.allclose(first, second)
    layer = make(rank=9)
    with torch.inference_mode():
        inside, _ = layer(x)
    with torch.no_grad():
        outside, _ = layer(x)
    assert torch.equal(inside, outside)
    assert torch.allclose(layer(x)[0], outside, atol=1e-5)


def test_the_state_holds_parameters_only():
    layer = make(rank=16)
    with torch.no_grad():
        layer(torch.randn(6, 32))
    weights = ("weight", "bias")
    names = {"down", "scale", "up", "bias"}
    names |= {f"scorer.{part}.{w}" for part in ("hidden", "output") for w in weights}
    assert set(layer.state_dict()) == names | {f"gate.linear.{w}" for w in weights}


@pytest.fixture
def switching():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.critical
def test_threads_share_a_layer(switching):
    layer = make(rank=16, r_min=1)
    with torch.no_grad():
        layer.gate.linear.weight.normal_()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(1, 32, generator=generator) for _ in range(40)]
    with torch.no_grad():
        expected = [layer(x) for x in batches]

    def worker(first):
        with torch.no_grad():
            return [layer(batches[(first + i) % 40]) for i in range(300)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(worker, range(0, 40, 5)))
    for first, results in zip(range(0, 40, 5), found, strict=True):
        for i, (y, rank) in enumerate(results):
            exact, same = expected[(first + i) % 40]
            assert rank == same
            assert torch.equal(y, exact)
