# SPDX-License-Identifier: Apache-2.0
"""What an error of a layer's output does to the model's output, by gradients.

For a random vector v of independent standard normal values, the gradient g of
v . y with respect to a layer's output has E (g . e)^2 = |J e|^2: the squared
change of the model's output y that an error e of that layer makes, to first
order (Hutchinson, 1989). Two things follow from the same backward passes:

- the mean of g g^T is the metric in which a layer's error counts, so that the
  factorisation keeps the directions that the model's output depends on;
- for known factors, the sum over an example's tokens of g . e_r, with e_r the
  error of rank r, gives the expected damage of every rank at once.

Decisions: y is divided by its norm in each example, so that damages are relative
squared errors and the layers' damages can be added and compared; a layer that runs
more than once in a pass counts with all of them; from 2048 outputs on, only the
metric's diagonal is used, since its eigenvectors would take longer than all the rest.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraven.batches import spread
from loraven.factorize import Factors
from torchworks_core.errors import InvalidValue

__all__ = ["Call", "DamageCurves", "OutputMetrics", "Projection", "gradients"]

_FULL_METRIC = 2048
# Share of the mean eigenvalue that is mixed into a metric: it is estimated from few
# projections, and must be invertible.
_SHRINKAGE = 0.01


class Call(NamedTuple):
    """One run of a layer: its input (N, ..., in) and a gradient (N, ..., out)."""

    x: Tensor
    gradient: Tensor


class Projection(NamedTuple):
    """The gradients of one random projection of a batch's output.

    Attributes:
        examples: How many there are in the batch, N.
        calls: The runs of each layer that has an influence on the output.
    """

    examples: int
    calls: dict[str, list[Call]]


def gradients(
    forward: Callable[[], tuple[Tensor, Tensor | None]],
    sites: Mapping[str, nn.Module],
    *,
    projections: int,
    generator: torch.Generator,
    inputs: bool = True,
) -> Iterator[Projection]:
    """Run a model once and give gradients of random projections of its output.

    Args:
        forward: Runs one batch; returns the output (N, ...) and the mask of its
            valid positions, bool, or None; see `loraven.batches.spread`.
        sites: The layers, by name.
        projections: How many projections, >= 1; each is one backward pass.
        generator: Of the random projections, on the CPU.
        inputs: Whether the layers' inputs are needed, and copied: a model may write
            into them afterwards. `OutputMetrics` needs none.

    Yields:
        For each projection the layers' gradients, which are zero at positions that
        aren't valid.

    Raises:
        InvalidValue: the output is not finite, or does not depend on the layers
            differentiably.
    """
    with torch.enable_grad(), _recorded(sites, inputs) as runs:
        output, valid = forward()
    scale = _relative(output, valid)
    flat = [(name, x, y) for name, found in runs.items() for x, y in found]
    if not output.requires_grad:
        raise InvalidValue(
            "output",
            "it has no gradient with respect to the layers: it is an integer, or "
            "the model runs under no_grad or inference_mode",
            "Pass output= with a differentiable tensor, or sensitivity=False",
        )
    for number in range(projections):
        noise = torch.randn(output.shape, generator=generator)
        found = torch.autograd.grad(
            (output,),
            [y for *_, y in flat],
            (noise.to(output) * scale,),
            retain_graph=number < projections - 1,
            allow_unused=True,
        )
        calls: dict[str, list[Call]] = {}
        for (name, x, _), gradient in zip(flat, found, strict=True):
            if gradient is not None:
                masked = _masked(gradient, valid)
                calls.setdefault(name, []).append(Call(x, masked))
        yield Projection(len(output) if output.ndim else 1, calls)


@contextmanager
def _recorded(
    sites: Mapping[str, nn.Module], inputs: bool
) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Keep input and output of every run of the sites, as parts of a graph."""
    runs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in sites}

    def hook(name: str) -> Callable[..., Tensor]:
        def keep(
            _: nn.Module, args: tuple[Any, ...], options: dict, output: Tensor
        ) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            x = args[0] if args else next(iter(options.values()))
            # What follows may write into both of them.
            kept = x.detach().clone() if inputs else x.detach()
            runs[name].append((kept, output))
            return output.clone()

        return keep

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in sites.items()
    ]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def _relative(output: Tensor, valid: Tensor | None) -> Tensor:
    """One over the norm of each example's valid outputs, zero where not valid."""
    detached = _masked(output.detach().float(), valid)
    norm = detached.flatten(1).norm(dim=1) if output.ndim > 1 else detached.abs()
    if not norm.isfinite().all():
        why = "it holds NaN or infinity, or its norm overflows"
        do = "Give output= to judge by another tensor, or sensitivity=False"
        raise InvalidValue("output", why, do)
    shape = norm.shape + (1,) * (output.ndim - norm.ndim)
    inverse = torch.where(norm > 0, norm.reciprocal(), 0).view(shape)
    return _masked(inverse.expand(output.shape), valid)


