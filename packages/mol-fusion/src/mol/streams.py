# SPDX-License-Identifier: Apache-2.0
"""What every way to fuse has in common, and the single stream.

``SingleStream``: the primary's residual stream runs through rows of experts.
The other way, whole models side by side, stands in ``mol.parallel``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache

from mol.adapters import resize
from mol.cache import (
    RunningMeanLayer,
    attention_layers,
    view,
)
from mol.config import MoLConfig
from mol.errors import NotReady
from mol.fusion import Expert, FusionLayer, statistics
from mol.routers import entropy
from mol.shell import Shell
from mol.sources import ModelSource, check_model
from mol.stack import Stack

__all__ = ["Inputs", "Passed", "Row", "SingleStream", "Streams", "describe_block"]

Row = tuple[tuple[str, int], ...]
_FORCED: ContextVar[dict[int, str] | None] = ContextVar("mol_forced", default=None)


@dataclass(frozen=True)
class Inputs:
    """What one call gives to the streams; shapes as in transformers."""

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cache: Cache | None = None
    logits_to_keep: int | Tensor = 0

    @property
    def real(self) -> Tensor | None:
        """The mask [B, T] of this call's tokens, None where all are real."""
        if self.attention_mask is None:
            return None
        return self.attention_mask[:, -self.input_ids.shape[1] :]

    @property
    def valid(self) -> Tensor:
        """[B, T], True where a token of this call is real."""
        if self.real is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool)
        return self.real.bool()

    @property
    def past(self) -> int:
        """Tokens that the cache holds already."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    def positions(self) -> Tensor:
        """[B, T]; counted from the cache's length where none were given."""
        batch, length = self.input_ids.shape
        if self.position_ids is not None:
            return self.position_ids.expand(batch, length)
        device = self.input_ids.device
        return torch.arange(self.past, self.past + length, device=device).expand(
            batch, length
        )


@dataclass
class Passed:
    """What came out: logits [B, K, V], and the weights of each row or the gate.

    ``stream`` [B, T, d] is the primary's, before its final norm.
    """

    logits: Tensor | None
    stream: Tensor | None = None
    weights: list[Tensor] = field(default_factory=list)


class Streams(nn.Module):
    """What both ways share: sources, rows, forcing one model, limits."""

    def __init__(self, config: MoLConfig, sources: dict[str, ModelSource]) -> None:
        super().__init__()
        self.sources, self.settings = sources, config
        widths = [source.info.hidden_size for source in sources.values()]
        self.width = config.target_hidden_dim or max(widths)
        self.primary = next(iter(sources))
        self.rows: list[Row] = []

    @contextmanager
    def forced(self, name: str) -> Iterator[None]:
        """Give one model weight 1 in the calls of this thread or task."""
        self.check_forced(name)
        token = _FORCED.set({**(_FORCED.get() or {}), id(self): name})
        try:
            yield
        finally:
            _FORCED.reset(token)

    @property
    def only(self) -> str | None:
        """The model that is forced now, or None."""
        return (_FORCED.get() or {}).get(id(self))

    def check_forced(self, name: str) -> None:
        """Raise where ``name`` cannot carry the whole model."""
        check_model(name, self.sources)

    def used(self) -> list[str]:
        """Names of the models that take part, the primary first."""
        named = {name for row in self.rows for name, _ in row}
        return [n for n in self.sources if n in named or n == self.primary]

    def ready(self) -> None:
        """Raise ``NotReady`` naming the call that is missing."""
        if not self.rows:
            call = "add_layer(layer_specs, layer_idx)"
            raise NotReady(
                "the model has no layers",
                f"{call} was not called",
                "Call it, or build with mol.fuse(config)",
            )
        for call, done in self.loaded().items():
            if not done:
                raise NotReady(
                    f"{call} was not called",
                    "its tensors are not read",
                    f"Call {call} first",
                )


