# SPDX-License-Identifier: Apache-2.0
"""Closed-form (ridge) adapters between the streams of different models.

For a row with the primary's layer l and a guest's layer i, on calibration
text: ``pre`` maps the primary's stream that enters l to the guest's stream
that enters i; ``post`` maps what the guest's block then changes to what the
primary's layer l changes.

Both models advance together, one block of each in memory at a time. Memory is
about five streams of all calibration tokens, and O(d^2) for one regression at a
time; in the other order, all tokens through one regression of each layer, a deep
model would need O(layers * d^2).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mol.adapters import LinearAdapter
from mol.errors import InvalidValue, NotReady, NotYetBuilt
from mol.fusion import FusionLayer
from mol.parallel import check_vocabularies
from mol.shell import Shell
from mol.sources import ModelSource
from mol.stack import Stack

if TYPE_CHECKING:
    from mol.modeling import MoLForCausalLM

__all__ = ["AlignReport", "AlignRow", "Ridge", "align"]

WEAK = 0.2
Tokenizer = Callable[[str], Any]
_BATCH_TOKENS = 4096
_WINDOW = 256


@dataclass(frozen=True)
class AlignRow:
    """One fitted expert.

    Attributes:
        layer: number of the row.
        expert: (model, layer index).
        r2_stream: share of the guest stream's variance that ``pre`` explains.
        r2_delta: share of the primary's change that ``post`` explains.
        tokens: calibration tokens used.
    """

    layer: int
    expert: tuple[str, int]
    r2_stream: float
    r2_delta: float
    tokens: int

    @property
    def weak(self) -> bool:
        """Whether an R2 is below 0.2: this expert has little to say here."""
        return not min(self.r2_stream, self.r2_delta) >= WEAK


class AlignReport(tuple[AlignRow, ...]):
    """The fitted experts, row by row; ``print`` shows a table."""

    __slots__ = ()

    def __str__(self) -> str:
        lines = [f"{'layer':>5} {'R2 stream':>9} {'R2 delta':>9} {'tokens':>7}  expert"]
        lines += [
            f"{r.layer:>5} {r.r2_stream:>9.3f} {r.r2_delta:>9.3f} {r.tokens:>7}  "
            f"{r.expert[0]}:{r.expert[1]}{'  weak' if r.weak else ''}"
            for r in self
        ]
        return "\n".join(lines)


class Ridge:
    """One-pass ridge regression X -> Y in float64 with an offset.

    Args:
        inputs: width of X.
        outputs: width of Y.

    Example:
        >>> import torch
        >>> ridge, x = Ridge(2, 1), torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])
        >>> ridge.add(x, x @ torch.tensor([[2.0], [3.0]]) + 1)
        >>> weight, bias, r2 = ridge.solve(1e-9)
        >>> weight.round(decimals=4).tolist(), round(bias.item(), 4), round(r2, 4)
        ([[2.0, 3.0]], 1.0, 1.0)
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        wide = {"dtype": torch.float64}
        self.xx = torch.zeros(inputs, inputs, **wide)
        self.xy = torch.zeros(inputs, outputs, **wide)
        self.x, self.y = torch.zeros(inputs, **wide), torch.zeros(outputs, **wide)
        self.yy, self.count = 0.0, 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x [..., inputs], y [..., outputs]."""
        x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.yy += y.square().sum().item()
        self.count += len(x)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, float]:
        """Weight [outputs, inputs], bias [outputs], and R2 on the same rows.

        Args:
            ridge: penalty as a multiple of the mean variance of X's columns.
        """
        mean_x, mean_y = self.x / self.count, self.y / self.count
        cross = self.xy - self.count * torch.outer(mean_x, mean_y)
        gram = self.xx - self.count * torch.outer(mean_x, mean_x)
        scale = gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        eye = torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram + ridge * scale * eye, cross)
        total = self.yy - self.count * (mean_y @ mean_y).item()
        if scale <= 1e-12 * self.xx.diagonal().mean():
            raise InvalidValue(
                "the calibration text does not vary",
                "a map cannot be fitted to one and the same input",
                "Give some pages of text",
            )
        explained = (
            2 * (weight * cross).sum() - (weight * (gram @ weight)).sum()
        ).item()
        # A target that never changes is explained by its mean.
        r2 = explained / total if total > 1e-12 * self.yy else 1.0
        return weight.T.float(), (mean_y - mean_x @ weight).float(), r2


class _Walk:
    """A model's residual stream on all calibration tokens, block by block."""

    def __init__(self, source: ModelSource, batches: list[Tensor]) -> None:
        self.source, self.batches = source, batches
        self.depth, self._block = 0, None
        shell = Shell(source)
        shell.load_embeddings()
        shell.load_head()
        self.streams = [_embedded(shell, batch) for batch in batches]

    def block(self) -> Stack:
        """The block that comes next, loaded once."""
        if self._block is None:
            self._block = Stack(self.source)
            self._block.add(self.depth)
        return self._block

    def apply(self, streams: Iterable[Tensor]) -> Iterator[Tensor]:
        """What the next block makes of each batch of streams."""
        stack = self.block()
        for batch, stream in zip(self.batches, streams, strict=True):
            positions = torch.arange(batch.shape[1]).expand_as(batch)
            calls = stack.prepare(None, positions, None)
            yield stack.run(calls, 0, stream)

    def advance(self, after: list[Tensor] | None = None) -> None:
        """Go behind the next block."""
        self.streams = after if after is not None else list(self.apply(self.streams))
        self.depth, self._block = self.depth + 1, None


