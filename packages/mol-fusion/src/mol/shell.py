# SPDX-License-Identifier: Apache-2.0
"""A ``ForCausalLM`` around blocks that are not its own list.

Embeddings, final norm, head, soft-caps and weight ties stay in the family's
class. A ``Shell`` runs a pipeline where the blocks stood; a ``Tower`` runs
its own blocks, natively.
"""

import copy
import warnings
from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from mol.blocks import (
    accepts,
    assign,
    block_keys,
    build_block,
    cut,
    find_blocks,
    meta_model,
    reduced_config,
    reindex,
    restore_buffers,
)
from mol.errors import InvalidValue, UnsupportedArchitectureError
from mol.sources import ModelSource
from mol.stack import check_block, copy_kind

__all__ = ["Shell", "Tower"]

_PIPELINE: ContextVar[Callable[[Tensor], Tensor]] = ContextVar("mol_pipeline")
_SINK: ContextVar[list[Tensor] | None] = ContextVar("mol_sink", default=None)


class ShellBlock(nn.Module):
    """The only block of a shell: runs what the call put in its place."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        copy_kind(like, self)

    def forward(self, hidden_states: Tensor, *_args, **_kwargs) -> Tensor:
        """The pipeline of this call, on the embedded tokens."""
        return _PIPELINE.get()(hidden_states)


class Shell(nn.Module):
    """The primary without its blocks.

    Args:
        source: the model; no tensor is read before ``load_embeddings``.
    """

    def __init__(self, source: ModelSource) -> None:
        super().__init__()
        self.source = source
        self.hidden_size = source.info.hidden_size
        self.causal = meta_model(source, reduced_config(source.config, [0]))
        self.where = find_blocks(self.causal)
        like = self.where.get(self.causal)[0]
        self.where.set(self.causal, [ShellBlock(like)])
        self.causal.requires_grad_(False)
        self.has_embeddings = self.has_head = False

    def train(self, mode: bool = True) -> "Shell":
        """Frozen, so always in eval mode."""
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding table, which is the stream's."""
        return self.causal.get_input_embeddings().weight.dtype

    def keys(self) -> list[str]:
        """The file's keys of every tensor outside the blocks."""
        ties = self._ties()
        names = [*self._names("embeddings"), *self._names("head")]
        found = [self._locate(ties.get(name, name), ties) for name in names]
        return list(dict.fromkeys(key for key in found if key))

    def load_embeddings(self) -> None:
        """Read all that stands before the blocks; again: nothing."""
        if not self.has_embeddings:
            self._load(self._names("embeddings"))
            self.has_embeddings = True

    def load_head(self) -> None:
        """Read final norm and output head; again: nothing."""
        if not self.has_head:
            self._load(self._names("head"))
            self.has_head = True

    def run(
        self,
        pipeline: Callable[[Tensor], Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        """Logits of the class, with ``pipeline`` between embeddings and norm.

        ``attention_mask`` [B, T] is that of these tokens alone.
        """
        kwargs = {"use_cache": False, "logits_to_keep": logits_to_keep}
        if accepts(type(self.causal), "position_ids"):
            kwargs["position_ids"] = position_ids
        token = _PIPELINE.set(pipeline)
        try:
            return self.causal(
                input_ids=input_ids, attention_mask=attention_mask, **kwargs
            ).logits
        finally:
            _PIPELINE.reset(token)

    def head(self, stream: Tensor) -> Tensor:
        """Norm and head on a stream [B, T, hidden_size]: logits [B, T, V]."""
        return _head(self.causal, stream)

    def _names(self, part: str) -> list[str]:
        """Tensor names before (``embeddings``) or after (``head``) the blocks."""
        inside = self.where.path + "."
        parent = self.causal.get_submodule(self.where.parent)
        children = [name for name, _ in parent.named_children()]
        start = f"{self.where.parent}."
        after = children[children.index(self.where.attribute) + 1 :]
        tail = tuple(f"{start}{name}." for name in after)
        names = [n for n in self.causal.state_dict() if not n.startswith(inside)]
        behind = [n for n in names if n.startswith(tail) or not n.startswith(start)]
        return behind if part == "head" else [n for n in names if n not in behind]

    def _load(self, names: list[str]) -> None:
        ties = self._ties()
        wanted = {ties.get(name, name) for name in names}
        found = {name: self._locate(name, ties) for name in wanted}
        keys = {name: key for name, key in found.items() if key is not None}
        missing = sorted(wanted - keys.keys())
        if missing:
            raise UnsupportedArchitectureError(
                f"{self.source.name!r} lacks tensors: {', '.join(missing[:3])}",
                f"{type(self.causal).__name__} needs them",
                "The files do not fit the configuration; save the model again",
            )
        present = self.causal.state_dict()
        keys = {name: key for name, key in keys.items() if present[name].is_meta}
        tensors = self.source.read(keys.values())
        values = {name: tensors[key] for name, key in keys.items()}
        assign(self.causal, values, repr(self.source.name))
        restore_buffers(self.causal, self.causal)
        for target, tied in ties.items():
            owner, _, leaf = target.rpartition(".")
            shared = self.causal.get_parameter(tied)
            setattr(self.causal.get_submodule(owner), leaf, shared)
        self.causal.requires_grad_(False)

    def _ties(self) -> dict[str, str]:
        """Tied name -> name it is tied to, as the configuration and files say."""
        if not self.causal.config.get_text_config().tie_word_embeddings:
            return {}
        ties = {}
        for target, tied in (self.causal._tied_weights_keys or {}).items():
            one, two = self.source.locate(target), self.source.locate(tied)
            if one and two and self._differ(one, two):
                warnings.warn(
                    f"{self.source.name!r}: {target} and {tied} are tied by the "
                    "configuration but differ in the files; both are used as stored",
                    stacklevel=2,
                )
                continue
            ties[target] = tied
        return ties

    def _differ(self, a: str, b: str) -> bool:
        return self.source.sha256(a) != self.source.sha256(b)

    def _locate(self, name: str, ties: dict[str, str]) -> str | None:
        tied = [target for target, source in ties.items() if source == name]
        found = map(self.source.locate, [name, *tied])
        return next((key for key in found if key), None)


class Tower(Shell):
    """A whole model, or one cut to some of its layers, run by its own code.

    Attributes:
        picks: the layer index of each of its blocks, strictly rising.
    """

    def __init__(self, source: ModelSource) -> None:
        super().__init__(source)
        self.set_blocks([], [])

    def add(self, index: int) -> int:
        """Load layer ``index`` as the last one, and return its slot.

        Raises:
            InvalidValue: no such layer, or not above the layers so far.
            UnsupportedArchitectureError: a check failed. Nothing was added.
        """
        if self.picks and index <= self.picks[-1]:
            raise InvalidValue(
                f"layer {index} of {self.source.name!r} follows {self.picks[-1]}",
                "a parallel stream runs its layers in their own order",
                "Name each layer once, rising, or use stream='single'",
            )
        block, slot = build_block(self.source, index), len(self.picks)
        check_block(self.source, block, index)
        reindex(block, slot)
        block.register_forward_hook(_catch)
        blocks, picks = self.blocks()
        self.set_blocks([*blocks, block], [*picks, index])
        return slot

    def blocks(self) -> tuple[list[nn.Module], list[int]]:
        """The blocks and the layer index of each."""
        return list(self.where.get(self.causal)), self.picks

    def set_blocks(self, blocks: list[nn.Module], picks: list[int]) -> None:
        """Make these the model's layers."""
        self.picks = picks
        self.where.set(self.causal, blocks)
        for module in self.causal.modules():
            if isinstance(module, PreTrainedModel):
                cut(module.config, self.source.config, picks)

    def keys(self) -> list[str]:
        """The file's keys of every tensor in use."""
        blocks = [k for index in self.picks for k in block_keys(self.source, index)]
        return [*super().keys(), *blocks]

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        logits_to_keep: int | Tensor = 0,
    ) -> Tensor:
        """The model's own logits."""
        return self.causal(
            input_ids=input_ids,
            logits_to_keep=logits_to_keep,
            **_call(self.causal, attention_mask, position_ids, cache),
        ).logits

    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """The stream after the last block, before the final norm, [B, T, d]."""
        backbone, caught = self.causal.base_model, []
        kwargs = _call(backbone, attention_mask, position_ids, cache)
        token = _SINK.set(caught)
        try:
            backbone(input_ids=input_ids, **kwargs)
        finally:
            _SINK.reset(token)
        return caught[-1]

    def head(self, stream: Tensor) -> Tensor:
        """Norm and head on a stream [B, T, hidden_size]: logits [B, T, V]."""
        return _head(self._without_blocks(), stream)

    def _without_blocks(self) -> PreTrainedModel:
        """A shallow copy that shares all but the list of blocks."""
        block = ShellBlock(self.where.get(self.causal)[0])
        module = causal = _shallow(self.causal)
        for name in self.where.parent.split("."):
            module._modules[name] = _shallow(module._modules[name])
            module = module._modules[name]
        self.where.set(causal, [block])
        return causal


def _head(causal: PreTrainedModel, stream: Tensor) -> Tensor:
    zeros = torch.zeros(1, dtype=stream.dtype, device=stream.device)
    token = _PIPELINE.set(lambda _: stream)
    try:
        return causal(inputs_embeds=zeros.expand_as(stream), use_cache=False).logits
    finally:
        _PIPELINE.reset(token)


def _call(
    model: PreTrainedModel,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> dict:
    kwargs = {
        "attention_mask": attention_mask,
        "past_key_values": cache,
        "use_cache": cache is not None,
    }
    if accepts(type(model), "position_ids"):
        kwargs["position_ids"] = position_ids
    return kwargs


def _catch(_module: nn.Module, _args: tuple, output: Tensor) -> None:
    sink = _SINK.get()
    if sink is not None:
        sink.append(output)


def _shallow(module: nn.Module) -> nn.Module:
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin
