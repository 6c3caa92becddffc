# SPDX-License-Identifier: Apache-2.0
"""One nested low-rank family out of a pretrained model, its budget a switch."""

from importlib.metadata import version

from loraven.auditing import AuditResult, audit
from loraven.budget import BudgetExhaustedException, BudgetManager
from loraven.conversion import convert
from loraven.energy import EnergyEstimator, PerfEstimator, get_default_hardware_profile
from loraven.energy_fit import calibrate_energy
from loraven.export import export_static
from loraven.family import at_budget, get_budget, revert, set_budget
from loraven.meter import EnergyReading, EnergyUnavailableError, measure_energy
from loraven.router import RoutedModel, fit_router
from loraven.schedulers import (
    EnergyAwareRankScheduler,
    LinearRankScheduler,
    RankScheduler,
)
from loraven.store import load, save
from loraven.summary import ConversionSummary, LayerSummary, LevelSummary

__all__ = [
    "AuditResult",
    "BudgetExhaustedException",
    "BudgetManager",
    "ConversionSummary",
    "EnergyAwareRankScheduler",
    "EnergyEstimator",
    "EnergyReading",
    "EnergyUnavailableError",
    "LayerSummary",
    "LevelSummary",
    "LinearRankScheduler",
    "PerfEstimator",
    "RankScheduler",
    "RoutedModel",
    "at_budget",
    "audit",
    "calibrate_energy",
    "convert",
    "export_static",
    "fit_router",
    "get_budget",
    "get_default_hardware_profile",
    "load",
    "measure_energy",
    "revert",
    "save",
    "set_budget",
]

__version__ = version("loraven")