def _embedded(shell: Shell, batch: Tensor) -> Tensor:
    caught: list[Tensor] = []

    def pipeline(stream: Tensor) -> Tensor:
        caught.append(stream)
        return stream

    shell.run(pipeline, batch, None, torch.arange(batch.shape[1])[None], 1)
    return caught[0]


@torch.no_grad()
def align(
    model: "MoLForCausalLM",
    data: Iterable[str] | Tensor,
    *,
    ridge: float = 1e-2,
    delta_ridge: float = 1e-1,
    max_tokens: int = 65_536,
    tokenizer: Tokenizer | None = None,
) -> AlignReport:
    """Fit every adapter of a single-stream model; see ``MoLRuntime.align``."""
    streams = model.streams
    if streams.settings.stream != "single":
        why = "parallel streams have no adapters"
        raise NotReady("there is nothing to align", why, "Use stream='single'")
    if not streams.rows:
        raise NotReady(
            "the model has no layers",
            "add_layer was not called",
            "Add the layers first",
        )
    for name, value in (("ridge", ridge), ("delta_ridge", delta_ridge)):
        if not 0 < value <= 1e6:
            why = "it is relative to the mean variance"
            raise InvalidValue(f"{name}={value!r}", why, "Give a number in (0, 1e6]")
    if (
        isinstance(max_tokens, bool)
        or not isinstance(max_tokens, int)
        or max_tokens < 2
    ):
        why = "it counts calibration tokens"
        raise InvalidValue(f"max_tokens={max_tokens!r}", why, "Give 2 or more")
    _same_tokens({name: streams.sources[name] for name in streams.used()})
    limits = [streams.sources[n].info.max_positions for n in streams.used()]
    window = min([_WINDOW, *(limit for limit in limits if limit)])
    batches = _batches(data, tokenizer, window, max_tokens)
    _check_ids(batches, streams.sources[streams.primary].info.vocab_size)
    jobs = _jobs(model)
    rows = _fit(streams.sources, streams.primary, jobs, batches, ridge, delta_ridge)
    return AlignReport(sorted(rows, key=lambda row: row.layer))


@dataclass(frozen=True)
class _Job:
    """One guest of one row: fit ``adapters`` at the primary's layer ``at``."""

    at: int
    row: int
    place: int
    name: str
    index: int
    layer: FusionLayer


def _jobs(model: "MoLForCausalLM") -> list[_Job]:
    streams, jobs = model.streams, []
    depth = streams.sources[streams.primary].info.num_layers
    for number, layer in enumerate(streams.layers):
        own = [expert.index for expert in layer.experts if expert.primary]
        share = number / max(1, len(streams.layers) - 1)
        at = own[0] if own else round(share * (depth - 1))
        jobs += [
            _Job(at, number, j, expert.name, expert.index, layer)
            for j, expert in enumerate(layer.experts)
            if not expert.primary
        ]
    return sorted(jobs, key=lambda job: (job.at, job.row, job.index))


