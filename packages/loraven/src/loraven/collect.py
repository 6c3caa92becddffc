# SPDX-License-Identifier: Apache-2.0
"""One run over data: the score of every level against the dense model, and features.

What a router is made and judged by. Only figures of each example are kept, so that
the data may be larger than memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraven import regroup
from loraven.batches import Output, check_iterable, evaluating, main_output, run
from loraven.calibrate import count_macs
from loraven.family import find_family
from loraven.features import Features, arguments, kept_levels, look, mask_of
from loraven.nested import NestedLinear
from torchworks_core.errors import InvalidValue

__all__ = ["Collected", "Score", "collect", "cosine"]

Score = Callable[[Tensor, Tensor], Tensor] | None


class Collected(NamedTuple):
    """Everything that a router is made and judged by; tensors in float64, CPU.

    Attributes:
        scores: (N, L), of every example at every level.
        features: (N, F).
        costs: (L,), the levels' costs as shares of the dense cost.
        overhead: what a router itself costs for the mean example, as such a share.
        site: number of the converted layer that runs first; -1 if the features are
            the user's.
    """

    scores: Tensor
    features: Tensor
    costs: Tensor
    overhead: float
    site: int


def cosine(reference: Tensor, output: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cosine of two outputs for each example, (N,) float64, 1 where they are equal.

    Args:
        reference: (N, T, d), compared by its mean over valid positions, or any
            other (N, ...), compared as one vector.
        output: of the same shape.
        mask: (N, T), bool, or None.

    Raises:
        InvalidValue: shapes that differ or don't fit the mask, or one number for
            each example, whose cosine says nothing.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> cosine(x, x.flip(1))
        tensor([0., 1.], dtype=torch.float64)
    """
    shape = tuple(reference.shape)
    do = "Pass score="
    if shape != tuple(output.shape):
        why = f"the dense output is {shape}, a level's {tuple(output.shape)}"
        raise InvalidValue("outputs", why, do)
    if reference.ndim < 2 or math.prod(shape[1:]) < 2:
        why = f"{shape} is one number for each example, its cosine 1 or -1"
        raise InvalidValue("outputs", why, do)
    sides = [reference.double(), output.double()]
    if reference.ndim == 3:
        keep = sides[0].new_ones(shape[:2]) if mask is None else mask.to(sides[0])
        if tuple(keep.shape) != shape[:2]:
            why = f"{shape} does not match the mask {tuple(keep.shape)}"
            raise InvalidValue("outputs", why, do)
        sides = [(side * keep.unsqueeze(-1)).sum(1) for side in sides]
    left, right = (side.flatten(1) for side in sides)
    norms = left.norm(dim=1) * right.norm(dim=1)
    value = torch.where(norms > 0, (left * right).sum(1) / norms, 0.0).clamp(-1, 1)
    return torch.where((left == right).all(1), 1.0, value)


def collect(
    model: nn.Module,
    data: Iterable[Any],
    score: Score,
    output: Output,
    features: Features,
) -> Collected:
    """Run every level over the data.

    Args:
        model: converted; its level, flags and hooks are afterwards as before.
        data: batches, see `loraven.batches.run`; read once.
        score: (reference, output) -> (N,), at most 1; None: `cosine`.
        output: picks the tensor that is scored, see `loraven.batches.main_output`.
        features: batch -> (N, F); None: from the first converted layer's input.

    Raises:
        InvalidValue: no example, scores or features of a wrong shape, above 1 or
            not finite.
        NotReady: the model was not converted.
        TypeError: an argument of a wrong type.
    """
    check_iterable(data, "data")
    pass_ = _Pass(model, score, output, features)
    with evaluating(model), kept_levels(pass_.family):
        for batch in data:
            pass_.add(batch)
    return pass_.finish()


