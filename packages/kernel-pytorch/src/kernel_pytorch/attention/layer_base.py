# SPDX-License-Identifier: Apache-2.0
"""What all attention layers share: projections, masks, and checks of their input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernel_pytorch.attention.masks import MaskSpec, is_abstract
from torchworks_core.errors import InvalidValue


class ProjectedAttention(nn.Module):
    """Projections to queries, keys and values, and back; subclasses attend.

    Args:
        d_model: Width of the input and the output.
        num_heads: Heads; must divide ``d_model`` unless ``head_dim`` is given.
        num_kv_heads: Heads of keys and values; None is ``num_heads``.
        head_dim: Width of a head; None is ``d_model // num_heads``.
        bias: Whether the four projections have one.
        causal: Whether queries see no later keys.
        window: w: keys with |i - j| < w are seen.
        max_sequence_length: A longer sequence is refused; None sets no limit.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        InvalidValue: an argument is unusable.

    Example:
        >>> layer = ProjectedAttention(16, 4, num_kv_heads=2)
        >>> [tuple(t.shape) for t in layer.project(torch.randn(2, 10, 16))]
        [(2, 4, 10, 4), (2, 2, 10, 4), (2, 2, 10, 4)]
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = False,
        window: int | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(d_model, num_heads, kv_heads, head_dim)
        if max_sequence_length is not None:
            check_count(max_sequence_length, "max_sequence_length")
        MaskSpec(causal=causal, window=window)  # refuses what it can't honour
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        self.head_dim = d_model // num_heads if head_dim is None else head_dim
        self.max_sequence_length = max_sequence_length
        self.causal, self.window = causal, window
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        wide, narrow = num_heads * self.head_dim, kv_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, wide, bias, **place)
        self.k_proj = nn.Linear(d_model, narrow, bias, **place)
        self.v_proj = nn.Linear(d_model, narrow, bias, **place)
        self.out_proj = nn.Linear(wide, d_model, bias, **place)

    def project(
        self, x: Tensor, key: Tensor | None = None, value: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [B, H, N, D] of ``x``, k [B, Hkv, M, D] of ``key`` and v likewise.

        ``key`` None is ``x``, ``value`` None is ``key``.
        """
        key = x if key is None else key
        value = key if value is None else value
        return (
            split_heads(self.q_proj(x), self.num_heads),
            split_heads(self.k_proj(key), self.num_kv_heads),
            split_heads(self.v_proj(value), self.num_kv_heads),
        )

    def merge(self, out: Tensor) -> Tensor:
        """Project heads [B, H, N, D] to [B, N, d_model]."""
        return self.out_proj(join_heads(out))

    def mask_of(
        self,
        given: Tensor | None,
        batch: int,
        queries: int,
        keys: int | None = None,
        pair_keys: int | None = None,
    ) -> MaskSpec:
        """Join the caller's mask with ``causal`` and ``window``.

        Args:
            given: [B, keys], 1 = may be attended to, 0 = not; or, with more dimensions,
                bool (True = may attend), integer likewise, or float (added to the
                scores), broadcast to [B, heads, queries, keys]; or None.
            batch: B.
            queries: Number of queries.
            keys: Number of keys; None is as many.
            pair_keys: Keys that a mask of more dimensions is about, where that is
                not ``keys``.

        Raises:
            InvalidValue: the mask has another shape.
        """
        causal, window = self.causal, self.window
        keys = queries if keys is None else keys
        if given is None:
            return MaskSpec(causal=causal, window=window)
        if given.ndim > 2:
            pairs = (queries, keys if pair_keys is None else pair_keys)
            found = zip(given.shape[-2:], pairs, strict=True)
            if given.ndim > 4 or any(x not in (1, y) for x, y in found):
                why = f"its last dimensions are [queries, keys] = {pairs}"
                raise InvalidValue(f"attention_mask {tuple(given.shape)}", why)
            bias = given if given.is_floating_point() else given.bool()
            bias = bias.unsqueeze(1) if bias.ndim == 3 else bias
            return MaskSpec(causal=causal, window=window, bias=bias)
        what = f"attention_mask {tuple(given.shape)}"
        if given.shape != (batch, keys):
            why = f"two dimensions are [batch, keys] = {(batch, keys)}"
            raise InvalidValue(what, why)
        if given.dtype != torch.bool and not is_abstract(given):
            wrong = given[(given != 0) & (given != 1)]
            if wrong.numel():
                why = f"[batch, keys] are 1 (attend) and 0, found {wrong[0].item()}"
                do = "Pass a bool mask, or [batch, 1, 1, keys] for one that is added"
                raise InvalidValue(what, why, do)
        return MaskSpec(causal=causal, window=window, key_padding=given != 0)

    def check_input(self, x: Tensor, total: int, name: str = "hidden_states") -> None:
        """Raise InvalidValue unless ``x`` is [B, N, d_model] and ``total`` allowed."""
        width = self.q_proj.in_features
        if x.ndim != 3 or x.shape[2] != width:
            why = f"it must be [batch, tokens, {width}]"
            raise InvalidValue(f"{name} {tuple(x.shape)}", why)
        limit = self.max_sequence_length
        if limit is not None and total > limit:
            do = "Make the layer with a higher one"
            raise InvalidValue(f"{total} tokens", f"max_sequence_length is {limit}", do)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * D] -> [B, heads, N, D], a view.

    Example:
        >>> split_heads(torch.zeros(1, 5, 8), 2).shape
        torch.Size([1, 2, 5, 4])
    """
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, heads, N, D] -> [B, N, heads * D].

    Example:
        >>> join_heads(torch.zeros(1, 2, 5, 4)).shape
        torch.Size([1, 5, 8])
    """
    return x.transpose(1, 2).flatten(2)


def check_heads(
    d_model: int, num_heads: int, kv_heads: int, head_dim: int | None = None
) -> None:
    """Raise InvalidValue, naming both numbers, unless heads fit the width."""
    check_count(d_model, "d_model")
    check_count(num_heads, "num_heads")
    check_count(kv_heads, "num_kv_heads")
    if head_dim is not None:
        check_count(head_dim, "head_dim")
    elif d_model % num_heads:
        why = f"num_heads={num_heads} must divide it"
        raise InvalidValue(f"d_model={d_model}", why)
    if num_heads % kv_heads:
        why = f"num_kv_heads={kv_heads} must divide it"
        raise InvalidValue(f"num_heads={num_heads}", why)


def check_count(value: object, name: str) -> None:
    """Raise InvalidValue unless ``value`` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidValue(f"{name}={value!r}", "it must be an integer >= 1")
