# SPDX-License-Identifier: Apache-2.0
"""Maps between streams of different width."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LinearAdapter", "resize"]


def resize(stream: Tensor, width: int) -> Tensor:
    """The rectangular identity: zero-pad or truncate the last dimension.

    Args:
        stream: [..., d], any floating dtype.
        width: the wanted last dimension.

    Returns:
        [..., width]; ``stream`` itself where it already has that width.

    Example:
        >>> import torch
        >>> resize(torch.ones(1, 2), 3)
        tensor([[1., 1., 0.]])
    """
    missing = width - stream.shape[-1]
    if missing == 0:
        return stream
    return F.pad(stream, (0, missing)) if missing > 0 else stream[..., :width]


class LinearAdapter(nn.Module):
    """One affine map that starts as the rectangular identity.

    Args:
        input_dim: width of what comes in, >= 1.
        output_dim: width of what goes out, >= 1.
        bias: whether the map has an offset, zero at start.

    Shape:
        [..., input_dim] -> [..., output_dim], in the dtype of the weights.

    Example:
        >>> import torch
        >>> LinearAdapter(2, 3)(torch.tensor([[1.0, 2.0]])).tolist()
        [[1.0, 2.0, 0.0]]
    """

    def __init__(self, input_dim: int, output_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.input_dim, self.output_dim = input_dim, output_dim
        self.weight = nn.Parameter(torch.eye(output_dim, input_dim))
        self.bias = nn.Parameter(torch.zeros(output_dim)) if bias else None

    def forward(self, stream: Tensor) -> Tensor:
        """Map [..., input_dim] to [..., output_dim]."""
        return F.linear(stream, self.weight, self.bias)

    @torch.no_grad()
    def assign(self, weight: Tensor, bias: Tensor) -> None:
        """Take a fitted map; where it is narrower, the rest becomes zero.

        Args:
            weight: [out, in], out <= output_dim and in <= input_dim.
            bias: [out].
        """
        rows, columns = weight.shape
        self.weight.zero_()
        self.weight[:rows, :columns] = weight.to(self.weight)
        if self.bias is not None:
            self.bias.zero_()
            self.bias[:rows] = bias.to(self.bias)

    def extra_repr(self) -> str:
        """Both widths, for ``print(module)``."""
        return f"{self.input_dim} -> {self.output_dim}, bias={self.bias is not None}"
