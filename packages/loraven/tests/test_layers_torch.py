# SPDX-License-Identifier: Apache-2.0
"""The layer inside torch's machinery: copies, precision, compile, two processes."""

import copy
import pickle
import socket
import warnings

import pytest
import torch
from torch import nn

from loraven import DynamicLowRankLayer, LoRAven


def make(**options):
    torch.manual_seed(0)
    options = {"r_max": 16, "r_min": 3} | options
    return DynamicLowRankLayer(32, 24, **options)


def test_deepcopy_pickle_and_state_dict():
    layer, x = make(), torch.randn(6, 32)
    # An expected_cost with a graph could not be copied.
    layer(x, mode="training")
    with torch.no_grad():
        expected, rank = layer(x)
    layer.fixed_rank, layer.rank_scope, layer.nan_policy = 9, "row", "propagate"
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (other.fixed_rank, other.rank_scope) == (9, "row")
        assert other.nan_policy == "propagate"
        assert other.rank_history == layer.rank_history
        assert other.expected_cost is None
        other.fixed_rank, other.rank_scope = None, "batch"
        with torch.no_grad():
            y, same = other(x)
        assert torch.equal(y, expected)
        assert same == rank
        assert len(layer.rank_history) == 2
    fresh = DynamicLowRankLayer(32, 24, 16, 3)
    fresh.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_other_precisions(dtype, mode):
    layer = make(dtype=dtype)
    layer.random_rank_share = 0.0
    layer.rank_scope = "row"
    x = torch.randn(6, 32, dtype=dtype)
    y, _ = layer(x, mode=mode)
    assert y.dtype == dtype
    with torch.no_grad():
        again, _ = layer(x, mode=mode)
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert torch.allclose(y, again, atol=tolerance)
    y.float().square().sum().backward()
    assert layer.down.grad.dtype == dtype


@pytest.mark.critical
def test_autocast_trains_and_infers_in_bfloat16():
    layer, x = make(), torch.randn(64, 32)
    layer.random_rank_share = 0.0
    layer.rank_scope = "row"
    plain, _ = layer(x)
    for mode in ("inference", "training"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = layer(x, mode=mode)
            cost = layer.expected_cost
            with torch.no_grad():
                for fixed in (None, 16, 16):
                    layer.fixed_rank = fixed
                    cached, _ = layer(x, mode=mode)
                    assert cached.dtype == torch.bfloat16
        layer.fixed_rank = None
        assert y.dtype == torch.bfloat16
        assert (y - plain).abs().mean() < 0.05
        if mode == "training":
            (y.float().square().mean() + 0.02 * cost).backward()
            assert cost.dtype == layer.expected_cost.dtype == torch.float32
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.abs().sum() > 0, name


def test_meta_device_and_empty_start():
    layer = make(device=torch.device("meta"))
    assert layer.down.is_meta
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.allclose(layer.down @ layer.down.T, torch.eye(16), atol=1e-5)


def test_the_module_never_moves_itself():
    layer = LoRAven(32, 24, device=torch.device("meta"))
    assert all(p.is_meta for p in layer.parameters())
    assert LoRAven(32, 24, device="cpu").layer.up.device.type == "cpu"


def _compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", **options)


@pytest.mark.critical
@pytest.mark.parametrize("grad", [True, False])
def test_a_fixed_rank_compiles_into_one_graph(grad):
    layer, x = make(), torch.randn(6, 32)
    layer.fixed_rank = 9
    expected, _ = layer(x)
    run = _compiled(layer, fullgraph=True)
    with torch.set_grad_enabled(grad):
        y, rank = run(x)
    assert rank == layer.current_rank == 9
    assert torch.allclose(y, expected, atol=1e-6)
    # A change of weights is seen without a new graph.
    with torch.no_grad():
        layer.down.mul_(2)
    expected, _ = layer(x)
    with torch.set_grad_enabled(grad), torch.compiler.set_stance("fail_on_recompile"):
        assert torch.allclose(run(x)[0], expected, atol=1e-6)


def test_a_fixed_rank_exports_with_any_batch():
    layer = make()
    layer.fixed_rank = 9
    layer.nan_policy = "propagate"
    dims = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            layer.eval(), (torch.randn(4, 32),), dynamic_shapes=dims
        )
    x = torch.randn(11, 32)
    assert torch.allclose(program.module()(x)[0], layer(x)[0], atol=1e-6)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = make()
        self.last = nn.Linear(24, 5)

    def forward(self, x, mode):
        return self.last(self.layer(x, mode=mode)[0])


# Dynamo itself asks a tensor that crosses a graph break for its gradient.
GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")