def _fit(
    sources: dict[str, ModelSource],
    primary: str,
    jobs: list[_Job],
    batches: list[Tensor],
    ridge: float,
    delta_ridge: float,
) -> list[AlignRow]:
    rows, fits, guests = [], [], {}
    host = _Walk(sources[primary], batches)
    for at in sorted({job.at for job in jobs}):
        while host.depth < at:
            host.advance()
        after = list(host.apply(host.streams))
        for job in [job for job in jobs if job.at == at]:
            guest = guests.get(job.name)
            if guest is None or guest.depth > job.index:
                guest = guests[job.name] = _Walk(sources[job.name], batches)
            while guest.depth < job.index:
                guest.advance()
            row, fit = _fit_one(job, host.streams, after, guest, ridge, delta_ridge)
            rows.append(row)
            fits += fit
        host.advance(after)
    # Only now, so that a failure leaves all adapters as they were.
    for adapter, weight, bias in fits:
        adapter.assign(weight, bias)
    return rows


def _fit_one(
    job: _Job,
    before: list[Tensor],
    after: list[Tensor],
    guest: _Walk,
    ridge: float,
    delta_ridge: float,
) -> tuple[AlignRow, list[tuple[LinearAdapter, Tensor, Tensor]]]:
    wide, narrow = before[0].shape[-1], guest.streams[0].shape[-1]
    pre, post = Ridge(wide, narrow), Ridge(narrow, wide)
    for x, y in zip(before, guest.streams, strict=True):
        pre.add(x, y)
    weight, bias, r2_stream = pre.solve(ridge)
    fits = [(job.layer.pre[str(job.place)], weight, bias)]
    dtype = guest.streams[0].dtype
    entering = [(x.float() @ weight.T + bias).to(dtype) for x in before]
    for z, out, x, x_next in zip(
        entering, guest.apply(entering), before, after, strict=True
    ):
        post.add(out - z, x_next - x)
    weight, bias, r2_delta = post.solve(delta_ridge)
    fits.append((job.layer.post[str(job.place)], weight, bias))
    expert = (job.name, job.index)
    return AlignRow(job.row, expert, r2_stream, r2_delta, pre.count), fits


def _same_tokens(sources: dict[str, ModelSource]) -> None:
    try:
        check_vocabularies(sources)
    except InvalidValue as error:
        raise NotYetBuilt(
            f"the models do not share one vocabulary: {error.what}",
            "aligning different tokenizers is not built yet",
            "Align models of one vocabulary",
        ) from error


def _batches(
    data: Iterable[str] | Tensor, tokenizer: Tokenizer | None, window: int, limit: int
) -> list[Tensor]:
    """Calibration tokens as batches [b, window]; the rest is dropped."""
    if isinstance(data, Tensor):
        if data.dim() != 2 or data.is_floating_point():
            raise InvalidValue(
                f"input_ids has shape {tuple(data.shape)} and dtype {data.dtype}",
                "token ids are [rows, length] integers",
                "Give such a tensor, or texts",
            )
        rows = data[:, : min(window, limit)]
        rows = rows[: limit // rows.shape[1]] if rows.numel() else rows
    elif tokenizer is None:
        why = "texts need a tokenizer"
        raise InvalidValue("tokenizer=None", why, "Give one, or token ids")
    else:
        ids: list[int] = []
        for text in [data] if isinstance(data, str) else data:
            ids += tokenizer(text)["input_ids"]
            if len(ids) >= limit:
                break
        ids = ids[:limit]
        short = min(window, len(ids)) or 1
        rows = torch.tensor(ids[: len(ids) // short * short]).reshape(-1, short)
    if rows.numel() < 2:
        raise InvalidValue(
            f"the calibration text has {rows.numel()} tokens",
            "a regression needs more",
            "Give some pages of text",
        )
    return list(rows.long().split(max(1, _BATCH_TOKENS // rows.shape[1])))


def _check_ids(batches: list[Tensor], size: int) -> None:
    low = min(batch.min().item() for batch in batches)
    high = max(batch.max().item() for batch in batches)
    if low < 0 or high >= size:
        raise InvalidValue(
            f"token ids reach from {low} to {high}",
            f"the vocabulary has {size}",
            "Tokenise with the primary's tokenizer",
        )
