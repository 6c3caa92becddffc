# SPDX-License-Identifier: Apache-2.0
"""One nested low-rank family out of a pretrained model, its budget a switch.

Importing this loads none of the modules behind the names below: each comes with its
first use (PEP 562).
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraven.auditing import AuditResult, audit
    from loraven.budget import BudgetExhaustedException, BudgetManager
    from loraven.conversion import convert
    from loraven.distillation import DistillSummary, distill
    from loraven.energy import (
        EnergyEstimator,
        PerfEstimator,
        get_default_hardware_profile,
    )
    from loraven.energy_fit import calibrate_energy
    from loraven.export import export_static
    from loraven.family import at_budget, get_budget, revert, set_budget
    from loraven.layers import DynamicLowRankLayer
    from loraven.meter import EnergyReading, EnergyUnavailableError, measure_energy
    from loraven.nested import NestedLinear
    from loraven.plots import plot_energy_efficiency, plot_rank_evolution
    from loraven.presets import LoRAven, create_loraven_layer
    from loraven.router import RoutedModel, fit_router
    from loraven.schedulers import (
        EnergyAwareRankScheduler,
        LinearRankScheduler,
        RankScheduler,
    )
    from loraven.scoring import GateNetwork, LightweightScorer
    from loraven.store import load, save
    from loraven.summary import ConversionSummary, LayerSummary, LevelSummary

_HOME = {
    "AuditResult": "loraven.auditing",
    "BudgetExhaustedException": "loraven.budget",
    "BudgetManager": "loraven.budget",
    "ConversionSummary": "loraven.summary",
    "DistillSummary": "loraven.distillation",
    "DynamicLowRankLayer": "loraven.layers",
    "EnergyAwareRankScheduler": "loraven.schedulers",
    "EnergyEstimator": "loraven.energy",
    "EnergyReading": "loraven.meter",
    "EnergyUnavailableError": "loraven.meter",
    "GateNetwork": "loraven.scoring",
    "LayerSummary": "loraven.summary",
    "LevelSummary": "loraven.summary",
    "LightweightScorer": "loraven.scoring",
    "LinearRankScheduler": "loraven.schedulers",
    "LoRAven": "loraven.presets",
    "NestedLinear": "loraven.nested",
    "PerfEstimator": "loraven.energy",
    "RankScheduler": "loraven.schedulers",
    "RoutedModel": "loraven.router",
    "at_budget": "loraven.family",
    "audit": "loraven.auditing",
    "calibrate_energy": "loraven.energy_fit",
    "convert": "loraven.conversion",
    "create_loraven_layer": "loraven.presets",
    "distill": "loraven.distillation",
    "export_static": "loraven.export",
    "fit_router": "loraven.router",
    "get_budget": "loraven.family",
    "get_default_hardware_profile": "loraven.energy",
    "load": "loraven.store",
    "measure_energy": "loraven.meter",
    "plot_energy_efficiency": "loraven.plots",
    "plot_rank_evolution": "loraven.plots",
    "revert": "loraven.family",
    "save": "loraven.store",
    "set_budget": "loraven.family",
}

__all__ = [
    "AuditResult",
    "BudgetExhaustedException",
    "BudgetManager",
    "ConversionSummary",
    "DistillSummary",
    "DynamicLowRankLayer",
    "EnergyAwareRankScheduler",
    "EnergyEstimator",
    "EnergyReading",
    "EnergyUnavailableError",
    "GateNetwork",
    "LayerSummary",
    "LevelSummary",
    "LightweightScorer",
    "LinearRankScheduler",
    "LoRAven",
    "NestedLinear",
    "PerfEstimator",
    "RankScheduler",
    "RoutedModel",
    "at_budget",
    "audit",
    "calibrate_energy",
    "convert",
    "create_loraven_layer",
    "distill",
    "export_static",
    "fit_router",
    "get_budget",
    "get_default_hardware_profile",
    "load",
    "measure_energy",
    "plot_energy_efficiency",
    "plot_rank_evolution",
    "revert",
    "save",
    "set_budget",
]

__version__ = version("loraven")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
