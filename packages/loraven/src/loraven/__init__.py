# SPDX-License-Identifier: Apache-2.0
"""One nested low-rank family out of a pretrained model, its budget a switch."""

from importlib.metadata import version

__all__: list[str] = []

__version__ = version("loraven")
