# SPDX-License-Identifier: Apache-2.0
"""AttentionLayer: multi-head attention with dropout, loadable from torch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.attention.layer_base import ProjectedAttention
from kernel_pytorch.attention.masks import EMPTY, INF, MaskSpec
from kernel_pytorch.attention.partial import lay_mask
from kernel_pytorch.attention.streaming import attention
from torchworks_core.errors import InvalidValue


class AttentionLayer(ProjectedAttention):
    """Multi-head self-attention, [B, N, d_model] to [B, N, d_model].

    Without dropout, or in evaluation, no tensor of N x N is made, under any mask. With
    dropout torch's scaled_dot_product_attention runs, which makes such tensors on the
    CPU or for a mask.

    Args:
        d_model: Width of the input and the output.
        num_heads: Heads; must divide ``d_model``.
        dropout: Probability, in [0, 1), that an attention weight is dropped in
            training.
        bias: Whether the four projections have one.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        InvalidValue: an argument is unusable.

    Example:
        >>> layer = AttentionLayer(32, 4).eval()
        >>> layer(torch.randn(2, 10, 32), causal=True).shape
        torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        dropout: float = 0.1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise InvalidValue(f"dropout={dropout!r}", "it must be in [0, 1)")
        super().__init__(d_model, num_heads, bias=bias, device=device, dtype=dtype)
        self.dropout = dropout

    @classmethod
    def from_mha(cls, mha: nn.MultiheadAttention) -> AttentionLayer:
        """Copy the parameters of torch's layer.

        Args:
            mha: Self-attention (one width for q, k and v), without ``add_bias_kv`` and
                ``add_zero_attn``. Its ``batch_first`` isn't taken over.

        Returns:
            A layer in the same mode, on the same device, with the same dropout.

        Raises:
            InvalidValue: ``mha`` has a feature that this layer hasn't.

        Example:
            >>> mha = torch.nn.MultiheadAttention(16, 2, batch_first=True).eval()
            >>> x = torch.randn(1, 5, 16)
            >>> ours, torchs = AttentionLayer.from_mha(mha)(x), mha(x, x, x)[0]
            >>> bool((ours - torchs).abs().max() < 1e-5)
            True
        """
        if mha.in_proj_weight is None:
            widths = f"kdim={mha.kdim}, vdim={mha.vdim}"
            raise InvalidValue(widths, f"they must be embed_dim={mha.embed_dim}")
        if mha.bias_k is not None or mha.add_zero_attn:
            raise InvalidValue("add_bias_kv or add_zero_attn", "not offered here")
        weight, bias = mha.in_proj_weight, mha.in_proj_bias
        place = {"device": weight.device, "dtype": weight.dtype}
        heads = (mha.embed_dim, mha.num_heads, mha.dropout, bias is not None)
        layer = cls(*heads, **place)
        with torch.no_grad():
            for i, part in enumerate((layer.q_proj, layer.k_proj, layer.v_proj)):
                part.weight.copy_(weight.chunk(3)[i])
                if bias is not None:
                    part.bias.copy_(bias.chunk(3)[i])
            layer.out_proj.load_state_dict(mha.out_proj.state_dict())
        return layer.train(mha.training)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, *, causal: bool = False
    ) -> Tensor:
        """Attend.

        Args:
            x: [B, N, d_model].
            attention_mask: [B, N], 1 = may be attended to, 0 = not; or, with more
                dimensions, bool (True = may attend) or float (added to the scores),
                broadcast to [B, heads, N, N].
            causal: Whether queries see no later keys.

        Returns:
            [B, N, d_model].

        Raises:
            InvalidValue: shapes don't fit.
        """
        self.check_input(x, 0, "x")
        q, k, v = self.project(x)
        mask = self.mask_of(attention_mask, *x.shape[:2])
        if causal:
            mask = MaskSpec(True, None, mask.key_padding, None, mask.bias)
        if self.dropout and self.training:
            out = _with_dropout(q, k, v, mask, self.dropout)
        else:
            out = attention(q, k, v, mask)
        return self.merge(out)


def _with_dropout(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, dropout: float
) -> Tensor:
    lay_mask(mask, q, k)
    length = q.shape[2]
    if mask.key_padding is not None:  # 0 * NaN would be NaN
        hidden = ~mask.key_padding[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    if not mask.tensors():
        return scaled_dot_product_attention(q, k, v, None, dropout, mask.causal)
    tile = mask.tile(0, length, 0, length)
    if not isinstance(tile, Tensor):
        if tile is EMPTY:
            return q * 0.0
        return scaled_dot_product_attention(q, k, v, None, dropout)
    seen = tile if tile.dtype == torch.bool else tile != -INF
    dead = ~seen.any(-1, keepdim=True)
    # A row that sees nothing gets 0, where a softmax over nothing would be NaN.
    shown = tile | dead if tile.dtype == torch.bool else tile.masked_fill(dead, 0.0)
    out = scaled_dot_product_attention(q, k, v, shown, dropout)
    return out.masked_fill(dead, 0.0)
