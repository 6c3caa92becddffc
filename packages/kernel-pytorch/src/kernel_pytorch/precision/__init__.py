# SPDX-License-Identifier: Apache-2.0
"""Number formats of eight bits."""

from kernel_pytorch.precision.formats import FP8Format

__all__ = ["FP8Format"]
