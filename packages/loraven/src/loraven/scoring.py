# SPDX-License-Identifier: Apache-2.0
"""How hard is an input, and which columns does it need: scorer, gates, masks.

The one idea: a mask is 0 or 1 in the value and a sigmoid in the gradient
(straight-through; Bengio, Leonard and Courville, "Estimating or Propagating
Gradients Through Stochastic Neurons", arXiv:1308.3432). So the forward pass of
training computes exactly what inference will, and the scorer and the gates still
learn from the task's loss.

Decisions: both networks treat each row alone, without batch statistics. Scores,
ranks and masks are float32 whatever the dtype of the layer. The straight-through
value is written ``hard + (soft - soft.detach())``, whose value is exactly ``hard``;
``soft + (hard - soft).detach()`` is so only up to rounding.
"""

import torch
from torch import Tensor, nn

from loraven.products import run
from torchworks_core.errors import InvalidValue

__all__ = [
    "GateNetwork",
    "LightweightScorer",
    "column_blocks",
    "gate_mask",
    "rank_mask",
    "row_ranks",
]


class LightweightScorer(nn.Module):
    """Linear, ReLU, Linear, sigmoid: how complex is each row, in [0, 1].

    Args:
        in_features: Size of the last dimension of the input.
        hidden_dim: Width of the hidden layer.
        device: Where the parameters live.
        dtype: Their floating-point type.

    Raises:
        InvalidValue: A size is not an integer of 1 or more.

    Example:
        >>> import torch
        >>> scores = LightweightScorer(16)(torch.randn(4, 16))
        >>> scores.shape, bool(((0 <= scores) & (scores <= 1)).all())
        (torch.Size([4, 1]), True)
    """

    def __init__(
        self,
        in_features: int,
        hidden_dim: int = 32,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features=in_features, hidden_dim=hidden_dim)
        self.in_features, self.hidden_dim = in_features, hidden_dim
        self.device, self.dtype = device, dtype
        self.hidden = nn.Linear(in_features, hidden_dim, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_dim, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Score each row: (..., in_features) -> (..., 1) in [0, 1]."""
        return torch.sigmoid(run(self.output, torch.relu(run(self.hidden, x))))


class GateNetwork(nn.Module):
    """Linear, sigmoid: which blocks of columns does each row need, in [0, 1].

    A block is open at 0.5 or more. The weight starts at 0 and the bias at 2, so
    that all gates start open (0.88) whatever the input.

    Args:
        in_features: Size of the last dimension of the input.
        num_blocks: Number of gates.
        device: Where the parameters live.
        dtype: Their floating-point type.

    Raises:
        InvalidValue: A size is not an integer of 1 or more.

    Example:
        >>> import torch
        >>> GateNetwork(16, num_blocks=3)(torch.randn(2, 16))
        tensor([[0.8808, 0.8808, 0.8808],
                [0.8808, 0.8808, 0.8808]], grad_fn=<SigmoidBackward0>)
    """

    def __init__(
        self,
        in_features: int,
        num_blocks: int = 8,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features=in_features, num_blocks=num_blocks)
        self.in_features, self.num_blocks = in_features, num_blocks
        self.device, self.dtype = device, dtype
        self.linear = nn.Linear(in_features, num_blocks, device=device, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        """Gate each row: (..., in_features) -> (..., num_blocks) in [0, 1]."""
        return torch.sigmoid(self.logits(x))

    def logits(self, x: Tensor) -> Tensor:
        """The gates before the sigmoid, in (-inf, inf)."""
        return run(self.linear, x)


def row_ranks(scores: Tensor, r_min: int, r_max: int, cap: int) -> Tensor:
    """Rank of each row, before rounding: ``r_min + s (r_max - r_min)``, <= cap.

    Args:
        scores: (rows,) in [0, 1], any floating-point type.
        r_min: Rank of score 0.
        r_max: Rank of score 1.
        cap: Largest rank that the budget allows.

    Returns:
        (rows,) float32, differentiable where the cap does not bind. A score that
        is NaN counts as 1.

    Example:
        >>> row_ranks(torch.tensor([0.0, 0.5, 1.0]), r_min=4, r_max=12, cap=10)
        tensor([ 4.,  8., 10.])
    """
    ranks = r_min + scores.float().nan_to_num(1.0) * (r_max - r_min)
    return ranks.clamp(max=cap)


def rank_mask(ranks: Tensor, columns: int, temperature: float) -> Tensor:
    """Column j of a row is kept while ``j + 1/2 <= rank``: round half up.

    Args:
        ranks: (rows,) as from `row_ranks`.
        columns: Number of columns of the mask.
        temperature: Width of the sigmoid that carries the gradient, in columns.

    Returns:
        (rows, columns) float32, exactly 0 or 1, with the gradient of
        ``sigmoid((rank - j - 1/2) / temperature)``.

    Example:
        >>> rank_mask(torch.tensor([1.0, 2.5]), columns=4, temperature=0.5)
        tensor([[1., 0., 0., 0.],
                [1., 1., 1., 0.]])
    """
    middle = torch.arange(columns, device=ranks.device, dtype=torch.float32) + 0.5
    above = ranks[:, None] - middle
    return _straight_through(torch.sigmoid(above / temperature), above >= 0)


def gate_mask(gates: Tensor, columns: int) -> Tensor:
    """Spread gates over the columns of their blocks; block 0 never closes.

    Args:
        gates: (rows, blocks) in [0, 1]; open at 0.5 or more.
        columns: Number of columns, split into blocks by `column_blocks`.

    Returns:
        (rows, columns) float32, exactly 0 or 1, with the gradient of the gates.

    Example:
        >>> gate_mask(torch.tensor([[0.1, 0.2, 0.9]]), columns=6)
        tensor([[1., 1., 0., 0., 1., 1.]])
    """
    gates = gates.float()
    soft = torch.cat([torch.ones_like(gates[:, :1]), gates[:, 1:]], 1)
    blocks = column_blocks(columns, gates.shape[1], gates.device)
    return _straight_through(soft, soft >= 0.5)[:, blocks]


def column_blocks(columns: int, blocks: int, device: torch.device | str) -> Tensor:
    """Block of each column: ``floor(i * blocks / columns)``, (columns,) int64.

    Example:
        >>> column_blocks(5, 2, "cpu")
        tensor([0, 0, 0, 1, 1])
    """
    return torch.arange(columns, device=device) * blocks // columns


def _straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    return hard.to(soft.dtype) + (soft - soft.detach())


def _check_sizes(**sizes: int) -> None:
    bad = [
        f"{name}={value!r}"
        for name, value in sizes.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < 1
    ]
    if bad:
        raise InvalidValue(
            ", ".join(bad), "sizes are integers of 1 or more", "Give a larger one"
        )
