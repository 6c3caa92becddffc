# SPDX-License-Identifier: Apache-2.0
"""Parallel streams: whole models side by side, their distributions mixed.

Each model keeps its own residual stream and runs by its own code with its
part of the flat cache; a gate weighs the output distributions.
"""

import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mol.adapters import resize
from mol.cache import KEPT_STEPS, GateLayer, attention_layers, view
from mol.config import MoLConfig
from mol.errors import InvalidValue, NotReady
from mol.fusion import statistics
from mol.gates import BayesGate, mix
from mol.routers import entropy
from mol.shell import Shell, Tower
from mol.sources import ModelSource
from mol.streams import Inputs, Passed, Row, Streams, describe_block

__all__ = ["ParallelStreams", "check_vocabularies"]

HEAD_CHUNK = 1024


class ParallelStreams(Streams):
    """Whole models side by side under a gate."""

    def __init__(self, config: MoLConfig, sources: dict[str, ModelSource]) -> None:
        super().__init__(config, sources)
        check_vocabularies(sources)
        self.towers = nn.ModuleList(Tower(source) for source in sources.values())
        self.gate = BayesGate(len(sources), config.gate_share)

    def loaded(self) -> dict[str, bool]:
        """Whether each set-up call was made."""
        return {
            "setup_embeddings()": all(t.has_embeddings for t in self.towers),
            "setup_lm_head()": all(t.has_head for t in self.towers),
        }

    def ready(self) -> None:
        """Every model needs at least one of its layers."""
        super().ready()
        for name, tower in zip(self.sources, self.towers, strict=True):
            if not tower.picks:
                raise NotReady(
                    f"model {name!r} has no layers",
                    "no row names one of its blocks",
                    "Name its layers in add_layer, or build with mol.fuse(config)",
                )

    def load_embeddings(self) -> None:
        """Read the embeddings of every model."""
        for tower in self.towers:
            tower.load_embeddings()

    def load_head(self) -> None:
        """Read final norm and head of every model."""
        for tower in self.towers:
            tower.load_head()

    def source_keys(self, name: str) -> list[str]:
        """The file's keys of every tensor of a model that is in use."""
        return self.tower(name).keys()

    def add_row(self, row: Row) -> None:
        """Append the row's layers to their models; all of them, or none."""
        before = [tower.blocks() for tower in self.towers]
        try:
            for name, index in row:
                self.tower(name).add(index)
        except BaseException:
            for tower, (blocks, picks) in zip(self.towers, before, strict=True):
                tower.set_blocks(blocks, picks)
            raise
        self.rows.append(row)

    def shell_of(self, name: str) -> Shell:
        """What stands around the blocks of a model."""
        return self.tower(name)

    def explain(self, number: int, row: Row) -> list[str]:
        """A line for each layer of a row, and for each cut model at the end."""
        lines = []
        for name, index in row:
            tower = self.tower(name)
            block = tower.blocks()[0][tower.picks.index(index)]
            lines.append(
                describe_block(name, index, block, tower.hidden_size, "own stream")
            )
        if number == len(self.rows) - 1:
            for name, tower in zip(self.sources, self.towers, strict=True):
                depth = tower.source.info.num_layers
                if len(tower.picks) < depth:
                    count = f"{len(tower.picks)} of {depth} layers"
                    lines.append(f"{name} is cut: it runs {count}")
        return lines

    def tower(self, name: str) -> Tower:
        """The stream of model ``name``."""
        return self.towers[list(self.sources).index(name)]

    def cache_layers(self) -> list:
        """Fresh layers of the flat cache: each model's, then the gate."""
        layers = [
            layer for t in self.towers for layer in attention_layers(t.causal.config)
        ]
        return [*layers, GateLayer()]

    def cache_depth(self) -> int:
        """Number of these layers, without making them."""
        return sum(len(tower.picks) for tower in self.towers) + 1

    def run(self, inputs: Inputs) -> Passed:
        """Mixture log-probabilities, in float32; raw logits of a forced model."""
        only = None if self.only is None else list(self.sources).index(self.only)
        if only is not None and inputs.cache is None:
            args = inputs.attention_mask, inputs.position_ids, None
            tower, keep = self.towers[only], inputs.logits_to_keep
            return Passed(tower.logits(inputs.input_ids, *args, keep))
        scored = [
            _score(tower, slots, inputs)
            for tower, slots in zip(self.towers, self._views(inputs), strict=True)
        ]
        log_weight = self._weigh(inputs, scored)
        if only is not None:
            return Passed(scored[only].raw)
        kept = torch.stack([score.kept for score in scored], 2)
        mixed = mix(log_weight[:, _kept(inputs)], kept)
        return Passed(mixed, weights=[log_weight.exp()])

    def trace(self, inputs: Inputs, *, weights: bool) -> Passed:
        """The primary's stream lifted to ``width``, and the gate's weights."""
        passed = Passed(None)
        if weights:
            passed = self.run(replace(inputs, logits_to_keep=1))
        args = inputs.attention_mask, inputs.position_ids, None
        stream = self.tower(self.primary).stream(inputs.input_ids, *args)
        passed.stream = resize(stream, self.width)
        return passed

    def head(self, stream: Tensor) -> Tensor:
        """The primary's logits of a stream [B, T, width]."""
        tower = self.tower(self.primary)
        return tower.head(resize(stream, tower.hidden_size))

    def statistics(self, inputs: Inputs, passed: Passed) -> dict:
        """Statistics of the gate, and of each row under the gate's weights."""
        names = list(self.sources)
        weights = self._gate_weights(inputs, passed)
        stats = {}
        for i, row in enumerate(self.rows):
            own = weights[..., [names.index(name) for name, _ in row]]
            # A model whose weight rounds to 0 must not give 0 / 0.
            own = own + torch.finfo(own.dtype).tiny
            own = own / own.sum(-1, keepdim=True)
            stats[f"layer_{i}"] = statistics(row, own, inputs.real)
        experts = [(n, -1) for n in names]
        return {**stats, "gate": statistics(experts, weights, inputs.real)}

    def entropy(self, inputs: Inputs, passed: Passed) -> Tensor:
        """Mean entropy of the gate's weights, 0-d."""
        return entropy(self._gate_weights(inputs, passed), inputs.real)

    def _gate_weights(self, inputs: Inputs, passed: Passed) -> Tensor:
        if passed.weights:
            return passed.weights[0]
        forced = [float(name == self.only) for name in self.sources]
        return torch.tensor(forced).expand(*inputs.input_ids.shape, len(forced))

    def _views(self, inputs: Inputs) -> list[Cache | None]:
        views, offset = [], 0
        for tower in self.towers:
            views.append(view(inputs.cache, offset, len(tower.picks)))
            offset += len(tower.picks)
        return views

    def _weigh(self, inputs: Inputs, scored: list["_Scored"]) -> Tensor:
        """Log-weights [B, T, E] after each token; the cache takes the state."""
        layer = None if inputs.cache is None else inputs.cache.layers[-1]
        state = {} if layer is None or layer.state is None else layer.state
        ids, seen = inputs.input_ids, torch.stack([s.seen for s in scored], -1)
        real = inputs.valid
        before = torch.zeros_like(real[:, :1])
        if state:
            before = state["valid"][:, None]
            first = ids[:, :1, None].expand(-1, len(scored), 1)
            seen[:, 0] = state["last"].gather(-1, first)[..., 0]
        known = real & torch.cat([before, real[:, :-1]], 1)
        log_weight = self.gate(seen, known, state.get("log_weight"))
        if layer is not None:
            tail = torch.stack([s.tail for s in scored], 1).detach()
            layer.record(
                ids.shape[1],
                lambda t: {
                    "log_weight": log_weight[:, t].detach(),
                    "last": tail[:, :, t - ids.shape[1]].clone(),
                    "valid": real[:, t],
                },
            )
        return log_weight


