# SPDX-License-Identifier: Apache-2.0
"""One nested low-rank family out of a pretrained model, its budget a switch."""

from importlib.metadata import version

from loraven.budget import BudgetExhaustedException, BudgetManager
from loraven.conversion import convert
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
from loraven.plots import plot_energy_efficiency, plot_rank_evolution
from loraven.presets import LoRAven, create_loraven_layer
from loraven.schedulers import (
    EnergyAwareRankScheduler,
    LinearRankScheduler,
    RankScheduler,
)
from loraven.scoring import GateNetwork, LightweightScorer
from loraven.store import load, save
from loraven.summary import ConversionSummary, LayerSummary, LevelSummary

__all__ = [
    "BudgetExhaustedException",
    "BudgetManager",
    "ConversionSummary",
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
    "PerfEstimator",
    "RankScheduler",
    "at_budget",
    "calibrate_energy",
    "convert",
    "create_loraven_layer",
    "export_static",
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