class _Pass:
    """Sums and rows over one run through the data."""

    def __init__(
        self, model: nn.Module, score: Score, output: Output, features: Features
    ) -> None:
        self.model, self.family = model, find_family(model)[1]
        self.score, self.output, self.features = score, output, features
        self.layers: Sequence[NestedLinear] = self.family.modules
        self.scores: list[Tensor] = []
        self.found: list[Tensor] = []
        self.spent = self.dense = 0
        # At such a level all layers run their original form.
        self.full = [
            all(layer.plans[level].form == "dense" for layer in self.layers)
            for level in range(len(self.family.levels))
        ]

    def add(self, batch: Any) -> None:
        """Run one batch at all levels."""
        args, kwargs = arguments(batch)
        if not regroup.count((args, kwargs)):
            return
        self._look(batch)
        mask = mask_of(self.model, args, kwargs)
        with self._counted():
            reference = self._run(len(self.family.levels), batch)
        columns = []
        for level, full in enumerate(self.full):
            given = reference if full else self._run(level, batch)
            columns.append(self._judge(reference, given, mask))
        if any(len(column) != len(self.found[-1]) for column in columns):
            why = f"{len(columns[0])} scores for {len(self.found[-1])} examples"
            raise InvalidValue("scores", why, "Pass score= that returns (N,)")
        self.scores.append(torch.stack(columns, 1))

    def _look(self, batch: Any) -> None:
        probe = _Probe(self)
        # A probe in place of the model: count_macs counts what the features take.
        self.spent += count_macs(probe, batch, ())[0] + probe.elementwise
        self.found.append(probe.found.double().cpu())
        if probe.layer is not None:
            self.layers = [probe.layer]

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Add up the multiply-adds of the converted layers."""

        def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self.dense += x.numel() * layer.out_features  # type: ignore[operator]

        handles = [
            layer.register_forward_pre_hook(hook, with_kwargs=True)
            for layer in self.family.modules
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _run(self, level: int, batch: Any) -> Tensor:
        self.family.set_level(level)
        return main_output(run(self.model, batch), self.output)

    def _judge(self, reference: Tensor, given: Tensor, mask: Tensor | None) -> Tensor:
        if self.score is None:
            found = cosine(reference, given, mask)
        else:
            found = self.score(reference, given)
        if not isinstance(found, Tensor):
            kind = type(found).__name__
            raise TypeError(f"score= returned a {kind}, not a Tensor")
        if found.ndim != 1:
            why = f"their shape is {tuple(found.shape)}"
            raise InvalidValue("scores", why, "Pass score= that returns (N,)")
        if found.is_complex():
            raise TypeError("score= returned complex numbers, not real ones")
        found = found.double().cpu()
        if not (found <= 1 + 1e-6).all():
            why = "they hold NaN" if found.isnan().any() else "some are above 1"
            raise InvalidValue("scores", why, "Scores are at most 1, better is higher")
        return found.clamp_max(1)

    def finish(self) -> Collected:
        """All rows together."""
        if not self.scores:
            raise InvalidValue("data", "it has no example", "Give a few hundred")
        scores, features = torch.cat(self.scores), torch.cat(self.found)
        for name, value in (("scores", scores), ("features", features)):
            if not value.isfinite().all():
                why = "they hold NaN or infinity"
                raise InvalidValue(name, why, "Check the model and the data")
        summary = self.family.summary.levels
        costs = [summary[level].cost_fraction for level in self.family.levels]
        products = features.numel() * len(costs)
        overhead = (self.spent + products) / self.dense if self.dense else math.inf
        site = -1 if self.features else self.family.modules.index(self.layers[0])
        costs = torch.tensor(costs, dtype=torch.float64)
        return Collected(scores, features, costs, overhead, site)


class _Probe(nn.Module):
    """Takes a batch as the model does, and only looks at its features."""

    def __init__(self, owner: _Pass) -> None:
        super().__init__()
        self._owner = (owner,)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Keep what `look` returns."""
        (owner,) = self._owner
        self.found, self.layer, self.elementwise = look(
            owner.model, owner.layers, owner.features, args, kwargs
        )
