# SPDX-License-Identifier: Apache-2.0
"""Layers that stand in for those of torch.nn."""

from kernel_pytorch.core.layers import AttentionLayer

__all__ = ["AttentionLayer"]
