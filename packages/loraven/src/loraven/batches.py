# SPDX-License-Identifier: Apache-2.0
"""Batches of any model: how they are passed, which positions count, what comes out.

A Tensor is passed as ``model(x)``, a tuple or list as ``model(*x)``, a Mapping as
``model(**x)``. A mask marks valid positions; a position that no mask can be matched
to is never guessed.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchworks_core.errors import InvalidValue

__all__ = [
    "Examples",
    "Judge",
    "check_iterable",
    "evaluating",
    "main_output",
    "run",
    "tensors_in",
    "trainable",
    "valid",
]

Output = Callable[[Any], Tensor] | None
TokenMask = Callable[[Any], Tensor] | None


def run(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with one batch.

    Raises:
        TypeError: the batch is no Tensor, tuple, list or Mapping.

    Example:
        >>> import torch
        >>> run(torch.nn.Identity(), (torch.ones(1),))
        tensor([1.])
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    kind = type(batch).__name__
    raise TypeError(f"a batch is a Tensor, a tuple or a Mapping, not a {kind}")


@dataclass(frozen=True)
class Judge:
    """By what the layers of a model are judged.

    Attributes:
        output: see `main_output`.
        token_mask: see `valid`.
        metrics: whether they are judged by that output at all, or only by their
            own errors.
    """

    output: Output = None
    token_mask: TokenMask = None
    metrics: bool = True

    def judged(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Run the model; its output, and the mask of valid positions."""
        found = main_output(run(model, batch), self.output)
        return found, valid(batch, self.token_mask)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in Mappings, tuples and lists, however deep."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def check_iterable(batches: Any, what: str) -> None:
    """Refuse what looks like one batch where several are expected.

    Raises:
        TypeError: a Tensor, a Mapping, text, or nothing that can be iterated.
    """
    if isinstance(batches, Tensor | Mapping | str | bytes) or not isinstance(
        batches, Iterable
    ):
        kind = type(batches).__name__
        raise TypeError(f"{what} is an iterable of batches, not a {kind}: [batch]?")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run without gradients and in evaluation mode, then restore every flag.

    What was compiled runs as plain Python meanwhile: a finished graph calls no hook.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        # Without a compiler in memory nothing is compiled, and loading it takes long.
        stance = "torch._dynamo" in sys.modules
        eager = torch.compiler.set_stance("force_eager") if stance else nullcontext()
        with eager, torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def main_output(found: Any, output: Output = None) -> Tensor:
    """The tensor of a model's output by which its quality is judged.

    Args:
        found: what the model returned.
        output: picks a tensor out of it; None: the Tensor itself, ``logits``,
            ``last_hidden_state``, or else the first Tensor.

    Raises:
        TypeError: there is no tensor.
    """
    chosen = output(found) if output is not None else _first(found)
    if not isinstance(chosen, Tensor):
        kind = type(chosen if output is not None else found).__name__
        raise TypeError(f"no Tensor in the model's output, a {kind}: give output=")
    return chosen


def _first(found: Any) -> Any:
    if isinstance(found, Tensor):
        return found
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(found, name, None), Tensor):
            return getattr(found, name)
    values = found.values() if isinstance(found, Mapping) else found
    if isinstance(values, Iterable) and not isinstance(values, str):
        return next((value for value in values if isinstance(value, Tensor)), None)
    return None


def valid(batch: Any, token_mask: TokenMask = None) -> Tensor | None:
    """The mask of a batch's valid positions, bool; None: all are valid.

    Args:
        batch: one batch.
        token_mask: computes the mask of a batch; None: ``attention_mask`` of a
            Mapping, (B, T), 1 where a token is real.

    Raises:
        InvalidValue: the mask has values other than 0 and 1, or another shape.
        TypeError: the mask is no Tensor.
    """
    if token_mask is not None:
        mask = token_mask(batch)
    elif isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
    else:
        mask = None
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"a mask is a bool Tensor, not a {type(mask).__name__}")
    if token_mask is None and mask.ndim != 2:
        why = f"its shape is {tuple(mask.shape)}, not (B, T)"
        raise InvalidValue("attention_mask", why, "Give token_mask=")
    if mask.dtype != torch.bool:
        if not ((mask == 0) | (mask == 1)).all():
            why = "it has values other than 0 and 1"
            raise InvalidValue("mask of valid positions", why, "Give token_mask=")
        mask = mask != 0
    return None if mask.all() else mask


