# SPDX-License-Identifier: Apache-2.0
"""Whether factors still belong to the weight that they were made from.

A fingerprint of the bits decides. It reads the whole weight, so it is taken again
only where something may have changed: another Parameter, other memory, or a version
counter that has moved. Writes through ``.data`` or numpy move none, and neither do
fused optimizers; who is about to keep a result for good asks for the bits. Weights
without bits to read here, sharded ones and those on the meta device, are trusted.

Twins of a layer that share its tensors share one `Freshness`.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Freshness", "fingerprint"]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Freshness:
    """What is known of one weight and bias.

    Attributes:
        stale: whether the factors belong to other values.

    Example:
        >>> import torch
        >>> weight = torch.ones(2, 3)
        >>> expected, known = fingerprint(weight, None), Freshness()
        >>> known.look(weight, None, expected)
        False
        >>> known.look(weight.mul_(2), None, expected)
        True
    """

    def __init__(self) -> None:
        self.stale = False
        self._seen: tuple[Any, ...] = ()

    def knows(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether it is about these tensors, or about none so far."""
        seen = self._seen
        return not seen or (seen[0] is weight and seen[1] is bias)

    def note(self, weight: Tensor, bias: Tensor | None, stale: bool) -> None:
        """Remember what was found for these tensors as they are now."""
        self.stale, self._seen = stale, ()
        if _readable(weight):
            self._seen = (weight, bias, *_state(weight), *_state(bias))

    def look(
        self,
        weight: Tensor,
        bias: Tensor | None,
        expected: Tensor,
        thorough: bool = False,
    ) -> bool:
        """Whether the factors are stale; reads the bits where they may have changed.

        Args:
            weight: as for `fingerprint`, and so is ``bias``.
            bias: see there.
            expected: the fingerprint of the values that the factors belong to.
            thorough: read the bits in any case.
        """
        if not _readable(weight):
            return self.stale
        seen = self._seen
        same = not thorough and len(seen) > 0 and self.knows(weight, bias)
        if not (same and seen[2:4] == _state(weight) and seen[4:] == _state(bias)):
            found = fingerprint(weight, bias)
            self.note(weight, bias, not torch.equal(found.cpu(), expected.cpu()))
        return self.stale

    def __getstate__(self) -> dict[str, Any]:
        # Version counters of copies start anew.
        return {"stale": self.stale, "_seen": ()}


def _readable(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and not weight.is_meta


def _state(tensor: Tensor | None) -> tuple[int, int]:
    if tensor is None:
        return 0, 0
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()


def fingerprint(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Three int64 made of the bits alone, so the same on every device.

    Args:
        weight: a matrix of any floating dtype.
        bias: a vector, or None.

    Example:
        >>> import torch
        >>> one = fingerprint(torch.eye(2), None)
        >>> torch.equal(one, fingerprint(torch.eye(2), None))
        True
        >>> torch.equal(one, fingerprint(2 * torch.eye(2), None))
        False
    """
    bits = _bits(weight)
    sums = [bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)]
    sums.append(sums[0][:0] if bias is None else _bits(bias).to(torch.int64))
    return torch.stack([(part * _odd(part)).sum() for part in sums])


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(_BITS[tensor.element_size()])


def _odd(like: Tensor) -> Tensor:
    """Odd factors that differ at every place, modulo 2**64."""
    places = torch.arange(len(like), device=like.device)
    return places * -7046029254386353130 + 1
