# SPDX-License-Identifier: Apache-2.0
"""Copies of a layer's weights in the shapes that inference runs fastest.

The one idea: the gates, the scorer's first layer and the first rows of ``down`` read
the same input, so one matrix product over their concatenated weights replaces
three; ``scale`` is multiplied into ``up`` once instead of into each input's
coordinates; and from 0.9 of the dense layer's cost on, one merged weight runs.

Decisions: copies exist only while grad is off and outside torch.compile. They are
compared with their sources before each use: same Parameter object, same version
counter, same address. An edit through ``parameter.data`` moves neither, which is why
the layer also drops its copies in each forward with grad and in ``train()``,
``eval()`` and ``_apply``. Sources that are not plain Parameters (parametrized,
wrapped by a functional transform) get no copies.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loraven.scoring import GateNetwork, LightweightScorer

if TYPE_CHECKING:
    from loraven.layers import DynamicLowRankLayer

__all__ = ["Copies", "copies_of", "join"]

_FEW = 4


class Copies:
    """The copies of one layer, made as they are asked for.

    Weights that read the input come as (in_features, columns): contiguous on the
    CPU, where a small batch runs up to four times faster so (MKL, 16 rows, 1024
    to 128), and as a transposed view elsewhere.

    Args:
        sources: ``down``, ``scale``, ``up``; the scorer's first layer's weight and
            bias; the gate's weight and bias.
    """

    def __init__(self, sources: tuple[Tensor, ...]) -> None:
        self._sources = sources
        # An alias keeps the memory alive: its address can't come back as another's.
        self._aliases = [source.detach() for source in sources]
        self._stamps = [
            (source, source._version, source.data_ptr()) for source in sources
        ]
        self._scaled: Tensor | None = None
        self._heads: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        self._tails: dict[int, Tensor] = {}
        self._prefix: tuple[int, Tensor, Tensor] | None = None
        self._spans: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = {}
        self._selected: tuple[object, tuple[Tensor, ...]] | None = None
        self._wanted = 0
        self._merged: Tensor | None = None

    def fresh(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether the copies still equal what they were made from."""
        for now, (then, version, address) in zip(sources, self._stamps, strict=True):
            if now is not then or now._version != version or now.data_ptr() != address:
                return False
        return True

    @property
    def scaled_up(self) -> Tensor:
        """(R, out): ``scale[:, None] * up``."""
        if self._scaled is None:
            self._scaled = self._aliases[1][:, None] * self._aliases[2]
        return self._scaled

    def head(self, rows: int, gated: bool) -> tuple[Tensor, Tensor]:
        """Weight and bias of [gates;] scorer's first layer; first rows of ``down``."""
        found = self._heads.get((rows, gated))
        if found is None:
            down, _, _, hidden, hidden_bias, gate, gate_bias = self._aliases
            weights, biases = [hidden, down[:rows]], [hidden_bias]
            if gated:
                weights, biases = [gate, *weights], [gate_bias, *biases]
            biases.append(hidden_bias.new_zeros(rows))
            found = _across(torch.cat(weights)), torch.cat(biases)
            self._heads[rows, gated] = found
        return found

    def prefix(self, rank: int) -> tuple[Tensor, Tensor]:
        """For a rank that stays: (in, rank) and (rank, out), both contiguous."""
        if self._prefix is None or self._prefix[0] != rank:
            down = _across(self._aliases[0][:rank])
            self._prefix = rank, down, self.scaled_up[:rank]
        return self._prefix[1], self._prefix[2]

    def span(self, start: int, rank: int, rows: int) -> tuple[Tensor, Tensor]:
        """For a rank that changes: (in, rank - start) and (rank, out), as views.

        A few rows of input read a contiguous slice of ``down`` fastest, more rows a
        strided slice of its transposed copy.
        """
        key = start, rank, rows < _FEW
        found = self._spans.get(key)
        if found is None:
            if rows < _FEW:
                down = self._aliases[0][start:rank].t()
            else:
                down = self._tail(start)[:, : rank - start]
            found = self._spans[key] = down, self.scaled_up[:rank]
        return found

    def _tail(self, start: int) -> Tensor:
        if start not in self._tails:
            self._tails[start] = _across(self._aliases[0][start:])
        return self._tails[start]

    def select(
        self, rank: int, start: int, blocks: tuple[bool, ...], columns: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the open columns below ``start``, and weights as from `prefix`.

        The weights that read the input are those of the columns from ``start`` on.
        """
        key = rank, start, blocks
        if self._selected is None or self._selected[0] != key:
            index = torch.tensor(columns, device=self._aliases[0].device)
            first = index[: sum(column < start for column in columns)]
            down = self._aliases[0].index_select(0, index[len(first) :])
            up = self.scaled_up.index_select(0, index)
            self._selected = key, (first, _across(down), up)
        first, down, up = self._selected[1]
        return first, down, up

    def merged(self, rank: int, stays: bool) -> Tensor | None:
        """(in, out) weight of the first ``rank`` columns; None: not worth it yet.

        Building it costs as much as ``rank`` rows of input. A rank that stays is
        worth it at once, one that was found is so when it comes twice in a row.
        """
        if rank != self._wanted:
            self._wanted, self._merged = rank, None
            if not stays:
                return None
        if self._merged is None:
            down, up = self._aliases[0][:rank], self.scaled_up[:rank]
            with torch.autocast(down.device.type, enabled=False):
                self._merged = down.t() @ up
        return self._merged


def copies_of(layer: "DynamicLowRankLayer") -> Copies | None:
    """The layer's copies, made anew if stale; None where none may be used."""
    if torch.compiler.is_compiling():
        return None
    last = layer._last
    if torch.is_grad_enabled():
        last.copies = None
        return None
    sources = _sources(layer)
    if sources is None:
        return None
    if last.copies is None or not last.copies.fresh(sources):
        last.copies = _make(sources)
    return last.copies


def join(bias: Tensor | None, z: Tensor, up: Tensor) -> Tensor:
    """``z @ up + bias``: (rows, r), (r, out) -> (rows, out) in one product."""
    return z @ up if bias is None else torch.addmm(bias, z, up)


def _make(sources: tuple[Tensor, ...]) -> Copies | None:
    if any(type(source) is not nn.Parameter for source in sources):
        return None
    # Tensors made under inference_mode count no versions.
    if any(source.is_inference() or source.is_meta for source in sources):
        return None
    return Copies(sources)


def _sources(layer: "DynamicLowRankLayer") -> tuple[Tensor, ...] | None:
    """All tensors that copies are made of, by dictionary: getattr takes longer."""
    scorer, gate = layer._modules["scorer"], layer._modules["gate"]
    if type(scorer) is not LightweightScorer or type(gate) is not GateNetwork:
        return None
    if scorer._forward_hooks or gate._forward_hooks:
        return None
    own = layer._parameters
    hidden = scorer._modules["hidden"]._parameters
    linear = gate._modules["linear"]._parameters
    try:
        return (
            own["down"],
            own["scale"],
            own["up"],
            hidden["weight"],
            hidden["bias"],
            linear["weight"],
            linear["bias"],
        )
    except KeyError:
        return None


def _across(weight: Tensor) -> Tensor:
    """(columns, in) -> (in, columns), contiguous on the CPU."""
    turned = weight.t()
    return turned.contiguous() if turned.is_cpu else turned
