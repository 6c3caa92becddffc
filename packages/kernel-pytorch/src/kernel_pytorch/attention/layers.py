# SPDX-License-Identifier: Apache-2.0
"""Attention layers: projections around a plan.

Decisions:
- Without a group a layer runs on one device, streamed by chunk, also where
  torch.distributed is initialised: an implicit group would break data parallelism.
- Under autocast, projections and attention run in the autocast type as a whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernel_pytorch.attention.layout import resolve
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.projection import Projections, project_and_attend
from kernel_pytorch.attention.ring import ring_with_lse
from torchworks_core.errors import InvalidValue

_LAYOUTS = ("zigzag", "contiguous")


class RingAttentionLayer(nn.Module):
    """Exact self-attention over long sequences, on one device or a ring of ranks.

    Args:
        d_model: Width of the input and the output.
        num_heads: Heads; must divide ``d_model``.
        max_sequence_length: A longer sequence is refused; nothing is allocated ahead.
        device: Of the parameters; None takes the default device where it is not the
            CPU, else the first CUDA device, else the CPU.
        num_kv_heads: Heads of keys and values; None is ``num_heads``.
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
        bias: bool = False,
        causal: bool = False,
        window: int | None = None,
        group: Any = None,
        layout: str = "zigzag",
        chunk_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(d_model, num_heads, kv_heads)
        _check_length(max_sequence_length, "max_sequence_length")
        if chunk_size is not None:
            _check_length(chunk_size, "chunk_size")
        if layout not in _LAYOUTS:
            raise InvalidValue(f"layout={layout!r}", f"it is one of {_LAYOUTS}")
        MaskSpec(causal=causal, window=window)  # refuses what it can't honour
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        self.max_sequence_length = max_sequence_length
        self.causal, self.window, self.chunk_size = causal, window, chunk_size
        self.group, self.layout = group, layout
        place = {"device": _device(device), "dtype": dtype}
        width = d_model // num_heads * kv_heads
        self.q_proj = nn.Linear(d_model, d_model, bias, **place)
        self.k_proj = nn.Linear(d_model, width, bias, **place)
        self.v_proj = nn.Linear(d_model, width, bias, **place)
        self.out_proj = nn.Linear(d_model, d_model, bias, **place)

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
        self._check_input(hidden_states, total_length)
        mask = _mask_of(hidden_states, attention_mask, self.causal, self.window)
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
        linear = nn.functional.linear
        q, k, v = (
            linear(x, weight, bias).unflatten(-1, (count, -1)).transpose(1, 2)
            for weight, bias, count in (
                (w.q, w.q_bias, heads),
                (w.k, w.k_bias, kv_heads),
                (w.v, w.v_bias, kv_heads),
            )
        )
        where = (self.group, self.layout, None, total_length)
        out, lse = ring_with_lse(q, k, v, mask, *where)
        return linear(out.transpose(1, 2).flatten(2), w.out, w.out_bias), lse

    def _check_input(self, x: Tensor, total_length: int | None) -> None:
        width = self.q_proj.in_features
        if x.ndim != 3 or x.shape[2] != width:
            why = f"it must be [batch, tokens, {width}]"
            raise InvalidValue(f"hidden_states {tuple(x.shape)}", why)
        if self.group is None and total_length is not None:
            why = "a layer without a group sees the whole sequence"
            raise InvalidValue(f"total_length={total_length}", why, "Leave it out")
        whole = total_length or x.shape[1] * resolve(self.group)[2]
        if whole > self.max_sequence_length:
            why = f"max_sequence_length is {self.max_sequence_length}"
            raise InvalidValue(
                f"{whole} tokens", why, "Make the layer with a higher one"
            )


def _mask_of(
    x: Tensor, given: Tensor | None, causal: bool, window: int | None
) -> MaskSpec:
    if given is None:
        return MaskSpec(causal=causal, window=window)
    if given.ndim > 2:
        bias = given if given.is_floating_point() else given.bool()
        bias = bias.unsqueeze(1) if bias.ndim == 3 else bias
        return MaskSpec(causal=causal, window=window, bias=bias)
    if given.shape != x.shape[:2]:
        why = f"two dimensions are [batch, tokens] = {tuple(x.shape[:2])}"
        raise InvalidValue(f"attention_mask {tuple(given.shape)}", why)
    return MaskSpec(causal=causal, window=window, key_padding=given != 0)


def _check_heads(d_model: int, num_heads: int, kv_heads: int) -> None:
    for name, value in (("d_model", d_model), ("num_heads", num_heads)):
        _check_length(value, name)
    if d_model % num_heads:
        raise InvalidValue(
            f"d_model={d_model}", f"num_heads={num_heads} must divide it"
        )
    if kv_heads < 1 or num_heads % kv_heads:
        why = f"num_kv_heads={kv_heads} must divide it"
        raise InvalidValue(f"num_heads={num_heads}", why)


def _check_length(value: object, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidValue(f"{name}={value!r}", "it must be an integer >= 1")


def _device(given: torch.device | str | None) -> torch.device:
    if given is not None:
        return torch.device(given)
    default = torch.get_default_device()
    if default.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", 0)
    return default
