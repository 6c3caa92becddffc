# SPDX-License-Identifier: Apache-2.0
import copy
import pickle
import threading
import tracemalloc

import pytest
import torch
from torch import nn

import loraven
from loraven.family import at_level

LEVELS = (0.3, 0.5, 0.7, 1.0)


@pytest.fixture
def converted(bert, sentences):
    model = bert()
    loraven.convert(model, sentences())
    return model


@torch.no_grad()
def out(model, batch):
    return model(**batch).last_hidden_state


def tensors(model):
    return [*model.parameters(), *model.buffers()]


def reachable(value):
    """Every tensor in containers, however deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    parts = value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in reachable(part)]


def test_a_budget_is_rounded_down_to_a_level(converted):
    for budget, level in [(0.3, 0.3), (0.49, 0.3), (0.5, 0.5), (0.99, 0.7), (1, 1.0)]:
        assert loraven.set_budget(converted, budget) == level
        assert loraven.get_budget(converted) == level


@pytest.mark.parametrize("call", [loraven.set_budget, loraven.at_budget])
def test_budgets_that_can_not_be_met(converted, call):
    with pytest.raises(ValueError, match=r"budget=0\.29.*0\.3, 0\.5, 0\.7, 1\.0"):
        call(converted, 0.29)
    for wrong in (0, -1, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="budget"):
            call(converted, wrong)
    for kind in ("0.5", None, True):
        with pytest.raises(TypeError, match="budget"):
            call(converted, kind)
    assert loraven.get_budget(converted) == 1.0


def test_what_was_not_converted_says_so(mlp):
    for call in (loraven.get_budget, loraven.revert):
        with pytest.raises(RuntimeError, match="was not converted"):
            call(mlp())
    for call in (loraven.set_budget, loraven.at_budget, loraven.export_static):
        with pytest.raises(RuntimeError, match=r"loraven\.convert"):
            call(mlp(), 0.5)
    with pytest.raises(TypeError, match="not a str"):
        loraven.get_budget("model")


def test_a_wrapper_is_looked_through(converted):
    wrapped = nn.Sequential(converted)
    assert loraven.set_budget(wrapped, 0.5) == 0.5
    assert loraven.get_budget(converted) == 0.5
    loraven.revert(wrapped)
    with pytest.raises(RuntimeError, match="was not converted"):
        loraven.get_budget(converted)


def test_two_parts_converted_one_by_one_are_not_mixed_up(mlp):
    a, b = mlp(0), mlp(1)
    for part in (a, b):
        loraven.convert(part, [torch.randn(300, 64)])
    with pytest.raises(ValueError, match="2 parts"):
        loraven.set_budget(nn.Sequential(a, b), 0.5)


def test_a_switch_allocates_nothing(converted):
    loraven.set_budget(converted, 0.5)
    loraven.set_budget(converted, 1.0)
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    for _ in range(50):
        loraven.set_budget(converted, 0.5)
        loraven.set_budget(converted, 1.0)
    after = tracemalloc.take_snapshot()
    tracemalloc.stop()
    # Nothing that grows with the switches stays; tracemalloc's own bookkeeping may.
    grown = after.compare_to(before, "filename")
    own = [s.size_diff for s in grown if "loraven" in s.traceback[0].filename]
    assert sum(own) < 1000


def test_a_twin_shares_every_tensor_and_has_its_own_level(converted, sentences):
    batch = sentences(1)[0]
    twin = loraven.at_budget(converted, 0.5)
    assert loraven.get_budget(twin) == 0.5
    assert loraven.get_budget(converted) == 1.0
    mine = {tensor.untyped_storage().data_ptr() for tensor in tensors(converted)}
    both = zip(tensors(twin), tensors(converted), strict=True)
    assert all(a is b for a, b in both)
    # Whatever else the twin's modules hold are views of the same memory.
    held = [t for module in twin.modules() for t in reachable(vars(module))]
    assert len(held) > len(mine)
    assert {t.untyped_storage().data_ptr() for t in held} <= mine
    loraven.set_budget(converted, 0.5)
    assert torch.equal(out(twin, batch), out(converted, batch))


@pytest.mark.critical
def test_two_threads_at_two_budgets_get_what_each_alone_gets(converted, sentences):
    batches = sentences(4)
    models = {level: loraven.at_budget(converted, level) for level in (0.3, 0.7)}
    alone = {
        level: [out(model, batch) for batch in batches]
        for level, model in models.items()
    }
    barrier, together = threading.Barrier(2), {level: [] for level in models}

    def work(level):
        barrier.wait()
        for _ in range(20):
            loraven.set_budget(models[level], level)
            together[level] = [out(models[level], batch) for batch in batches]

    threads = [threading.Thread(target=work, args=(level,)) for level in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for level in models:
        pairs = zip(alone[level], together[level], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_twin_can_run_dense_under_levels_that_do_not_reach_it(mlp):
    model, x = mlp(), torch.randn(300, 64)
    with torch.no_grad():
        before = model(x)
        loraven.convert(model, [x], levels=(0.5,))
        assert torch.equal(at_level(model, 1)(x), before)
        assert not torch.equal(model(x), before)
    assert loraven.get_budget(at_level(model, 1)) == 1.0


def test_copies_and_pickles_are_whole_models(converted, sentences):
    batch = sentences(1)[0]
    loraven.set_budget(converted, 0.5)
    expected = out(converted, batch)
    copies = [copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))]
    loraven.set_budget(converted, 1.0)
    for model in copies:
        assert loraven.get_budget(model) == 0.5
        assert torch.equal(out(model, batch), expected)
        shared = {id(t) for t in tensors(model)} & {id(t) for t in tensors(converted)}
        assert not shared
        loraven.set_budget(model, 1.0)
        assert torch.equal(out(model, batch), out(converted, batch))
        loraven.revert(model)


def test_moving_to_another_dtype_and_back_reverts_to_the_same_parameters(mlp):
    model = mlp()
    first = model[0]
    loraven.convert(model, [torch.randn(300, 64)])
    model.double()
    loraven.set_budget(model, 0.5)
    assert model(torch.randn(2, 64).double()).dtype == torch.float64
    loraven.revert(model)
    assert model[0] is first
    assert first.weight.dtype == torch.float64
