# SPDX-License-Identifier: Apache-2.0
"""One call that turns a model's linear layers into one family of budgets.

Find the layers, take the moments of their inputs, factorise, weigh their errors by
what the output minds, choose a rank and a form for each layer and level, build the
new layers, and only then swap them in. One batch runs to see that they are called in
place of the originals. Whatever fails leaves the model, its hooks and its flags as
they were.

The module is not called ``convert``: as an attribute of the package, that name is
the function.

A level holds whatever the input is. Layers that ran equally often in every single
calibration batch share one budget; a pooler that runs once for each sentence, or a
decoder, has a budget of its own. So each group keeps to the level by itself, and
with it every sum of them, in whatever proportion they run later. Under a process
group every process takes the choices of the first, with the mean of all
weights, so that all hold the same family.
"""

import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from loraven.allocate import allocate
from loraven.arguments import (
    Cost,
    check_functions,
    check_request,
    check_weights,
    require,
)
from loraven.batches import Judge, Output, TokenMask, check_iterable
from loraven.calibrate import (
    Calibration,
    calibrate,
    count_macs,
    damages,
    gathered,
)
from loraven.eligible import Target, find_targets
from loraven.factorize import Factors, Moments, Pivots, output_pca, pivot
from loraven.family import Family, install, revert
from loraven.forms import Choice, choices, cost_function, form_macs
from loraven.levels import check_levels
from loraven.nested import NestedLinear, Plan
from loraven.summary import ConversionSummary, LayerSummary, LevelSummary
from torchworks_core.errors import InvalidValue, NotReady

__all__ = ["convert"]


class _Layer(NamedTuple):
    """What is known of a layer before the levels are chosen."""

    target: Target
    factors: Factors
    pivots: Pivots
    choices: list[Choice]
    # How often its cost counts.
    times: int
    # Of the layers that run equally often.
    group: int


def convert(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    levels: Sequence[float] = (0.3, 0.5, 0.7, 1.0),
    cost: Cost = "macs",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    min_features: int = 32,
    sensitivity: bool = True,
    output: Output = None,
    token_mask: TokenMask = None,
) -> ConversionSummary:
    """Convert ``model`` in place, and leave it at its largest level.

    Args:
        model: any module, or ``torch.compile`` of one. ``nn.Linear`` and transformers'
            ``Conv1D`` that own their weight are converted; the summary says why
            others are not. It is run in evaluation mode, on the device where it is.
        calibration: a few hundred unlabelled inputs, in batches: a Tensor is passed
            as ``model(x)``, a tuple as ``model(*x)``, a Mapping as ``model(**x)``.
        levels: 1 to 7 budgets in (0, 1], as fractions of the dense cost of the
            converted layers. At 1.0 every layer runs as before, to the last bit.
            Each group of layers that ran equally often in every calibration batch
            keeps to them by itself, so they hold for other inputs, too, as long as
            the layers of a group go on running equally often.
        cost: "macs"; "latency", measured on this machine; "energy", an estimator's;
            or a function (out, in, rank, form) -> positive number for one row.
        include: shell patterns of the names to convert; None: all.
        exclude: shell patterns of the names to leave alone.
        min_features: smaller layers are left alone.
        sensitivity: weigh errors by what they do to the model's output, by two
            backward passes for each batch, and two more for up to 96 examples;
            False: each layer by its own relative error, for models without
            gradients; much worse. Layers that the output does not depend on are left
            alone.
        output: picks the tensor that quality is judged by; None: the output itself,
            ``logits``, ``last_hidden_state``, or the first Tensor.
        token_mask: gives for a batch the mask of its valid positions, in the layout
            of the layers' inputs; None: ``attention_mask`` of a Mapping. Padding
            enters no statistics. Where a mask fits an input in two orders (flattened,
            or as many examples as tokens), a batch runs with other padding, and a
            layer that shows another order is left alone. That needs ids (B, T) or
            floats (B, T, n) in the batch, and a ``token_mask`` that is not square:
            else the mask's order is believed.

    Returns:
        The summary; ``print`` shows it as a table.

    Raises:
        InvalidValue: nothing can be converted, the calibration is empty or not
            finite, a level can't be reached, the model is converted already. The
            model is then as it was.
        TypeError: an argument is of a wrong type.
        NotReady: another process of the group failed.

    Example:
        >>> import torch, loraven
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU())
        >>> data = [torch.randn(256, 64)]
        >>> before = model(data[0])
        >>> summary = loraven.convert(model, data, levels=(0.3, 0.5, 1.0))
        >>> torch.equal(model(data[0]), before)
        True
        >>> loraven.set_budget(model, 0.5)
        0.5
        >>> summary.levels[0.5].cost_fraction <= 0.5
        True
    """
    begin = time.perf_counter()
    ordered = check_levels(levels)
    # Names and places are those of the model in a compiled wrapper.
    model = getattr(model, "_orig_mod", model)
    check_request(model, cost, include, exclude, min_features)
    check_functions(output=output, token_mask=token_mask)
    check_iterable(calibration, "calibration")
    # What is made in inference mode could never be trained.
    with torch.inference_mode(False):
        targets, skipped = find_targets(model, include, exclude, min_features)
        require(targets, skipped)
        check_weights(targets)
        judge = Judge(output, token_mask, sensitivity)
        found = calibrate(model, calibration, targets, judge)
        targets = [target for target in targets if target.name in found.moments]
        skipped |= found.skipped
        require(targets, skipped)
        while True:
            request = ordered, cost, judge
            summary, modules = _build(model, targets, found, skipped, request)
            seconds = time.perf_counter() - begin
            summary = replace(summary, seconds=seconds)
            names = tuple(target.name for target in targets)
            family = Family(names, modules, ordered, summary)
            family.set_level(len(ordered) - 1)
            missed = _installed(model, family, targets, found.examples[0])
            if not missed:
                return summary
            skipped |= dict.fromkeys(missed, "it is called by another reference")
            targets = [target for target in targets if target.name not in missed]
            require(targets, skipped)


