# SPDX-License-Identifier: Apache-2.0
"""One nested low-rank family out of a pretrained model, its budget a switch."""

from importlib.metadata import version

from loraven.energy import (
    EnergyEstimator,
    PerfEstimator,
    get_default_hardware_profile,
)
from loraven.schedulers import (
    EnergyAwareRankScheduler,
    LinearRankScheduler,
    RankScheduler,
)

__all__ = [
    "EnergyAwareRankScheduler",
    "EnergyEstimator",
    "LinearRankScheduler",
    "PerfEstimator",
    "RankScheduler",
    "get_default_hardware_profile",
]

__version__ = version("loraven")
