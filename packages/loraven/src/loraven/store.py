# SPDX-License-Identifier: Apache-2.0
"""A conversion in a folder: factors in safetensors, everything else in one JSON.

The model's own weights are not stored: a conversion belongs to exactly those
weights that it was made from, and their SHA-256 is checked. Forms are derived from
the factors, so what is loaded runs as what was saved, to the bit.

A file is foreign data: nothing in it is unpickled or executed, every number, name,
shape and value is checked, and the model is touched only when all is well. A hash
finds damage to the document, but anyone can write a new one: so plans have to agree
with levels and costs, sizes are computed anew, and no text reaches a terminal with
control characters in it. The
folder is written by `torchworks_core.checkpoint`: weights under a name that holds
their hash, then the document, so a kill leaves the old or the new conversion whole.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraven.eligible import Target, find_targets
from loraven.factorize import Factors, Pivots
from loraven.family import Family, find_family, install, is_converted
from loraven.forms import FORMS, form_macs
from loraven.levels import check_levels
from loraven.nested import NestedLinear, Plan
from loraven.summary import ConversionSummary, LayerSummary, LevelSummary
from torchworks_core.errors import CorruptFile, InvalidValue

__all__ = ["load", "save"]

DOCUMENT = "loraven.json"
_FORMAT = 1
_NEAR = 1e-9
_TENSORS = ("up", "down", "down_bias", "up_bias", "order")


def save(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the conversion of a model, without the model's own weights.

    Args:
        model: from `loraven.convert`. Its current level is not stored.
        folder: created if missing; a conversion in it is replaced whole. It holds
            ``loraven.json`` and ``loraven-<hash>.safetensors``.

    Raises:
        NotReady: the model was not converted, or its factors are stale.

    Example:
        >>> import tempfile, torch, loraven
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> summary = loraven.convert(model, [torch.randn(256, 64)])
        >>> folder = tempfile.mkdtemp()
        >>> loraven.save(model, folder)
        >>> loraven.load(loraven.revert(model), folder) == summary
        True
    """
    from torchworks_core import checkpoint

    family = find_family(model)[1]
    family.check(thorough=True)
    tensors, layers = {}, []
    for name, module, found in zip(
        family.names, family.modules, family.summary.layers, strict=True
    ):
        for key in _TENSORS:
            tensors[f"{name}.{key}"] = getattr(module, key)
        layers.append(
            {
                "name": name,
                "in_features": module.in_features,
                "out_features": module.out_features,
                "ranks": [plan.rank for plan in module.plans],
                "forms": [plan.form for plan in module.plans],
                "expected_error": list(found.expected_error.values()),
                "sha256": _digest(module),
            }
        )
    summary = family.summary
    document = {
        "loraven": _FORMAT,
        "levels": list(family.levels),
        "cost_fraction": [s.cost_fraction for s in summary.levels.values()],
        "model_macs_fraction": [s.model_macs_fraction for s in summary.levels.values()],
        "resident_bytes": [s.resident_bytes for s in summary.levels.values()],
        "tokens": summary.tokens,
        "seconds": summary.seconds,
        "cost": summary.cost,
        "family_bytes": summary.resident_bytes,
        "skipped": summary.skipped,
        "layers": layers,
    }
    document["sha256"] = seal(document)
    checkpoint.save(folder, tensors, document, document_name=DOCUMENT, stem="loraven")


def load(model: nn.Module, folder: str | os.PathLike) -> ConversionSummary:
    """Convert ``model`` in place by what `save` wrote; leave it at the largest level.

    Args:
        model: not converted, with the very weights that the conversion was made
            from.
        folder: where it is.

    Returns:
        The summary of the conversion.

    Raises:
        MissingFile: the folder or a file in it is missing.
        CorruptFile: anything is not as it was saved, or does not belong to this
            model; names file, layer and field. ``model`` is as it was.
        InvalidValue: the model is converted already.
    """
    from torchworks_core import checkpoint

    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch Module, not a {type(model).__name__}")
    if is_converted(model):
        kind = type(model).__name__
        raise InvalidValue(kind, "already converted", "Call loraven.revert first")
    # Names first, as they decide which tensors may be there at all.
    tensors, document = checkpoint.load(folder, document_name=DOCUMENT)
    reader = _Reader(f"file {str(Path(folder) / DOCUMENT)!r}", document)
    levels = reader.levels()
    entries = reader.layers(model, levels)
    expected = {f"{target.name}.{key}" for target, *_ in entries for key in _TENSORS}
    if different := expected ^ tensors.keys():
        raise reader.wrong(f"tensor {min(different)!r}", "is missing or too many")
    modules = tuple(
        _module(reader, target, plans, tensors) for target, plans, _ in entries
    )
    layers = tuple(layer for _, _, layer in entries)
    summary = reader.summary(levels, layers, modules)
    names = tuple(target.name for target, *_ in entries)
    family = Family(names, modules, levels, summary)
    family.set_level(len(levels) - 1)
    install(model, family)
    return summary


