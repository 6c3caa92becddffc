# SPDX-License-Identifier: Apache-2.0
"""FlashAttention3: a layer of dense attention by the best kernel that torch has here.

Decisions:
- ``backend`` tells which kernel ran. FlashAttention 3 and 4 run where the user has
  activated them in torch, on CUDA, without a mask other than causal.
- Masks other than causal go tile by tile, so that no mask of N x N is made.
- FP8 is simulated: q, k and v are rounded to float8 values. torch's own float8
  attention needs a GPU, which the authors have not had to try it on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernel_pytorch.attention.config import (
    AttentionConfig,
    AttentionPatterns,
    FP8AttentionConfig,
)
from kernel_pytorch.attention.layer_base import ProjectedAttention
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.partial import lay_mask
from kernel_pytorch.attention.streaming import attention
from kernel_pytorch.attention.tiling import counting
from kernel_pytorch.precision.formats import round_to_fp8
from torchworks_core.errors import InvalidValue, NotReady

# What torch._fused_sdp_choice returns.
_CHOICES = {0: "reference", 1: "sdpa-flash", 2: "sdpa-efficient", 3: "sdpa-cudnn"}


class FlashAttention3(ProjectedAttention):
    """Dense attention with projections, as a layer.

    Args:
        config: ``embed_dim``, heads, ``bias``, ``causal`` and window are read from it,
            and ``fp8_config``.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        accelerated: False where ``fp8_config`` is set: it saves no time; ``reason``
            says why. True otherwise.
        reason: A sentence, or "".

    Raises:
        InvalidValue: an argument is unusable.

    Example:
        >>> layer = FlashAttention3(AttentionConfig(embed_dim=32, num_heads=4))
        >>> layer(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])
        >>> layer.backend
        'cpu-flash'
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            config.embed_dim,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.bias,
            causal=config.causal or config.pattern is AttentionPatterns.CAUSAL,
            window=config.window,
            max_sequence_length=config.max_sequence_length,
            device=device,
            dtype=dtype,
        )
        self.chunk_size, self.dropout = config.chunk_size, config.attention_dropout
        self.fp8_config = config.fp8_config
        self.accelerated, self.reason = True, ""
        if self.fp8_config is not None:
            self.accelerated = False
            self.reason = (
                "q, k and v are rounded to float8 values; torch's float8 attention, "
                "FlashAttention 3 on CUDA, isn't used"
            )
        self._backend = ""

    @property
    def backend(self) -> str:
        """The kernel that last ran forward.

        ``"fa3"``, ``"fa4"``, ``"sdpa-flash"``, ``"sdpa-efficient"``, ``"sdpa-cudnn"``,
        ``"cpu-flash"`` or ``"reference"``; several are joined by ``"+"``, where a mask
        needed another one in some tiles.

        Raises:
            NotReady: there was no forward pass.
        """
        if not self._backend:
            raise NotReady("backend", "there was no forward pass yet")
        return self._backend

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``query`` to ``key``.

        Args:
            query: [B, N, embed_dim].
            key: [B, M, embed_dim]; None is ``query``.
            value: Like ``key``; None is ``key``.
            attention_mask: [B, M], 1 = may be attended to, 0 = not; or, with more
                dimensions, bool (True = may attend) or float (added to the scores),
                broadcast to [B, heads, N, M].

        Returns:
            [B, N, embed_dim].

        Raises:
            InvalidValue: shapes don't fit, a sequence is too long, or dropout is
                wanted in training, which exact plans do not offer.
        """
        if self.dropout and self.training:
            why = "dropout inside attention is not offered here"
            do = "Set it to 0, or use kernel_pytorch.core.AttentionLayer"
            raise InvalidValue(f"attention_dropout={self.dropout}", why, do)
        named = {"query": query, "key": key, "value": value}
        for name, x in named.items():
            if x is not None:
                self.check_input(x, x.shape[1] if x.ndim == 3 else 0, name)
        q, k, v = self.project(query, key, value)
        mask = self.mask_of(attention_mask, len(query), q.shape[2], k.shape[2])
        if self.fp8_config is not None:
            q, k, v = _simulate_fp8(q, k, v, mask, self.fp8_config, key is None)
        return self.merge(self._attend(q, k, v, mask))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec) -> Tensor:
        square = mask.causal and q.shape[2] == k.shape[2]
        plain = (
            mask.window is None and not mask.tensors() and (square or not mask.causal)
        )
        if q.is_cuda and plain and q.numel() and k.numel():
            lay_mask(mask, q, k)
            options = {"is_causal": mask.causal, "enable_gqa": q.shape[1] != k.shape[1]}
            self._backend = _cuda_backend(q, k, v, **options)
            return scaled_dot_product_attention(q, k, v, **options)
        with counting() as work:
            out = attention(q, k, v, mask, chunk_size=self.chunk_size)
        self._backend = "+".join(sorted(work.backends)) or "reference"
        return out


def _cuda_backend(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool
) -> str:
    """Ask torch which kernel scaled_dot_product_attention takes."""
    choice = torch._fused_sdp_choice(
        q, k, v, is_causal=is_causal, enable_gqa=enable_gqa
    )
    name = _CHOICES.get(int(choice), "reference")
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    active = current() if current is not None else None
    if name == "sdpa-flash" and active:
        return str(active).lower()
    return name


def _simulate_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec,
    config: FP8AttentionConfig,
    own: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round q, k and v; with ``own`` queries and keys are the same tokens."""
    if not q.numel() or not k.numel():
        return q, k, v
    hidden = None
    if mask.key_padding is not None:  # what hides there must not set the scale
        hidden = ~mask.key_padding[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    if config.smooth_k:
        count = k.shape[2] if hidden is None else (~hidden).sum(2, keepdim=True)
        k = k - k.sum(2, keepdim=True) / torch.as_tensor(count).clamp_min(1)
    dims = (2, 3) if config.scaling == "per_head" else (0, 1, 2, 3)
    form = config.format
    q = round_to_fp8(q, form, dims, hidden if own else None)
    return q, round_to_fp8(k, form, dims, hidden), round_to_fp8(v, form, dims)
