# SPDX-License-Identifier: Apache-2.0
"""One row of the fused model: several experts, weighed position by position.

``out = sum_i w_i * y_i`` with ``y_primary = B(h)`` and, for a guest,
``y_i = h + post_i(B_i(pre_i h) - pre_i h)``. The primary has no trainable
adapter, so weight 1 on it gives its own output bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mol.adapters import LinearAdapter
from mol.cache import RunningMeanLayer
from mol.config import MoLConfig
from mol.routers import (
    SimpleRouter,
    TokenLevelRouter,
    entropy,
    load_balance,
    masked_mean,
)

__all__ = ["Expert", "FusionLayer", "statistics"]

Block = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Expert:
    """One block in a row.

    Attributes:
        name: the model it comes from.
        index: its layer index there.
        slot: its slot in that model's stack.
        width: width of that model's stream.
        primary: whether it belongs to the primary.
    """

    name: str
    index: int
    slot: int
    width: int
    primary: bool


class FusionLayer(nn.Module):
    """Adapters and router of one row; the blocks belong to their stacks.

    Args:
        width: width of the fused stream.
        experts: who takes part.
        config: router type, start weights, temperature.
        dtype: of the adapters, the same as the stream's.
    """

    def __init__(
        self,
        width: int,
        experts: Sequence[Expert],
        config: MoLConfig,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.experts = tuple(experts)
        self.pre, self.post = nn.ModuleDict(), nn.ModuleDict()
        for j, expert in enumerate(self.experts):
            if not expert.primary:
                self.pre[str(j)] = LinearAdapter(width, expert.width).to(dtype)
                self.post[str(j)] = LinearAdapter(expert.width, width).to(dtype)
        simple = config.router_type == "simple"
        kind = SimpleRouter if simple else TokenLevelRouter
        self.router = kind(width, len(self.experts), config.temperature)
        self.router.start_at(start_weights(self.experts, config.router_init))

    def forward(
        self,
        stream: Tensor,
        blocks: Sequence[Block],
        attention_mask: Tensor | None = None,
        state: RunningMeanLayer | None = None,
        only: str | None = None,
        run_all: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Fuse the experts' outputs.

        Args:
            stream: [B, T, width].
            blocks: for each expert, its block on the expert's own stream.
            attention_mask: [B, T] of these tokens, non-zero where real.
            state: what the router keeps between calls.
            only: name of a model that gets weight exactly 1.
            run_all: whether blocks of weight 0 run, too, to fill their cache.

        Returns:
            The new stream [B, T, width], the weights [B, T, E] in float32.
        """
        weights = self.router(stream, attention_mask, state)
        if only is not None:
            weights = self._one_hot(weights, only)
        terms: list[Tensor] = []
        for j, (expert, block) in enumerate(zip(self.experts, blocks, strict=True)):
            out = only is not None and expert.name != only
            if out and not run_all:
                continue
            result = self._result(j, expert, block, stream)
            if not out:
                # Weights rounded to bfloat16 would no longer sum to 1.
                wide = torch.promote_types(result.dtype, torch.float32)
                terms.append(weights[..., j : j + 1].to(wide) * result.to(wide))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total.to(stream.dtype), weights

    def _result(self, j: int, expert: Expert, block: Block, stream: Tensor) -> Tensor:
        if expert.primary:
            own = block(stream[..., : expert.width]).to(stream.dtype)
            if expert.width == stream.shape[-1]:
                return own
            return torch.cat([own, stream[..., expert.width :]], -1)
        guest = self.pre[str(j)](stream)
        change = block(guest).to(stream.dtype) - guest
        return stream + self.post[str(j)](change)

    def _one_hot(self, weights: Tensor, only: str) -> Tensor:
        chosen = [float(expert.name == only) for expert in self.experts]
        row = torch.tensor(chosen, device=weights.device) / sum(chosen)
        return row.expand_as(weights)


def start_weights(experts: Sequence[Expert], router_init: float | None) -> list[float]:
    """Weights at start: ``router_init`` for the primary, the rest shared.

    Rows without the primary, or with nothing else, are uniform; a primary
    that stands in a row several times shares its weight.
    """
    own, count = sum(expert.primary for expert in experts), len(experts)
    if router_init is None or own in (0, count):
        return [1 / count] * count
    rest = (1 - router_init) / (count - own)
    return [router_init / own if expert.primary else rest for expert in experts]


def statistics(
    experts: Sequence[tuple[str, int]], weights: Tensor, mask: Tensor | None
) -> dict:
    """What the specification calls router statistics, of one row.

    Args:
        experts: (model, layer index) of each expert.
        weights: [B, T, E] in float32.
        mask: [B, T] of these tokens, non-zero where real; None: all are.
    """
    weights = weights.detach()
    chosen = torch.ones_like(weights, dtype=torch.bool)
    tokens = weights.shape[0] * weights.shape[1] if mask is None else mask.bool().sum()
    share = masked_mean(chosen.float(), mask)
    return {
        "expert_weights": weights,
        "router_entropy": entropy(weights, mask),
        "load_balancing_loss": load_balance(weights, chosen, mask),
        "num_experts": len(experts),
        "experts": tuple(experts),
        "tokens_per_expert": (share * tokens).round().long(),
        "flops_fraction": chosen.float().mean().item(),
    }
