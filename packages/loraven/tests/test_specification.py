# SPDX-License-Identifier: Apache-2.0
"""Every name of the specification: kind, arguments, types and defaults, literally."""

import inspect
import typing
from abc import ABC
from typing import Any

import pytest
import torch
from torch import nn

import loraven
from loraven import BudgetExhaustedException, LoRAven

Pair = tuple[int, int]
Tensor = torch.Tensor
none = inspect.Parameter.empty
KWARGS = ("**kwargs", Any, none)

# Name -> (argument, annotation, default) for each argument, and what it returns.
SIGNATURES = {
    "LoRAven": (
        [
            ("in_features", int, none),
            ("out_features", int, none),
            ("mode", str, "balanced"),
            ("max_rank", int | None, None),
            ("min_rank", int | None, None),
            ("energy_budget", float | None, None),
            ("bias", bool, True),
            ("device", torch.device | None, None),
        ],
        None,
    ),
    "LoRAven.forward": ([("x", Tensor, none)], Tensor),
    "LoRAven.get_current_rank": ([], int),
    "LoRAven.get_budget_usage": ([], float),
    "LoRAven.reset_budget": ([], None),
    "LoRAven.get_performance_stats": ([], dict[str, Any]),
    "DynamicLowRankLayer": (
        [
            ("in_features", int, none),
            ("out_features", int, none),
            ("r_max", int, none),
            ("r_min", int, 4),
            ("init_rank", int | None, None),
            ("bias", bool, True),
            ("scorer_hidden", int, 32),
            ("num_gate_blocks", int, 8),
            ("device", torch.device | None, None),
            ("dtype", torch.dtype | None, None),
        ],
        None,
    ),
    "DynamicLowRankLayer.forward": (
        [
            ("x", Tensor, none),
            ("budget", float | None, None),
            ("mode", str, "inference"),
        ],
        tuple[Tensor, int],
    ),
    "DynamicLowRankLayer.get_compression_ratio": ([], float),
    "DynamicLowRankLayer.get_flops": ([("batch_size", int, 1)], int),
    "DynamicLowRankLayer.visualize_rank_history": (
        [("save_path", str | None, None)],
        None,
    ),
    "LightweightScorer": (
        [
            ("in_features", int, none),
            ("hidden_dim", int, 32),
            ("device", torch.device | None, None),
            ("dtype", torch.dtype | None, None),
        ],
        None,
    ),
    "LightweightScorer.forward": ([("x", Tensor, none)], Tensor),
    "GateNetwork": (
        [
            ("in_features", int, none),
            ("num_blocks", int, 8),
            ("device", torch.device | None, None),
            ("dtype", torch.dtype | None, None),
        ],
        None,
    ),
    "GateNetwork.forward": ([("x", Tensor, none)], Tensor),
    "RankScheduler.schedule_rank": (
        [
            ("complexity_scores", Tensor, none),
            ("budget", float | None, None),
            KWARGS,
        ],
        int,
    ),
    "LinearRankScheduler": (
        [("r_min", int, 4), ("r_max", int, 128), ("diversity_factor", float, 0.1)],
        None,
    ),
    "LinearRankScheduler.schedule_rank": (
        [
            ("complexity_scores", Tensor, none),
            ("budget", float | None, None),
            ("current_loss", float | None, None),
            ("gradient_norm", float | None, None),
            KWARGS,
        ],
        int,
    ),
    "EnergyAwareRankScheduler": (
        [
            ("r_min", int, 4),
            ("r_max", int, 128),
            ("energy_model", Any | None, None),
            ("alpha", float, 1.0),
            ("beta", float, 0.1),
        ],
        None,
    ),
    "EnergyAwareRankScheduler.schedule_rank": (
        [
            ("complexity_scores", Tensor, none),
            ("budget", float | None, None),
            ("layer_dims", Pair | None, None),
            KWARGS,
        ],
        int,
    ),
    "BudgetManager": (
        [
            ("total_budget", float, 10.0),
            ("window_size", int, 100),
            ("safety_margin", float, 0.1),
            ("adaptation_rate", float, 0.01),
        ],
        None,
    ),
    "BudgetManager.allocate_budget": (
        [
            ("layer_id", str, none),
            ("complexity_score", float, none),
            ("layer_dims", Pair, none),
            ("performance_priority", float, 1.0),
        ],
        float,
    ),
    "BudgetManager.update_energy_consumption": (
        [
            ("layer_id", str, none),
            ("actual_energy", float, none),
            ("performance_metric", float | None, None),
        ],
        None,
    ),
    "BudgetManager.get_budget_status": ([], dict[str, float]),
    "BudgetManager.reset": ([], None),
    "PerfEstimator": ([("hardware_profile", dict[str, Any], none)], None),
    "PerfEstimator.estimate": (
        [("layer_dims", Pair, none), ("rank", int, none)],
        float,
    ),
    "EnergyEstimator": (
        [
            ("hardware_profile", dict[str, Any], none),
            ("flops_per_mac", float, 2.0),
            ("energy_per_flop", float, 1e-6),
            ("energy_per_memory_access", float, 1e-7),
        ],
        None,
    ),
    "EnergyEstimator.estimate": (
        [
            ("layer_dims", Pair, none),
            ("rank", int, none),
            ("batch_size", int, 1),
            ("utilization", float, 0.8),
            ("temperature", float, 65.0),
        ],
        float,
    ),
    "EnergyEstimator.estimate_all": (
        [("layer_dims", Pair, none), ("rank", int, none), ("batch_size", int, 1)],
        dict[str, float],
    ),
    "create_loraven_layer": (
        [
            ("in_features", int, none),
            ("out_features", int, none),
            ("mode", str, "balanced"),
            KWARGS,
        ],
        LoRAven,
    ),
    "get_default_hardware_profile": ([], dict[str, Any]),
    "plot_rank_evolution": (
        [
            ("rank_history", list[int], none),
            ("complexity_history", list[float], none),
            ("save_path", str | None, None),
        ],
        None,
    ),
    "plot_energy_efficiency": (
        [
            ("energy_data", dict[str, list[float]], none),
            ("save_path", str | None, None),
        ],
        None,
    ),
}


