# SPDX-License-Identifier: Apache-2.0
"""How much the model's output minds an error in each layer.

Two ways to weigh the layers' errors against each other stand behind one seam:
`sensitivities` gives one weight for each layer, and a function that gives an output
metric for each layer (see `loraven.factorize.output_pca`) can be used instead, for
then the factors' tails are errors of the model's output already.

The direct method: with one layer alone reduced to 0.4 of its multiply-adds, the
relative squared change of the model's output, divided by the layer's own error at
that rank. Hooks replace the layer's output, and blocks before it are not run again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraven.batches import Output, TokenMask, evaluating, spread, valid
from loraven.eligible import Target
from loraven.factorize import Factors
from loraven.replay import Replay
from torchworks_core.errors import InvalidValue

__all__ = ["sensitivities"]

# The share of its multiply-adds that the layer under test is left with.
_SHARE = 0.4


def sensitivities(
    model: nn.Module,
    batches: Sequence[Any],
    targets: Sequence[Target],
    factors: Mapping[str, Factors],
    *,
    output: Output = None,
    token_mask: TokenMask = None,
) -> dict[str, float]:
    """The weight of each layer's error energy in the error of the model's output.

    Args:
        model: it runs once for each batch and layer, in evaluation mode.
        batches: the examples by which to judge, best at most 96.
        targets: the layers.
        factors: their factors by name.
        output: see `loraven.batches.main_output`.
        token_mask: see `loraven.batches.valid`; other positions do not count.

    Returns:
        By name, the mean over examples of ||change of output||^2 / ||output||^2, for
        each unit of the layer's expected squared error.

    Raises:
        InvalidValue: the model's output is not finite.
        TypeError: there is no tensor in the model's output.
    """
    weights = {}
    with evaluating(model):
        kept = [valid(batch, token_mask) for batch in batches]
        replay = Replay(model, batches, [target.module for target in targets], output)
        if not all(bool(found.isfinite().all()) for found in replay.reference):
            do = "Give output= to judge by another tensor, or sensitivity=False"
            raise InvalidValue("the model's output", "it is not finite", do)
        for target in targets:
            found = factors[target.name]
            rank = _probe_rank(target, found)
            handle = target.module.register_forward_hook(_reduced(found, rank, target))
            try:
                outputs = replay.run(target.module)
            finally:
                handle.remove()
            runs = zip(outputs, replay.reference, kept, strict=True)
            mean = float(torch.cat([_change(*each) for each in runs]).mean())
            left = float(found.tail[rank])
            weights[target.name] = mean / left if left > 0 else 0.0
    return weights


def _probe_rank(target: Target, factors: Factors) -> int:
    """The rank of 0.4 of the multiply-adds, less where no error would be left."""
    m, n = target.out_features, target.in_features
    # The root of r (m + n - r) = share * m n.
    rank = int(((m + n) - ((m + n) ** 2 - 4 * _SHARE * m * n) ** 0.5) / 2)
    tail = factors.tail
    enough = int((tail > 1e-4 * factors.energy).sum()) - 1
    return max(0, min(rank, enough, len(tail) - 1))


def _reduced(factors: Factors, rank: int, target: Target) -> Any:
    """A forward hook that gives the output of the layer at ``rank``."""
    like = target.matrix()
    down, shift = factors.down[:rank].to(like), factors.down_bias[:rank].to(like)
    up, bias = factors.up[:rank].T.to(like), factors.up_bias.to(like)

    def replace(_: nn.Module, args: tuple, out: Tensor) -> Tensor:
        x = args[0]
        low = functional.linear(x, down.to(x.dtype), shift.to(x.dtype))
        return functional.linear(low, up.to(x.dtype), bias.to(x.dtype)).to(out.dtype)

    return replace


def _change(now: Tensor, before: Tensor, mask: Tensor | None) -> Tensor:
    """(B,): the relative squared change of each example, over valid positions."""
    keep = None if mask is None or before.ndim < 2 else spread(before, mask)
    now, before = now.double(), before.double()
    if keep is not None:
        now, before = now * keep[..., None], before * keep[..., None]
    error = (now - before).reshape(len(before), -1).square().sum(1)
    return error / before.reshape(len(before), -1).square().sum(1).clamp_min(1e-300)
