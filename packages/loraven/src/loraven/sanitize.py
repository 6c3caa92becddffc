# SPDX-License-Identifier: Apache-2.0
"""What a layer does with inputs that are not finite: a policy, and a count.

The one idea: only elements that are NaN or infinite are touched, each by itself.
There is no clipping and no statistic of the batch, so a finite value passes
whatever its size, and one bad row changes no other.

Decisions: ``where`` costs a pass over the input and almost no input needs it. On the
CPU a sum decides: a sum that is finite has finite terms. On an accelerator, where
reading a sum would wait for the device, ``where`` always runs and the count stays
on the device until somebody asks. In a graph of torch.compile nothing is counted.
"""

import math
import warnings

import torch
from torch import Tensor

from torchworks_core.errors import InvalidValue

__all__ = ["POLICIES", "NonFiniteGuard"]

POLICIES = ("sanitize", "propagate", "raise")


class NonFiniteGuard:
    """Applies a policy to inputs and counts what it replaced.

    Args:
        policy: ``"sanitize"`` replaces non-finite elements by 0, counts them and
            warns once; ``"propagate"`` touches nothing; ``"raise"`` raises.

    Raises:
        InvalidValue: Another policy.

    Example:
        >>> guard = NonFiniteGuard("propagate")
        >>> guard.clean(torch.tensor([1.0, float("nan")]))
        tensor([1., nan])
    """

    def __init__(self, policy: str = "sanitize") -> None:
        if policy not in POLICIES:
            raise InvalidValue(
                f"nan_policy={policy!r}", "it is unknown", f"Use one of {POLICIES}"
            )
        self.policy = policy
        self._count: int | Tensor = 0
        self._warned = False

    @property
    def count(self) -> int:
        """Number of elements replaced so far."""
        return int(self._count)

    def clean(self, x: Tensor, shape: torch.Size | None = None) -> Tensor:
        """Return ``x`` as the policy wants it; ``x`` itself where nothing is wrong.

        Args:
            x: Any shape and floating-point type.
            shape: Shape that the message of ``"raise"`` indexes; None: that of ``x``.

        Raises:
            InvalidValue: The policy is ``"raise"`` and an element is not finite.
        """
        if self.policy == "propagate" or self.passes(x):
            return x
        return self.repair(x, shape)

    def passes(self, y: Tensor) -> bool:
        """Whether a sum proves all of ``y`` finite; False also means not known."""
        if torch.compiler.is_compiling() or not y.is_cpu:
            return False
        return math.isfinite(y.sum().item())

    def repair(self, x: Tensor, shape: torch.Size | None = None) -> Tensor:
        """Do what `clean` does without asking first whether anything is wrong."""
        finite = torch.isfinite(x)
        if self.policy == "raise":
            self._refuse(x, finite, x.shape if shape is None else shape)
            return x
        cleaned = torch.where(finite, x, torch.zeros((), dtype=x.dtype))
        if torch.compiler.is_compiling():
            return cleaned
        bad = (~finite).sum()
        if not x.is_cpu:
            # Counts of another device join this one's without a transfer to the host.
            before = self._count
            self._count = bad + (
                before.to(bad.device) if isinstance(before, Tensor) else before
            )
            return cleaned
        if not bad:
            return x
        self._count = self.count + int(bad)
        self.warn(self._count)
        return cleaned

    def counted(self, device: torch.device) -> Tensor:
        """`count` as a (1,) float32 tensor on ``device``, without a transfer to us."""
        if isinstance(self._count, Tensor):
            return self._count.to(device, torch.float32).reshape(1)
        return torch.full((1,), float(self._count), device=device)

    def warn(self, count: int) -> None:
        """Warn that elements were replaced, the first time that some were."""
        if self._warned or not count:
            return
        self._warned = True
        warnings.warn(
            f"{count} input elements were NaN or infinite and count as 0; set "
            "nan_policy='raise' to find them, 'propagate' to keep them",
            RuntimeWarning,
            stacklevel=2,
        )

    @staticmethod
    def _refuse(x: Tensor, finite: Tensor, shape: torch.Size) -> None:
        bad = (~finite).reshape(-1).nonzero()
        if not len(bad):
            return
        first = torch.unravel_index(bad[0, 0], shape)
        index = tuple(int(i) for i in first)
        raise InvalidValue(
            f"x[{', '.join(map(str, index))}]={x.reshape(-1)[bad[0, 0]].item()!r}",
            f"{len(bad)} of {x.numel()} input elements are not finite",
            "Repair the input, or set nan_policy to 'sanitize' or 'propagate'",
        )
