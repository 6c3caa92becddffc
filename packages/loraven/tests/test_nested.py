# SPDX-License-Identifier: Apache-2.0
import copy
import io
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from loraven.factorize import Moments, output_pca, pivot
from loraven.forms import form_macs
from loraven.nested import NestedLinear, Plan

PLANS = [Plan(4, "prefix"), Plan(8, "gauge"), Plan(16, "gauge")]
LEADS = [(), (1,), (15,), (16,), (64,), (3, 5), (4, 8), (0,), (2, 0)]
LIMITS = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


def made(out=24, in_=40, bias=True, dtype=torch.float32, plans=PLANS, conv=False):
    """A layer, its factors in float64, and the nested layer made of both."""
    if conv:
        original = Conv1D(out, in_)
        torch.nn.init.normal_(original.bias)
    else:
        original = torch.nn.Linear(in_, out, bias=bias)
    original = original.to(dtype)
    mix = torch.randn(in_, in_, dtype=torch.float64)
    mix = mix * torch.logspace(0, -2, in_, dtype=torch.float64)
    mean = torch.randn(in_, dtype=torch.float64)
    moments = Moments(mean, mix @ mix.T, 10 * in_, False)
    weight = original.weight.T if conv else original.weight
    factors = output_pca(weight, original.bias, moments)
    nested = NestedLinear(original, factors, pivot(factors.up), plans, conv)
    return original, factors, nested


def exact(factors, rank, x):
    matrix = factors.up[:rank].T @ factors.down[:rank]
    offset = factors.up[:rank].T @ factors.down_bias[:rank] + factors.up_bias
    return x.double() @ matrix.T + offset


def outputs(nested, x):
    """Of all levels."""
    found = []
    for level in range(nested.reduced_levels + 1):
        nested.set_level(level)
        found.append(nested(x))
    return found


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.critical
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("conv", [False, True])
def test_every_level_is_its_map_and_the_last_the_original(lead, dtype, conv):
    original, factors, nested = made(dtype=dtype, conv=conv)
    x = torch.randn(*lead, 40).to(dtype)
    *reduced, dense = outputs(nested, x)
    assert torch.equal(dense, original(x))
    for plan, y in zip(PLANS, reduced, strict=True):
        expected = exact(factors, plan.rank, x)
        assert (y.shape, y.dtype) == (expected.shape, dtype)
        size = expected.norm() + x.double().norm() * factors.energy**0.5
        assert (y.double() - expected).norm() <= LIMITS[dtype] * size


def test_a_plan_may_be_dense_and_a_layer_may_have_no_bias():
    plans = [Plan(8, "gauge"), Plan(24, "dense")]
    original, factors, nested = made(bias=False, plans=plans)
    x = torch.randn(5, 40)
    reduced, planned, dense = outputs(nested, x)
    assert torch.equal(planned, original(x))
    assert torch.equal(dense, original(x))
    assert torch.allclose(reduced.double(), exact(factors, 8, x), atol=1e-4)
    assert nested.bias is None
    assert "bias" not in nested.state_dict()
    assert nested.up.shape == (8, 24)


def test_it_looks_like_the_layer_that_it_replaces():
    original, _, nested = made()
    assert nested.weight is original.weight
    assert nested.bias is original.bias
    assert nested.original is original
    assert list(nested.children()) == []
    assert (nested.in_features, nested.out_features) == (40, 24)
    conv, _, nested = made(conv=True)
    assert nested.weight is conv.weight
    assert (nested.in_features, nested.out_features) == (40, 24)
    assert (nested.level, nested.reduced_levels) == (3, 3)
    assert [p for p in nested.parameters() if p.requires_grad] == [
        conv.weight,
        conv.bias,
    ]
    assert "gauge:16" in repr(nested)


@pytest.mark.parametrize("rows", [3, 20])
def test_macs_are_those_of_the_plan(rows):
    _, _, nested = made()
    for level, plan in enumerate([*PLANS, Plan(24, "dense")]):
        nested.set_level(level)
        with FlopCounterMode(display=False) as counter:
            nested(torch.randn(rows, 40))
        macs = form_macs(24, 40, *plan)
        assert counter.get_total_flops() == 2 * rows * macs