def seal(document: dict[str, Any]) -> str:
    """SHA-256 of a document, without itself and what `checkpoint` adds.

    Example:
        >>> seal({"b": 1, "a": 0.5}) == seal({"a": 0.5, "b": 1, "torchworks": {}})
        True
    """
    rest = {k: v for k, v in document.items() if k not in ("sha256", "torchworks")}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(module: nn.Module) -> str:
    """SHA-256 of the bytes of a layer's weight, and of its bias if there is one."""
    found = hashlib.sha256()
    for name in ("weight", "bias"):
        tensor = module._parameters.get(name)
        if tensor is not None:
            plain = tensor.detach().cpu().contiguous()
            found.update(plain.view(torch.uint8).numpy().data)
    return found.hexdigest()


class _Reader:
    """Takes values out of a document, each of the type and range that it must have."""

    def __init__(self, source: str, document: dict[str, Any]) -> None:
        self.source, self.document = source, document
        if type(document.get("loraven")) is not int or document["loraven"] != _FORMAT:
            why = f"is {document.get('loraven')!r}, this version reads {_FORMAT}"
            raise self.wrong("field 'loraven'", why)
        if document.get("sha256") != seal(document):
            raise self.wrong("field 'sha256'", "is not that of the document")

    def wrong(self, where: str, why: str) -> CorruptFile:
        do = "Restore the folder, or convert the model again"
        return CorruptFile(f"{self.source}, {where}", why, do)

    def numbers(
        self, found: Any, name: str, count: int, high: float, where: str = ""
    ) -> list[float]:
        """``count`` finite numbers in [0, high]."""
        values = found.get(name)
        fine = isinstance(values, list) and len(values) == count
        if not fine or not all(_is_number(value, high) for value in values):
            why = f"is not {count} numbers from 0 to {high:g}"
            raise self.wrong(f"{where}field {name!r}", why)
        return values

    def levels(self) -> tuple[float, ...]:
        """The levels, ascending."""
        values = self.document.get("levels")
        count = len(values) if isinstance(values, list) else 0
        found = self.numbers(self.document, "levels", count, 1.0)
        try:
            levels = check_levels(found)
        except ValueError as error:
            raise self.wrong("field 'levels'", str(error)) from error
        # 1 would be a key like 1.0, but is printed as something else.
        if list(levels) != found or not all(type(level) is float for level in found):
            raise self.wrong("field 'levels'", "is not ascending, or no floats")
        return levels

    def layers(
        self, model: nn.Module, levels: tuple[float, ...]
    ) -> list[tuple[Target, list[Plan], LayerSummary]]:
        """Every layer with the module of ``model`` that it is meant for."""
        entries = self.document.get("layers")
        if not isinstance(entries, list) or not entries:
            raise self.wrong("field 'layers'", "is no list of layers")
        targets, skipped = find_targets(model, min_features=1)
        known = {target.name: target for target in targets}
        found = []
        for number, entry in enumerate(entries):
            name = entry.get("name") if isinstance(entry, dict) else None
            if type(name) is not str:
                raise self.wrong(f"layer {number}", "has no name")
            target = known.pop(name, None)
            if target is None:
                why = skipped.get(name, "no such layer in the model, or twice")
                raise self.wrong(f"layer {name[:80]!a}", why)
            found.append((target, *self.layer(entry, target, levels)))
        return found

    def layer(
        self, entry: dict[str, Any], target: Target, levels: tuple[float, ...]
    ) -> tuple[list[Plan], LayerSummary]:
        """One layer's plans, checked against the layer of the model."""
        where, count = f"layer {target.name!r}, ", len(levels)
        for name in ("in_features", "out_features"):
            size = getattr(target, name)
            if type(entry.get(name)) is not int or entry[name] != size:
                why = f"is {entry.get(name)!r}, the model has {size}"
                raise self.wrong(f"{where}field {name!r}", why)
        ranks, forms = entry.get("ranks"), entry.get("forms")
        largest = min(target.in_features, target.out_features)
        fine = isinstance(ranks, list) and len(ranks) == count
        if not fine or not all(type(r) is int and 1 <= r <= largest for r in ranks):
            why = f"is not {count} ranks from 1 to {largest}"
            raise self.wrong(f"{where}field 'ranks'", why)
        fine = isinstance(forms, list) and len(forms) == count
        if not fine or not all(type(f) is str and f in FORMS for f in forms):
            why = f"is not {count} of {', '.join(FORMS)}"
            raise self.wrong(f"{where}field 'forms'", why)
        self.agree(target, ranks, forms, levels)
        errors = self.numbers(entry, "expected_error", count, 1.0 + 1e-9, where)
        if entry.get("sha256") != _digest(target.module):
            why = "differs: the conversion was made from other weights"
            raise self.wrong(f"{where}field 'sha256'", why)
        plans = [Plan(*plan) for plan in zip(ranks, forms, strict=True)]
        sizes = target.name, target.in_features, target.out_features
        return plans, LayerSummary(
            *sizes,
            ranks=dict(zip(levels, ranks, strict=True)),
            forms=dict(zip(levels, forms, strict=True)),
            expected_error=dict(zip(levels, errors, strict=True)),
        )

    def agree(
        self,
        target: Target,
        ranks: list[int],
        forms: list[str],
        levels: tuple[float, ...],
    ) -> None:
        """Plans that a conversion could have made for these levels."""
        where = f"layer {target.name!r}, field "
        if levels[-1] == 1.0 and forms[-1] != "dense":
            why = f"is {forms[-1]!r} at level 1.0, which is the original layer"
            raise self.wrong(f"{where}'forms'", why)
        if sorted(ranks) != ranks:
            raise self.wrong(f"{where}'ranks'", f"is {ranks}, not ascending")
        dense = [form == "dense" for form in forms]
        if sorted(dense) != dense:
            why = "is smaller at a level than at the one below"
            raise self.wrong(f"{where}'forms'", why)
        largest = min(target.in_features, target.out_features)
        if any(d and rank != largest for d, rank in zip(dense, ranks, strict=True)):
            raise self.wrong(f"{where}'ranks'", f"is not {largest} where it is dense")

    def costs(
        self, levels: tuple[float, ...], layers: Sequence[LayerSummary]
    ) -> list[float]:
        """Cost fractions that agree with the levels and the plans."""
        costs = self.numbers(self.document, "cost_fraction", len(levels), 1.0)
        where = "field 'cost_fraction'"
        if sorted(costs) != costs:
            raise self.wrong(where, "is not ascending")
        for cost, level in zip(costs, levels, strict=True):
            if cost > level * (1 + _NEAR):
                raise self.wrong(where, f"is {cost:g} at level {level:g}")
            shares = [_share(layer, level) for layer in layers]
            if min(shares) == 1.0 != cost:
                raise self.wrong(where, f"is {cost:g} where every layer is dense")
            # How often each layer ran is not stored, only that none ran less than once.
            low, high = min(shares) * (1 - _NEAR), max(shares) * (1 + _NEAR)
            if self.document.get("cost") == "macs" and not low <= cost <= high:
                why = (
                    f"is {cost:g} at level {level:g}, by its plans {low:g} to {high:g}"
                )
                raise self.wrong(where, why)
        return costs

    def summary(
        self,
        levels: tuple[float, ...],
        layers: Sequence[LayerSummary],
        modules: Sequence[NestedLinear],
    ) -> ConversionSummary:
        """The rest of the document."""
        document, count = self.document, len(levels)
        costs = self.costs(levels, layers)
        # A cost that isn't multiply-adds may prefer a prefix form of many of them.
        high = 1.0 if document.get("cost") == "macs" else 2.0
        macs = self.numbers(document, "model_macs_fraction", count, high)
        self.numbers(document, "resident_bytes", count, 2.0**63)
        sizes = [sum(_bytes(module, i) for module in modules) for i in range(count)]
        for name in ("tokens", "seconds", "family_bytes"):
            if not _is_number(document.get(name), 2.0**63):
                raise self.wrong(f"field {name!r}", "is no number from 0 on")
        skipped, cost = document.get("skipped"), document.get("cost")
        if not isinstance(skipped, dict) or not isinstance(cost, str):
            raise self.wrong("field 'skipped' or 'cost'", "is missing")
        if not all(isinstance(text, str) for text in skipped.values()):
            raise self.wrong("field 'skipped'", "holds something else than texts")
        if not all(map(str.isprintable, (cost, *skipped, *skipped.values()))):
            why = "holds characters that can't be printed"
            raise self.wrong("field 'skipped' or 'cost'", why)
        found = map(LevelSummary, costs, macs, sizes)
        return ConversionSummary(
            layers=tuple(layers),
            skipped=skipped,
            levels=dict(zip(levels, found, strict=True)),
            tokens=int(document["tokens"]),
            seconds=document["seconds"],
            cost=cost,
            resident_bytes=sum(module.resident_bytes for module in modules),
        )


