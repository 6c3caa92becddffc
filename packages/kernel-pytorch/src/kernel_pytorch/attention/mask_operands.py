# SPDX-License-Identifier: Apache-2.0
"""What operators take of a mask: tensors for the whole batch, of one length.

Kernels read these by position without looking at their sizes, so each operator checks
them once more: a compiled graph comes to it without the checks of `MaskSpec`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_pytorch.attention.masks import MaskSpec
from torchworks_core.errors import InvalidValue


class MaskOperands(NamedTuple):
    """A mask without its bias.

    Args:
        key_padding: Bool [B, Nk] or None.
        documents: Int64 [B, max(Nq, Nk)] or None.
        window: As in `MaskSpec`, at most Nq + Nk; 0 = none.
    """

    key_padding: Tensor | None
    documents: Tensor | None
    window: int


def mask_operands(mask: MaskSpec, q: Tensor, k: Tensor) -> MaskOperands:
    """Cut a mask to q [B, H, Nq, D] and k [B, Hkv, Nk, D].

    Example:
        >>> q = torch.zeros(2, 1, 3, 4)
        >>> mask = MaskSpec(window=9, documents=torch.zeros(1, 5, dtype=torch.int32))
        >>> _, documents, window = mask_operands(mask, q, q)
        >>> documents.shape, documents.dtype, window
        (torch.Size([2, 3]), torch.int64, 6)
    """
    padding, documents, batch = mask.key_padding, mask.documents, len(q)
    q_len, kv_len = q.shape[2], k.shape[2]
    if padding is not None:
        padding = padding[:, :kv_len].expand(batch, -1)
    if documents is not None:
        documents = documents[:, : max(q_len, kv_len)].expand(batch, -1)
        documents = documents.to(torch.int64)
    # A window longer than both inputs is none, and needs no 64-bit care in a kernel.
    return MaskOperands(padding, documents, min(mask.window or 0, q_len + kv_len))


def check_mask_operands(
    key_padding: Tensor | None, documents: Tensor | None, q: Tensor, k: Tensor
) -> None:
    """Raise InvalidValue unless the tensors have the shapes of `MaskOperands`."""
    q_len, kv_len = q.shape[2], k.shape[2]
    for name, found, length in (
        ("key_padding", key_padding, kv_len),
        ("documents", documents, max(q_len, kv_len)),
    ):
        shape = (len(q), length)
        if found is not None and tuple(found.shape) != shape:
            raise InvalidValue(f"{name} {tuple(found.shape)}", f"it must be {shape}")
