# SPDX-License-Identifier: Apache-2.0
"""The float8 formats of Micikevicius et al., FP8 Formats for Deep Learning, 2022."""

from __future__ import annotations

import enum

import torch
from torch import Tensor


class FP8Format(enum.Enum):
    """Eight-bit floating-point formats.

    E4M3: 1 sign, 4 exponent and 3 mantissa bits, largest value 448, no infinity.
    E5M2: 1 sign, 5 exponent and 2 mantissa bits, largest value 57344.

    Example:
        >>> FP8Format.E4M3.dtype, FP8Format("e5m2").largest
        (torch.float8_e4m3fn, 57344.0)
    """

    E4M3 = "e4m3"
    E5M2 = "e5m2"

    @property
    def dtype(self) -> torch.dtype:
        """The tensor type of this format."""
        return torch.float8_e4m3fn if self is FP8Format.E4M3 else torch.float8_e5m2

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return torch.finfo(self.dtype).max


def round_to_fp8(
    x: Tensor, form: FP8Format, dims: tuple[int, ...], ignored: Tensor | None = None
) -> Tensor:
    """Round ``x`` to values that ``form`` can hold, times a scale.

    The scale is the largest absolute value over ``dims`` divided by the format's; so
    nothing overflows but what is ignored, which is clamped. The gradient passes
    unchanged (straight through).

    Args:
        x: Floating point, finite.
        form: The format.
        dims: Dimensions that share a scale.
        ignored: Bool that broadcasts to ``x``, True where values set no scale.

    Returns:
        Like ``x``, in its dtype.

    Example:
        >>> round_to_fp8(torch.tensor([448.0, 17.0, 0.0]), FP8Format.E4M3, (0,))
        tensor([448.,  16.,   0.])
    """
    with torch.no_grad():
        wide = x.float()
        sizes = wide.abs()
        sizes = sizes if ignored is None else sizes.masked_fill(ignored, 0.0)
        scale = sizes.amax(dims, keepdim=True) / form.largest
        scale = scale.masked_fill(scale == 0, 1.0)
        # A cast of what lies beyond the largest value may give NaN: clamp first.
        scaled = (wide / scale).clamp(-form.largest, form.largest)
        rounded = (scaled.to(form.dtype).float() * scale).to(x.dtype)
        step = rounded - x
    return x + step
