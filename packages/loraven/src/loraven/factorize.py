# SPDX-License-Identifier: Apache-2.0
"""Streamed input statistics, and a factorisation that is best at every rank at once.

For y = W x + b with inputs of mean mu and covariance C, the map of rank r that
loses least, E ||y - y_r||^2, projects the centred output onto the r leading
eigenvectors U of W C W^T (Eckart and Young, 1936, applied to W C^1/2):

    z = A_r x - A_r mu,   y_r = U_r z + W mu + b,   A = U^T W.

Decisions: float64 and symmetric eigenproblems only, never an inverse or a
Cholesky factor of C, so few calibration tokens are no special case; the smaller
of the two sides is decomposed; factors are rank-major, so the factors of rank r
are the first r rows, contiguous. One LU factorisation of U with row pivoting
gives an order of the outputs that serves every rank, because LU is nested in
its columns: U[p][:, :r] = L[:, :r] R[:r, :r].
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchworks_core.errors import InvalidValue

__all__ = [
    "Factors",
    "GaugeFactors",
    "InputStatistics",
    "Moments",
    "Pivots",
    "gauge_factors",
    "gauge_of_order",
    "output_pca",
    "pivot",
]

_CHUNK = 4096
# Eigenvalues below this share of the largest one are rounding, not signal.
_NOISE = 1e-13


class Moments(NamedTuple):
    """First two moments of a layer's input.

    Attributes:
        mean: (in,), float64.
        covariance: (in, in), float64, of population form (divided by tokens).
        tokens: How many input vectors were seen.
        shrunk: Whether the covariance was pulled towards a multiple of the
            identity because there were fewer than 2 * in tokens.
    """

    mean: Tensor
    covariance: Tensor
    tokens: int
    shrunk: bool


class InputStatistics:
    """Mean and covariance of a stream of input vectors.

    Products are summed in float32 over at most 4096 tokens at a time and then
    added in float64 (float64 input: all in float64), after subtracting the first
    batch's mean, so that a large offset costs no digits.

    Args:
        in_features: Length of an input vector, >= 1.
        device: Where the sums live; best the device of the layer.

    Raises:
        InvalidValue: in_features below 1.

    Example:
        >>> import torch
        >>> statistics = InputStatistics(2)
        >>> statistics.add(torch.tensor([[1.0, 0.0], [3.0, 0.0]]).repeat(8, 1))
        >>> moments = statistics.finish()
        >>> moments.tokens, moments.mean, moments.covariance.diagonal()
        (16, tensor([2., 0.], ...), tensor([1., 0.], ...))
    """

    def __init__(
        self, in_features: int, device: str | torch.device | None = "cpu"
    ) -> None:
        if in_features < 1:
            raise InvalidValue(f"in_features={in_features}", "a layer has 1 or more")
        double = {"dtype": torch.float64, "device": device}
        self.in_features = in_features
        self.tokens = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(in_features, **double)
        self._product = torch.zeros(in_features, in_features, **double)
        self._partial: Tensor | None = None
        self._waiting = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in vectors of shape (..., in), of any floating dtype, unpadded.

        Raises:
            InvalidValue: the last dimension is not in_features.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            why = f"the layer takes (..., {self.in_features})"
            raise InvalidValue(f"input of shape {tuple(x.shape)}", why)
        x = x.detach().reshape(-1, self.in_features).to(self._sum.device)
        for chunk in x.split(_CHUNK):
            if len(chunk):
                self._add_chunk(chunk)

    def _add_chunk(self, x: Tensor) -> None:
        if x.dtype != torch.float64:
            x = x.float()
        if self._shift is None:
            # Rounded, so that it is the same number in both dtypes.
            self._shift = x.mean(0).float().double()
        x = x - self._shift.to(x.dtype)
        self.tokens += len(x)
        self._sum += x.sum(0, dtype=torch.float64)
        if x.dtype == torch.float64:
            self._product.addmm_(x.T, x)
            return
        if self._waiting + len(x) > _CHUNK:
            self._flush()
        if self._partial is None:
            self._partial = torch.zeros_like(self._product, dtype=torch.float32)
        self._partial.addmm_(x.T, x)
        self._waiting += len(x)

    def _flush(self) -> None:
        if self._partial is not None:
            self._product += self._partial
            self._partial.zero_()
        self._waiting = 0

    @torch.no_grad()
    def all_reduce(self) -> None:
        """Add up the sums of all processes, when torch.distributed is initialised.

        Called once, by all processes, after the last `add`.
        """
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        self._flush()
        if self._shift is not None:
            # Each process has another shift; in float64 there are digits to spare.
            shift, total = self._shift, self._sum
            cross = torch.outer(shift, total)
            self._product += cross + cross.T + self.tokens * torch.outer(shift, shift)
            self._sum = total + self.tokens * shift
        self._shift = torch.zeros_like(self._sum)
        count = self._sum.new_tensor([self.tokens])
        for tensor in (count, self._sum, self._product):
            distributed.all_reduce(tensor)
        self.tokens = int(count.item())

    @torch.no_grad()
    def finish(self) -> Moments:
        """Mean and covariance of what was seen so far; more may be added after.

        With fewer than 2 * in tokens the covariance is shrunk: (1 - g) C +
        g tr(C) / in I with g = min(0.5, in / (4 tokens)).

        Raises:
            InvalidValue: no token was seen, or the sums are not finite.
        """
        if not self.tokens or self._shift is None:
            why = "no input vector was seen"
            raise InvalidValue("statistics", why, "Run the layer on calibration data")
        self._flush()
        offset = self._sum / self.tokens
        covariance = self._product / self.tokens - torch.outer(offset, offset)
        covariance = (covariance + covariance.T) / 2
        if not covariance.isfinite().all():
            why = "the inputs hold NaN or infinity, or their squares overflow float32"
            raise InvalidValue("statistics", why, "Check the calibration data")
        shrunk = self.tokens < 2 * self.in_features
        if shrunk:
            part = min(0.5, self.in_features / (4 * self.tokens))
            level = part * covariance.diagonal().mean()
            covariance *= 1 - part
            covariance.diagonal().add_(level)
        return Moments(self._shift + offset, covariance, self.tokens, shrunk)


@dataclass(frozen=True)
class Factors:
    """Nested factors of one linear map; those of rank r are the first r rows.

    The map of rank r is ``(x @ down[:r].T + down_bias[:r]) @ up[:r] + up_bias``.

    Attributes:
        up: (R, out).
        down: (R, in).
        down_bias: (R,), minus the factors applied to the mean input.
        up_bias: (out,), the output at the mean input.
        tail: (R + 1,) float64; tail[r] is the expected squared error at rank r.
            tail[R] is what rounding left, or 0.
        energy: Expected squared norm of the centred output; equals tail[0].
    """

    up: Tensor
    down: Tensor
    down_bias: Tensor
    up_bias: Tensor
    tail: Tensor
    energy: float

    @property
    def rank(self) -> int:
        """The largest rank, R."""
        return self.up.shape[0]


class Pivots(NamedTuple):
    """An LU factorisation with row pivoting: ``up.T[order] = lower @ upper``.

    Attributes:
        order: (out,) int64, the outputs in the order in which they become pivots.
        lower: (out, R), unit lower triangular.
        upper: (R, R), upper triangular.
    """

    order: Tensor
    lower: Tensor
    upper: Tensor


class GaugeFactors(NamedTuple):
    """A map of rank r that computes r outputs, and the others from those.

    ``y[order[:r]] = skeleton @ x + skeleton_bias`` and then
    ``y[order[r:]] = interpolation @ y[order[:r]] + interpolation_bias``.

    Attributes:
        skeleton: (r, in).
        interpolation: (out - r, r).
        skeleton_bias: (r,).
        interpolation_bias: (out - r,).
        order: (out,) int64.
    """

    skeleton: Tensor
    interpolation: Tensor
    skeleton_bias: Tensor
    interpolation_bias: Tensor
    order: Tensor


@torch.no_grad()
def output_pca(
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments,
    *,
    metric: Tensor | None = None,
) -> Factors:
    """Factorise a linear layer for inputs with the given moments.

    Args:
        weight: (out, in), any floating dtype; the work is done in float64 on its
            device.
        bias: (out,) or None.
        moments: Of the layer's input.
        metric: (out, out), symmetric positive definite, or (out,), a diagonal, or
            None for the identity. Errors are measured as e^T metric e, as the mean
            outer product of the gradients at the output would weigh them.

    Returns:
        Factors in float64. R is min(in, out) less the directions without energy,
        and at least 1.

    Raises:
        InvalidValue: shapes that do not fit, values that are not finite, or a
            metric that is not positive definite.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> moments = Moments(torch.zeros(2), torch.eye(2), 100, False)
        >>> output_pca(weight, None, moments).tail
        tensor([5., 1., 0.], dtype=torch.float64)
    """
    _check(weight, bias, moments, metric)
    weight, mean, covariance = (
        value.detach().to(weight.device, torch.float64)
        for value in (weight, moments.mean, moments.covariance)
    )
    scaled, back = weight, None
    if metric is not None:
        root, back = _roots(metric.detach().to(weight))
        scaled = root @ weight if root.ndim == 2 else root[:, None] * weight
    basis, energies = _principal(scaled, covariance)
    rank, up = basis.shape[1], basis.T
    if back is not None:
        up = up @ back if back.ndim == 2 else up * back
    down = basis.T @ scaled
    up_bias = weight @ mean
    if bias is not None:
        up_bias = up_bias + bias.detach().to(weight)
    tail = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])
    tail = tail[: rank + 1].clone()
    energy = float(tail[0])
    return Factors(up.contiguous(), down, -(down @ mean), up_bias, tail, energy)


def _check(
    weight: Tensor, bias: Tensor | None, moments: Moments, metric: Tensor | None
) -> None:
    if weight.ndim != 2 or not weight.numel():
        raise InvalidValue(f"weight of shape {tuple(weight.shape)}", "it is (out, in)")
    rows, columns = weight.shape
    if metric is not None and metric.ndim not in (1, 2):
        raise InvalidValue(f"metric of shape {tuple(metric.shape)}", "it is (out, out)")
    wanted = {
        "bias": (bias, (rows,)),
        "moments.mean": (moments.mean, (columns,)),
        "moments.covariance": (moments.covariance, (columns, columns)),
        "metric": (metric, (rows,) * (1 if metric is None else metric.ndim)),
        "weight": (weight, (rows, columns)),
    }
    for name, (value, shape) in wanted.items():
        if value is None:
            continue
        if value.shape != shape:
            why = f"the weight {rows} x {columns} wants {shape}"
            raise InvalidValue(f"{name} of shape {tuple(value.shape)}", why)
        if not value.isfinite().all():
            raise InvalidValue(name, "it holds NaN or infinity", "Check the model")


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive definite matrix, and its inverse."""
    if metric.ndim == 1:
        values, vectors = metric, metric
    else:
        values, vectors = torch.linalg.eigh((metric + metric.T) / 2)
    if not values.min() > values.max() * _NOISE:
        why = f"its eigenvalues run from {values.min():.3g} to {values.max():.3g}"
        raise InvalidValue(
            "metric", why, "Add a multiple of the identity to make it positive definite"
        )
    root = values.sqrt()
    if metric.ndim == 1:
        return root, root.reciprocal()
    return (vectors * root) @ vectors.T, (vectors / root) @ vectors.T


