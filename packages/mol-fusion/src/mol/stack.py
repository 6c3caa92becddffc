# SPDX-License-Identifier: Apache-2.0
"""The chosen blocks of one model, and the code that prepares their arguments.

The family's own backbone runs with recorders where its blocks stood: masks,
positions, rotary tables and cache arguments are made by the code that the
model was trained with, once for each forward pass. The real blocks then run
with what was recorded. What was recorded lives in the call, not in the module,
so two threads may use one model.
"""

from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from mol.blocks import (
    BlockList,
    accepts,
    block_keys,
    build_block,
    find_blocks,
    meta_model,
    reduced_config,
    reindex,
    restore_buffers,
    share,
)
from mol.errors import InvalidValue, NotReady, UnsupportedArchitectureError
from mol.sources import ModelSource

__all__ = ["Call", "Stack", "check_block", "copy_kind"]

Call = tuple[tuple, dict]
_RECORD: ContextVar[list[Call]] = ContextVar("mol_record")
_KINDS = ("attention_type", "layer_type")


class Recorder(nn.Module):
    """Stands where a block stood and remembers how the backbone called it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        copy_kind(block, self)

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """Pass the stream on; keep the other arguments."""
        _RECORD.get().append((args, kwargs))
        return hidden_states


class NoEmbedding(nn.Module):
    """Zeros of an embedding's shape: a guest's frame needs no table."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(1, dtype=dtype), persistent=False)
        self.dim = dim

    def forward(self, ids: Tensor) -> Tensor:
        """Zeros [*ids.shape, dim] without memory."""
        return self.zero.expand(*ids.shape, self.dim)


class Stack(nn.Module):
    """Blocks of one model, each with a cache slot of its own.

    Args:
        source: the model they come from.

    Attributes:
        picks: the layer index of each slot.
        hidden_size: width of the model's stream.
        frame: the backbone with recorders in place of its blocks.
    """

    def __init__(self, source: ModelSource) -> None:
        super().__init__()
        self.source = source
        self.hidden_size = source.info.hidden_size
        self.picks: list[int] = []
        self.blocks = nn.ModuleList()
        self.frame: PreTrainedModel | None = None

    def train(self, mode: bool = True) -> "Stack":
        """Frozen experts stay in eval mode: no dropout, whatever ``mode``."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the blocks' parameters."""
        return next(self.blocks.parameters()).dtype

    def keys(self) -> list[str]:
        """The file's keys of every block in use."""
        return [
            key for index in set(self.picks) for key in block_keys(self.source, index)
        ]

    def add(self, index: int) -> int:
        """Load layer ``index``, check it, and return its slot.

        Raises:
            InvalidValue: no such layer, or weights that are not finite.
            UnsupportedArchitectureError: a check failed. Nothing was added.
        """
        if index in self.picks:
            block = share(self.blocks[self.picks.index(index)])
            reindex(block, index)
        else:
            block = build_block(self.source, index)
        blocks, picks = [*self.blocks, block], [*self.picks, index]
        frame, where = _frame(self.source, blocks, picks)
        _probe(self.source, frame, where, blocks, index)
        self.blocks, self.picks, self.frame = nn.ModuleList(blocks), picks, frame
        return len(picks) - 1

    @torch.no_grad()
    def prepare(
        self,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
    ) -> list[Call]:
        """The arguments of every slot for tokens at ``position_ids`` [B, T]."""
        zeros = torch.zeros(1, dtype=self.dtype, device=position_ids.device)
        stream = zeros.expand(*position_ids.shape, self.hidden_size)
        return _record(self._ready_frame(), stream, attention_mask, position_ids, cache)

    def cache_config(self) -> PreTrainedConfig:
        """The configuration that says which cache layer each slot needs."""
        return self._ready_frame().config

    def _ready_frame(self) -> PreTrainedModel:
        if self.frame is None:
            name = self.source.name
            raise NotReady(f"no block of {name!r} is loaded", "", "Call add first")
        return self.frame

    def run(self, calls: list[Call], slot: int, stream: Tensor) -> Tensor:
        """Run the block of ``slot`` on [B, T, hidden_size]."""
        args, kwargs = calls[slot]
        return self.blocks[slot](stream.to(self.dtype), *args, **kwargs)