def _found(name):
    """Arguments, annotations, defaults and return type of ``loraven.<name>``."""
    function = loraven
    for part in name.split("."):
        function = getattr(function, part)
    if inspect.isclass(function):
        function = function.__init__
    hints = typing.get_type_hints(function)
    arguments = [
        (
            f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name,
            hints[p.name],
            p.default,
        )
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    ]
    returned = hints.get("return")
    return arguments, None if returned is type(None) else returned


@pytest.mark.critical
@pytest.mark.parametrize("name", list(SIGNATURES))
def test_signatures(name):
    arguments, returned = _found(name)
    expected, result = SIGNATURES[name]
    assert [(a, d) for a, _, d in arguments] == [(a, d) for a, _, d in expected]
    assert [d.__class__ for *_, d in arguments] == [d.__class__ for *_, d in expected]
    assert returned == result
    for (argument, kind, _), (_, wanted, _) in zip(arguments, expected, strict=True):
        # A wider type takes what the specified one takes.
        if "hardware_profile" in argument:
            assert typing.get_args(kind) == typing.get_args(wanted)
        else:
            assert kind == wanted, argument


def test_kinds():
    for name in ("LoRAven", "DynamicLowRankLayer", "LightweightScorer", "GateNetwork"):
        assert issubclass(getattr(loraven, name), nn.Module)
    for name in ("RankScheduler", "PerfEstimator"):
        assert issubclass(getattr(loraven, name), ABC)
        with pytest.raises(TypeError):
            getattr(loraven, name)({})
    for name in ("LinearRankScheduler", "EnergyAwareRankScheduler"):
        assert issubclass(getattr(loraven, name), loraven.RankScheduler)
    assert issubclass(loraven.EnergyEstimator, loraven.PerfEstimator)
    assert issubclass(BudgetExhaustedException, RuntimeError)
    names = {name.split(".")[0] for name in SIGNATURES} | {"BudgetExhaustedException"}
    assert names <= set(loraven.__all__)


def test_default_hardware_profile():
    assert loraven.get_default_hardware_profile() == {
        "dram_energy_per_byte": 1e-6,
        "l2_cache_energy_per_byte": 1e-7,
        "l1_cache_energy_per_byte": 1e-8,
        "compute_energy_per_flop": 1e-6,
        "l1_cache_size": 64 * 1024,
        "l2_cache_size": 1024 * 1024,
        "gpu_cores": 5120,
        "base_frequency": 1.5e9,
        "thermal_design_power": 250.0,
    }
