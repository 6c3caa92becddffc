# SPDX-License-Identifier: Apache-2.0
"""A linear layer with its original weight and a choice of reduced forms of it.

`NestedLinear` holds the Parameters of the layer that it replaces and the factors
of its largest reduced level. A level is an integer: changing it copies nothing.

Decisions:
- Every reduced form is a function of the factors and of one stored order of the
  outputs: loading a state dict rebuilds the same forms, bit for bit.
- Slices of the factors are cut once, not in each forward; they serve only while
  the module still holds the very Parameter that they were cut from.
- A compiler sees the registered tensors and one branch: one graph for each level.
- A fingerprint of the weight and bias bits travels in the state dict. Factors under
  weights that they do not belong to are noticed by it: see `loraven.freshness`.
- Copies that share all tensors share the derived forms and what is known of their
  freshness, too; forms are written in place, so that all copies follow.
- Where a factor was replaced, as by ``functional_call``, or wants a gradient, the
  prefix form runs: it is the one that is a function of the factors themselves.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, addmm, nn
from torch.compiler import is_compiling
from torch.nn.functional import linear

from loraven.factorize import Factors, Pivots, gauge_of_order, pivot
from loraven.forms import safe_ranks
from loraven.freshness import Freshness, fingerprint
from loraven.runners import (
    FORMS,
    MANY_INPUTS,
    MANY_ROWS,
    plain_gauge,
    run_dense,
    run_gauge,
    run_prefix,
)
from torchworks_core.errors import InvalidValue, NotReady

__all__ = ["NestedLinear", "Plan"]

_MASTERS = ("up", "down", "down_bias", "up_bias")
_GAUGE = ("skeleton", "skeleton_bias", "interpolation", "interpolation_bias")
_Masters = tuple[Tensor, Tensor, Tensor, Tensor]
# The factors that were cut; below how many numbers of an input two products with the
# two matrices at the end do; else the arguments and what to call with them.
_Cut = tuple[_Masters, int, tuple, Callable[..., Tensor], Any, Any] | tuple[()] | None


class Plan(NamedTuple):
    """How a level runs a layer.

    Attributes:
        rank: Of the reduced map; without meaning for the dense form.
        form: "dense", "prefix" or "gauge".
    """

    rank: int
    form: str


class NestedLinear(nn.Module):
    """A linear layer that can run at reduced ranks.

    Args:
        original: ``nn.Linear``, or transformers' ``Conv1D`` with ``transposed``.
        factors: From `loraven.factorize.output_pca` of its weight; as many ranks
            are kept as the plans need, in the dtype and on the device of the weight.
        pivots: `loraven.factorize.pivot` of ``factors.up``; None if no plan has the
            gauge form.
        plans: One for each reduced level. Level ``len(plans)`` is the original
            layer, bit for bit, and the one that is set first.
        transposed: The weight is (in, out).

    Attributes:
        weight: The original's Parameter itself, and so is ``bias``.
        up: (R, out), Parameter without gradient, as are ``down`` (R, in),
            ``down_bias`` (R,) and ``up_bias`` (out,). In float16 the factors of
            rank i are scaled by max(1, tail[i] - tail[i + 1]) ** 0.25 so that what
            lies between them cannot overflow.
        plans: The plans.
        level: The level that runs, an int. A forward reads it once, so a write from
            another thread is safe for this layer; a model of many layers that is
            running meanwhile computes some of them at the old level and some at the
            new one. Give each thread its own `loraven.at_budget`.

    Raises:
        InvalidValue: factors of other sizes, an unknown form, a rank that the
            factors do not have, a gauge plan without pivots, or factors that are
            not finite in the weight's dtype.

    Example:
        >>> import torch
        >>> from loraven.factorize import Moments, output_pca, pivot
        >>> layer = torch.nn.Linear(16, 16)
        >>> moments = Moments(torch.zeros(16), torch.eye(16), 100, False)
        >>> factors = output_pca(layer.weight, layer.bias, moments)
        >>> plans = [Plan(4, "prefix"), Plan(8, "gauge")]
        >>> nested = NestedLinear(layer, factors, pivot(factors.up), plans)
        >>> x = torch.randn(3, 16)
        >>> torch.equal(nested(x), layer(x))
        True
        >>> nested.set_level(0)
        >>> nested(x).shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        original: nn.Module,
        factors: Factors,
        pivots: Pivots | None,
        plans: Sequence[Plan],
        transposed: bool = False,
    ) -> None:
        super().__init__()
        shape = tuple(original.weight.shape)
        self.out_features, self.in_features = shape[::-1] if transposed else shape
        self.plans = tuple(Plan(*plan) for plan in plans)
        self.transposed = transposed
        self._check(factors, pivots)
        self.training = original.training
        # In a tuple, so that it is no submodule: its Parameters are this module's.
        self._original = (original,)
        self.weight = original.weight
        self.register_parameter("bias", original.bias)
        self._hold(factors)
        order = torch.arange(self.out_features) if pivots is None else pivots.order
        device = self.weight.device
        self.register_buffer("order", order.to(device, torch.int64, copy=True))
        self.register_buffer("fingerprint", fingerprint(self.weight, self.bias))
        self.level = len(self.plans)
        self._freshness = Freshness()
        self._freshness.note(self.weight, self.bias, False)
        self._training_form, self._contiguous_output = False, True
        self._build()

    def _check(self, factors: Factors, pivots: Pivots | None) -> None:
        sizes = factors.up.shape[1], factors.down.shape[1]
        if sizes != (self.out_features, self.in_features):
            why = f"the layer is {self.out_features} x {self.in_features}"
            raise InvalidValue(f"factors of a {sizes[0]} x {sizes[1]} layer", why)
        for plan in self.plans:
            if plan.form not in FORMS:
                do = f"Give one of {', '.join(FORMS)}"
                raise InvalidValue(f"form={plan.form!r}", "unknown", do)
            if plan.form != "dense" and not 1 <= plan.rank <= factors.rank:
                why = f"the factors allow 1 to {factors.rank}"
                raise InvalidValue(f"rank={plan.rank}", why)
            if plan.form == "gauge" and pivots is None:
                raise InvalidValue("pivots=None", "a plan has the gauge form")

    @torch.no_grad()
    def _hold(self, factors: Factors) -> None:
        """Register the factors that the plans need, in the weight's dtype."""
        rank = max((p.rank for p in self.plans if p.form != "dense"), default=0)
        up, down, bias = (
            factors.up[:rank],
            factors.down[:rank],
            factors.down_bias[:rank],
        )
        if self.weight.dtype == torch.float16:
            spread = (factors.tail[:rank] - factors.tail[1 : rank + 1]).clamp_min(1)
            scale = (spread**0.25).to(up)[:, None]
            up, down, bias = up * scale, down / scale, bias / scale[:, 0]
        for name, value in zip(
            _MASTERS, (up, down, bias, factors.up_bias), strict=True
        ):
            value = value.detach().to(self.weight, copy=True).contiguous()
            if not value.isfinite().all():
                why = f"not finite in {self.weight.dtype}"
                raise InvalidValue(f"factors.{name}", why)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    @property
    def original(self) -> nn.Module:
        """The module that was replaced; it shares ``weight`` and ``bias``."""
        return self._original[0]

    @property
    def stale(self) -> bool:
        """Whether the factors were found to belong to other weights."""
        return self._freshness.stale

    def check(self, thorough: bool = False) -> bool:
        """Whether the factors belong to the weight and bias as they are now.

        Args:
            thorough: Read all bits; False: only if a version counter has moved, which
                it does not for writes through ``.data`` or by fused optimizers.
        """
        weight, bias = self.weight, self.bias
        if not self._freshness.knows(weight, bias):
            self._freshness = Freshness()
        expected = self._buffers["fingerprint"]
        return not self._freshness.look(weight, bias, expected, thorough)

    @property
    def reduced_levels(self) -> int:
        """How many levels there are below the original layer."""
        return len(self.plans)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all Parameters and buffers."""
        tensors = [*self.parameters(), *self.buffers()]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def training_form(self) -> bool:
        """Whether all reduced levels run the prefix form with gradients to its factors.

        For training ``up``, ``down`` and the biases; call `rebuild` afterwards.
        """
        return self._training_form

    @training_form.setter
    def training_form(self, value: bool) -> None:
        self._training_form = bool(value)
        self._cut()

    @property
    def contiguous_output(self) -> bool:
        """Whether a gauge form's output is contiguous (default) or may be a view."""
        return self._contiguous_output

    @contiguous_output.setter
    def contiguous_output(self, value: bool) -> None:
        self._contiguous_output = bool(value)
        self._cut()

    def set_level(self, level: int) -> None:
        """Run this level from now on: 0 up to `reduced_levels`, the original layer.

        Raises:
            TypeError: level is not an int.
            InvalidValue: there is no such level.
        """
        if isinstance(level, bool) or not isinstance(level, int):
            raise TypeError(f"level must be an int, not {type(level).__name__}")
        if not 0 <= level <= len(self.plans):
            raise InvalidValue(f"level={level}", f"there are 0 to {len(self.plans)}")
        self.level = level

    def forward(
        self, input: Tensor | None = None, *, x: Tensor | None = None
    ) -> Tensor:
        """(..., in) -> (..., out) at the present level.

        Args:
            input: As ``nn.Linear`` calls it.
            x: The same, as transformers' ``Conv1D`` calls it.

        Raises:
            NotReady: a reduced level, and the factors belong to other weights.
        """
        if input is None:
            if x is None:
                raise TypeError("forward() takes one Tensor")
            input = x
        cut = None if is_compiling() else self._cuts[self.level]
        if not cut:
            # An empty cut is the original nn.Linear.
            if cut is None:
                return self._any(input)
            return linear(input, self.weight, self.bias)
        masters, few, arguments, run, down_t, up = cut
        if self._freshness.stale or not self._frozen(masters):
            return self._any(input)
        if input.numel() < few and input.ndim == 2:
            _, down_bias, _, up_bias = arguments
            return addmm(up_bias, addmm(down_bias, input, down_t), up)
        return run(input, *arguments)

    def _any(self, x: Tensor) -> Tensor:
        """Every case, from the registered tensors."""
        level = self.level
        if level == len(self.plans) or self.plans[level].form == "dense":
            return run_dense(x, self.weight, self.bias, self.transposed)
        if self._freshness.stale:
            why = "their weights have changed"
            raise NotReady("the factors are stale, convert again", why)
        rank, form = self.plans[level]
        if form == "gauge" and not self._training_form and self._frozen(self._cut_of):
            if is_compiling():
                return plain_gauge(x, *self._gauge(rank))
            return run_gauge(x, *self._gauge(rank), contiguous=self._contiguous_output)
        down, down_bias, up_t, up_bias = self._prefix(rank)
        if is_compiling():
            return linear(linear(x, down, down_bias), up_t, up_bias)
        return run_prefix(x, down, down_bias, up_t, up_bias)

    def _frozen(self, masters: _Masters) -> bool:
        """Whether the factors are these Parameters, and none wants a gradient."""
        now = self._parameters
        up, down, down_bias, up_bias = masters
        return (
            now["up"] is up
            and now["down"] is down
            and now["down_bias"] is down_bias
            and now["up_bias"] is up_bias
            and not up.requires_grad
            and not down.requires_grad
            and not down_bias.requires_grad
            and not up_bias.requires_grad
        )

    def _prefix(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        down, bias = self.down[:rank], self.down_bias[:rank]
        return down, bias, self.up[:rank].t(), self.up_bias

    def _gauge(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        names = [f"{name}_{rank}" for name in _GAUGE]
        first, first_bias, rest, rest_bias = (getattr(self, name) for name in names)
        return first, first_bias, rest, rest_bias, self.inverse

    def _gauge_ranks(self) -> list[int]:
        return sorted({plan.rank for plan in self.plans if plan.form == "gauge"})

    @torch.no_grad()
    def rebuild(self, order: Tensor | None = None) -> None:
        """Derive an order and all gauge forms from the factors as they are now.

        Args:
            order: The order to take, one that served these factors before; None:
                the best one.

        Raises:
            NotReady: a gauge form would lose accuracy; nothing was changed.
        """
        if order is not None:
            self.order.copy_(order)
        elif ranks := self._gauge_ranks():
            pivots = pivot(self.up)
            safe = safe_ranks(self.down, pivots, ranks)
            if bad := [rank for rank in ranks if not safe[rank]]:
                why = "its interpolation weights exceed 100 or lose digits"
                raise NotReady(f"gauge form of rank {bad[0]}", why, "Convert again")
            self.order.copy_(pivots.order)
        self._build()

    @torch.no_grad()
    def _build(self) -> None:
        """Gauge forms by the stored order, then the slices."""
        if ranks := self._gauge_ranks():
            self._put("inverse", self.order.argsort())
        masters = self.up, self.down, self.down_bias, self.up_bias
        for rank in ranks:
            made = gauge_of_order(*masters, self.order, rank)
            for name in _GAUGE:
                self._put(f"{name}_{rank}", getattr(made, name).to(self.weight))
        self._cut()

    def _put(self, name: str, value: Tensor) -> None:
        """Into the buffer's memory if it fits: copies that share it follow."""
        old = self._buffers.get(name)
        if old is not None and not old.is_inference():
            wanted = value.shape, value.dtype, value.device
            if (old.shape, old.dtype, old.device) == wanted:
                old.copy_(value)
                return
        self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def _cut(self) -> None:
        """What the reduced levels run, ready to call."""
        plain = self.in_features < MANY_INPUTS or not self.weight.is_cpu
        few = sys.maxsize if plain else MANY_ROWS * self.in_features
        masters = self.up, self.down, self.down_bias, self.up_bias
        cuts: list[_Cut] = []
        for rank, form in (*self.plans, Plan(0, "dense")):
            if form == "dense":
                cuts.append(None if self.transposed else ())
            elif self._training_form:
                cuts.append(None)
            elif form == "gauge":
                arguments = (*self._gauge(rank), self._contiguous_output)
                cuts.append((masters, 0, arguments, run_gauge, None, None))
            else:
                arguments = tuple(part.detach() for part in self._prefix(rank))
                ready = arguments[0].t(), arguments[2].t()
                cuts.append((masters, few, arguments, run_prefix, *ready))
        self._cuts, self._cut_of = cuts, masters

    def _link(self) -> None:
        """Give the original the Parameters that this module has now."""
        for name in ("weight", "bias"):
            self.original._parameters[name] = self._parameters[name]

    def _shared(self) -> list[Tensor | None]:
        """What a copy that follows this one has in common with it."""
        names = "weight", "bias", *_MASTERS
        return [*(self._parameters[name] for name in names), self.order]

    def _unshare(self, before: Sequence[Tensor | None]) -> None:
        """Follow no copy any more, if tensors were replaced by others."""
        if all(a is b for a, b in zip(before, self._shared(), strict=True)):
            return
        self._freshness = Freshness()
        for name in [name for name in self._buffers if name.startswith(_GAUGE)]:
            del self._buffers[name]
        self._buffers.pop("inverse", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before, dtype, stale = self.weight, self.weight.dtype, not self.check(True)
        super()._apply(fn, recurse)
        self._link()
        if self._parameters["weight"] is not before:
            self._freshness = Freshness()
            self._freshness.stale = stale
        if self.weight.dtype != dtype and not self.weight.is_meta:
            if not stale:
                self.fingerprint.copy_(fingerprint(self.weight, self.bias))
            self._build()
        self._freshness.note(self.weight, self.bias, stale)
        self._cut()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        given = [
            state_dict.get(prefix + name, self._parameters[name])
            for name in ("weight", "bias")
        ]
        expected = state_dict.get(prefix + "fingerprint", self.fingerprint)
        expected = expected.detach().clone()
        errors, before = len(args[-1]), self._shared()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._link()
        self._unshare(before)
        if self.weight.is_meta:
            return
        found = fingerprint(self.weight, self.bias)
        # A checkpoint in another dtype is judged by its own bits, before rounding.
        fresh = torch.equal(found.cpu(), expected.cpu()) or (
            len(args[-1]) == errors
            and torch.equal(fingerprint(*given).cpu(), expected.cpu())
        )
        self._freshness.note(self.weight, self.bias, not fresh)
        if fresh:
            self.fingerprint.copy_(found)
        self._build()

    def __getstate__(self) -> dict[str, Any]:
        derived = "_cuts", "_cut_of"
        return {key: value for key, value in vars(self).items() if key not in derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cut()

    def extra_repr(self) -> str:
        """Sizes, plans and level, for ``print(module)``."""
        plans = ", ".join(f"{form}:{rank}" for rank, form in self.plans)
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, plans=[{plans}], level={self.level}"