@dataclass(frozen=True)
class _Scored:
    """One model's part in a call; log-probabilities in float32.

    ``seen`` [B, T] of each token before it was seen (0 for the first), ``raw``
    logits and ``kept`` log-probabilities [B, K, V] at the positions asked for,
    ``tail`` [B, n, V] at the latest positions, for the gate's state.
    """

    seen: Tensor
    raw: Tensor
    kept: Tensor
    tail: Tensor


def _kept(inputs: Inputs) -> slice | Tensor:
    """Which positions' logits were asked for."""
    keep = inputs.logits_to_keep
    return slice(-keep if keep else None, None) if isinstance(keep, int) else keep


def _score(tower: Tower, slots: Cache | None, inputs: Inputs) -> _Scored:
    """Run one model; long prompts whose logits nobody asked for go in chunks."""
    ids, length = inputs.input_ids, inputs.input_ids.shape[1]
    args = inputs.attention_mask, inputs.position_ids, slots
    keep = inputs.logits_to_keep
    few = isinstance(keep, int) and 0 < keep <= KEPT_STEPS
    if length <= HEAD_CHUNK or not few:
        raw = tower.logits(ids, *args)
        logp = raw.float().log_softmax(-1)
        seen = _likelihood(logp[:, :-1], ids[:, 1:])
        keep = _kept(inputs)
        return _Scored(
            _shifted(seen), raw[:, keep], logp[:, keep], logp[:, -KEPT_STEPS:]
        )
    stream, seen = tower.stream(ids, *args), []
    for start in range(0, length - 1, HEAD_CHUNK):
        stop = min(start + HEAD_CHUNK, length - 1)
        logp = tower.head(stream[:, start:stop]).float().log_softmax(-1)
        seen.append(_likelihood(logp, ids[:, start + 1 : stop + 1]))
    raw = tower.head(stream[:, -KEPT_STEPS:])
    logp, keep = raw.float().log_softmax(-1), _kept(inputs)
    return _Scored(_shifted(torch.cat(seen, 1)), raw[:, keep], logp[:, keep], logp)


