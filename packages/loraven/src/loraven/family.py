# SPDX-License-Identifier: Apache-2.0
"""A converted model as a family of budgets: choose one, share it, take it back.

What belongs to a conversion stands in one plain attribute of the model, so that
deepcopy and pickle carry it along and a budget is found without a search. A twin
at another budget is a copy of the module tree that shares every tensor: budgets are
integers in the modules, so two twins in two threads don't disturb each other.
"""

import copy
import threading
from bisect import bisect_right
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from loraven.batches import tensors_in
from loraven.checks import number
from loraven.nested import NestedLinear
from loraven.summary import ConversionSummary
from torchworks_core.errors import InvalidValue, NotReady

__all__ = ["at_budget", "get_budget", "revert", "set_budget"]

_KEY = "_loraven"
_ROUNDING = 1e-6
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Lock:
    """A lock that one thread may take twice; a copy of it is a lock of its own.

    Example:
        >>> lock = Lock()
        >>> with lock, lock, copy.deepcopy(lock):
        ...     print("inside")
        inside
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Lock, ()


@dataclass(frozen=True)
class Family:
    """The converted layers of one model.

    Attributes:
        names: their qualified names.
        modules: the layers themselves.
        levels: ascending, in (0, 1]; a layer's own number of a level is the index.
        summary: what the conversion returned.
        lock: held by who changes the level for a while and puts it back.
    """

    names: tuple[str, ...]
    modules: tuple[NestedLinear, ...]
    levels: tuple[float, ...]
    summary: ConversionSummary
    lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def index(self, budget: float) -> int:
        """The largest level that ``budget`` pays for."""
        value = number("budget", budget, 0.0, 1.0, above=True)
        # A level as float32 wrote it is that level.
        found = bisect_right(self.levels, value * (1 + _ROUNDING)) - 1
        if found < 0:
            listed = ", ".join(map(repr, self.levels))
            why = "it is below the smallest level"
            raise InvalidValue(f"budget={value!r}", why, f"The levels are {listed}")
        return found

    def set_level(self, index: int) -> None:
        """Put every layer on one level; ``len(levels)`` is the dense form."""
        for module in self.modules:
            # Past Module.__setattr__, which takes ten times as long.
            module.__dict__["level"] = index

    def check(self, index: int | None = None, thorough: bool = False) -> None:
        """Refuse factors that do not belong to the weights as they are now.

        Args:
            index: of the level that is about to run; None: all reduced ones.
            thorough: see `NestedLinear.check`.

        Raises:
            NotReady: naming the layer.
        """
        for name, module in zip(self.names, self.modules, strict=True):
            plans = module.plans if index is None else module.plans[index : index + 1]
            # The forms alone: this runs in every switch.
            if [1 for _, form in plans if form != "dense"] and not module.check(
                thorough
            ):
                raise stale(name)


def stale(name: str) -> NotReady:
    """The error for a layer whose weights are not those of its factors."""
    why = "its weights have changed since it was converted"
    do = "Its factors are stale, convert again, or put the weights back"
    return NotReady(f"layer {name!r}", why, do)


def install(model: nn.Module, family: Family) -> None:
    """Replace the originals by ``family.modules``, all of them or none."""
    done: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name, module in zip(family.names, family.modules, strict=True):
            parent, key = _place(model, name)
            done.append((parent, key, parent._modules[key]))
            share_hooks(parent._modules[key], module)
            parent._modules[key] = module
        vars(model)[_KEY] = family
    except BaseException:
        for parent, key, original in reversed(done):
            parent._modules[key] = original
        vars(model).pop(_KEY, None)
        raise


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, key = name.rpartition(".")
    return model.get_submodule(parent), key


def share_hooks(original: nn.Module, module: nn.Module) -> None:
    """One set of hooks for both: they fire, and their handles remove them, in both."""
    for name in _HOOKS:
        vars(module)[name] = vars(original)[name]
    module._is_full_backward_hook = original._is_full_backward_hook


def is_converted(model: nn.Module) -> bool:
    """Whether any part of the model is a converted layer."""
    return any(isinstance(module, NestedLinear) for module in model.modules())


def find_family(model: nn.Module) -> tuple[nn.Module, Family]:
    """The converted model in ``model``, itself or inside of a wrapper.

    Raises:
        TypeError: ``model`` is no module.
        NotReady: it was not converted.
        InvalidValue: it has several parts that were converted one by one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch Module, not a {type(model).__name__}")
    if _KEY in vars(model):
        return model, vars(model)[_KEY]
    found = [part for part in model.modules() if _KEY in vars(part)]
    if not found:
        do = "Call loraven.convert or loraven.load first"
        raise NotReady(type(model).__name__, "it was not converted", do)
    if len(found) > 1:
        why = f"{len(found)} parts of it were converted one by one"
        raise InvalidValue(type(model).__name__, why, "Call this for each part")
    return found[0], vars(found[0])[_KEY]