def select(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The valid vectors of ``x`` (..., n) as (tokens, n), or None if none can tell.

    Inputs of the mask's shape, of its flattened one, and of (B, n) or (B, 1, n), one
    vector for each example, are matched to it.
    """
    keep = spread(x, mask)
    flat = x.reshape(-1, x.shape[-1])
    if mask is None:
        return flat
    return None if keep is None else flat[keep.reshape(-1)]


def spread(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """A mask of the shape of x without its last dimension, or None without a match."""
    lead = x.shape[:-1]
    if mask is None:
        return torch.ones(lead, dtype=torch.bool, device=x.device)
    mask = mask.to(x.device)
    if lead == mask.shape:
        return mask
    if len(lead) == 1 and lead[0] == mask.numel():
        return mask.reshape(lead)
    if len(lead) and lead.numel() == lead[0] == mask.shape[0]:
        return mask.flatten(1).any(1).reshape(lead)
    return None


class Examples:
    """At most so many examples, taken evenly from all batches of a stream.

    Args:
        limit: how many, >= 1.

    Example:
        >>> import torch
        >>> examples = Examples(4)
        >>> for i in range(8):
        ...     examples.add(torch.full((4,), i))
        >>> [batch.tolist() for batch in examples.batches]
        [[0], [2], [4], [6]]
    """

    def __init__(self, limit: int) -> None:
        self.limit = self._share = limit
        self._step, self._seen = 1, 0
        self._divisible: bool | None = None
        self.batches: list[Any] = []

    @property
    def _least(self) -> int:
        """Not below a sixth of the limit: small batches run slowly."""
        return max(1, self.limit // 6)

    def check(self, model: nn.Module, batch: Any, output: Output = None) -> None:
        """Cut no batches if the first one's examples don't stand by themselves.

        A tensor may be a table that all examples use, and as long as there are
        examples: then the model fails on a part of the batch, or gives other values.
        """
        if self._divisible is None and size(batch) > self._least:
            self._divisible = _divides(model, batch, self._least, output)

    def add(self, batch: Any) -> None:
        """Take from one more batch, and less from those before when it is too much."""
        if self._divisible is False:
            self._share = max(self._share, size(batch))
        if self._seen % self._step == 0:
            self.batches.append(_head(batch, self._share))
        self._seen += 1
        while sum(map(size, self.batches)) > self.limit:
            if self._share > self._least and self._divisible is not False:
                self._share = max(self._least, self._share // 2)
                self.batches = [_head(batch, self._share) for batch in self.batches]
            elif len(self.batches) > 1:
                self._step, self.batches = 2 * self._step, self.batches[::2]
            else:
                return


def _divides(model: nn.Module, batch: Any, count: int, output: Output) -> bool:
    whole = main_output(run(model, batch), output)
    try:
        part = main_output(run(model, _head(batch, count)), output)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return False
    if not whole.ndim or len(whole) != size(batch):
        # No output by examples: it can't be told, and runs.
        return True
    if part.shape != whole[:count].shape:
        return False
    part, whole = part.double(), whole[:count].double()
    return bool((part - whole).norm() <= 1e-2 * whole.norm())


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch
    listed = isinstance(values, Iterable) and not isinstance(values, str)
    return [value for value in values if isinstance(value, Tensor)] if listed else []


def size(batch: Any) -> int:
    """How many examples a batch has: the common first size of its tensors, or 1."""
    sizes = {len(x) if x.ndim else 0 for x in _tensors(batch)}
    return sizes.pop() if len(sizes) == 1 and 0 not in sizes else 1


def _head(batch: Any, count: int) -> Any:
    """The first examples of a batch; all of it, where that can't be told."""
    return batch if size(batch) <= count else _mapped(batch, lambda x: x[:count])


def trainable(batch: Any) -> Any:
    """A batch that gradients can pass through: tensors of inference mode are copied.

    Call it outside of that mode.

    Example:
        >>> import torch
        >>> with torch.inference_mode():
        ...     x = torch.ones(2)
        >>> trainable({"x": x})["x"].is_inference()
        False
    """
    if not any(value.is_inference() for value in _tensors(batch)):
        return batch
    return _mapped(batch, lambda x: x.clone() if x.is_inference() else x)


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Each tensor of a batch changed; a batch of an unknown type as it is."""

    def each(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else value

    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: each(value) for key, value in batch.items()}
    return type(batch)(map(each, batch)) if type(batch) in (tuple, list) else batch
