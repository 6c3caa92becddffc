# SPDX-License-Identifier: Apache-2.0
"""Figures that show whether a fused model is what it should be."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mol.errors import UnsupportedArchitectureError
from mol.shell import Tower
from mol.streams import Inputs

if TYPE_CHECKING:
    from mol.modeling import MoLForCausalLM

__all__ = ["Check", "VerifyReport", "verify"]

_TOKENS = 24


@dataclass(frozen=True)
class Check:
    """A largest absolute difference of logits, and what it may be at most.

    ``value`` is None where the check has no meaning for this model.
    """

    value: float | None
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the figure keeps its limit; a NaN does not."""
        return self.value is None or self.value <= self.limit


@dataclass(frozen=True)
class VerifyReport:
    """What ``mol.verify()`` measured on random tokens.

    Attributes:
        exact: routed to the primary, against the primary run by its own class;
            None unless every row has one block of it, in rising order.
        leak: earlier logits after later tokens changed.
        cached: token by token with the cache, against all at once.
        permutation: rows of a batch in another order, against the same order.
    """

    exact: Check
    leak: Check
    cached: Check
    permutation: Check

    def raise_if_failed(self) -> None:
        """Raise ``UnsupportedArchitectureError`` naming each failed check."""
        failed = [
            f"{f.name} {check.value:.3g} > {check.limit:.3g}"
            for f in fields(self)
            if not (check := getattr(self, f.name)).passed
        ]
        if failed:
            raise UnsupportedArchitectureError(
                f"the fused model failed: {'; '.join(failed)}",
                "its logits cannot be trusted",
                "Take other layers or models, and report this combination",
            )


@torch.no_grad()
def verify(model: "MoLForCausalLM") -> VerifyReport:
    """Run the checks; see ``MoLRuntime.verify``."""
    streams = model.streams
    streams.ready()
    training = model.training
    model.eval()
    try:
        size = streams.sources[streams.primary].info.vocab_size
        limits = [streams.sources[n].info.max_positions for n in streams.used()]
        length = min([_TOKENS, *(limit for limit in limits if limit)])
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(size, (2, length), generator=random)
        other = ids.clone()
        half = length // 2
        other[:, half:] = torch.randint(size, (2, length - half), generator=random)
        base = _logits(model, ids)
        dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        scale = max(1.0, base.abs().max().item())
        limit, loose = max(1e-5, 2 * eps) * scale, max(1e-5, 8 * eps) * scale
        return VerifyReport(
            exact=Check(_exact(model, ids), 0.0),
            leak=Check(_worst(_logits(model, other)[:, :half], base[:, :half]), limit),
            cached=Check(_worst(_cached(model, ids), base), loose),
            permutation=Check(_worst(_logits(model, ids.flip(0)), base.flip(0)), limit),
        )
    finally:
        model.train(training)


def _worst(actual: Tensor, expected: Tensor) -> float:
    if actual.numel() == 0:
        return 0.0
    return (actual.float() - expected.float()).abs().max().item()


def _logits(model: "MoLForCausalLM", ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def _cached(model: "MoLForCausalLM", ids: Tensor) -> Tensor:
    cache, parts = model.new_cache(), []
    for step in ids.split(1, dim=1):
        parts.append(model(step, past_key_values=cache).logits)
    return torch.cat(parts, 1)


def _exact(model: "MoLForCausalLM", ids: Tensor) -> float | None:
    streams = model.streams
    picks = [[i for n, i in row if n == streams.primary] for row in streams.rows]
    if streams.settings.stream == "parallel":
        picks = [[i] for row in picks for i in row]
    flat = [i for own in picks for i in own]
    if any(len(own) != 1 for own in picks) or flat != sorted(set(flat)):
        return None
    tower = Tower(streams.sources[streams.primary])
    tower.load_embeddings()
    tower.load_head()
    for index in flat:
        tower.add(index)
    if model.dtype != tower.dtype:
        tower.to(model.dtype)  # the user called .to(dtype) after the build
    with streams.forced(streams.primary):
        passed = streams.run(Inputs(ids))
    return _worst(passed.logits, tower.logits(ids, None, None, None))
