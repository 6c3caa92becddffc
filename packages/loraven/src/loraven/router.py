# SPDX-License-Identifier: Apache-2.0
"""A converted model that chooses a level for each example, under a stated guarantee.

`fit_router` learns on one part of the data how far each level falls short, and fixes
on the other part how cautious the choice has to be. `RoutedModel` sorts the examples
of a batch by level, runs each group at its level, and restores the order.

Decisions:
- The numbers are buffers in float64 and stay so: ``.to(torch.bfloat16)`` is meant
  for the model, and would move decisions.
- Without a level that is good enough often enough there is no router: an error
  tells what is missing. A router never runs the dense model unless it is a level.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from loraven import regroup
from loraven.batches import Output, evaluating
from loraven.checks import integer
from loraven.collect import Collected, Score, collect
from loraven.difficulty import (
    Ridge,
    choose,
    examples_needed,
    fit_offset,
    fit_ridge,
    limit,
    logs,
)
from loraven.family import Family, find_family
from loraven.features import Features, check_functions, check_goal, kept_levels, look
from torchworks_core.errors import InvalidValue, NotReady

__all__ = ["RoutedModel", "fit_router"]

_NUMBERS = ("mean", "scale", "coefficients", "intercept", "offset", "limit")
_LEAST = 10


class RoutedModel(nn.Module):
    """Runs each example at the level that a router chooses for it.

    Usually made by `fit_router`. In another process, make one without numbers
    around the loaded model and call ``load_state_dict``. It changes the model's level
    while it runs, so that threads that share one wait for each other, and a call of
    the model itself meanwhile runs at any level. For threads at the same time, give
    each a RoutedModel around its own `loraven.at_budget`.

    Args:
        model: from `loraven.convert` or `loraven.load`. It keeps its own level.
        features: as for `fit_router`; it is no part of the state dict.

    Attributes:
        model: the converted model.
        last_levels: for each example of the last batch the level it ran at.
        mean: (F,), buffer as all that follow, float64: features' means,
            ``scale`` (F,) one over their deviations, ``coefficients`` (F, L),
            ``intercept`` (L,), ``offset`` and ``limit`` (), and ``site`` (), int64,
            the converted layer that is looked at, -1 with ``features``.

    Raises:
        NotReady: the model was not converted.

    Example:
        >>> import torch, loraven
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU())
        >>> data = [torch.randn(256, 64)]
        >>> summary = loraven.convert(model, data, levels=(0.3, 0.6, 1.0))
        >>> routed = loraven.fit_router(model, data, target=0.9)
        >>> routed(data[0]).shape, len(routed.last_levels)
        (torch.Size([256, 96]), 256)
        >>> set(routed.last_levels) <= {0.3, 0.6, 1.0}
        True
    """

    def __init__(self, model: nn.Module, *, features: Features = None) -> None:
        find_family(model)
        check_functions(features=features)
        super().__init__()
        self.model, self.features = model, features
        self.training = model.training
        self.last_levels: tuple[float, ...] = ()
        for name, shape in zip(
            _NUMBERS, ((0,), (0,), (0, 0), (0,), (), ()), strict=True
        ):
            empty = torch.full(shape, torch.nan, dtype=torch.float64)
            self.register_buffer(name, empty)
        self.register_buffer("site", torch.tensor(-1))

    def hold(self, ridge: Ridge, offset: float, limit: float, site: int) -> None:
        """Take the numbers of a router over, onto the model's device."""
        device = next((p.device for p in self.model.parameters()), None)
        for name, value in zip(_NUMBERS, (*ridge[:4], offset, limit), strict=True):
            value = torch.as_tensor(value, dtype=torch.float64)
            setattr(self, name, value.to(device, copy=True))
        self.site = torch.tensor(site)

    def route(self, *args: Any, **kwargs: Any) -> list[int]:
        """The number of each example's level, for the model's arguments.

        Raises:
            NotReady: the router has no numbers, or the layer that it looks at did
                not run.
            InvalidValue: the features are not those that it was fitted on.
        """
        family = find_family(self.model)[1]
        site = self._check(family)
        layers = family.modules[site : site + 1] if site >= 0 else ()
        quiet = evaluating(self.model) if self.training else nullcontext()
        with torch.no_grad(), quiet:
            found, _, _ = look(self.model, layers, self.features, args, kwargs)
            if found.shape[1] != len(self.mean):
                why = f"the router was fitted on {len(self.mean)}"
                raise InvalidValue(f"{found.shape[1]} features", why)
            found = found.to(self.mean)
            ridge = Ridge(
                self.mean, self.scale, self.coefficients, self.intercept, math.nan
            )
            return choose(self.limit - ridge.predict(found), self.offset).tolist()

    def _check(self, family: Family) -> int:
        """The number of the layer to look at, if all is there."""
        if not len(self.mean):
            do = "Call loraven.fit_router, or load_state_dict"
            raise NotReady("the router", "it was not fitted", do)
        levels, site = len(family.levels), int(self.site)
        if len(self.intercept) != levels or site >= len(family.modules):
            why = f"fitted on {len(self.intercept)} levels, the model has {levels}"
            raise NotReady("the router", why, "Fit it again")
        if (site < 0) != (self.features is not None):
            why = "it was fitted with" + ("" if site < 0 else "out") + " features="
            raise NotReady("the router", why, "Make the RoutedModel in the same way")
        return site

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, every example at its level.

        Args:
            args: for the model. Tensors whose first size is that of the first
                tensor are split by example, also inside of tuples, lists and
                Mappings; anything else goes to every group as it is.
            kwargs: as ``args``.

        Returns:
            What the model returns: Tensors, tuples, lists, Mappings and dataclasses.

        Raises:
            InvalidValue: there is no tensor, or the groups' outputs can't be put
                together.
            NotReady: as for `route`, or the model's weights have changed since.
        """
        family = find_family(self.model)[1]
        examples = regroup.count((args, kwargs))
        chosen = self.route(*args, **kwargs) if examples else []
        family.check()
        # Two threads would read each other's levels as those to be put back.
        with family.lock, kept_levels(family):
            found = self._run(family, chosen, args, kwargs)
        self.last_levels = tuple(family.levels[level] for level in chosen)
        return found

    def _run(
        self, family: Family, chosen: list[int], args: tuple, kwargs: Mapping[str, Any]
    ) -> Any:
        levels = sorted(set(chosen)) or [0]
        if len(levels) == 1:
            family.set_level(levels[0])
            return self.model(*args, **kwargs)
        numbers = torch.tensor(chosen)
        groups = [(numbers == level).nonzero()[:, 0] for level in levels]
        outputs = []
        for level, rows in zip(levels, groups, strict=True):
            given, named = regroup.select((args, dict(kwargs)), rows, len(chosen))
            family.set_level(level)
            outputs.append(self.model(*given, **named))
        return regroup.merge(outputs, groups)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before, site = {name: getattr(self, name) for name in _NUMBERS}, self.site
        super()._apply(fn, recurse)
        # Read in every forward, so never behind a device's queue.
        self.site = site
        for name, value in before.items():
            now = getattr(self, name)
            if now.dtype != value.dtype:
                setattr(self, name, value.to(now.device))
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        for name in _NUMBERS:
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(given, Tensor) and given.ndim == own.ndim:
                setattr(self, name, own.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"features={len(self.mean)}, levels={len(self.intercept)}"


def fit_router(
    model: nn.Module,
    data: Iterable[Any],
    *,
    target: float = 0.95,
    alpha: float = 0.05,
    score: Score = None,
    output: Output = None,
    features: Features = None,
    seed: int = 0,
) -> RoutedModel:
    """Make a router that lets at most a share ``alpha`` of examples miss a target.

    Four sevenths of the examples, at random, teach what each level scores; the others
    fix an offset by conformal risk control. The guarantee holds for new examples in
    random order with these, on average over the draw of the data: the chance of a
    score below ``target`` is at most ``alpha``. Whether that pays against one fixed
    level, `loraven.audit` tells.

    Args:
        model: from `loraven.convert`. Its levels are tried in order of their cost;
            with level 1.0 among them any target can be held.
        data: unlabelled inputs, in batches as for `loraven.convert`; read once.
        target: the score that an example should reach, below 1.
        alpha: the share of examples that may miss it, in (0, 1).
        score: (reference, output) -> (N,), at most 1, more is better; reference is
            the dense model's output. None: the cosine, of the mean over valid
            positions if the output is (N, T, d).
        output: picks the tensor to score; None: the output itself, ``logits``,
            ``last_hidden_state``, or the first Tensor.
        features: batch -> (N, F), from what is known before the model runs. The
            batch is what the model was called with: one argument itself, several as
            a tuple, or a dict. None: mean and deviation over the valid tokens of
            the first converted layer's input, and log of their number.
        seed: of the split.

    Returns:
        The router around ``model``, which stays as it is.

    Raises:
        InvalidValue: too few examples, or the largest level misses too often.
        NotReady: the model was not converted.
        TypeError: an argument of a wrong type.

    Example:
        >>> import torch, loraven
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU())
        >>> data = [torch.randn(256, 64)]
        >>> summary = loraven.convert(model, data)
        >>> routed = loraven.fit_router(model, data, target=0.9, alpha=0.1)
        >>> dense = torch.nn.functional.linear(data[0], model[0].weight, model[0].bias)
        >>> scores = torch.cosine_similarity(routed(data[0]), dense.relu())
        >>> bool((scores < 0.9).float().mean() < 0.15)
        True
    """
    find_family(model)
    target, alpha = check_goal(target, alpha)
    check_functions(score=score, output=output, features=features)
    integer("seed", seed, 0)
    found = collect(model, data, score, output, features)
    ridge, shift = _fit(found, target, alpha, seed)
    routed = RoutedModel(model, features=features)
    routed.hold(ridge, shift, limit(target), found.site)
    return routed


def examples_for(alpha: float, learn: int, fix: int, whole: int) -> int:
    """The fewest examples of which two parts of ``whole`` are enough for a router.

    Example:
        >>> examples_for(0.05, 4, 3, 7), examples_for(0.05, 4, 3, 10)
        (45, 64)
    """
    needed = examples_needed(alpha)
    return max(-(-_LEAST * whole // learn), -(-needed * whole // fix))


def _fit(
    found: Collected, target: float, alpha: float, seed: int
) -> tuple[Ridge, float]:
    examples = len(found.scores)
    needed = examples_for(alpha, 4, 3, 7)
    if examples < needed:
        why = f"too few for alpha={alpha!r}"
        do = f"Give at least {needed}, better a thousand"
        raise InvalidValue(f"{examples} examples", why, do)
    fixing = examples * 3 // 7
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed))
    learn, fix = order[:-fixing], order[-fixing:]
    ridge = fit_ridge(found.features[learn], logs(found.scores[learn]))
    margins = limit(target) - ridge.predict(found.features[fix])
    shift = fit_offset(margins, found.scores[fix], target, alpha)
    if shift == math.inf:
        good = int((found.scores[fix, -1] >= target).sum())
        raise InvalidValue(
            f"target={target!r} with alpha={alpha!r}",
            f"the largest level reaches it in {good} of {fixing} examples only",
            "Convert with level 1.0, which always does, or ask for less",
        )
    return ridge, shift
