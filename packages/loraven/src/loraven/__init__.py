# SPDX-License-Identifier: Apache-2.0
"""One nested low-rank family out of a pretrained model, its budget a switch."""

from importlib.metadata import version

from loraven.budget import BudgetExhaustedException, BudgetManager
from loraven.energy import (
    EnergyEstimator,
    PerfEstimator,
    get_default_hardware_profile,
)
from loraven.energy_fit import calibrate_energy
from loraven.meter import EnergyReading, EnergyUnavailableError, measure_energy
from loraven.schedulers import (
    EnergyAwareRankScheduler,
    LinearRankScheduler,
    RankScheduler,
)

__all__ = [
    "BudgetExhaustedException",
    "BudgetManager",
    "EnergyAwareRankScheduler",
    "EnergyEstimator",
    "EnergyReading",
    "EnergyUnavailableError",
    "LinearRankScheduler",
    "PerfEstimator",
    "RankScheduler",
    "calibrate_energy",
    "get_default_hardware_profile",
    "measure_energy",
]

__version__ = version("loraven")