def check_block(source: ModelSource, block: nn.Module, index: int) -> None:
    """Run the build-time checks on a block that stands at its own index."""
    frame, where = _frame(source, [block], [index])
    _probe(source, frame, where, [block], index)


def copy_kind(block: nn.Module, to: nn.Module) -> None:
    """Backbones choose a mask by these attributes of the block."""
    for name in _KINDS:
        if hasattr(block, name):
            setattr(to, name, getattr(block, name))


def _frame(
    source: ModelSource, blocks: list[nn.Module], picks: list[int]
) -> tuple[PreTrainedModel, BlockList]:
    """The backbone for ``picks``, its blocks recorders, its tables zeros."""
    model = meta_model(source, reduced_config(source.config, picks))
    frame = model.base_model
    where = find_blocks(frame)
    where.set(frame, [Recorder(block) for block in blocks])
    dtype = next(blocks[0].parameters()).dtype
    for module in list(frame.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Embedding):
                setattr(module, name, NoEmbedding(child.embedding_dim, dtype).cpu())
            elif child._parameters:
                # What it makes of the stream behind the blocks is thrown away.
                setattr(module, name, nn.Identity())
    restore_buffers(frame, frame)
    return frame.requires_grad_(False).eval(), where


def _record(
    frame: PreTrainedModel,
    stream: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor,
    cache: Cache | None,
) -> list[Call]:
    kwargs = {"past_key_values": cache, "use_cache": cache is not None}
    if accepts(type(frame), "position_ids"):
        kwargs["position_ids"] = position_ids
    calls: list[Call] = []
    token = _RECORD.set(calls)
    try:
        frame(inputs_embeds=stream, attention_mask=attention_mask, **kwargs)
    finally:
        _RECORD.reset(token)
    return calls


@torch.no_grad()
def _probe(
    source: ModelSource,
    frame: PreTrainedModel,
    where: BlockList,
    blocks: list[nn.Module],
    index: int,
) -> None:
    """Prove that the new block, last of ``blocks``, runs as in its own model."""
    random = torch.Generator().manual_seed(index)
    dtype = next(blocks[0].parameters()).dtype
    width = source.info.hidden_size
    stream = torch.randn(1, 5, width, generator=random).to(dtype)
    positions = torch.arange(5)[None]
    slot, block = len(blocks) - 1, blocks[-1]

    def alone(x: Tensor) -> Tensor:
        args, kwargs = _record(frame, x, None, positions, None)[slot]
        return block(x, *args, **kwargs)

    before = alone(stream)
    if not before.isfinite().all():
        raise InvalidValue(
            f"layer {index} of {source.name!r} gives values that are not finite",
            "on random input of unit variance",
            "Its weights are damaged, or overflow in this dtype; set dtype='float32'",
        )
    reindex(block, slot)
    _expect_equal(source, index, "re-index", alone(stream), before)
    native = _natively(frame, where, block, stream)
    _expect_equal(source, index, "recorded call", alone(stream), native)
    changed = stream.clone()
    changed[:, 3:] = torch.randn(1, 2, width, generator=random).to(dtype)
    _expect_equal(source, index, "future leak", alone(changed)[:, :3], before[:, :3])


def _natively(
    frame: PreTrainedModel, where: BlockList, block: nn.Module, stream: Tensor
) -> Tensor:
    """The block's output when the backbone calls it itself."""
    recorders = list(where.get(frame))
    seen: list[Tensor] = []
    hook = block.register_forward_hook(lambda _m, _a, out: seen.append(out))
    try:
        where.set(frame, [*recorders[:-1], block])
        _record(frame, stream, None, torch.arange(5)[None], None)
    finally:
        hook.remove()
        where.set(frame, recorders)
    return seen[0]


def _expect_equal(
    source: ModelSource, index: int, check: str, actual: Tensor, expected: Tensor
) -> None:
    worst = (actual - expected).abs().max().item()
    limit = 0.0
    if check == "future leak":
        # Rows of one matrix product may be summed in another order.
        rounding = max(1e-5, 4 * torch.finfo(expected.dtype).eps)
        limit = rounding * max(1.0, expected.abs().max().item())
    if not worst <= limit:
        raise UnsupportedArchitectureError(
            f"layer {index} of {source.name!r} ({source.info.model_type}) failed the "
            f"{check} check with {worst:.3g} (limit {limit:.3g})",
            "outside its own model it would compute something else",
            "Take another layer or model, and report this family",
        )
