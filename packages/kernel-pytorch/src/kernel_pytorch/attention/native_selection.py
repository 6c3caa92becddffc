# SPDX-License-Identifier: Apache-2.0
"""Choosing blocks of keys by content in C: the operator around ``kp_bs_select``.

It is `estimate` and the choice of `selection` in one pass over the keys, and writes
the index's lists directly. It stands behind an operator, so that fake tensors see
shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_pytorch.attention import native
from kernel_pytorch.attention.blocks import check_qkv
from kernel_pytorch.attention.mask_operands import check_mask_operands, mask_operands
from kernel_pytorch.attention.masks import MaskSpec
from torchworks_core.errors import InvalidValue

_MAX_DIM = 256


class Choice(NamedTuple):
    """How blocks are chosen.

    Args:
        block_size: Tokens in a block.
        keep: Share of the admissible blocks to keep.
        coverage: Share of the estimated mass to keep instead, or None.
        remainder: Whether dropped blocks take part by their means.
    """

    block_size: int
    keep: float
    coverage: float | None
    remainder: bool


def fits(q: Tensor, k: Tensor, mask: MaskSpec, block_size: int) -> bool:
    """Whether the native kernel chooses blocks for these arguments."""
    right = q.device.type == "cpu" and native.dtype_code(q.dtype) is not None
    right = right and q.dtype == k.dtype and mask.bias is None
    size = block_size % 16 == 0 and 16 <= block_size <= 256
    if not (right and size and 0 < q.shape[-1] <= _MAX_DIM):
        return False
    return bool(q.numel() and k.numel()) and native.native_status().available


def select_native(
    q: Tensor, k: Tensor, mask: MaskSpec, block_logits: Tensor | None, choice: Choice
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose blocks in C, for arguments that fit.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        mask: Without a bias.
        block_logits: [B, H, Tq, Tk] or None.
        choice: How.

    Returns:
        Counts int32 [B, H, Tq], blocks int32 [B, H, Tq, width], and the missed mass,
        float32 [B, H, Tq].
    """
    padding, documents, window = mask_operands(mask, q, k)
    counts, blocks, missed = torch.ops.kernel_pytorch.select_blocks(
        q.detach(),
        k.detach(),
        padding,
        documents,
        None if block_logits is None else block_logits.detach().float(),
        choice.block_size,
        mask.causal,
        window,
        float(choice.keep),
        float(choice.coverage or 0.0),
        choice.remainder,
    )
    if choice.coverage is not None:
        blocks = blocks[..., : int(counts.max())].contiguous()
    return counts, blocks, missed


def _width(kv_blocks: int, keep: float, coverage: float) -> int:
    """The most blocks that a row can keep."""
    return kv_blocks if coverage else min(kv_blocks, max(1, round(keep * kv_blocks)))


class _Arguments(NamedTuple):
    """What the operator takes; see `select_native` and `Choice`."""

    q: Tensor
    k: Tensor
    key_padding: Tensor | None
    documents: Tensor | None
    block_logits: Tensor | None
    block_size: int
    causal: bool
    window: int
    keep: float
    coverage: float
    remainder: bool


def _run(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    given = _Arguments(*args)
    counts, blocks, missed = _empty(given)
    q, k, key_padding, documents, block_logits, block_size = given[:6]
    check_qkv(q, k, k)
    check_mask_operands(key_padding, documents, q, k)
    sizes = (*counts.shape, -(-k.shape[2] // block_size))
    if block_logits is not None and tuple(block_logits.shape) != sizes:
        shape = f"block logits of shape {tuple(block_logits.shape)}"
        raise InvalidValue(shape, f"it must be {sizes}")
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    parts = {"key_padding": key_padding, "documents": documents, "logits": block_logits}
    dense = {n: None if t is None else t.contiguous() for n, t in parts.items()}
    results = {"counts": counts, "blocks": blocks, "missed": missed}
    results |= {"logits": dense.pop("logits")}
    batch, heads, q_len, dim = q.shape
    done = native.select(
        {"q": q, "k": k, **dense},
        results,
        {
            "keep": given.keep,
            "coverage": given.coverage,
            "remainder": int(given.remainder),
        },
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        q_len=q_len,
        kv_len=k.shape[2],
        dim=dim,
        index_batch=batch,
        width=blocks.shape[-1],
        block=block_size,
        positions=0 if documents is None else documents.shape[1],
        causal=int(given.causal),
        window=given.window,
        scale=dim**-0.5,
        dtype=native.dtype_code(q.dtype) or 0,
    )
    if not done:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, blocks of {block_size}"
        raise RuntimeError(f"the native kernel refused to choose blocks for {shapes}")
    return counts, blocks, missed


def _empty(given: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    q, block_size = given.q, given.block_size
    sizes = *q.shape[:2], -(-q.shape[2] // block_size)
    kv_blocks = -(-given.k.shape[2] // block_size)
    width = _width(kv_blocks, given.keep, given.coverage)
    counts = q.new_empty(sizes, dtype=torch.int32)
    # Entries beyond a count are never read, but they should not change from call to
    # call.
    blocks = q.new_zeros(*sizes, width, dtype=torch.int32)
    return counts, blocks, q.new_empty(sizes, dtype=torch.float32)


# Not by torch.library.custom_op, which imports all of torch._dynamo.
_NAME = "kernel_pytorch::select_blocks"
torch.library.define(
    _NAME,
    "(Tensor q, Tensor k, Tensor? key_padding, Tensor? documents, "
    "Tensor? block_logits, SymInt block_size, bool causal, SymInt window, "
    "float keep, float coverage, bool remainder) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl(_NAME, "CompositeExplicitAutograd", _run)
torch.library.register_fake(_NAME, lambda *args: _empty(_Arguments(*args)))
