# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Loggers: ``mycelya_torch`` and below it ``machine``, ``wire``, ``dispatch``.

They are silent unless the program, or ``MYCELYA_LOG``, asks for them:
``MYCELYA_LOG=debug``, or ``MYCELYA_LOG=machine=info,dispatch=debug``.
"""

import os

import torch

from torchworks_core.logs import enable, get_logger

NAME = "mycelya_torch"
root = get_logger(NAME)
machine = get_logger(f"{NAME}.machine")
wire = get_logger(f"{NAME}.wire")
dispatch = get_logger(f"{NAME}.dispatch")


def from_environment() -> None:
    """Print what ``MYCELYA_LOG`` names to stderr.

    Raises:
        ValueError: it names no logging level.
    """
    for part in filter(None, os.environ.get("MYCELYA_LOG", "").split(",")):
        child, _, level = part.strip().rpartition("=")
        enable(level.upper(), f"{NAME}.{child}" if child else NAME)


def log_tensor(what: str, tensor: torch.Tensor) -> None:
    """Log one line about a device tensor, with its hash, on ``dispatch``."""
    if dispatch.isEnabledFor(10):
        tag = torch.ops.mycelya.metadata_hash(tensor) & (2**64 - 1)
        shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        dispatch.debug("%s: %s%s on %s, %016x", what, dtype, shape, tensor.device, tag)
