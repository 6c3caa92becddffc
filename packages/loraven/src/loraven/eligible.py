# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model can be converted, and why the others can't.

Only a layer that owns an ordinary weight, is reached under one name, and really
runs when the model runs may be replaced: anything else would change the model at
budget 1, or would be bypassed at every other budget. Nothing here changes a model.
"""

from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

__all__ = ["Target", "find_targets"]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Target(NamedTuple):
    """A layer y = x W^T + b that may be converted.

    Attributes:
        name: qualified name in the model.
        module: the layer itself.
        out_features: length of an output vector.
        in_features: length of an input vector.
        transposed: whether its weight is stored as (in, out), as transformers'
            ``Conv1D`` does.
    """

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    transposed: bool

    def matrix(self) -> torch.Tensor:
        """Return the weight as (out, in), detached, sharing memory."""
        weight = self.module.weight.detach()
        return weight.T if self.transposed else weight


def find_targets(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    min_features: int = 32,
) -> tuple[list[Target], dict[str, str]]:
    """Walk the modules of ``model``.

    Args:
        model: any module.
        include: shell patterns of qualified names; None means every name.
        exclude: shell patterns of qualified names; stronger than ``include``.
        min_features: both sides of a layer have at least this many features.

    Returns:
        The layers that can be converted, in the order of ``named_modules``, and
        for every other layer that looks like a linear one the reason.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
        >>> targets, skipped = find_targets(model)
        >>> [target.name for target in targets], skipped
        (['0'], {'1': 'too small: 2 x 64, min_features is 32'})
    """
    names, holders = _places(model)
    targets, skipped = [], {}
    for name, module in model.named_modules():
        transposed = _is_conv1d(module)
        kind = type(module).__name__
        linear = isinstance(module, nn.Linear) or "Linear" in kind
        if not (transposed or linear) or "PackedParams" in kind:
            continue
        reason = (
            _by_pattern(name, include, exclude)
            or _by_kind(module, transposed)
            or _by_place(name, module, names, holders)
            or _bypassed(model, name)
            or _by_size(module, min_features)
        )
        if reason:
            skipped[name] = reason
        else:
            rows, columns = module.weight.shape
            sizes = (columns, rows) if transposed else (rows, columns)
            targets.append(Target(name, module, sizes[0], sizes[1], transposed))
    return targets, skipped


def _places(model: nn.Module) -> tuple[dict, dict]:
    """Every name of each module, and every module that holds each parameter."""
    names, holders = defaultdict(list), defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
        if len(names[id(module)]) == 1:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    holders[id(parameter)].append(f"{name}.{key}")
    return names, holders


def _is_conv1d(module: nn.Module) -> bool:
    # By name: importing transformers only to ask would take seconds.
    kind = type(module)
    home = kind.__module__
    return kind.__name__ == "Conv1D" and home == "transformers.pytorch_utils"


def _by_pattern(
    name: str, include: Sequence[str] | None, exclude: Sequence[str]
) -> str | None:
    if include is not None and not any(fnmatchcase(name, p) for p in include):
        return "not in include"
    matches = [p for p in exclude if fnmatchcase(name, p)]
    return f"excluded by {matches[0]!r}" if matches else None


def _by_kind(module: nn.Module, transposed: bool) -> str | None:
    kind = type(module)
    if parametrize.is_parametrized(module):
        return "parametrized"
    if not transposed and not isinstance(module, nn.Linear):
        quantized = "quantized" in kind.__module__
        return "quantized" if quantized else f"not a plain linear layer: {kind}"
    ordinary = transposed or kind.forward is nn.Linear.forward
    if not ordinary or "forward" in vars(module):
        return f"not a plain linear layer: {kind.__name__} with its own forward"
    weight = module._parameters.get("weight")
    if weight is None:
        return "parametrized: its weight is computed"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.layout != torch.strided:
        return f"sparse: {weight.layout}"
    if weight.device.type == "meta":
        return "on the meta device, without values"
    return None if weight.dtype in _DTYPES else f"quantized: {weight.dtype}"


def _by_place(name: str, module: nn.Module, names: dict, holders: dict) -> str | None:
    if name == "":
        return "it is the whole model: put it into a Sequential"
    others = [other for other in names[id(module)] if other != name]
    if others:
        return f"shared: the same module is {others[0]!r}"
    tied = [p for p in holders[id(module.weight)] if p != f"{name}.weight"]
    return f"tied: its weight is {tied[0]!r}" if tied else None


def _bypassed(model: nn.Module, name: str) -> str | None:
    """The fused path of torch's encoder layer reads weights and calls no module."""
    parent = name
    while parent:
        parent = parent.rpartition(".")[0]
        layer = model.get_submodule(parent)
        if isinstance(layer, nn.TransformerEncoderLayer):
            fused = layer.activation_relu_or_gelu
            why = "bypassed by the fast path of TransformerEncoderLayer"
            do = "its activation_relu_or_gelu = 0 turns that off"
            return f"{why}; {do}" if fused else None
    return None


def _by_size(module: nn.Module, min_features: int) -> str | None:
    sides = tuple(module.weight.shape)
    if min(sides) >= min_features:
        return None
    return f"too small: {sides[0]} x {sides[1]}, min_features is {min_features}"
