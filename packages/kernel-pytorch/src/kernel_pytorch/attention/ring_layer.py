# SPDX-License-Identifier: Apache-2.0
"""RingAttentionLayer: exact attention, streamed on one device or over a ring of ranks.

Decisions:
- Without a group the layer runs on one device, streamed by chunk, also where
  torch.distributed is initialised: an implicit group would break data parallelism.
- Under autocast, projections and attention run in the autocast type as a whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernel_pytorch.attention.layer_base import (
    ProjectedAttention,
    check_count,
    join_heads,
    split_heads,
)
from kernel_pytorch.attention.layout import check_layout, resolve
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.projection import Projections, project_and_attend
from kernel_pytorch.attention.ring import ring_with_lse
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
            attention_mask: [B, N], nonzero = may be attended to; or, with more
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
        self._check_length(hidden_states, total_length)
        mask = self.mask_of(attention_mask, *hidden_states.shape[:2])
        x, weights = hidden_states, self._weights()
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            lower = torch.get_autocast_dtype(kind)
            cast = [None if w is None else w.to(lower) for w in weights]
            x, weights = x.to(lower), Projections(*cast)  # type: ignore[arg-type]
        with torch.autocast(kind, enabled=False):
            out, lse = self._attend(x, weights, mask, total_length)
        return (out, lse) if return_lse else out

    def _weights(self) -> Projections:
        parts = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        return Projections(*(p.weight for p in parts), *(p.bias for p in parts))

    def _attend(
        self, x: Tensor, w: Projections, mask: MaskSpec, total_length: int | None
    ) -> tuple[Tensor, Tensor]:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if self.group is None:
            options = {"chunk_size": self.chunk_size}
            return project_and_attend(x, w, heads, kv_heads, mask, **options)
        q = split_heads(linear(x, w.q, w.q_bias), heads)
        k = split_heads(linear(x, w.k, w.k_bias), kv_heads)
        v = split_heads(linear(x, w.v, w.v_bias), kv_heads)
        where = (self.group, self.layout, None, total_length)
        out, lse = ring_with_lse(q, k, v, mask, *where)
        return linear(join_heads(out), w.out, w.out_bias), lse

    def _check_length(self, x: Tensor, total_length: int | None) -> None:
        if self.group is None and total_length is not None:
            why = "a layer without a group sees the whole sequence"
            raise InvalidValue(f"total_length={total_length}", why, "Leave it out")
        shard = x.shape[1] if x.ndim == 3 else 0
        self.check_input(x, total_length or shard * resolve(self.group)[2])


def _device(given: torch.device | str | None) -> torch.device:
    if given is not None:
        return torch.device(given)
    default = torch.get_default_device()
    if default.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", 0)
    return default