class SingleStream(Streams):
    """Rows of experts in the primary's stream."""

    def __init__(self, config: MoLConfig, sources: dict[str, ModelSource]) -> None:
        super().__init__(config, sources)
        self.shell = Shell(sources[self.primary])
        names = {name: str(i) for i, name in enumerate(sources)}
        self._key = names
        self.stacks = nn.ModuleDict(
            {key: Stack(sources[n]) for n, key in names.items()}
        )
        self.layers = nn.ModuleList()

    def loaded(self) -> dict[str, bool]:
        """Whether each set-up call was made."""
        return {
            "setup_embeddings()": self.shell.has_embeddings,
            "setup_lm_head()": self.shell.has_head,
        }

    def load_embeddings(self) -> None:
        """Read the primary's embeddings."""
        self.shell.load_embeddings()

    def load_head(self) -> None:
        """Read the primary's final norm and head."""
        self.shell.load_head()

    def shell_of(self, name: str) -> Shell:
        """What stands around the blocks; a guest has nothing of that."""
        return self.shell

    def explain(self, number: int, row: Row) -> list[str]:
        """A line for each expert of a row."""
        lines, layer = [], self.layers[number]
        for j, (name, index) in enumerate(row):
            expert = layer.experts[j]
            block = self.stack(name).blocks[expert.slot]
            via = "no adapter, the primary"
            if not expert.primary:
                maps = [layer.pre[str(j)], layer.post[str(j)]]
                count = sum(p.numel() for m in maps for p in m.parameters())
                via = f"linear adapters of {count:,} parameters"
            lines.append(describe_block(name, index, block, expert.width, via))
        router = sum(p.numel() for p in layer.router.parameters())
        return [*lines, f"{type(layer.router).__name__} of {router:,} parameters"]

    def stack(self, name: str) -> Stack:
        """The blocks that come from model ``name``."""
        return self.stacks[self._key[name]]

    def source_keys(self, name: str) -> list[str]:
        """The file's keys of every tensor of a model that is in use."""
        shell = self.shell.keys() if name == self.primary else []
        return [*shell, *self.stack(name).keys()]

    def add_row(self, row: Row) -> None:
        """Load the row's blocks; a failure leaves the model as it was."""
        before = {k: (s.blocks, s.picks, s.frame) for k, s in self.stacks.items()}
        try:
            experts = [self._expert(name, index) for name, index in row]
            dtype = self.sources[self.primary].dtype
            layer = FusionLayer(self.width, experts, self.settings, dtype)
        except BaseException:
            for key, (blocks, picks, frame) in before.items():
                stack = self.stacks[key]
                stack.blocks, stack.picks, stack.frame = blocks, picks, frame
            raise
        self.layers.append(layer)
        self.rows.append(row)

    def _expert(self, name: str, index: int) -> Expert:
        stack = self.stack(name)
        slot, primary = stack.add(index), name == self.primary
        return Expert(name, index, slot, stack.hidden_size, primary)

    def check_forced(self, name: str) -> None:
        """Every row must have the model."""
        super().check_forced(name)
        for number, row in enumerate(self.rows):
            if name not in [n for n, _ in row]:
                raise NotReady(
                    f"row {number} has no block of {name!r}",
                    f"it holds {list(row)}",
                    "Force a model that stands in every row",
                )

    def cache_layers(self) -> list:
        """Fresh layers of the flat cache: stacks, then routers."""
        layers = []
        for name in self.used():
            stack = self.stack(name)
            if stack.picks:
                layers += attention_layers(stack.cache_config())
        return layers + [RunningMeanLayer() for _ in self.layers]

    def cache_depth(self) -> int:
        """Number of these layers, without making them."""
        stacks = sum(len(self.stack(name).picks) for name in self.used())
        return stacks + len(self.layers)

    def run(self, inputs: Inputs) -> Passed:
        """Embeddings, rows, norm and head."""
        positions, passed = inputs.positions(), Passed(None)
        calls = self._prepare(inputs, positions)
        pipeline = partial(self._pipeline, inputs, calls, passed)
        passed.logits = self.shell.run(
            pipeline,
            inputs.input_ids,
            inputs.real,
            positions,
            inputs.logits_to_keep,
        )
        return passed

    def _prepare(self, inputs: Inputs, positions: Tensor) -> dict[str, list]:
        calls, offset = {}, 0
        for name in self.used():
            stack = self.stack(name)
            depth = len(stack.picks)
            if depth:
                slots = view(inputs.cache, offset, depth)
                mask = inputs.attention_mask
                calls[name] = stack.prepare(mask, positions, slots)
            offset += depth
        return calls

    def _pipeline(
        self, inputs: Inputs, calls: dict[str, list], passed: Passed, embedded: Tensor
    ) -> Tensor:
        stream = resize(embedded, self.width)
        states: Sequence = [None] * len(self.layers)
        if inputs.cache is not None:
            states = inputs.cache.layers[-len(self.layers) :]
        # Computing a step again would append to the cache again.
        saving = self.settings.use_gradient_checkpointing and self.training
        saving = saving and inputs.cache is None
        for layer, state in zip(self.layers, states, strict=True):
            blocks = [
                partial(self.stack(e.name).run, calls[e.name], e.slot)
                for e in layer.experts
            ]
            step = partial(
                layer,
                blocks=blocks,
                attention_mask=inputs.real,
                state=state,
                only=self.only,
                run_all=inputs.cache is not None,
            )
            if saving and torch.is_grad_enabled():
                stream, weights = checkpoint(step, stream, use_reentrant=False)
            else:
                stream, weights = step(stream)
            passed.weights.append(weights)
        passed.stream = stream
        return resize(stream, self.shell.hidden_size)

    def trace(self, inputs: Inputs, *, weights: bool) -> Passed:
        """The fused stream before the final norm, and the routers' weights."""
        return self.run(replace(inputs, logits_to_keep=1))

    def head(self, stream: Tensor) -> Tensor:
        """The primary's logits of a fused stream [B, T, width]."""
        return self.shell.head(resize(stream, self.shell.hidden_size))

    def statistics(self, inputs: Inputs, passed: Passed) -> dict:
        """Router statistics of every row."""
        return {
            f"layer_{i}": statistics(row, weights, inputs.real)
            for i, (row, weights) in enumerate(
                zip(self.rows, passed.weights, strict=True)
            )
        }

    def entropy(self, inputs: Inputs, passed: Passed) -> Tensor:
        """Mean router entropy over the rows, with gradient, 0-d."""
        each = [entropy(weights, inputs.real) for weights in passed.weights]
        return torch.stack(each).mean()


def describe_block(
    name: str, index: int, block: nn.Module, width: int, via: str
) -> str:
    """One expert in words: where from, of which class and size."""
    count = sum(p.numel() for p in block.parameters())
    size = sum(p.numel() * p.itemsize for p in block.parameters())
    return (
        f"{name}:{index} {type(block).__name__}, width {width}, "
        f"{count:,} parameters in {size:,} bytes, {via}"
    )