def _build(
    model: nn.Module,
    targets: Sequence[Target],
    found: Calibration,
    skipped: dict[str, str],
    request: tuple[tuple[float, ...], Cost, Judge],
) -> tuple[ConversionSummary, tuple[NestedLinear, ...]]:
    """The new layers, outside of the model, and what is to be said of them."""
    levels, cost, judge = request
    layers, plans = _plan(model, targets, found, levels, cost, judge)
    modules = tuple(
        NestedLinear(
            layer.target.module,
            layer.factors,
            layer.pivots,
            [Plan(choice.rank, choice.form) for choice in plan],
            transposed=layer.target.transposed,
        )
        for layer, plan in zip(layers, plans, strict=True)
    )
    described = zip(layers, plans, strict=True)
    summary = ConversionSummary(
        layers=tuple(_describe(*both, levels) for both in described),
        skipped=skipped,
        levels=_describe_levels(model, found, layers, plans, levels),
        tokens=found.tokens,
        seconds=0.0,
        cost=cost if isinstance(cost, str) else getattr(cost, "__name__", "cost"),
        resident_bytes=sum(module.resident_bytes for module in modules),
    )
    return summary, modules


def _installed(
    model: nn.Module, family: Family, targets: Sequence[Target], batch: Any
) -> list[str]:
    """Swap the layers in, and see that they run; else take them back, and say which.

    A model may hold a layer in a list of its own beside the attribute: it goes on
    calling the original, at every level.
    """
    expected = count_macs(model, batch, targets)[1]
    install(model, family)
    error, missed = None, []
    try:
        new = [
            target._replace(module=module)
            for target, module in zip(targets, family.modules, strict=True)
        ]
        found = count_macs(model, batch, new)[1]
        missed = [name for name in found if found[name] < expected[name]]
    except Exception as problem:
        error = problem
    except BaseException:
        revert(model)
        raise
    everyone = gathered((None if error is None else repr(error), missed))
    if error is not None or any(problem or names for problem, names in everyone):
        revert(model)
    if error is not None:
        raise error
    for rank, (problem, _) in enumerate(everyone):
        if problem is not None:
            raise NotReady(f"conversion in process {rank}", problem)
    return sorted({name for _, names in everyone for name in names})


