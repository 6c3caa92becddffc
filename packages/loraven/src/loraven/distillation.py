# SPDX-License-Identifier: Apache-2.0
"""Train the factors so that every level comes closer to the dense model.

The dense form of the same model is the teacher. Each step runs the smallest level,
the largest reduced one, and one between them (the sandwich rule of Yu and Huang,
Universally Slimmable Networks, 2019), because the levels share their factors: what
helps one alone hurts the others.

Decisions: only the factors are trained, never the original weights; each level's loss
is divided by what it was before, so that large budgets, whose losses are
small, keep their quality; an eighth of the data judges, and if any level got worse on
it, the factors are put back.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraven.batches import (
    Output,
    check_iterable,
    evaluating,
    main_output,
    run,
    spread,
    valid,
)
from loraven.checks import integer, number
from loraven.family import Family, at_level, find_family
from loraven.nested import NestedLinear
from torchworks_core.errors import InvalidValue, NotReady

__all__ = ["DistillSummary", "distill"]

Loss = Callable[[Tensor, Tensor], Tensor]
_MASTERS = ("up", "down", "down_bias", "up_bias")
_HELD_OUT = 8
_WARM_UP = 0.1


@dataclass(frozen=True)
class DistillSummary:
    """What distillation did.

    Attributes:
        steps: How many were taken.
        seconds: How long they took.
        before: Loss on the held-out eighth, by reduced level.
        after: The same afterwards; equal to ``before`` if ``restored``.
        restored: Whether the factors were put back.
        reason: Why, or "".

    Example:
        >>> print(DistillSummary(200, 60.0, {0.5: 0.1}, {0.5: 0.05}, False, ""))
        200 steps in 60 s; loss 0.1 -> 0.05 at 0.5
    """

    steps: int
    seconds: float
    before: dict[float, float]
    after: dict[float, float]
    restored: bool
    reason: str

    def __str__(self) -> str:
        """One line."""
        if self.restored:
            return f"{self.steps} steps, then the factors were put back: {self.reason}"
        changes = ", ".join(
            f"{old:.3g} -> {self.after[level]:.3g} at {level:g}"
            for level, old in self.before.items()
        )
        return f"{self.steps} steps in {self.seconds:.0f} s; loss {changes}"


def distill(
    model: nn.Module,
    data: Iterable[Any],
    *,
    steps: int = 200,
    lr: float = 1e-4,
    loss: Loss | None = None,
    output: Output = None,
    seed: int = 0,
) -> DistillSummary:
    """Train a converted model's factors towards its dense form.

    Args:
        model: From `loraven.convert`; trained in place, in evaluation mode, in the
            dtype of its weights, which must be float32 or float64.
        data: Batches as for `loraven.convert`, two or more; they are kept in memory.
            An eighth of them judges and is not trained on. Positions that
            ``attention_mask`` calls padding don't count.
        steps: Optimizer steps, each on one batch at up to three levels.
        lr: Peak learning rate of AdamW: a linear warm-up over the first tenth, then
            a linear decay to 0.
        loss: ``loss(output, reference)`` -> 0-dim Tensor, both with padding at 0;
            None: the relative squared error, plus one minus the mean cosine between
            the outputs' means over positions.
        output: Picks the Tensor that is compared; see `loraven.convert`.
        seed: Of the order of the batches and of the levels between.

    Returns:
        The summary, with the losses before and after.

    Raises:
        InvalidValue: fewer than two batches, a half-precision model, one without a
            reduced level or made in inference mode, a loss that is not finite; the
            model is then as it was.
        NotReady: the model was not converted, or its weights have changed since.
        TypeError: an argument is of a wrong type.

    Example:
        >>> import torch, loraven
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)
        ... )
        >>> data = [torch.randn(32, 32) for _ in range(16)]
        >>> _ = loraven.convert(model, data, levels=(0.5, 1.0))
        >>> summary = loraven.distill(model, data, steps=50, lr=1e-3)
        >>> summary.after[0.5] < summary.before[0.5]
        True
    """
    root, family = find_family(model)
    integer("steps", steps)
    rate = number("lr", lr, above=True)
    for name, value in (("loss", loss), ("output", output)):
        if value is not None and not callable(value):
            raise TypeError(f"{name}={value!r}: a function or None is needed")
    check_iterable(data, "data")
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(integer("seed", seed, 0))
    # What is made in inference mode can not be trained on.
    with torch.inference_mode(False):
        batches = [_plain(batch) for batch in data]
        _check(root, family, batches)
        lesson = _Lesson(model, family, loss or _default_loss, output)
        with evaluating(model), lesson:
            reason = lesson.train(batches, steps, rate, generator)
    return DistillSummary(
        steps=steps,
        seconds=time.perf_counter() - begin,
        before=lesson.before,
        after=lesson.before if reason else lesson.after,
        restored=bool(reason),
        reason=reason,
    )


def _plain(batch: Any) -> Any:
    """A batch without tensors of inference mode; itself, if it has none."""
    if isinstance(batch, Tensor):
        return batch.clone() if batch.is_inference() else batch
    if not isinstance(batch, Mapping) and type(batch) not in (tuple, list):
        return batch
    old = list(batch.values() if isinstance(batch, Mapping) else batch)
    new = [_plain(value) for value in old]
    if all(a is b for a, b in zip(old, new, strict=True)):
        return batch
    if isinstance(batch, Mapping):
        return dict(zip(batch, new, strict=True))
    return type(batch)(new)


def _check(root: nn.Module, family: Family, batches: Sequence[Any]) -> None:
    kind = type(root).__name__
    family.check(thorough=True)
    plans = [plan for module in family.modules for plan in module.plans]
    if all(plan.form == "dense" for plan in plans):
        why = "every level runs every layer dense, so there is nothing to train"
        raise InvalidValue(kind, why, "Convert with a level below 1.0")
    if any(t.is_inference() for t in (*root.parameters(), *root.buffers())):
        why = "some of its tensors were made in inference mode"
        raise InvalidValue(kind, why, "Give copy.deepcopy(model), made outside of it")
    if len(batches) < 2:
        why = f"{len(batches)} batch(es); one judges, and the others train"
        raise InvalidValue("data", why, "Give two or more")
    for module in family.modules:
        if module.weight.dtype not in (torch.float32, torch.float64):
            why = f"small steps are lost in {module.weight.dtype}"
            do = "Call model.float() first, and convert the dtype back afterwards"
            raise InvalidValue(kind, why, do)


def _default_loss(output: Tensor, reference: Tensor) -> Tensor:
    """Relative squared error, plus one minus the cosine of the means."""
    error = (output - reference).square().sum() / reference.square().sum()
    one, two = (
        t.flatten(1, -2).sum(1) if t.ndim > 2 else t for t in (output, reference)
    )
    return error + 1 - functional.cosine_similarity(one, two, dim=-1).mean()


class _Lesson:
    """One run of the training, with everything that must be put back."""

    def __init__(
        self, model: nn.Module, family: Family, loss: Loss, output: Output
    ) -> None:
        self.model, self.family, self.loss, self.output = model, family, loss, output
        self.teacher = at_level(model, len(family.levels)).eval()
        self.layers: tuple[NestedLinear, ...] = family.modules
        self.reduced = [
            index
            for index in range(len(family.levels))
            if any(layer.plans[index].form != "dense" for layer in self.layers)
        ]
        self.factors = [getattr(m, name) for m in self.layers for name in _MASTERS]
        self.before: dict[float, float] = {}
        self.after: dict[float, float] = {}

    def __enter__(self) -> None:
        self.level = self.layers[0].level
        self.flags = [factor.requires_grad for factor in self.factors]
        self.kept = [factor.detach().clone() for factor in self.factors]
        self.orders = [layer.order.clone() for layer in self.layers]
        for layer in self.layers:
            layer.training_form = True

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self.put_back()
        for factor, flag in zip(self.factors, self.flags, strict=True):
            factor.requires_grad_(flag)
        for layer in self.layers:
            layer.training_form = False
        self.family.set_level(self.level)

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo all steps."""
        for factor, value in zip(self.factors, self.kept, strict=True):
            factor.copy_(value)
        for layer, order in zip(self.layers, self.orders, strict=True):
            layer.rebuild(order)

    def train(
        self,
        batches: Sequence[Any],
        steps: int,
        rate: float,
        generator: torch.Generator,
    ) -> str:
        """Train, judge, rebuild; return why the factors were put back, or ""."""
        order = torch.randperm(len(batches), generator=generator).tolist()
        judges = max(1, len(batches) // _HELD_OUT)
        held_out = [batches[i] for i in order[:judges]]
        training = [batches[i] for i in order[judges:]]
        self.before = self.judge(held_out)
        self._steps(training, steps, rate, generator)
        self.after = self.judge(held_out)
        reason = self._worse()
        if not reason:
            try:
                for layer in self.layers:
                    layer.rebuild()
            except NotReady as error:
                reason = str(error)
        if reason:
            self.put_back()
        return reason

    def _worse(self) -> str:
        for level, old in self.before.items():
            new = self.after[level]
            if not new <= old:
                return (
                    f"the held-out loss at {level:g} went from {old:.3g} to {new:.3g}"
                )
        return ""

    @torch.no_grad()
    def judge(self, batches: Sequence[Any]) -> dict[float, float]:
        """Mean loss over batches, by reduced level."""
        sums = dict.fromkeys(self.reduced, 0.0)
        for batch in batches:
            reference = self.outputs(self.teacher, batch)
            for index in self.reduced:
                self.family.set_level(index)
                found = self.loss(self.outputs(self.model, batch), reference)
                sums[index] += self._finite(found)
        return {self.family.levels[i]: s / len(batches) for i, s in sums.items()}

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """What is compared, with padding at 0."""
        found = main_output(run(model, batch), self.output)
        mask = valid(batch)
        keep = spread(found, mask) if mask is not None and found.ndim > 1 else None
        return found if keep is None else found * keep[..., None]

    def _finite(self, loss: Tensor) -> float:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            kind = type(loss).__name__
            size = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise TypeError(f"loss returned a {kind}{size}: a 0-dim Tensor is needed")
        value = loss.item()
        if not abs(value) < float("inf"):
            raise InvalidValue(f"loss={value}", "it is not finite", "Give a smaller lr")
        return value

    def _steps(
        self,
        batches: Sequence[Any],
        steps: int,
        rate: float,
        generator: torch.Generator,
    ) -> None:
        for factor in self.factors:
            factor.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.factors, lr=rate, weight_decay=0.0)
        queue: list[int] = []
        for step in range(steps):
            warm = (step + 1) / max(1.0, _WARM_UP * steps)
            left = (steps - step) / max(1.0, (1 - _WARM_UP) * steps)
            optimizer.param_groups[0]["lr"] = rate * min(1.0, warm, left)
            queue = queue or torch.randperm(len(batches), generator=generator).tolist()
            self._backward(batches[queue.pop()], generator)
            optimizer.step()
            optimizer.zero_grad()

    def _backward(self, batch: Any, generator: torch.Generator) -> None:
        """Add up the gradients of the factors, and of nothing else."""
        reference = self.outputs(self.teacher, batch)
        losses = list(self.before.values())
        for index in self._sandwich(generator):
            self.family.set_level(index)
            before = losses[self.reduced.index(index)]
            with torch.enable_grad():
                loss = self.loss(self.outputs(self.model, batch), reference)
                self._finite(loss)
                scaled = loss / before if before > 0 else loss
            found = torch.autograd.grad(scaled, self.factors, allow_unused=True)
            for factor, gradient in zip(self.factors, found, strict=True):
                if gradient is not None:
                    old = factor.grad
                    factor.grad = gradient if old is None else old + gradient

    def _sandwich(self, generator: torch.Generator) -> list[int]:
        """The smallest level, the largest reduced one, and one between."""
        first, *between = self.reduced
        last = [between.pop()] if between else []
        if between:
            at = int(torch.randint(len(between), (), generator=generator))
            last.append(between[at])
        return [first, *last]