def _principal(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns of most output energy, and all energies, descending."""
    rows, columns = weight.shape
    if rows <= columns:
        energies, basis = _descending(weight @ covariance @ weight.T)
        return basis[:, : _kept(energies)], energies
    # A symmetric root by eigenvectors: unlike Cholesky's, it has no singular case.
    values, vectors = torch.linalg.eigh(covariance)
    half = weight @ (vectors * values.clamp_min(0).sqrt())
    energies, basis = _descending(half.T @ half)
    kept = half @ basis[:, : _kept(energies)]
    ortho, triangle = torch.linalg.qr(kept)
    sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(ortho)
    return ortho * sign, energies


def _descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _kept(energies: Tensor) -> int:
    return max(1, int((energies > energies[0] * _NOISE).sum()))


@torch.no_grad()
def pivot(up: Tensor) -> Pivots:
    """Order the outputs so that one order serves every rank.

    Args:
        up: (R, out) with R <= out, any floating dtype; worked on in float64.

    Returns:
        Float64 factors on the device of ``up``.

    Raises:
        InvalidValue: not a matrix with R <= out.

    Example:
        >>> import torch
        >>> pivot(torch.tensor([[0.1, 0.9, 0.2]])).order
        tensor([1, 0, 2])
    """
    if up.ndim != 2 or up.shape[0] > up.shape[1]:
        raise InvalidValue(f"up of shape {tuple(up.shape)}", "it is (R, out), R <= out")
    packed, swaps = torch.linalg.lu_factor(up.detach().double().T)
    rank = up.shape[0]
    order = list(range(up.shape[1]))
    for row, other in enumerate(swaps.tolist()):
        order[row], order[other - 1] = order[other - 1], order[row]
    lower = packed.tril(-1)
    lower.diagonal().fill_(1)
    return Pivots(torch.tensor(order, device=up.device), lower, packed[:rank].triu())


@torch.no_grad()
def gauge_factors(factors: Factors, pivots: Pivots, rank: int) -> GaugeFactors:
    """The gauge form of rank r: r * (in + out - r) weights, the same map.

    Args:
        factors: From `output_pca`, or trained since.
        pivots: `pivot` of ``factors.up``.
        rank: 1 to R.

    Returns:
        Factors in float64.

    Raises:
        InvalidValue: rank out of range.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[2.0, 0.0], [0.0, 1.0], [4.0, 0.0]])
        >>> moments = Moments(torch.zeros(2), torch.eye(2), 100, False)
        >>> factors = output_pca(weight, None, moments)
        >>> gauge = gauge_factors(factors, pivot(factors.up), 1)
        >>> gauge.order[0], gauge.skeleton.round(decimals=6)
        (tensor(2), tensor([[4., 0.]], dtype=torch.float64))
    """
    if not 1 <= rank <= factors.rank:
        raise InvalidValue(f"rank={rank}", f"the factors allow 1 to {factors.rank}")
    parts = factors.up, factors.down, factors.down_bias, factors.up_bias
    return gauge_of_order(*parts, pivots.order, rank)


@torch.no_grad()
def gauge_of_order(
    up: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up_bias: Tensor,
    order: Tensor,
    rank: int,
) -> GaugeFactors:
    """`gauge_factors` from the four tensors and an order alone, in float64."""
    up, bias = up[:rank].detach().double()[:, order], up_bias.detach().double()[order]
    head, rest = up[:, :rank], up[:, rank:]
    skeleton = head.T @ down[:rank].detach().double()
    interpolation = torch.linalg.solve(head, rest).T.contiguous()
    first = bias[:rank] + head.T @ down_bias[:rank].detach().double()
    # The interpolation starts from finished outputs, so their bias is inside already.
    other = bias[rank:] - interpolation @ bias[:rank]
    return GaugeFactors(skeleton, interpolation, first, other, order)