def _plan(
    model: nn.Module,
    targets: Sequence[Target],
    found: Calibration,
    levels: tuple[float, ...],
    cost: Cost,
    judge: Judge,
) -> tuple[list[_Layer], list[list[Choice]]]:
    """Layers with their factors, and for each of them one choice for each level."""
    error, layers, curves = None, [], []
    try:
        layers = _factorise(targets, found, cost)
        curves = _damages(model, layers, found, judge)
    except Exception as problem:
        error = problem
    tables = [layer.choices for layer in layers]
    everyone = gathered((None if error is None else repr(error), curves, tables))
    if error is not None:
        raise error
    for rank, (problem, _, _) in enumerate(everyone):
        if problem is not None:
            raise NotReady(f"conversion in process {rank}", problem)
    # The first process decides where rounding or measuring could differ.
    layers = [
        layer._replace(choices=[Choice(*choice) for choice in table])
        for layer, table in zip(layers, everyone[0][2], strict=True)
    ]
    mean = [
        [sum(values) / len(everyone) for values in zip(*same, strict=True)]
        for same in zip(*(curves for _, curves, _ in everyone), strict=True)
    ]
    return layers, _choose(layers, mean, levels)


def _factorise(
    targets: Sequence[Target], found: Calibration, cost: Cost
) -> list[_Layer]:
    shared = None if cost == "latency" else cost_function(cost)
    tables: dict[tuple, Any] = {}
    layers = []
    for target in targets:
        name, weight = target.name, target.matrix()
        bias = target.module._parameters.get("bias")
        metric = found.metrics.get(name)
        multiple = 16 if weight.is_cuda else 8
        factors = output_pca(weight, bias, found.moments[name], metric=metric)
        if factors.energy and factors.rank < multiple:
            _warn_of_few_directions(target, found.moments[name], factors.rank)
        factors = _widened(factors, target, multiple)
        pivots = pivot(factors.up)
        price, times = shared, found.rows[name]
        if price is None:
            times = found.calls[name]
            rows = max(1, round(found.rows[name] / times))
            key = (rows, weight.dtype, weight.device)
            if key not in tables:
                options = {"dtype": weight.dtype, "device": weight.device}
                tables[key] = cost_function("latency", rows=rows, **options)
            price = tables[key]
        options = choices(
            factors,
            pivots,
            target.out_features,
            target.in_features,
            multiple=multiple,
            cost=price,
        )
        group = found.groups[name]
        layers.append(_Layer(target, factors, pivots, options, times, group))
    return layers


def _widened(factors: Factors, target: Target, multiple: int) -> Factors:
    """Add directions without energy, up to the next rank that may be chosen.

    Else a layer whose inputs hardly vary would have no reduced form at all. The new
    outputs are independent of the others, so that a layer can be pivoted and trained.
    """
    rank = min(-factors.rank % multiple + factors.rank, *target.matrix().shape)
    more = rank - factors.rank
    if not more:
        return factors
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(factors.up.shape[1], more, generator=generator)
    basis = torch.cat([factors.up.T, random.to(factors.up)], 1)
    extra = torch.linalg.qr(basis).Q[:, factors.rank :].T
    return replace(
        factors,
        up=torch.cat([factors.up, extra]),
        down=torch.cat(
            [factors.down, factors.down.new_zeros(more, target.in_features)]
        ),
        down_bias=torch.cat([factors.down_bias, factors.down_bias.new_zeros(more)]),
        tail=torch.cat([factors.tail, factors.tail[-1:].expand(more)]),
    )


def _warn_of_few_directions(target: Target, moments: Moments, rank: int) -> None:
    """Constant inputs lose nothing; an outlier hides all the rest."""
    spread = moments.covariance.diagonal().max()
    if spread > 1e-12 * moments.mean.square().max():
        warnings.warn(
            f"the inputs of layer {target.name!r} make its outputs vary in {rank} of "
            f"{target.out_features} directions, with a standard deviation of up to "
            f"{spread.sqrt():.3g}. If that is an outlier, remove it",
            UserWarning,
            stacklevel=5,
        )


