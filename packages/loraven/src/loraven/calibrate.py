# SPDX-License-Identifier: Apache-2.0
"""One pass over the calibration data: what goes into each layer, how often it runs.

Hooks look at each layer's input. Layers that receive the identical tensor (query,
key, value) share one set of sums: the first of them keeps it, the others follow as
long as they see the same tensors in every batch. Positions that the mask calls
padding enter no sum; a layer whose input the mask can't be matched to is left out
rather than guessed, and so is one where the sizes match and the order does not; see
`loraven.layouts`. The same forward gives the gradients of the output that the
layers are to be judged by, if they are; a layer without influence on it is left out.

Under a process group, every process brings its own batches, the sums are added up,
and a failure of one process is raised by all of them instead of letting them wait.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from loraven.batches import Examples, Judge, evaluating, run, select, trainable, valid
from loraven.eligible import Target
from loraven.factorize import Factors, InputStatistics, Moments
from loraven.importance import DamageCurves, OutputMetrics, Projection, gradients
from loraven.layouts import is_ambiguous, unlike_the_mask
from torchworks_core.errors import InvalidValue, NotReady

__all__ = ["Calibration", "calibrate", "count_macs", "damages", "gathered"]

EXAMPLES, PROJECTIONS = 96, 2
_MOMENTS_ONLY = Judge(metrics=False)


@dataclass
class Calibration:
    """What one pass over the calibration data found.

    Attributes:
        moments: for each layer that can be converted the moments of its input;
            layers with equal inputs share one object.
        metrics: for each of them the metric of its output's errors; empty where
            nothing judges.
        rows: for each of them how many vectors went in, padding included: that is
            what it costs.
        calls: how often it ran.
        groups: a number for each of them, the same for layers that took in as many
            vectors, in as many calls, in every single batch.
        skipped: for each other layer the reason.
        examples: batches with at most 96 examples, from all over the data.
        tokens: valid vectors that the layer with the most of them has seen.
    """

    moments: dict[str, Moments] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    examples: list[Any] = field(default_factory=list)
    tokens: int = 0


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Sequence[Target],
    judge: Judge = _MOMENTS_ONLY,
) -> Calibration:
    """Run ``model`` over ``batches`` and take the moments of the layers' inputs.

    Args:
        model: it runs in evaluation mode; its flags and hooks are afterwards as
            before, whatever happens.
        batches: see `loraven.batches.run`; read once.
        targets: the layers to look at.
        judge: which positions count, and what the layers are judged by.

    Raises:
        InvalidValue: there is no batch, or an input, the output or a gradient is
            not finite, or there are no gradients.
        NotReady: another process of the group failed.
    """
    watch, examples = _Watch(targets, judge.metrics), Examples(EXAMPLES)
    failed: Exception | None = None
    try:
        _pass(model, batches, watch, examples, judge)
    except Exception as error:
        failed = error
    error = None if failed is None else repr(failed)
    found = gathered((error, watch.owner, watch.skipped))
    if failed is not None:
        raise failed
    for rank, (error, owner, skipped) in enumerate(found):
        watch.skipped |= skipped
        if error is not None or owner != watch.owner:
            why = error or "other layers ran, or shared their inputs, than here"
            raise NotReady(f"calibration in process {rank}", why)
    result = watch.finish(targets)
    result.examples = examples.batches
    _warn_of_few_tokens(result)
    return result


def _pass(
    model: nn.Module,
    batches: Iterable[Any],
    watch: "_Watch",
    examples: Examples,
    judge: Judge,
) -> None:
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for target in watch.targets:
            hook = watch.hook(target)
            handle = target.module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        count, generator = 0, torch.Generator().manual_seed(0)
        for count, given in enumerate(batches, 1):  # noqa: B007
            batch = trainable(given)
            watch.begin(valid(batch, judge.token_mask))
            if not judge.metrics:
                run(model, batch)
            else:
                watch.judge(partial(judge.judged, model, batch), generator)
            watch.end()
            # A square mask of the user's own may be in another layout than the batch.
            square = watch.mask is not None and len(set(watch.mask.shape)) == 1
            if not (judge.token_mask and square):
                watch.settle(model, batch)
            with watch.pausing():
                examples.check(model, batch, judge.output)
            examples.add(batch)
    if not count:
        raise InvalidValue(
            "calibration", "it has no batch", "Give a few hundred inputs"
        )


def _gradients(
    forward: Callable[[], tuple[Tensor, Tensor | None]],
    targets: Sequence[Target],
    generator: torch.Generator,
    inputs: bool,
) -> Iterator[Projection]:
    sites = {target.name: target.module for target in targets}
    options = {"projections": PROJECTIONS, "generator": generator, "inputs": inputs}
    return gradients(forward, sites, **options)


def damages(
    model: nn.Module,
    batches: Sequence[Any],
    targets: Sequence[Target],
    factors: dict[str, Factors],
    judge: Judge,
) -> dict[str, list[float]]:
    """What every rank of every layer does to the output that is judged by.

    Args:
        model: it runs once for each batch, in evaluation mode.
        batches: the examples to judge by.
        targets: the layers.
        factors: their factors by name.
        judge: picks the output.

    Returns:
        By name, the expected relative squared change of the output at ranks 0 to R.
    """
    curves, generator = DamageCurves(factors), torch.Generator().manual_seed(1)
    with evaluating(model):
        for batch in batches:
            forward = partial(judge.judged, model, batch)
            for projection in _gradients(forward, targets, generator, True):
                curves.add(projection)
    return {name: curve.tolist() for name, curve in curves.finish().items()}


class _Watch:
    """The sums of all layers, filled by hooks on one forward after another."""

    def __init__(self, targets: Sequence[Target], judged: bool) -> None:
        self.targets = targets
        self.judged, self.metrics = judged, OutputMetrics()
        self.sums: dict[str, InputStatistics] = {}
        # The layer whose sums a layer uses: itself or another one.
        self.owner: dict[str, str] = {}
        # For each layer and batch, how many vectors it took in, in how many calls.
        self.work: dict[str, list[tuple[int, int]]] = {t.name: [] for t in targets}
        self.skipped: dict[str, str] = {}
        self.mask: Tensor | None = None
        # Layers whose order was looked into, and those where it has to be.
        self.settled: set[str] = set()
        self.doubtful: set[str] = set()
        self.paused = False

    def begin(self, mask: Tensor | None) -> None:
        """Before a forward: nothing of it was seen yet."""
        self.mask, self.inputs = mask, 0
        self.seen: dict[tuple, tuple[Any, str, int]] = {}
        self.trace: dict[str, list[int]] = {}
        for done in self.work.values():
            done.append((0, 0))

    def hook(self, target: Target) -> Any:
        """What looks at the input of one layer."""

        def look(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if self.paused:
                return
            if not isinstance(x, Tensor) or x.shape[-1:] != (target.in_features,):
                # The layer itself says best what is wrong with it.
                return
            done = self.work[target.name]
            rows, calls = done[-1]
            done[-1] = rows + x.numel() // target.in_features, calls + 1
            if target.name not in self.skipped:
                self._take(target, x)

        return look

    def _take(self, target: Target, x: Tensor) -> None:
        name = target.name
        version = -1 if x.is_inference() else x._version
        key = (x.data_ptr(), x.shape, x.stride(), x.dtype, version)
        alive, first, number = self.seen.get(key, (lambda: None, name, 0))
        if alive() is None:
            # New, or memory that another tensor has given back since.
            first, number = name, self.inputs
            self.inputs += 1
            self.seen[key] = (weakref.ref(x), name, number)
        owner = self.owner.setdefault(name, self.owner.get(first, first))
        self.trace.setdefault(name, []).append(number)
        if owner != name:
            return
        rows = select(x, self.mask)
        if rows is None and self.mask is not None:
            shapes = f"{tuple(x.shape)} and {tuple(self.mask.shape)}"
            self.skipped[name] = f"its input and the mask have shapes {shapes}"
        if rows is None:
            return
        if name not in self.settled and is_ambiguous(x, self.mask):
            self.doubtful.add(name)
        if name not in self.sums:
            self.sums[name] = InputStatistics(target.in_features, x.device)
        self.sums[name].add(rows)

    def judge(
        self,
        forward: Callable[[], tuple[Tensor, Tensor | None]],
        random: torch.Generator,
    ) -> None:
        """Run the model, and take the gradients of its output."""
        try:
            for projection in _gradients(forward, self.targets, random, False):
                self.metrics.add(projection)
        except InvalidValue:
            # What went in may be the reason: then that is the better error.
            for name, sums in self.sums.items():
                _moments(name, sums)
            raise

    def end(self) -> None:
        """After a forward: drop the layers that went another way than their owner."""
        for name, owner in self.owner.items():
            if self.trace.get(name, []) != self.trace.get(owner, []):
                self.skipped[name] = f"its input is that of {owner!r} in some batches"

    def settle(self, model: nn.Module, batch: Any) -> None:
        """Drop the layers that the mask fits in its size alone."""
        doubtful = [t for t in self.targets if t.name in self.doubtful]
        if not doubtful or self.mask is None:
            return
        self.settled |= self.doubtful
        self.doubtful = set()
        with self.pausing():
            unlike = unlike_the_mask(model, batch, self.mask, doubtful)
        for name in unlike:
            self.skipped[name] = (
                "its input is not in the order of the mask: what padding holds "
                "changes vectors that it calls valid; token_mask= can give another"
            )

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Forwards that no statistics are taken of."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def finish(self, targets: Sequence[Target]) -> Calibration:
        """Add up over processes, and turn sums into moments, one layer at a time."""
        result = Calibration(skipped=self.skipped)
        everyone = gathered(self.work)
        groups: dict[tuple, int] = {}
        moments: dict[str, Moments] = {}
        # In the targets' order: processes may have run the layers in another one.
        for owner in [t.name for t in targets if self.owner.get(t.name) == t.name]:
            if owner in self.skipped:
                continue
            sums = self.sums[owner]
            sums.all_reduce()
            if sums.tokens:
                moments[owner] = _moments(owner, sums)
        judged = self._metrics(targets, set(moments))
        for target in targets:
            name, owner = target.name, self.owner.get(target.name)
            if owner in self.skipped and owner != name:
                self.skipped[name] = self.skipped[owner]
            if name in self.skipped:
                continue
            if owner is None:
                self.skipped[name] = "never ran during calibration"
            elif owner not in moments:
                self.skipped[name] = "saw padding only"
            elif self.judged and name not in judged:
                self.skipped[name] = "the output that is judged by does not need it"
            else:
                result.moments[name] = moments[owner]
                if self.judged:
                    result.metrics[name] = judged[name]
                done = tuple(step for work in everyone for step in work[name])
                result.rows[name] = sum(rows for rows, _ in done)
                result.calls[name] = sum(calls for _, calls in done)
                result.groups[name] = groups.setdefault(done, len(groups))
        result.tokens = max((m.tokens for m in moments.values()), default=0)
        return result

    def _metrics(
        self, targets: Sequence[Target], owners: set[str]
    ) -> dict[str, Tensor]:
        """The metrics of the layers whose moments are known."""
        if not self.judged:
            return {}
        for target in targets:
            if self.owner.get(target.name) in owners:
                self.metrics.all_reduce(target.name, target.matrix())
        return self.metrics.finish()


def _moments(name: str, sums: InputStatistics) -> Moments:
    try:
        return sums.finish()
    except InvalidValue as error:
        do = "convert changes no value: mend the data or the model"
        raise InvalidValue(f"input of layer {name!r}", str(error), do) from error


def _warn_of_few_tokens(result: Calibration) -> None:
    few = {name: m for name, m in result.moments.items() if m.shrunk}
    if few:
        name = min(few, key=lambda n: few[n].tokens / len(few[n].mean))
        more = f" ({len(few)} layers in all)" if len(few) > 1 else ""
        warnings.warn(
            f"layer {name!r}{more} saw {few[name].tokens} valid tokens for "
            f"{len(few[name].mean)} input features, fewer than two for each: its "
            "statistics were shrunk. Give more calibration data",
            UserWarning,
            stacklevel=4,
        )


def count_macs(
    model: nn.Module, batch: Any, targets: Sequence[Target]
) -> tuple[int, dict[str, int]]:
    """Multiply-adds of one batch: of the whole model, and of each layer.

    Counted by the formulas of ``torch.utils.flop_counter``: matrix products,
    convolutions and attention, nothing elementwise. Attention runs as plain products
    meanwhile: there is no formula for the fused kernel of the CPU.
    """
    own = dict.fromkeys((target.name for target in targets), 0)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for target in targets:

            def look(
                module: Any, args: tuple, kwargs: dict, target: Target = target
            ) -> None:
                if module is not target.module:
                    # A converted layer and its original have their hooks in common.
                    return
                x = args[0] if args else next(iter(kwargs.values()))
                own[target.name] += x.numel() * target.out_features

            handle = target.module.register_forward_pre_hook(look, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        counter = stack.enter_context(_Counter())
        run(model, batch)
    return counter.flops // 2, own


class _Counter(TorchDispatchMode):
    """What FlopCounterMode counts, without the compiler that it loads, 4 seconds."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.formulas, self.flops = flop_registry, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=found)
        return found


def gathered(value: Any) -> list[Any]:
    """One value from each process of the default group, or only one's own."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found