@GRAD
@pytest.mark.critical
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_compiled_models_agree_and_stop_recompiling(mode):
    model = Wrapped()
    model.layer.random_rank_share = 0.0
    batches = [torch.randn(16, 32) * (1 + i) for i in range(12)]
    expected = [model(x, mode) for x in batches]
    ranks = model.layer.rank_history
    run = _compiled(model)
    actual = [run(x, mode) for x in batches]
    for y, z in zip(actual, expected, strict=True):
        assert torch.allclose(y, z, atol=1e-5)
    assert model.layer.rank_history == 2 * ranks
    with torch.compiler.set_stance("fail_on_recompile"):
        for x in batches:
            y = run(x, mode)
    y.sum().backward()
    assert model.layer.down.grad.abs().sum() > 0
    if mode == "training":
        assert model.layer.scorer.output.bias.grad.abs().sum() > 0


@GRAD
def test_training_breaks_its_graph_only_to_read_the_rank():
    layer, x = make(), torch.randn(16, 32)
    torch._dynamo.reset()
    found = torch._dynamo.explain(layer)(x, mode="training")
    assert found.graph_break_count <= 1
    preset = LoRAven(32, 24)
    torch._dynamo.reset()
    y = _compiled(preset)(x)
    y.sum().backward()
    assert preset.get_performance_stats()["samples"] == 16


def _train(rank, port, results):
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    layer = make()
    model = nn.parallel.DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(10 + rank)
    used = []
    for step in range(4):
        # Ranks, batch sizes and budgets differ; one process even has no rows.
        rows = 0 if step == 2 and rank else 5 + 3 * rank
        budget = [None, 0.0][(rank + step) % 2]
        y, found = model(torch.randn(rows, 32) * (1 + rank), budget, "training")
        loss = y.square().sum() + 0.02 * layer.expected_cost
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        used.append(found)
    results.put((rank, used, [p.detach().numpy() for p in layer.parameters()]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.critical
def test_two_processes_train_without_find_unused_parameters():
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.SimpleQueue()
    workers = [context.Process(target=_train, args=(r, port, results)) for r in (0, 1)]
    for worker in workers:
        worker.start()
    found = {rank: rest for rank, *rest in (results.get() for _ in workers)}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert (one == two).all()
    assert found[0][0] != found[1][0]
    start = [p.detach().numpy() for p in make().parameters()]
    assert all((a != b).any() for a, b in zip(found[0][1], start, strict=True))


class Away(torch.Tensor):
    """A CPU tensor that says it lives on an accelerator."""

    is_cpu = False


@pytest.mark.critical
@pytest.mark.parametrize("scope", ["batch", "row"])
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_path_of_accelerators_equals_the_host_s(scope, mode, spread):
    layer = make()
    layer.random_rank_share = 0.0
    layer.rank_scope = scope
    with torch.no_grad():
        layer.scorer.output.weight.mul_(6)
        layer.gate.linear.weight.normal_(std=spread)
        layer.gate.linear.bias[3] = -1.0
    x = torch.randn(7, 32)
    with torch.no_grad():
        expected, rank = layer(x, mode=mode)
        y, same = layer(x.as_subclass(Away), mode=mode)
    assert isinstance(y, Away)
    assert same == rank
    assert torch.allclose(y, expected, atol=1e-5)
    assert layer.rank_history[0] == layer.rank_history[1]
    assert layer.complexity_history[0] == pytest.approx(layer.complexity_history[1])
    # What was replaced is counted there, and said with the next decision's transfer.
    x[2, 3] = float("nan")
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="1 input elements"):
        y, _ = layer(x.as_subclass(Away), mode=mode)
    assert layer.sanitized == 1
    assert y.isfinite().all()


@pytest.mark.critical
def test_an_accelerator_s_input_keeps_its_gradient_at_inference():
    layer = make()
    x = torch.randn(7, 32, requires_grad=True)
    y, _ = layer(x.as_subclass(Away))
    y.sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.fixture
def group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("setting", [("fixed_rank", 9), ("gates_enabled", False)])
@pytest.mark.parametrize("way", ["requires_grad_", "find_unused_parameters", None])
def test_data_parallel_training_with_parts_turned_off(group, setting, way):
    layer = make()
    setattr(layer, *setting)
    if way == "requires_grad_":
        layer.gate.requires_grad_(False)
        layer.scorer.requires_grad_(layer.fixed_rank is None)
    unused = way == "find_unused_parameters"
    model = nn.parallel.DistributedDataParallel(layer, find_unused_parameters=unused)

    def step():
        y, _ = model(torch.randn(5, 32), None, "training")
        y.square().sum().backward()

    step()
    if way is None:
        # What the documentation of the two settings warns of.
        with pytest.raises(RuntimeError, match="find_unused_parameters"):
            step()
    else:
        step()