def _masked(values: Tensor, valid: Tensor | None) -> Tensor:
    """Zero the positions that aren't valid, where that can be told."""
    if valid is None or values.ndim < 2:
        return values
    keep = spread(values, valid)
    return values if keep is None else values * keep[..., None]


class OutputMetrics:
    """Sums the metrics of layers: the mean outer products of their gradients.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 2)
        >>> metrics = OutputMetrics()
        >>> x, random = torch.randn(8, 3), torch.Generator().manual_seed(0)
        >>> runs = gradients(
        ...     lambda: (layer(x) * torch.tensor([1.0, 0.0]), None),
        ...     {"layer": layer}, projections=4, generator=random,
        ... )
        >>> for projection in runs:
        ...     metrics.add(projection)
        >>> metric = metrics.finish()["layer"]
        >>> bool(metric[0, 0] > 100 * metric[1, 1])
        True
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, projection: Projection) -> None:
        """Take in what `gradients` yielded."""
        for name, found in projection.calls.items():
            for _, gradient in found:
                flat = gradient.flatten(0, -2).float()
                full = flat.shape[1] <= _FULL_METRIC
                part = flat.T @ flat if full else flat.square().sum(0)
                before = self._sums.get(name)
                self._sums[name] = part.double() if before is None else before + part

    def all_reduce(self, name: str, like: Tensor) -> None:
        """Add up one layer's sums over all processes of the default group.

        Args:
            name: The layer; every process calls this for the same ones in turn.
            like: Its weight, (out, in).
        """
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        shape = (len(like),) * (2 if len(like) <= _FULL_METRIC else 1)
        empty = torch.zeros(shape, dtype=torch.float64, device=like.device)
        total = self._sums.get(name, empty)
        distributed.all_reduce(total)
        if total.any():
            self._sums[name] = total

    def finish(self) -> dict[str, Tensor]:
        """Metrics by layer, float64, (out, out) or (out,) for a diagonal one.

        Their mean eigenvalue is 1: `DamageCurves` gives the scale. A layer without
        influence on the output has none.

        Raises:
            InvalidValue: a gradient was not finite; names the layer.
        """
        found = {}
        for name, total in self._sums.items():
            diagonal = total.diagonal() if total.ndim == 2 else total
            mean = diagonal.mean()
            if not mean.isfinite():
                why = "a gradient at its output is not finite"
                raise InvalidValue(f"layer {name!r}", why, "Pass sensitivity=False")
            if mean > 0:
                metric = total * ((1 - _SHRINKAGE) / mean)
                kept = metric.diagonal() if total.ndim == 2 else metric
                kept += _SHRINKAGE
                found[name] = metric
        return found


class DamageCurves:
    """Expected relative squared change of the output, for every rank of a layer.

    Args:
        factors: Of each layer, of any dtype.
    """

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self._factors = {
            name: (f.up.T.float(), f.down.T.float(), f.down_bias.float())
            for name, f in factors.items()
        }
        self._sums = {
            name: torch.zeros(f.rank, dtype=torch.float64, device=f.up.device)
            for name, f in factors.items()
        }
        self._examples = 0

    @torch.no_grad()
    def add(self, projection: Projection) -> None:
        """Take in what `gradients` yielded."""
        self._examples += projection.examples
        for name, found in projection.calls.items():
            up, down, bias = self._factors[name]
            change: Tensor | None = None
            for x, gradient in found:
                # The part that each direction has in g . e, summed over tokens.
                parts = (gradient.float() @ up) * (x.float() @ down + bias)
                parts = parts.reshape(_examples(parts, projection), -1, up.shape[1])
                part = parts.sum(1)
                change = part if change is None else change + part
            if change is not None:
                dropped = change.flip(1).cumsum(1).flip(1)
                self._sums[name] += dropped.double().square().sum(0)

    def finish(self) -> dict[str, Tensor]:
        """Curves by layer: (R + 1,) float64; entry r is the damage of rank r.

        They never rise with the rank, and end with 0.
        """
        found = {}
        for name, total in self._sums.items():
            mean = (total / max(1, self._examples)).cummin(0).values
            found[name] = torch.cat([mean, mean.new_zeros(1)])
        return found


def _examples(parts: Tensor, projection: Projection) -> int:
    """How many examples the vectors of a call belong to, in their order.

    Where that can't be told, each counts by itself: then what their errors have in
    common is missed, and no more.
    """
    vectors = parts.shape[:-1].numel()
    first = parts.shape[0] % projection.examples == 0
    return projection.examples if first else vectors