def _share(layer: LayerSummary, level: float) -> float:
    """Multiply-adds of a layer at a level, as a share of the dense ones."""
    sides = layer.out_features, layer.in_features
    macs = form_macs(*sides, layer.ranks[level], layer.forms[level])
    return macs / (sides[0] * sides[1])


def _bytes(module: NestedLinear, index: int) -> int:
    """Of the weights and biases that a level needs by itself."""
    rank, form = module.plans[index]
    sides = module.out_features, module.in_features
    biases = sides[0] + (rank if form == "prefix" else 0)
    if form == "dense" and module.bias is None:
        biases = 0
    return (form_macs(*sides, rank, form) + biases) * module.weight.itemsize


def _is_number(value: Any, high: float) -> bool:
    return type(value) in (int, float) and 0 <= value <= high and math.isfinite(value)


def _module(
    reader: _Reader, target: Target, plans: list[Plan], tensors: dict[str, Tensor]
) -> NestedLinear:
    """One layer out of its tensors, after all that can be wrong with them."""
    name, m, n = target.name, target.out_features, target.in_features
    rank = max((plan.rank for plan in plans if plan.form != "dense"), default=0)
    shapes = {"up": (rank, m), "down": (rank, n), "down_bias": (rank,)}
    shapes |= {"up_bias": (m,), "order": (m,)}
    parts = {key: tensors[f"{name}.{key}"] for key in _TENSORS}
    weight = target.module.weight
    for key, part in parts.items():
        where = f"tensor '{name}.{key}'"
        dtype = torch.int64 if key == "order" else weight.dtype
        if part.shape != shapes[key] or part.dtype != dtype:
            why = f"is {part.dtype} {tuple(part.shape)}, not {dtype} {shapes[key]}"
            raise reader.wrong(where, why)
        if not part.isfinite().all():
            raise reader.wrong(where, "holds NaN or infinity")
    order = parts["order"]
    if not torch.equal(order.sort().values, torch.arange(m)):
        raise reader.wrong(f"tensor '{name}.order'", f"is no order of {m} outputs")
    nothing = order.new_zeros(0, dtype=torch.float64)
    # Tails of 0 leave the factors as they are: they have been scaled already.
    tail = torch.zeros(rank + 1, dtype=torch.float64)
    factors = Factors(
        parts["up"], parts["down"], parts["down_bias"], parts["up_bias"], tail, 0.0
    )
    pivots = Pivots(order, nothing, nothing)
    try:
        module = NestedLinear(
            target.module, factors, pivots, plans, transposed=target.transposed
        )
    except RuntimeError as error:
        raise reader.wrong(f"tensor '{name}.up'", f"has no form: {error}") from error
    floats = (b for b in module.buffers() if b.is_floating_point())
    if not all(buffer.isfinite().all() for buffer in floats):
        raise reader.wrong(f"tensor '{name}.up'", "gives forms that are not finite")
    return module
