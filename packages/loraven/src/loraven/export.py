# SPDX-License-Identifier: Apache-2.0
"""One level of a converted model as a plain model, for export and deployment.

The copy has its own tensors and keeps only what its level needs: no original
weight under a reduced layer, no other level, no switch.
"""

import copy
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import linear

from loraven.factorize import gauge_of_order
from loraven.family import _KEY, find_family, stale
from loraven.forms import plain_gauge, run_gauge, run_prefix
from loraven.nested import NestedLinear

__all__ = ["GaugeLinear", "PrefixLinear", "export_static"]


class _Reduced(nn.Module):
    """A linear map of reduced rank; code that reads a layer's dtype finds it."""

    out_features: int
    in_features: int

    def _hold(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            value = tensor.detach().clone().contiguous()
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PrefixLinear(_Reduced):
    """Two factors: ``(x @ weight.T + down_bias) @ up + bias``.

    Args:
        down: (r, in).
        down_bias: (r,).
        up: (r, out).
        up_bias: (out,).

    Example:
        >>> import torch
        >>> ones = torch.ones
        >>> layer = PrefixLinear(ones(1, 3), ones(1), ones(1, 2), torch.zeros(2))
        >>> layer(torch.ones(1, 3))
        tensor([[4., 4.]])
    """

    def __init__(
        self, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor
    ) -> None:
        super().__init__()
        self._hold(weight=down, down_bias=down_bias, up=up, bias=up_bias)
        self.in_features, self.out_features = down.shape[1], up.shape[1]

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if is_compiling():
            low = linear(input, self.weight, self.down_bias)
            return linear(low, self.up.t(), self.bias)
        return run_prefix(input, self.weight, self.down_bias, self.up.t(), self.bias)


class GaugeLinear(_Reduced):
    """Some outputs from x, the others from those, then into their order.

    Args:
        skeleton: (r, in).
        skeleton_bias: (r,).
        interpolation: (out - r, r).
        interpolation_bias: (out - r,).
        inverse: (out,) int64, where each output stands among the two parts.

    Example:
        >>> import torch
        >>> one, none = torch.ones(1, 1), torch.zeros(1)
        >>> layer = GaugeLinear(one, none, 2 * one, none, torch.tensor([1, 0]))
        >>> layer(torch.ones(1, 1))
        tensor([[2., 1.]])
    """

    inverse: Tensor

    def __init__(
        self,
        skeleton: Tensor,
        skeleton_bias: Tensor,
        interpolation: Tensor,
        interpolation_bias: Tensor,
        inverse: Tensor,
    ) -> None:
        super().__init__()
        self._hold(
            weight=skeleton,
            skeleton_bias=skeleton_bias,
            interpolation=interpolation,
            interpolation_bias=interpolation_bias,
        )
        self.register_buffer("inverse", inverse.clone())
        self.in_features, self.out_features = skeleton.shape[1], len(inverse)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        parts = (
            self.weight,
            self.skeleton_bias,
            self.interpolation,
            self.interpolation_bias,
            self.inverse,
        )
        plain = is_compiling()
        return plain_gauge(input, *parts) if plain else run_gauge(input, *parts)


def export_static(model: nn.Module, budget: float) -> nn.Module:
    """A deep copy of a converted model, fixed at one level.

    Args:
        model: from `loraven.convert`; it stays as it is.
        budget: as for `loraven.set_budget`.

    Returns:
        A model that shares no tensor with ``model``. Dense layers are of their
        original class, with its hooks; reduced ones are `PrefixLinear` or
        `GaugeLinear`, without hooks. ``torch.export`` takes it.

    Raises:
        InvalidValue: the budget is below the smallest level, or no fraction.
        NotReady: the model was not converted, or its factors are stale.

    Example:
        >>> import torch, loraven
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> summary = loraven.convert(model, [torch.randn(256, 64)])
        >>> loraven.export_static(model, 1.0)
        Sequential(
          (0): Linear(in_features=64, out_features=64, bias=True)
          (1): ReLU()
        )
    """
    family = find_family(model)[1]
    index = family.index(budget)
    memo: dict[int, Any] = {id(family): None}
    for name, module in zip(family.names, family.modules, strict=True):
        memo[id(module)] = _static(name, module, index, memo)
    result = copy.deepcopy(model, memo)
    for part in result.modules():
        vars(part).pop(_KEY, None)
    return result


def _static(
    name: str, module: NestedLinear, index: int, memo: dict[int, Any]
) -> nn.Module:
    rank, form = module.plans[index]
    if form == "dense":
        return copy.deepcopy(module.original, memo)
    if not module.check(thorough=True):
        raise stale(name)
    masters = module.up, module.down, module.down_bias, module.up_bias
    if form == "prefix":
        up, down, down_bias, up_bias = masters
        made = PrefixLinear(down[:rank], down_bias[:rank], up[:rank], up_bias)
    else:
        found = gauge_of_order(*masters, module.order, rank)
        skeleton, interpolation, bias, other, order = found
        parts = skeleton, bias, interpolation, other
        held = [part.to(module.weight) for part in parts]
        made = GaugeLinear(held[0], held[1], held[2], held[3], order.argsort())
    return made.train(module.training)
