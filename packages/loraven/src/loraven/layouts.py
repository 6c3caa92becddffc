# SPDX-License-Identifier: Apache-2.0
"""Whether a mask's layout is that of a layer's input, where the shapes can't tell.

A flattened input has as many vectors for a time-major model as for a batch-major one,
and so has any input whose batch is as large as it is long. What is at padded positions
is then replaced, and the vectors that change show where padding went. It may change
nothing that the mask calls valid, unless the model lets padding leak: then nearly
all of it changes, and more than what the other layout calls padding.

Changes are seen through one random projection for each vector, so that nothing of the
size of an input is kept.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from loraven.batches import run
from loraven.eligible import Target

__all__ = ["is_ambiguous", "padded_otherwise", "unlike_the_mask"]

# Of the largest change of a vector: smaller ones are rounding.
_ROUNDING = 1e-3


def is_ambiguous(x: Tensor, mask: Tensor | None) -> bool:
    """Whether a mask (B, T) fits x (..., n) in more than one order.

    Example:
        >>> import torch
        >>> mask = torch.ones(2, 3, dtype=torch.bool)
        >>> [is_ambiguous(torch.ones(*s, 8), mask) for s in ((6,), (2, 3), (3, 3))]
        [True, False, False]
    """
    if mask is None or mask.ndim != 2 or min(mask.shape) < 2:
        return False
    lead = tuple(x.shape[:-1])
    return lead == (mask.numel(),) or (lead == mask.shape and lead[0] == lead[1])


def padded_otherwise(batch: Any, mask: Tensor) -> Any | None:
    """The same batch with something else at its padded positions, or None.

    Integers are replaced by others of the same tensor's valid ones, floats by
    random numbers. None: no tensor (B, T) of ids or (B, T, n) of floats is there.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> padded_otherwise(torch.tensor([[5, 6], [7, 0]]), mask)
        tensor([[5, 6],
                [7, 5]])
    """
    found = 0

    def other(value: Any) -> Any:
        nonlocal found
        new = _replaced(value, mask) if isinstance(value, Tensor) else None
        found += new is not None
        return value if new is None else new

    if isinstance(batch, Tensor):
        made = other(batch)
    elif isinstance(batch, Mapping):
        made = {key: other(value) for key, value in batch.items()}
    else:
        made = tuple(map(other, batch))
    return made if found else None


def _replaced(value: Tensor, mask: Tensor) -> Tensor | None:
    if value.shape[:2] != mask.shape:
        return None
    mask = mask.to(value.device)
    if value.is_floating_point() and value.ndim > 2:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(value.shape, generator=generator).to(value)
        keep = mask.view(*mask.shape, *(1,) * (value.ndim - 2))
        return torch.where(keep, value, noise)
    whole = not (value.is_floating_point() or value.is_complex())
    # Zeros and ones alone are a mask of some kind.
    if not whole or value.ndim != 2 or not ((value != 0) & (value != 1)).any():
        return None
    known = value[mask].unique()
    if len(known) < 2:
        return None
    return torch.where(mask, value, torch.where(value == known[0], known[1], known[0]))


def unlike_the_mask(
    model: nn.Module, batch: Any, mask: Tensor, targets: Sequence[Target]
) -> list[str]:
    """Names of those layers whose inputs the mask is in another order than.

    Args:
        model: it runs twice, in the mode it is in.
        batch: a batch with padding.
        mask: of its valid positions, bool (B, T), in the layout of its tensors.
        targets: the layers that `is_ambiguous` says it of.

    Returns:
        Those of which it shows; none where the batch has nothing to replace.
    """
    other = padded_otherwise(batch, mask)
    if other is None:
        return []
    before, after = (_projected(model, each, mask, targets) for each in (batch, other))
    return [name for name in before if not _agrees(before[name], after[name], mask)]


def _projected(
    model: nn.Module, batch: Any, mask: Tensor, targets: Sequence[Target]
) -> dict[str, list[Tensor]]:
    """One number for each vector of each ambiguous input."""
    found: dict[str, list[Tensor]] = {target.name: [] for target in targets}
    with ExitStack() as stack, torch.no_grad():
        for target in targets:

            def look(
                _: Any, args: tuple, kwargs: dict, name: str = target.name
            ) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                if is_ambiguous(x, mask):
                    generator = torch.Generator().manual_seed(0)
                    weights = torch.randn(x.shape[-1], generator=generator)
                    found[name].append(x.double() @ weights.to(x.device).double())

            handle = target.module.register_forward_pre_hook(look, with_kwargs=True)
            stack.callback(handle.remove)
        run(model, batch)
    return found


def _agrees(before: list[Tensor], after: list[Tensor], mask: Tensor) -> bool:
    if [x.shape for x in before] != [x.shape for x in after]:
        return False
    for one, two in zip(before, after, strict=True):
        change = (two - one).abs()
        changed = change > _ROUNDING * change.max()
        padding = ~mask.reshape(one.shape).to(one.device)
        otherwise = ~mask.T.reshape(one.shape).to(one.device)
        here, there = change[padding & ~otherwise], change[otherwise & ~padding]
        # One projection may miss a change, hence nearly all.
        most = changed[padding].double().mean() > 0.9
        leaks = not len(here) or (most and here.mean() > there.mean())
        if (changed & ~padding).any() and not leaks:
            return False
    return True
