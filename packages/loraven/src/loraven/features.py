# SPDX-License-Identifier: Apache-2.0
"""What a router may look at before it chooses a level for an example.

That is what goes into the first converted layer: mean and standard deviation over
an example's valid tokens, and how many these are. To get there the model is run and
stopped at that layer by an exception, so that only what comes before is computed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from loraven import regroup
from loraven.batches import run, valid
from loraven.checks import number
from loraven.family import Family
from loraven.nested import NestedLinear
from torchworks_core.errors import InvalidValue, NotReady

__all__ = ["arguments", "check_functions", "check_goal", "kept_levels", "look"]

Features = Callable[[Any], Tensor] | None


class _Stop(BaseException):
    """Leaves the model at the first converted layer; no model catches it."""


def check_goal(target: float, alpha: float) -> tuple[float, float]:
    """Return both as floats.

    Raises:
        TypeError: one of them is no number.
        InvalidValue: the target is not below 1, or alpha not between 0 and 1.
    """
    found = number("target", target, -math.inf)
    if found > 1 - 1e-6:
        do = "Give a target of at most 0.999999; the dense level scores 1"
        raise InvalidValue(f"target={found!r}", "no reduced level reaches it", do)
    share = number("alpha", alpha, 0.0, 1.0, above=True)
    if share == 1:
        raise InvalidValue("alpha=1.0", "then any level will do", "Give less than 1")
    return found, share


def check_functions(**functions: Any) -> None:
    """Raise TypeError for what is neither None nor callable."""
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name}={value!r}: a function or None is needed")


def arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """The arguments of ``loraven.batches.run``.

    Raises:
        TypeError: the batch is no Tensor, tuple, list or Mapping.
    """
    found: list[Any] = []

    def take(*args: Any, **kwargs: Any) -> None:
        found.extend((args, kwargs))

    run(take, batch)  # type: ignore[arg-type]
    return found[0], found[1]


def as_batch(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The batch with these arguments, as a user's function of a batch gets it."""
    if not kwargs:
        return args[0] if len(args) == 1 else args
    return dict(enumerate(args)) | dict(kwargs)


@contextmanager
def kept_levels(family: Family) -> Iterator[None]:
    """Put every layer's level back afterwards."""
    before = [module.level for module in family.modules]
    try:
        yield
    finally:
        for module, level in zip(family.modules, before, strict=True):
            module.level = level


def mask_of(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The valid positions by ``attention_mask``, also where it is given by position."""
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1:
        names = list(signature(model.forward).parameters)
        at = names.index("attention_mask") if "attention_mask" in names else len(args)
        mask = args[at] if at < len(args) else None
    return valid({"attention_mask": mask})


def first_input(
    model: nn.Module,
    layers: Sequence[NestedLinear],
    args: tuple,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, NestedLinear]:
    """What goes into the first of these layers to run, and which one that is.

    Raises:
        NotReady: none of them ran.
    """
    found: list[Any] = []

    def stop(layer: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        found.extend((given[0] if given else next(iter(named.values())), layer))
        raise _Stop

    handles = [
        layer.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        for layer in layers
    ]
    try:
        model(*args, **kwargs)
    except _Stop:
        return found[0], found[1]
    finally:
        for handle in handles:
            handle.remove()
    why = "the converted layer that ran first when the router was made"
    what = why if len(layers) == 1 else "a converted layer"
    raise NotReady(f"{what} did not run", "a compiled model, or another way through it")


def pooled(x: Tensor, mask: Tensor | None, examples: int) -> Tensor:
    """Mean and deviation over each example's valid tokens, and log of their number.

    Args:
        x: (N, ..., d), or (N * T, d) with the rows of an example together.
        mask: (N, T), bool, or None.
        examples: N.

    Returns:
        (N, 2 d + 1), float32 at least.

    Raises:
        InvalidValue: it can't be told which rows are of which example.

    Example:
        >>> pooled(torch.tensor([[[1.0], [3.0]]]), None, 1)
        tensor([[2.0000, 1.0000, 0.6931]])
    """
    shape = tuple(x.shape)
    by_row = x.ndim > 1 and shape[0] % examples == 0
    if by_row and x.ndim > 2 and shape[0] != examples and shape[1] == examples:
        by_row = False
    tokens = x.reshape(examples, -1, shape[-1]) if by_row else x
    if not by_row or (mask is not None and tokens.shape[1] not in (1, mask.shape[1])):
        known = f"{examples} examples" if mask is None else f"mask {tuple(mask.shape)}"
        why = f"input {shape} of the first converted layer does not match {known}"
        raise InvalidValue("the features of a batch", why, "Pass features=")
    tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
    if mask is None or tokens.shape[1] != mask.shape[1]:
        keep = tokens.new_ones(tokens.shape[:2])
    else:
        keep = mask.to(tokens)
    keep = keep.unsqueeze(-1)
    length = keep.sum(1).clamp_min(1)
    mean = (tokens * keep).sum(1) / length
    spread = ((tokens - mean.unsqueeze(1)) * keep).square().sum(1) / length
    return torch.cat([mean, spread.sqrt(), length.log()], 1)


def look(
    model: nn.Module,
    layers: Sequence[NestedLinear],
    features: Features,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> tuple[Tensor, NestedLinear | None, int]:
    """Features of a batch, the layer they come from, and what they cost elementwise.

    Raises:
        InvalidValue: they are not (N, F).
        TypeError: the user's function returned no Tensor, or complex numbers.
    """
    examples = regroup.count((args, kwargs))
    if features is None:
        x, layer = first_input(model, layers, args, kwargs)
        found = pooled(x, mask_of(model, args, kwargs), examples)
        return found, layer, 2 * x.numel() + found.numel()
    found = features(as_batch(args, kwargs))
    if not isinstance(found, Tensor):
        raise TypeError(f"features= returned a {type(found).__name__}, not a Tensor")
    if found.is_complex():
        raise TypeError("features= returned complex numbers, not real ones")
    if found.ndim != 2 or len(found) != examples or not found.shape[1]:
        why = f"their shape is {tuple(found.shape)}"
        raise InvalidValue("features", why, f"Return ({examples}, F) for this batch")
    return found, None, found.numel()
