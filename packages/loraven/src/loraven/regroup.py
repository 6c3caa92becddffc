# SPDX-License-Identifier: Apache-2.0
"""Part of a batch as a batch, and the outputs of the parts as one output.

What has one row for each example is a tensor whose first size is the number of
examples. Anything else goes to every part as it is, and comes back only if all
parts agree on it: a loss over a part, or a cache, is no output of an example.
"""

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraven.batches import tensors_in
from torchworks_core.errors import InvalidValue

__all__ = ["count", "merge", "select"]


def count(value: Any) -> int:
    """How many examples there are: the first size of the first tensor.

    Args:
        value: a Tensor, or tuples, lists and Mappings of such, nested.

    Raises:
        InvalidValue: there is no tensor with a dimension.

    Example:
        >>> count(("text", {"ids": torch.zeros(3, 5)}))
        3
    """
    found = next((x for x in tensors_in(value) if x.ndim), None)
    if found is None:
        raise InvalidValue("a batch", "it has no tensor with a row for each example")
    return len(found)


def select(value: Any, rows: Tensor, examples: int) -> Any:
    """The given rows of every tensor with ``examples`` rows, in the same structure.

    Args:
        value: a Tensor, or tuples, lists and dicts of such, nested.
        rows: int64.
        examples: how many rows the whole batch has.

    Example:
        >>> select((torch.arange(3), {"scale": 2.0}), torch.tensor([2, 0]), 3)
        (tensor([2, 0]), {'scale': 2.0})
    """
    if isinstance(value, Tensor):
        whole = value.ndim == 0 or len(value) != examples
        return value if whole else value[rows.to(value.device)]
    if isinstance(value, tuple | list):
        return _sequence(value, [select(part, rows, examples) for part in value])
    if isinstance(value, Mapping):
        return _mapping(
            value, {key: select(part, rows, examples) for key, part in value.items()}
        )
    return value


def merge(parts: Sequence[Any], rows: Sequence[Tensor]) -> Any:
    """Outputs of the parts of a batch as the output of the batch.

    Args:
        parts: one output for each part: Tensors, tuples, lists, Mappings and
            dataclasses (as transformers' ``ModelOutput``), nested.
        rows: for each part, which rows of the batch it had, int64; together each
            row once.

    Returns:
        The same structure; tensors with their rows in the batch's order.

    Raises:
        InvalidValue: the parts differ in structure or in their other sizes, or hold
            something that is not by example and not equal in all parts.

    Example:
        >>> rows = [torch.tensor([1]), torch.tensor([0, 2])]
        >>> merge([{"y": torch.tensor([5])}, {"y": torch.tensor([4, 6])}], rows)
        {'y': tensor([4, 5, 6])}
    """
    sizes = [len(row) for row in rows]
    return _merge(list(parts), sizes, torch.cat(list(rows)).argsort(), "output")


def _merge(parts: list[Any], sizes: list[int], order: Tensor, name: str) -> Any:
    first = parts[0]
    kinds = {type(part) for part in parts}
    if len(kinds) > 1:
        listed = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise _refusal(name, f"it is of different types at the levels: {listed}")
    if isinstance(first, Tensor):
        return _mergetensors_in(parts, sizes, order, name)
    if isinstance(first, tuple | list):
        if len({len(part) for part in parts}) > 1:
            raise _refusal(name, "it has different lengths at the levels")
        merged = [
            _merge(list(column), sizes, order, f"{name}[{number}]")
            for number, column in enumerate(zip(*parts, strict=True))
        ]
        return _sequence(first, merged)
    if isinstance(first, Mapping) or dataclasses.is_dataclass(first):
        tables = [_table(part) for part in parts]
        if any(table.keys() != tables[0].keys() for table in tables):
            raise _refusal(name, "it has different keys at the levels")
        merged = {
            key: _merge([t[key] for t in tables], sizes, order, f"{name}[{key!r}]")
            for key in tables[0]
        }
        return _mapping(first, merged)
    if all(part is first for part in parts) or _equal(parts):
        return first
    why = f"a {type(first).__name__} has no row for each example"
    raise _refusal(name, why)


def _table(part: Any) -> Mapping[Any, Any]:
    if isinstance(part, Mapping):
        return part
    return {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}


def _mergetensors_in(
    parts: list[Tensor], sizes: list[int], order: Tensor, name: str
) -> Tensor:
    first = parts[0]
    if all(x.ndim and len(x) == n for x, n in zip(parts, sizes, strict=True)):
        if len({x.shape[1:] for x in parts}) > 1:
            listed = ", ".join(str(tuple(x.shape)) for x in parts)
            raise _refusal(name, f"its shapes at the levels are {listed}")
        return torch.cat(parts)[order.to(first.device)]
    if all(x is first or torch.equal(x, first) for x in parts[1:]):
        return first
    listed = ", ".join(str(tuple(x.shape)) for x in parts)
    listed_sizes = ", ".join(map(str, sizes))
    why = f"its shapes are {listed}, for {listed_sizes} examples"
    raise _refusal(name, why)


def _equal(parts: list[Any]) -> bool:
    plain = (str, bytes, int, float, bool, torch.dtype, torch.device, torch.Size)
    return isinstance(parts[0], plain) and all(part == parts[0] for part in parts)


def _refusal(name: str, why: str) -> InvalidValue:
    do = "Ask the model for outputs with one row for each example (no loss, no cache)"
    return InvalidValue(f"{name} can't be put together from its groups", why, do)


def _sequence(like: Any, parts: list[Any]) -> Any:
    if hasattr(like, "_fields"):
        return type(like)(*parts)
    return type(like)(parts)


def _mapping(like: Any, parts: dict[str, Any]) -> Any:
    if dataclasses.is_dataclass(like):
        return type(like)(**parts)
    if not isinstance(like, MutableMapping):
        return parts
    made = copy.copy(like)
    for key, part in parts.items():
        made[key] = part
    return made