@pytest.mark.parametrize("rows", [3, 20])
def test_gradients_reach_the_input_and_in_training_form_the_factors(rows):
    _, factors, nested = made(dtype=torch.float64)
    x = torch.randn(rows, 40, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(rows, 24, dtype=torch.float64)
    for level, plan in enumerate(PLANS):
        nested.set_level(level)
        loss = (exact(factors, plan.rank, x) * weight).sum()
        (expected,) = torch.autograd.grad(loss, x)
        (got,) = torch.autograd.grad((nested(x) * weight).sum(), x)
        assert torch.allclose(got, expected, atol=1e-10)
        before = nested(x)
        nested.training_form = True
        masters = [nested.up, nested.down, nested.down_bias, nested.up_bias]
        for master in masters:
            master.requires_grad_(True)
        y = nested(x)
        assert torch.allclose(y, before, atol=1e-10)
        grads = torch.autograd.grad((y * weight).sum(), [*masters, x])
        rank = plan.rank
        z = x @ nested.down[:rank].T + nested.down_bias[:rank]
        assert torch.allclose(grads[0][:rank], z.T @ weight)
        back = weight @ nested.up[:rank].T
        assert torch.allclose(grads[1][:rank], back.T @ x)
        assert torch.allclose(grads[2][:rank], back.sum(0))
        assert torch.allclose(grads[3], weight.sum(0))
        assert torch.allclose(grads[4], expected, atol=1e-10)
        assert not any(grad[rank:].any() for grad in grads[:3])
        nested.requires_grad_(False)
        nested.training_form = False


def test_gradients_reach_unfrozen_factors_of_a_prefix_level_in_any_case():
    _, _, nested = made()
    nested.set_level(0)
    nested(torch.randn(3, 40))
    nested.up.requires_grad_(True)
    nested(torch.randn(3, 40)).sum().backward()
    assert nested.up.grad[:4].any()


def test_rebuild_follows_trained_factors():
    _, factors, nested = made(dtype=torch.float64)
    x = torch.randn(20, 40, dtype=torch.float64)
    with torch.no_grad():
        for name in ("up", "down", "down_bias", "up_bias"):
            master = getattr(nested, name)
            master += 0.3 * torch.randn_like(master)
    nested.rebuild()
    trained = [p.detach() for p in (nested.up, nested.down, nested.down_bias)]
    changed = type(factors)(*trained, nested.up_bias.detach(), factors.tail, 0.0)
    for plan, y in zip(PLANS, outputs(nested, x), strict=False):
        assert torch.allclose(y, exact(changed, plan.rank, x), atol=1e-9)
        assert not torch.allclose(y, exact(factors, plan.rank, x), atol=1e-2)
    assert torch.equal(nested.order, pivot(nested.up).order)
    assert not torch.equal(nested.order, pivot(factors.up).order)


def test_rebuild_refuses_a_gauge_form_that_loses_digits_and_changes_nothing():
    _, _, nested = made()
    before = nested.order.clone(), nested.skeleton_16.clone()
    # Interpolation weights of this matrix double with each rank: 2**7 at rank 8.
    growing = torch.cat(
        [torch.eye(16) - torch.ones(16, 16).tril(-1), -torch.ones(8, 16)]
    )
    with torch.no_grad():
        nested.up.copy_(growing.T)
    with pytest.raises(RuntimeError, match="gauge form of rank 8"):
        nested.rebuild()
    assert same((nested.order, nested.skeleton_16), before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_run_the_same_and_share_nothing(way):
    original, _, nested = made()
    nested.set_level(1)
    if way == "deepcopy":
        twin = copy.deepcopy(nested)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(nested))
    else:
        file = io.BytesIO()
        torch.save(nested, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert (twin.level, twin.plans) == (1, nested.plans)
    assert twin.original.weight is twin.weight is not original.weight
    x = torch.randn(20, 40)
    expected = outputs(nested, x)
    assert same(outputs(twin, x), expected)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.zero_()
    assert not any(y.any() for y in outputs(twin, x))
    assert same(outputs(nested, x), expected)


def test_a_copy_that_shares_all_tensors_has_a_level_of_its_own():
    _, _, nested = made()
    tensors = [*nested.parameters(), *nested.buffers()]
    twin = copy.deepcopy(nested, {id(tensor): tensor for tensor in tensors})
    assert [*twin.parameters(), *twin.buffers()] == tensors
    assert twin.original.weight is nested.weight
    x = torch.randn(20, 40)
    expected = outputs(nested, x)
    twin.set_level(0)
    assert torch.equal(twin(x), expected[0])
    assert torch.equal(nested(x), expected[3])
    # Its slices are cut from the same memory.
    with torch.no_grad():
        nested.up_bias += 1
    assert torch.allclose(twin(x), expected[0] + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_is_bit_equal(dtype):
    _, _, nested = made(dtype=dtype)
    _, _, other = made(dtype=dtype)
    x = torch.randn(20, 40).to(dtype)
    expected = outputs(nested, x)
    assert not same(outputs(other, x), expected)
    assert not any("skeleton" in key for key in nested.state_dict())
    other.load_state_dict(nested.state_dict())
    assert not other.stale
    assert same(outputs(other, x), expected)
    file = io.BytesIO()
    torch.save(nested.state_dict(), file)
    file.seek(0)
    _, _, third = made(dtype=dtype)
    third.load_state_dict(torch.load(file), assign=True)
    assert same(outputs(third, x), expected)
    assert third.original.weight is third.weight


def test_a_checkpoint_in_another_dtype_is_not_stale():
    _, _, nested = made()
    _, _, other = made()
    other.to(torch.bfloat16)
    other.load_state_dict(nested.state_dict())
    assert not other.stale
    twin = copy.deepcopy(nested).to(torch.bfloat16)
    x = torch.randn(20, 40).to(torch.bfloat16)
    assert same(outputs(other, x), outputs(twin, x))
    # The same weights once more, in float32 and on their own.
    other.load_state_dict({"weight": nested.weight.float()}, strict=False)
    assert not other.stale


@pytest.mark.critical
@pytest.mark.parametrize("key", ["weight", "bias"])
def test_other_weights_make_the_factors_stale(key):
    original, _, nested = made()
    x = torch.randn(20, 40)
    before = outputs(nested, x)
    right = {name: value.clone() for name, value in original.state_dict().items()}
    wrong = {name: value.clone() for name, value in right.items()}
    wrong[key].view(-1)[3] += 1e-6
    for assign in (False, True):
        nested.load_state_dict(wrong, strict=False, assign=assign)
        for level in range(3):
            nested.set_level(level)
            with pytest.raises(RuntimeError, match="factors are stale, convert again"):
                nested(x)
            with pytest.raises(RuntimeError, match="factors are stale, convert again"):
                copy.deepcopy(nested)(x)
        nested.set_level(3)
        assert torch.equal(nested(x), torch.nn.functional.linear(x, **wrong))
        assert torch.equal(nested.original(x), nested(x))
    # The right ones are known when they come back.
    nested.load_state_dict(right, strict=False)
    assert same(outputs(nested, x), before)


def test_rows_or_columns_in_another_order_are_other_weights():
    for dim in (0, 1):
        original, _, nested = made()
        flipped = original.weight.detach().flip(dim)
        nested.load_state_dict({"weight": flipped}, strict=False)
        assert nested.stale


def test_a_state_dict_of_other_sizes_is_refused_by_name():
    _, _, nested = made()
    _, _, other = made(plans=[Plan(4, "prefix")])
    with pytest.raises(RuntimeError, match="size mismatch for up"):
        nested.load_state_dict(other.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype_takes_all_forms_along(dtype):
    original, factors, nested = made()
    nested.set_level(0)
    assert nested.to(dtype) is nested
    assert nested.weight is original.weight
    assert nested.order.dtype == torch.int64
    assert not nested.stale
    x = torch.randn(20, 40).to(dtype)
    *reduced, dense = outputs(nested, x)
    assert torch.equal(dense, original(x))
    for plan, y in zip(PLANS, reduced, strict=True):
        expected = exact(factors, plan.rank, x)
        size = expected.norm() + x.double().norm() * factors.energy**0.5
        limit = max(LIMITS[dtype], LIMITS[torch.float32])
        assert (y.double() - expected).norm() <= limit * size
    nested.load_state_dict(copy.deepcopy(nested.state_dict()))
    assert same(outputs(nested, x), [*reduced, dense])


def test_parameters_that_a_conversion_replaces_are_the_originals_too():
    original, _, nested = made()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        nested.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert original.weight is nested.weight
    assert original.bias is nested.bias
    outputs(nested, torch.randn(3, 40, dtype=torch.float64))


def test_to_meta_and_back_by_a_state_dict():
    _, _, nested = made()
    x = torch.randn(20, 40)
    expected, state = outputs(nested, x), copy.deepcopy(nested.state_dict())
    nested.to("meta")
    assert nested(x.to("meta")).shape == (20, 24)
    nested.to_empty(device="cpu")
    nested.load_state_dict(state)
    assert same(outputs(nested, x), expected)


def test_functional_call_uses_the_tensors_that_it_is_given():
    _, _, nested = made()
    x = torch.randn(3, 40)
    for level in (0, 3):
        nested.set_level(level)
        nested(x)
        zeros = {name: torch.zeros_like(p) for name, p in nested.named_parameters()}
        assert not torch.func.functional_call(nested, zeros, x).any()
        assert nested(x).any()


def test_the_output_is_a_view_only_when_allowed():
    _, _, nested = made()
    x = torch.randn(4, 8, 40)
    expected = outputs(nested, x)
    assert all(y.is_contiguous() for y in expected)
    nested.contiguous_output = False
    found = outputs(nested, x)
    assert found[1].stride() == (8, 1, 32)
    for y, z in zip(found, expected, strict=True):
        assert torch.allclose(y, z, atol=1e-5)


def test_float16_does_not_overflow_between_the_factors():
    torch.manual_seed(0)
    original = torch.nn.Linear(64, 4096, bias=False)
    weight = torch.ones(4096, 64) * 20 + torch.randn(4096, 64)
    original.weight.data = weight.half()
    moments = Moments(torch.zeros(64), torch.eye(64), 999, False)
    factors = output_pca(original.weight, None, moments)
    nested = NestedLinear(original, factors, None, [Plan(8, "prefix")])
    nested.set_level(0)
    x = torch.ones(2, 64) * 10
    # What lies between the factors, unscaled, would be 20 * 64 * 10 * 64.
    assert (x @ factors.down[:8].T.float()).abs().max() > 65504
    y = nested(x.half())
    expected = exact(factors, 8, x)
    assert (y.double() - expected).norm() <= 2e-3 * expected.norm()


class Counter:
    """A compiler that counts the graphs it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


@pytest.mark.critical
def test_each_level_compiles_to_one_whole_graph():
    _, _, nested = made()
    x = torch.randn(20, 40)
    expected = outputs(nested, x)
    torch._dynamo.reset()
    counter = Counter()
    compiled = torch.compile(nested, fullgraph=True, backend=counter)
    for turn in range(3):
        for level in (0, 1, 2, 3) if turn else (2, 0, 3, 1):
            nested.set_level(level)
            y = compiled(x + turn)
            assert turn or torch.allclose(y, expected[level], atol=1e-5)
    assert counter.graphs == 4


@pytest.mark.parametrize("level", range(4))
def test_export_at_a_level_with_any_number_of_rows(level):
    _, _, nested = made()
    nested.set_level(level)
    rows = torch.export.Dim("rows", min=1, max=512)
    program = torch.export.export(
        nested, (torch.randn(8, 40),), dynamic_shapes={"input": {0: rows}}
    )
    for count in (1, 15, 16, 100):
        x = torch.randn(count, 40)
        assert torch.allclose(program.module()(x), nested(x), atol=1e-5)


def test_inference_mode_and_autocast():
    _, _, nested = made()
    x = torch.randn(20, 40)
    expected = outputs(nested, x)
    with torch.inference_mode():
        assert same(outputs(nested, x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs(nested, x)
    for y, z in zip(found, expected, strict=True):
        assert y.dtype == torch.bfloat16
        assert torch.allclose(y.float(), z, atol=0.2, rtol=0.05)


def test_levels_are_checked_and_cost_no_memory():
    _, _, nested = made()
    kept = [tensor.data_ptr() for tensor in nested.state_dict().values()]
    for level in (-1, 4):
        with pytest.raises(ValueError, match=rf"level={level}.*0 to 3"):
            nested.set_level(level)
    for level in (1.0, True, "1"):
        with pytest.raises(TypeError, match="level must be an int"):
            nested.set_level(level)
    nested.set_level(2)
    assert [tensor.data_ptr() for tensor in nested.state_dict().values()] == kept
    total = sum(t.nbytes for t in [*nested.parameters(), *nested.buffers()])
    assert nested.resident_bytes == total


def test_errors_name_what_is_wrong():
    original, factors, _ = made()
    pivots = pivot(factors.up)
    with pytest.raises(ValueError, match="form='diagonal'"):
        NestedLinear(original, factors, pivots, [Plan(4, "diagonal")])
    with pytest.raises(ValueError, match=r"rank=25.*1 to 24"):
        NestedLinear(original, factors, pivots, [Plan(25, "gauge")])
    with pytest.raises(ValueError, match="pivots=None"):
        NestedLinear(original, factors, None, [Plan(4, "gauge")])
    with pytest.raises(ValueError, match=r"24 x 40 layer.*40 x 24"):
        NestedLinear(original, factors, pivots, PLANS, transposed=True)
    large = torch.nn.Linear(40, 24).half()
    huge = type(factors)(*[t * 1e30 for t in vars(factors).values()])
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        NestedLinear(large, huge, pivots, PLANS)
