# SPDX-License-Identifier: Apache-2.0
"""One nested low-rank family out of a pretrained model, its budget a switch."""

from importlib.metadata import version

from loraven.energy import (
    EnergyEstimator,
    PerfEstimator,
    get_default_hardware_profile,
)
from loraven.layers import DynamicLowRankLayer
from loraven.plots import plot_energy_efficiency, plot_rank_evolution
from loraven.presets import LoRAven, create_loraven_layer
from loraven.schedulers import (
    EnergyAwareRankScheduler,
    LinearRankScheduler,
    RankScheduler,
)
from loraven.scoring import GateNetwork, LightweightScorer

__all__ = [
    "DynamicLowRankLayer",
    "EnergyAwareRankScheduler",
    "EnergyEstimator",
    "GateNetwork",
    "LightweightScorer",
    "LinearRankScheduler",
    "LoRAven",
    "PerfEstimator",
    "RankScheduler",
    "create_loraven_layer",
    "get_default_hardware_profile",
    "plot_energy_efficiency",
    "plot_rank_evolution",
]

__version__ = version("loraven")
