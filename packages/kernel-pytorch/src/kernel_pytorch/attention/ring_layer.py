# SPDX-License-Identifier: Apache-2.0
"""RingAttentionLayer: exact attention, streamed on one device or over a ring of ranks.

Decisions:
- Without a group the layer runs on one device, streamed by chunk, also where
  torch.distributed is initialised: an implicit group would break data parallelism.
- Under autocast, projections and attention run in the autocast type as a whole.
- Streaming computes the projections itself, so it is for plain ones: what has hooks,
  or is no `nn.Linear`, is called, at the price of memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernel_pytorch.attention.blocks import autocast_enabled, without_autocast
from kernel_pytorch.attention.layer_base import ProjectedAttention, check_count
from kernel_pytorch.attention.layout import check_layout, resolve
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.projection import Projections, project_and_attend
from kernel_pytorch.attention.ring import ring_with_lse
from kernel_pytorch.attention.streaming import attention_with_lse
from torchworks_core.errors import InvalidValue


class RingAttentionLayer(ProjectedAttention):
    """Exact self-attention over long sequences, on one device or a ring of ranks.

    Args:
        d_model: Width of the input and the output.
        num_heads: Heads; must divide ``d_model``.
        max_sequence_length: A longer sequence is refused; nothing is allocated ahead.
        device: Of the parameters; None takes the default device where it is not the
            CPU, else the first CUDA device, else the CPU.
        num_kv_heads: Heads of keys and values; None is ``num_heads``.
        head_dim: Width of a head; None is ``d_model // num_heads``.
        bias: Whether the four projections have one.
        causal: Whether queries see no later keys.
        window: w: keys with |i - j| < w are seen.
        group: ProcessGroup or 1-D DeviceMesh whose ranks hold shards of the sequence,
            as `kernel_pytorch.attention.shard_sequence` makes them; None: one device.
        layout: ``"zigzag"`` or ``"contiguous"``, of the shards.
        chunk_size: Query rows at a time on one device; None chooses.
        dtype: Of the parameters; None is torch's default.

    Raises:
        InvalidValue: an argument is unusable.

    Example:
        >>> layer = RingAttentionLayer(16, 4, causal=True, device="cpu")
        >>> layer(torch.randn(2, 10, 16)).shape
        torch.Size([2, 10, 16])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        max_sequence_length: int = 1_000_000,
        device: torch.device | str | None = None,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = False,
        window: int | None = None,
        group: Any = None,
        layout: str = "zigzag",
        chunk_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count(max_sequence_length, "max_sequence_length")
        if chunk_size is not None:
            check_count(chunk_size, "chunk_size")
        check_layout(layout)
        super().__init__(
            d_model,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=bias,
            causal=causal,
            window=window,
            max_sequence_length=max_sequence_length,
            device=_device(device),
            dtype=dtype,
        )
        self.chunk_size, self.group, self.layout = chunk_size, group, layout

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        return_lse: bool = False,
        total_length: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend, within the whole sequence or, with a group, from this rank's shard.

        Args:
            hidden_states: [B, N, d_model]; with a group N is the shard's.
            attention_mask: [B, N], 1 = may be attended to, 0 = not; or, with more
                dimensions, bool (True = may attend) or float (added to the scores),
                broadcast to [B, heads, N, N]; with a group [B, heads, N, whole N].
            return_lse: Whether to return log-sum-exp of the scores, too.
            total_length: With a group, the tokens of all shards without padding.

        Returns:
            [B, N, d_model], and with ``return_lse`` lse [B, heads, N], which carries
            gradients with a group only.

        Raises:
            InvalidValue: shapes don't fit, or the sequence is too long.
        """
        whole = self._check_length(hidden_states, total_length)
        batch, length = hidden_states.shape[:2]
        mask = self.mask_of(attention_mask, batch, length, pair_keys=whole)
        if self.group is None and all(map(_plain, self.children())):
            out, lse = self._streamed(hidden_states, mask)
            return (out, lse) if return_lse else out
        q, k, v = self.project(hidden_states)
        if self.group is None:
            out, lse = attention_with_lse(q, k, v, mask, chunk_size=self.chunk_size)
        else:
            where = (self.group, self.layout, None, total_length)
            out, lse = ring_with_lse(q, k, v, mask, *where)
        out = self.merge(out)
        return (out, lse) if return_lse else out

    def _streamed(self, x: Tensor, mask: MaskSpec) -> tuple[Tensor, Tensor]:
        """Attend chunk by chunk, projections included."""
        parts = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        weights = Projections(*(p.weight for p in parts), *(p.bias for p in parts))
        kind = x.device.type
        if autocast_enabled(kind):
            lower = torch.get_autocast_dtype(kind)
            cast = [None if w is None else w.to(lower) for w in weights]
            x, weights = x.to(lower), Projections(*cast)  # type: ignore[arg-type]
        with without_autocast(kind):
            return project_and_attend(
                *(x, weights, self.num_heads, self.num_kv_heads, mask),
                chunk_size=self.chunk_size,
            )

    def _check_length(self, x: Tensor, total_length: int | None) -> int:
        """Return the tokens of the whole sequence."""
        if self.group is None and total_length is not None:
            why = "a layer without a group sees the whole sequence"
            raise InvalidValue(f"total_length={total_length}", why, "Leave it out")
        shard = x.shape[1] if x.ndim == 3 else 0
        whole = total_length or shard * resolve(self.group)[2]
        self.check_input(x, whole)
        return whole


def _plain(projection: nn.Module) -> bool:
    """Whether a projection is nothing but its weight and bias.

    What others put there (adapters, quantised layers, hooks) must run.
    """
    hooks = (projection._forward_hooks, projection._forward_pre_hooks)
    hooks += (projection._backward_hooks, projection._backward_pre_hooks)
    return type(projection) is nn.Linear and not any(hooks)


def _device(given: torch.device | str | None) -> torch.device:
    if given is not None:
        return torch.device(given)
    default = torch.get_default_device()
    if default.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", 0)
    return default