def _damages(
    model: nn.Module, layers: Sequence[_Layer], found: Calibration, judge: Judge
) -> list[list[float]]:
    """What each rank of each layer does to the output, or to the layer's own."""
    factors = {layer.target.name: layer.factors for layer in layers}
    if judge.metrics:
        targets = [layer.target for layer in layers]
        curves = damages(model, found.examples, targets, factors, judge)
        return [curves[target.name] for target in targets]
    return [(f.tail / (f.energy or 1.0)).tolist() for f in factors.values()]


def _choose(
    layers: Sequence[_Layer], curves: Sequence[list[float]], levels: tuple[float, ...]
) -> list[list[Choice]]:
    losses = [
        [*(curve[choice.rank] for choice in layer.choices[:-1]), 0.0]
        for layer, curve in zip(layers, curves, strict=True)
    ]
    plans: list[list[Choice]] = [[] for _ in layers]
    groups: dict[int, list[int]] = {}
    for number, layer in enumerate(layers):
        groups.setdefault(layer.group, []).append(number)
    # The one that is worst off first: what its error asks for is enough for all.
    for numbers in sorted(groups.values(), key=lambda n: -_least(layers, n)):
        costs = [[c.cost for c in layers[number].choices] for number in numbers]
        mine = [losses[number] for number in numbers]
        name = layers[numbers[0]].target.name
        more = f" and the {len(numbers) - 1} that run as often as it"
        who = f"layer {name!r}{more if len(numbers) > 1 else ''}"
        if levels[0] < 1 <= _least(layers, numbers):
            why = f"level {levels[0]}: no reduced form costs less than the layer itself"
            raise InvalidValue(who, why, "Exclude it, or give another cost")
        try:
            picked = allocate(costs, mine, sum(cost[-1] for cost in costs), levels)
        except InvalidValue as error:
            raise InvalidValue(who, str(error), "Or exclude it") from error
        for position, number in enumerate(numbers):
            options = layers[number].choices
            plans[number] = [options[level[position]] for level in picked]
    return plans


def _least(layers: Sequence[_Layer], numbers: Sequence[int]) -> float:
    """The share of their dense cost that some layers can't do without."""
    tables = [layers[number].choices for number in numbers]
    return sum(table[0].cost for table in tables) / sum(t[-1].cost for t in tables)


def _describe(
    layer: _Layer, plan: Sequence[Choice], levels: tuple[float, ...]
) -> LayerSummary:
    tail, energy = layer.factors.tail, layer.factors.energy
    errors = [
        0.0
        if choice.form == "dense" or not energy
        else float(tail[choice.rank]) / energy
        for choice in plan
    ]
    return LayerSummary(
        name=layer.target.name,
        in_features=layer.target.in_features,
        out_features=layer.target.out_features,
        ranks={level: choice.rank for level, choice in zip(levels, plan, strict=True)},
        forms={level: choice.form for level, choice in zip(levels, plan, strict=True)},
        expected_error=dict(zip(levels, errors, strict=True)),
    )


def _describe_levels(
    model: nn.Module,
    found: Calibration,
    layers: Sequence[_Layer],
    plans: Sequence[Sequence[Choice]],
    levels: tuple[float, ...],
) -> dict[float, LevelSummary]:
    targets = [layer.target for layer in layers]
    total, own = count_macs(model, found.examples[0], targets)
    dense = sum(layer.choices[-1].cost * layer.times for layer in layers)
    result = {}
    for number, level in enumerate(levels):
        spent = saved = size = 0
        for layer, plan in zip(layers, plans, strict=True):
            target, choice = layer.target, plan[number]
            sides = target.out_features, target.in_features
            full, macs = (
                sides[0] * sides[1],
                form_macs(*sides, choice.rank, choice.form),
            )
            spent += choice.cost * layer.times
            saved += own[target.name] // full * (full - macs)
            # A form has as many weights as multiply-adds for one row.
            size += (macs + biases(target, choice)) * target.module.weight.itemsize
        fraction = (total - saved) / total if total else 1.0
        result[level] = LevelSummary(spent / dense, fraction, size)
    return result


def biases(target: Target, choice: Choice) -> int:
    """How many numbers a form of a layer has beside its weights, order apart."""
    if choice.form == "dense":
        return target.out_features if target.module.bias is not None else 0
    return target.out_features + (choice.rank if choice.form == "prefix" else 0)