def _likelihood(logp: Tensor, tokens: Tensor) -> Tensor:
    return logp.gather(-1, tokens[..., None])[..., 0]


def _shifted(seen: Tensor) -> Tensor:
    """Put a 0 before the first token, which no model of this call predicted."""
    return torch.cat([seen.new_zeros(len(seen), 1), seen], 1)


def check_vocabularies(sources: dict[str, ModelSource]) -> None:
    """Parallel streams mix distributions, so every model needs the same tokens.

    Raises:
        InvalidValue: naming the first token, or the sizes, that differ.
    """
    (first, reference), *others = sources.items()
    for name, source in others:
        sizes = reference.info.vocab_size, source.info.vocab_size
        if sizes[0] != sizes[1]:
            raise InvalidValue(
                f"{first!r} has {sizes[0]} token ids and {name!r} has {sizes[1]}",
                "parallel streams mix distributions over the same tokens",
                "Use stream='single', or models of one vocabulary",
            )
    tokens = {name: source.vocabulary() for name, source in sources.items()}
    known = {name: vocab for name, vocab in tokens.items() if vocab is not None}
    for name in sources:
        if name not in known:
            warnings.warn(
                f"{name!r} has no tokenizer files; its "
                f"{sources[name].info.vocab_size} tokens are taken to be those of "
                "the other models",
                stacklevel=2,
            )
    for name, vocab in list(known.items())[1:]:
        first, reference_vocab = next(iter(known.items()))
        if vocab != reference_vocab:
            token = min(
                token
                for token in vocab.keys() | reference_vocab.keys()
                if vocab.get(token) != reference_vocab.get(token)
            )
            raise InvalidValue(
                f"token {token!r} is {reference_vocab.get(token)} in {first!r} and "
                f"{vocab.get(token)} in {name!r}",
                "parallel streams mix distributions over the same tokens",
                "Use stream='single', or models of one vocabulary",
            )