def set_budget(model: nn.Module, budget: float) -> float:
    """Put a converted model on the largest level that a budget pays for.

    One integer is written for each layer; nothing is computed or copied, unless
    weights were written to since: then their bits are compared once. Writes that
    move no version counter (``.data``, numpy, fused optimizers) are not noticed here;
    `save`, `export_static` and `distill` notice them.

    Args:
        model: from `loraven.convert`, or a wrapper around it.
        budget: fraction of the converted layers' dense cost, in (0, 1].

    Returns:
        The level.

    Raises:
        InvalidValue: the budget is below the smallest level, or no fraction.
        NotReady: the model was not converted, or its weights have changed since.

    Example:
        >>> import torch, loraven
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> data = [torch.randn(256, 64)]
        >>> summary = loraven.convert(model, data, levels=(0.3, 0.6, 1.0))
        >>> loraven.set_budget(model, 0.7), loraven.get_budget(model)
        (0.6, 0.6)
    """
    family = find_family(model)[1]
    index = family.index(budget)
    family.check(index)
    family.set_level(index)
    return family.levels[index]


def get_budget(model: nn.Module) -> float:
    """The level that a converted model is on.

    Raises:
        NotReady: the model was not converted.
    """
    family = find_family(model)[1]
    return (*family.levels, 1.0)[family.modules[0].level]


def at_budget(model: nn.Module, budget: float) -> nn.Module:
    """A second model with a budget of its own that shares every tensor.

    Use one for each thread. Training, distilling or loading weights into one does so
    to both. Moving one to another device or dtype does not: make new ones afterwards.

    Args:
        model: from `loraven.convert`.
        budget: as for `set_budget`.

    Returns:
        A copy of the module tree on its level; ``model`` stays as it is. What can't
        be copied at all, such as a lock or an open file, is shared.

    Raises:
        InvalidValue: the budget is below the smallest level, or no fraction; or an
            attribute of the model has no copy.
        NotReady: the model was not converted, or its weights have changed since.

    Example:
        >>> import torch, loraven
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> summary = loraven.convert(model, [torch.randn(256, 64)])
        >>> small = loraven.at_budget(model, 0.3)
        >>> small[0].weight is model[0].weight
        True
        >>> loraven.get_budget(small), loraven.get_budget(model)
        (0.3, 1.0)
    """
    family = find_family(model)[1]
    index = family.index(budget)
    family.check(index)
    return at_level(model, index)


def at_level(model: nn.Module, index: int) -> nn.Module:
    """`at_budget` by the number of a level; ``len(levels)`` is the dense form."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        shared |= {id(tensor): tensor for tensor in tensors_in(vars(module))}
        if isinstance(module, NestedLinear):
            shared[id(module._freshness)] = module._freshness
    try:
        twin = copy.deepcopy(model, dict(shared))
    except TypeError:
        shared |= _without_copy(vars(model))
        try:
            twin = copy.deepcopy(model, shared)
        except TypeError as error:
            why = f"an attribute has no copy: {error}"
            raise InvalidValue(type(model).__name__, why) from error
    find_family(twin)[1].set_level(index)
    return twin


def _without_copy(value: Any) -> dict[int, Any]:
    """What can't be copied among everything that hangs on a value, by its id.

    Only what has no attributes itself: a lock can be shared, but an object that holds
    one may hold the model, too.
    """
    found, seen, queue = {}, set(), [value]
    while queue:
        one = queue.pop()
        if id(one) in seen or isinstance(one, Tensor | type):
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            queue += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            queue += one
        elif isinstance(getattr(one, "__dict__", None), dict) and not isinstance(
            one, ModuleType
        ):
            queue += vars(one).values()
        else:
            try:
                copy.copy(one)
            except TypeError:
                found[id(one)] = one
    return found


def revert(model: nn.Module) -> nn.Module:
    """Put the original layers back: the same objects with the same hooks.

    Args:
        model: from `loraven.convert`.

    Returns:
        ``model``, changed in place. Parameters that were set on a converted layer
        since are the original's.

    Raises:
        NotReady: the model was not converted.
        InvalidValue: where a converted layer was, there is another module, or none;
            the model is then as it was.

    Example:
        >>> import torch, loraven
        >>> layer = torch.nn.Linear(64, 64)
        >>> model = torch.nn.Sequential(layer)
        >>> summary = loraven.convert(model, [torch.randn(256, 64)])
        >>> model[0] is layer, loraven.revert(model)[0] is layer
        (False, True)
    """
    root, family = find_family(model)
    present = dict(root.named_modules(remove_duplicate=False))
    for name, module in zip(family.names, family.modules, strict=True):
        if present.get(name) is not module:
            now = type(present[name]).__name__ if name in present else "nothing"
            why = f"there is {now} now, not the converted layer"
            raise InvalidValue(f"layer {name!r}", why, "Put it back there first")
    for name, module in zip(family.names, family.modules, strict=True):
        parent, key = _place(root, name)
        module._link()
        original = module.original
        original.training = module.training
        original._is_full_backward_hook = module._is_full_backward_hook
        parent._modules[key] = original
    del vars(root)[_KEY]
    return model
