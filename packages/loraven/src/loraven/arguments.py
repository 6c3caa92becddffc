# SPDX-License-Identifier: Apache-2.0
"""What a conversion is asked for, and what can't be meant by it.

All of this is looked at before anything runs, so a mistake costs no time and changes
nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from loraven.checks import integer
from loraven.eligible import Target
from loraven.family import is_converted
from torchworks_core.errors import InvalidValue

__all__ = ["Cost", "check_functions", "check_request", "check_weights", "require"]

_COSTS = ("macs", "latency", "energy")
Cost = str | Callable[[int, int, int, str], float]


def check_request(
    model: nn.Module,
    cost: Cost,
    include: Sequence[str] | None,
    exclude: Sequence[str],
    min_features: int,
) -> None:
    """Refuse a model that can't be converted as it is, and arguments of wrong types.

    Raises:
        TypeError: an argument is of a wrong type.
        InvalidValue: the model is wrapped or converted already, or the cost unknown.
    """
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a torch Module, not a {kind}")
    for name, part in model.named_modules():
        if isinstance(part, nn.parallel.DistributedDataParallel):
            what = f"part {name!r}, a {type(part).__name__}" if name else kind
            do = "Convert the module first, then wrap it"
            raise InvalidValue(what, "its gradients are tied to its parameters", do)
    if is_converted(model):
        raise InvalidValue(kind, "already converted", "Call loraven.revert first")
    for name, value in (("include", include), ("exclude", exclude)):
        texts = None if isinstance(value, str) else value or ()
        if texts is None or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name}={value!r}: a list of shell patterns is needed")
    integer("min_features", min_features)
    if not isinstance(cost, str) and not callable(cost):
        raise TypeError(f"cost={cost!r}: a name or a function is needed")
    if isinstance(cost, str) and cost not in _COSTS:
        do = f"Give one of {', '.join(map(repr, _COSTS))}, or a function"
        raise InvalidValue(f"cost={cost!r}", "unknown", do)


def check_functions(**functions: Any) -> None:
    """Raise TypeError for an argument that is neither a function nor None."""
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name}={value!r}: a function or None is needed")


def check_weights(targets: Sequence[Target]) -> None:
    """Raise InvalidValue for a weight that holds no number or takes no gradient."""
    for target in targets:
        bias = target.module._parameters.get("bias")
        if target.module.weight.is_inference():
            why = "its weight was made in inference mode and can't be differentiated"
            do = "Build or load the model outside of torch.inference_mode"
            raise InvalidValue(f"layer {target.name!r}", why, do)
        if not all(t is None or t.isfinite().all() for t in (target.matrix(), bias)):
            why = "its weight or bias holds NaN or infinity"
            raise InvalidValue(f"layer {target.name!r}", why, "Mend it or exclude it")


def require(targets: Sequence[Target], skipped: dict[str, str]) -> None:
    """Raise InvalidValue with all reasons if no layer is left."""
    if not targets:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in skipped.items())
        why = reasons or "it has no linear layer"
        raise InvalidValue("no layer of the model can be converted", why)
