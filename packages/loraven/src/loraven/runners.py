# SPDX-License-Identifier: Apache-2.0
"""Three ways to run a linear map, and how many multiply-accumulates each takes.

dense: the original weight, out * in for each row.
prefix: the first r rows of two factors, r * (in + out).
gauge: r outputs, and the others from those, r * (in + out - r), never above dense.

Decisions, each measured on one core in float32 (384 to 3072 features):
- From 512 inputs on, with 16 to 64 rows, the first product is computed transposed,
  weight @ x.T: the prefix form takes 0.51 to 0.93 of the time at 16 rows. With 96
  rows or 384 inputs it would take 1.0 to 1.1.
- The outputs are put in order by one ``index_select``; with
  ``contiguous=False`` on whole rows of the transposed output, which is then
  returned as a view. Advanced indexing took up to twice as long.
- A compiler gets the plain expressions without a branch on the number of rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from torchworks_core.errors import InvalidValue

__all__ = [
    "FORMS",
    "MANY_INPUTS",
    "MANY_ROWS",
    "form_macs",
    "plain_gauge",
    "run_dense",
    "run_gauge",
    "run_prefix",
]

FORMS = ("dense", "prefix", "gauge")
# Where the first product may be computed transposed: from so many rows on, up to so
# many, with at least so many inputs.
MANY_ROWS, _TOO_MANY_ROWS, MANY_INPUTS = 16, 64, 512


def form_macs(out: int, in_: int, rank: int, form: str) -> int:
    """Multiply-accumulates of one row, which is also the number of weights.

    Raises:
        InvalidValue: an unknown form.

    Example:
        >>> [form_macs(64, 64, 16, form) for form in FORMS]
        [4096, 2048, 1792]
    """
    if form == "dense":
        return out * in_
    if form == "prefix":
        return rank * (out + in_)
    if form == "gauge":
        return rank * (out + in_ - rank)
    raise InvalidValue(f"form={form!r}", "unknown", f"Give one of {', '.join(FORMS)}")


def run_dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """The original layer: the same operations, so the same bits.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) when transposed.
        bias: (out,) or None.
        transposed: the weight is that of transformers' ``Conv1D``.

    Returns:
        (..., out).
    """
    if not transposed:
        return linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def run_prefix(
    x: Tensor, down: Tensor, down_bias: Tensor, up_t: Tensor, up_bias: Tensor
) -> Tensor:
    """Two factors: ``(x @ down.T + down_bias) @ up_t.T + up_bias``.

    Args:
        x: (..., in).
        down: (r, in).
        down_bias: (r,).
        up_t: (out, r); best the transpose of a contiguous (r, out).
        up_bias: (out,).

    Returns:
        (..., out), contiguous.
    """
    if not (x.is_cpu and _pays_transposed(x.numel(), down.shape[1])):
        return linear(linear(x, down, down_bias), up_t, up_bias)
    z = torch.addmm(down_bias[:, None], down, x.flatten(0, -2).t())
    y = torch.addmm(up_bias, z.t(), up_t.t())
    return y if x.ndim == 2 else y.unflatten(0, x.shape[:-1])


def _pays_transposed(numbers: int, inside: int) -> bool:
    many = MANY_ROWS * inside <= numbers <= _TOO_MANY_ROWS * inside
    return many and inside >= MANY_INPUTS


def plain_gauge(
    x: Tensor,
    skeleton: Tensor,
    skeleton_bias: Tensor,
    interpolation: Tensor,
    interpolation_bias: Tensor,
    inverse: Tensor,
) -> Tensor:
    """`run_gauge` without a branch on the number of rows."""
    y = linear(x, skeleton, skeleton_bias)
    y = torch.cat([y, linear(y, interpolation, interpolation_bias)], -1)
    return y.index_select(-1, inverse)


def run_gauge(
    x: Tensor,
    skeleton: Tensor,
    skeleton_bias: Tensor,
    interpolation: Tensor,
    interpolation_bias: Tensor,
    inverse: Tensor,
    contiguous: bool = True,
) -> Tensor:
    """R outputs from x, the others from those, then into their order.

    Args:
        x: (..., in).
        skeleton: (r, in).
        skeleton_bias: (r,).
        interpolation: (out - r, r).
        interpolation_bias: (out - r,).
        inverse: (out,) int64, where each output stands in the order of the pivots.
        contiguous: False: from 16 rows on, a view with strides (1, rows), which is
            cheaper, but ``y.view(-1)`` raises on it.

    Returns:
        (..., out).
    """
    inside = skeleton.shape[1]
    if contiguous:
        transposed = x.is_cpu and _pays_transposed(x.numel(), inside)
    else:
        transposed = x.numel() >= MANY_ROWS * inside
    if not transposed:
        weights = skeleton, skeleton_bias, interpolation, interpolation_bias
        return plain_gauge(x, *weights, inverse)
    y = torch.addmm(skeleton_bias[:, None], skeleton, x.flatten(0, -2).t())
    if contiguous:
        y = y.t().contiguous()
        y = torch.cat([y, linear(y, interpolation, interpolation_bias)], 1)
        y = y.index_select(1, inverse)
    else:
        rest = torch.addmm(interpolation_bias[:, None], interpolation, y)
        y = torch.cat([y, rest]).index_select(0, inverse).t()
    return y if x.ndim == 2 else y.unflatten(0, x.shape[:-1])
