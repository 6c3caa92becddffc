# SPDX-License-Identifier: Apache-2.0
"""Which expert counts how much, position by position, and never by the future."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mol.cache import RunningMeanLayer
from mol.errors import InvalidValue, NotYetBuilt

__all__ = [
    "SimpleRouter",
    "TokenLevelRouter",
    "entropy",
    "load_balance",
    "masked_mean",
]


class TokenLevelRouter(nn.Module):
    """Softmax weights from each token's own stream.

    Args:
        hidden_dim: width of the stream, >= 1.
        num_experts: experts to weigh, >= 1.
        temperature: divides the logits, > 0.
        top_k: not built yet; None weighs all experts.

    Shape:
        hidden_states [B, T, hidden_dim] -> weights [B, T, num_experts], float32,
        each row sums to 1.

    Raises:
        InvalidValue: a number outside its range.
        NotYetBuilt: ``top_k`` other than None.

    Example:
        >>> import torch
        >>> router = TokenLevelRouter(hidden_dim=4, num_experts=2)
        >>> router(torch.zeros(1, 3, 4)).tolist()
        [[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]]
    """

    def __init__(
        self,
        hidden_dim: int,
        num_experts: int,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_dim", hidden_dim), ("num_experts", num_experts)):
            if value < 1:
                raise InvalidValue(f"{name}={value!r}", "it counts", "Give 1 or more")
        if not (math.isfinite(temperature) and temperature > 0):
            why = "it divides the logits"
            raise InvalidValue(f"temperature={temperature!r}", why, "Give more than 0")
        if top_k is not None:
            raise NotYetBuilt(
                f"top_k={top_k!r} is not built yet",
                "this release weighs all experts",
                "Leave it at None",
            )
        self.hidden_dim, self.num_experts = hidden_dim, num_experts
        self.temperature, self.top_k = temperature, top_k
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_dim))
        self.bias = nn.Parameter(torch.zeros(num_experts))

    @torch.no_grad()
    def start_at(self, weights: Sequence[float]) -> None:
        """Make ``weights`` (positive, [E]) the output for any stream."""
        logs = [math.log(w) * self.temperature for w in weights]
        self.bias.copy_(torch.tensor(logs))
        self.weight.zero_()

    def logits(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        state: RunningMeanLayer | None = None,
    ) -> Tensor:
        """Scores before the softmax, [B, T, E] in float32."""
        seen = self._seen(hidden_states.float(), attention_mask, state)
        scores = F.linear(seen, self.weight.float(), self.bias.float())
        return scores / self.temperature

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        state: RunningMeanLayer | None = None,
    ) -> Tensor:
        """Weights [B, T, E] in float32.

        Args:
            hidden_states: [B, T, hidden_dim].
            attention_mask: [B, T], non-zero where a token is real; None: all.
            state: what earlier calls of the same sequences left in the cache.
        """
        return self.logits(hidden_states, attention_mask, state).softmax(-1)

    def _seen(
        self, stream: Tensor, mask: Tensor | None, state: RunningMeanLayer | None
    ) -> Tensor:
        return stream


class SimpleRouter(TokenLevelRouter):
    """Softmax weights from the running mean of the stream up to each token.

    The mean over the whole sequence would let later tokens change earlier
    outputs; the mean over the real tokens so far does not. Arguments and
    shapes are those of :class:`TokenLevelRouter`.

    Example:
        >>> import torch
        >>> router = SimpleRouter(hidden_dim=1, num_experts=2)
        >>> _ = router.weight.data.copy_(torch.tensor([[1.0], [0.0]]))
        >>> router.logits(torch.tensor([[[2.0], [4.0]]]))[0, :, 0].tolist()
        [2.0, 3.0]
    """

    def _seen(
        self, stream: Tensor, mask: Tensor | None, state: RunningMeanLayer | None
    ) -> Tensor:
        if mask is None:
            mask = stream.new_ones(stream.shape[:2])
        real = mask.to(stream.dtype).unsqueeze(-1)
        # A NaN at a padded position must not reach the sums: 0 * NaN is NaN.
        total = torch.where(real > 0, stream, 0.0).cumsum(1)
        count = real.cumsum(1)
        if state is not None:
            total, count = state.extend(total, count)
        return total / count.clamp(min=1.0)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``values`` [B, T, ...] over real positions; zeros where none is.

    Args:
        values: [B, T, ...].
        mask: [B, T], non-zero where a token is real; None: all are.
    """
    if mask is None:
        return values.mean((0, 1))
    real = mask.bool().reshape(*mask.shape, *[1] * (values.dim() - 2))
    count = mask.bool().sum().clamp(min=1)
    return torch.where(real, values, 0.0).sum((0, 1)) / count


def entropy(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean Shannon entropy of router weights, in nats, 0-d.

    Example:
        >>> import torch
        >>> round(entropy(torch.tensor([[[0.5, 0.5]]])).item(), 4)
        0.6931
    """
    return masked_mean(torch.special.entr(weights).sum(-1), mask)


def load_balance(weights: Tensor, chosen: Tensor, mask: Tensor | None = None) -> Tensor:
    """Balance loss ``E * sum_e f_e * P_e``, 0-d; 1 for perfect balance.

    ``f_e`` is expert e's share of the assignments and ``P_e`` its mean weight
    (Fedus et al., Switch Transformers, 2021, eq. 4); the gradient flows
    through ``P_e``.

    Args:
        weights: [B, T, E].
        chosen: [B, T, E], True where an expert computes a token.
        mask: [B, T], non-zero where a token is real; None: all are.
    """
    share = masked_mean(chosen.float(), mask)
    share = share / share.sum().clamp(min=1e-9)
    return weights.shape[-1] * (share * masked_mean(weights, mask)).sum()
