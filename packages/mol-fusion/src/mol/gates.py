# SPDX-License-Identifier: Apache-2.0
"""Mixing the output distributions of whole models.

The Bayes gate weighs each model by the likelihood it gave to the sequence so
far, and lets a fixed share of the weight flow back to the prior at every token
(Herbster and Warmuth, "Tracking the Best Expert", 1998). For a sequence of n
predicted tokens and E models its loss is at most that of the best single model
plus ``ln E - (n - 1) * ln(1 - share + share / E)``.
"""

import math

import torch
from torch import Tensor, nn

from mol.errors import InvalidValue

__all__ = ["BayesGate", "mix"]

# Finite, so that two models which exclude a token one after the other do not
# turn the weights into NaN.
_FLOOR = -1e30


class BayesGate(nn.Module):
    """Posterior weights with fixed share; nothing to train.

    Args:
        experts: number of models, >= 1.
        share: part of the weight that returns to the uniform prior at each
            token, in [0, 1).

    Raises:
        InvalidValue: a number outside its range.

    Example:
        >>> import torch
        >>> gate = BayesGate(experts=2, share=0.0)
        >>> likelihood = torch.tensor([[[0.9, 0.1]]]).log()
        >>> gate(likelihood, torch.ones(1, 1, dtype=torch.bool)).exp()
        tensor([[[0.9000, 0.1000]]])
    """

    def __init__(self, experts: int, share: float = 0.02) -> None:
        super().__init__()
        if experts < 1:
            raise InvalidValue(f"experts={experts!r}", "it counts", "Give 1 or more")
        if not 0 <= share < 1:
            why = "it is a part of the weight"
            raise InvalidValue(f"share={share!r}", why, "Give a number in [0, 1)")
        self.experts, self.share = experts, share

    def forward(
        self, seen: Tensor, known: Tensor, start: Tensor | None = None
    ) -> Tensor:
        """Log-weights after each token.

        Args:
            seen: [B, T, E], log-probability that each model gave to token t
                before it saw it.
            known: [B, T], True where token t and the one before are real, so
                that the comparison counts.
            start: [B, E], log-weights before the first token; None: uniform.

        Returns:
            [B, T, E] in float32; every row sums to 1 in probability.
        """
        prior = seen.new_full(seen[:, 0].shape, -math.log(self.experts)).float()
        weight = prior if start is None else start
        keep, back = math.log1p(-self.share), math.log(self.share or 1.0)
        # Only differences count; a token that all exclude tells nothing.
        seen = seen.float()
        best = seen.amax(-1, keepdim=True)
        seen = torch.where(best.isfinite(), seen - best, 0.0).clamp(min=_FLOOR)
        steps = []
        for t in range(seen.shape[1]):
            after = (weight + seen[:, t]).log_softmax(-1)
            if self.share:
                after = torch.logaddexp(after + keep, prior + back)
            weight = torch.where(known[:, t, None], after, weight)
            steps.append(weight)
        return torch.stack(steps, 1)

    def extra_repr(self) -> str:
        """Both settings, for ``print(module)``."""
        return f"experts={self.experts}, share={self.share}"


def mix(log_weight: Tensor, log_probs: Tensor) -> Tensor:
    """``ln sum_e w_e p_e``: [B, T, E] and [B, T, E, V] -> [B, T, V]."""
    return (log_weight[..., None] + log_probs).logsumexp(2)
