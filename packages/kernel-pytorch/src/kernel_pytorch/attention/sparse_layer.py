# SPDX-License-Identifier: Apache-2.0
"""DynamicSparseAttention: a layer that computes some blocks of attention only.

Decisions:
- The choice of blocks has no gradient; the attention over them has an exact one.
- RANDOM draws from a generator of its own, seeded alike at each call: recomputation
  under activation checkpointing, and `block_index`, give the same blocks.
- Statistics are read from what the last forward ran, and computed when asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernel_pytorch.attention.block_index import BlockIndex
from kernel_pytorch.attention.block_sparse import block_sparse_attention, kernel_for
from kernel_pytorch.attention.gate import BlockGate
from kernel_pytorch.attention.layer_base import ProjectedAttention
from kernel_pytorch.attention.masks import MaskSpec, is_abstract
from kernel_pytorch.attention.patterns import SparsePattern, build_block_index
from kernel_pytorch.attention.selection import (
    admissible_blocks,
    check_sparsity,
    select_blocks,
)
from torchworks_core.errors import InvalidValue, NotReady


@dataclass(frozen=True)
class SparsityStats:
    """What the last forward pass of a layer computed.

    Attributes:
        requested_sparsity: ``sparsity_ratio``, or None if ``coverage`` replaced it.
        density: Blocks computed / blocks that the mask admits; 0.0 if it admits none.
        blocks_kept: Blocks computed, over batch and heads.
        blocks_admissible: Blocks of which some query may see some key.
        kernel: ``"native-avx512"``, ``"native-avx2"``, ``"native-generic"``,
            ``"triton"`` or ``"reference"``.
        estimated_missed_mass: Mean share of the softmax outside the blocks, estimated
            from some queries; None for patterns that look at positions alone.
    """

    requested_sparsity: float | None
    density: float
    blocks_kept: int
    blocks_admissible: int
    kernel: str
    estimated_missed_mass: float | None


class _Ran(NamedTuple):
    """What a forward pass used; shapes only of q and k."""

    index: BlockIndex
    mask: MaskSpec
    q: Tensor
    k: Tensor
    missed_mass: Tensor | None
    admitted: int | None


class DynamicSparseAttention(ProjectedAttention):
    """Self-attention over the blocks of keys that a pattern chooses.

    Args:
        d_model: Width of the input and the output.
        num_heads: Heads; must divide ``d_model``.
        sparsity_ratio: In [0, 0.95]: share of the admissible blocks that is left out.
            It bounds the work, not the error; see ``coverage``.
        pattern: A `SparsePattern` or its value. LEARNED has a gate, in
            ``layer.gate``, that `distill_gate` trains.
        num_kv_heads: Heads of keys and values; None is ``num_heads``.
        head_dim: Width of a head; None is ``d_model // num_heads``.
        causal: Whether queries see no later keys.
        window: w: keys with |i - j| < w are seen.
        block_size: Tokens in a block; multiples of 16 up to 256 run natively.
        coverage: In (0, 1], for DYNAMIC_THRESHOLD and LEARNED: keep the fewest blocks
            whose estimated share of the softmax reaches it; replaces
            ``sparsity_ratio``.
        remainder: Let each left-out block take part as one key, by its means.
        bias: Whether the four projections have one.
        max_sequence_length: A longer sequence is refused; None sets no limit.
        seed: Of RANDOM.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        InvalidValue: an argument is unusable.

    Example:
        >>> layer = DynamicSparseAttention(32, 4, 0.5, block_size=16)
        >>> layer(torch.randn(1, 128, 32)).shape
        torch.Size([1, 128, 32])
        >>> layer.get_sparsity_stats().density
        0.5
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        sparsity_ratio: float = 0.9,
        pattern: SparsePattern | str = SparsePattern.DYNAMIC_THRESHOLD,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        window: int | None = None,
        block_size: int = 64,
        coverage: float | None = None,
        remainder: bool = False,
        bias: bool = False,
        max_sequence_length: int | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_sparsity(sparsity_ratio, block_size, coverage)
        pattern = SparsePattern.of(pattern)
        if coverage is not None and not pattern.by_content:
            why = f"{pattern.name} estimates no mass; DYNAMIC_THRESHOLD and LEARNED do"
            raise InvalidValue(f"coverage={coverage!r}", why)
        super().__init__(
            d_model,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=bias,
            causal=causal,
            window=window,
            max_sequence_length=max_sequence_length,
            device=device,
            dtype=dtype,
        )
        self.sparsity_ratio, self.pattern = sparsity_ratio, pattern
        self.block_size, self.coverage = block_size, coverage
        self.remainder, self.seed = remainder, seed
        self._ran: _Ran | None = None
        self.gate: BlockGate | None = None
        if pattern is SparsePattern.LEARNED:
            self.gate = BlockGate(
                self.head_dim,
                num_heads,
                block_size=block_size,
                device=device,
                dtype=dtype,
            )

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Attend to the chosen blocks.

        Args:
            hidden_states: [B, N, d_model].
            attention_mask: [B, N], 1 = may be attended to, 0 = not; or, with more
                dimensions, bool (True = may attend) or float (added to the scores),
                broadcast to [B, heads, N, N].

        Returns:
            [B, N, d_model].

        Raises:
            InvalidValue: shapes don't fit, or the sequence is too long.
            NotImplementedError: ``remainder`` with a mask of more than two dimensions.
        """
        q, k, v, mask = self._prepare(hidden_states, attention_mask)
        if is_abstract(q):
            return self.merge(torch.empty_like(q))
        index, missed = self._choose(q, k, mask)
        out = block_sparse_attention(q, k, v, index, mask, remainder=self.remainder)
        assert isinstance(out, Tensor)
        admitted = None
        if mask.bias is not None:  # too large to be kept
            admitted, mask = self._count(q, k, mask), MaskSpec(bias=torch.zeros(()))
        self._ran = _Ran(index, mask, _hollow(q), _hollow(k), missed, admitted)
        return self.merge(out)

    @torch.no_grad()
    def block_index(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> BlockIndex:
        """Return the blocks that `forward` would compute for these inputs."""
        q, k, _, mask = self._prepare(hidden_states, attention_mask)
        return self._choose(q, k, mask)[0]

    def get_sparsity_stats(self) -> SparsityStats:
        """Tell what the last forward pass computed.

        Raises:
            NotReady: there was none.
        """
        ran = self._ran
        if ran is None:
            raise NotReady("get_sparsity_stats", "there was no forward pass yet")
        total = ran.admitted
        if total is None:
            total = self._count(ran.q, ran.k, ran.mask)
        kept = int(ran.index.counts.expand(len(ran.q), -1, -1).sum())
        missed = ran.missed_mass
        return SparsityStats(
            None if self.coverage is not None else float(self.sparsity_ratio),
            kept / total if total else 0.0,
            kept,
            total,
            kernel_for(ran.q, ran.index, ran.mask),
            None if missed is None or not missed.numel() else float(missed.mean()),
        )

    def _count(self, q: Tensor, k: Tensor, mask: MaskSpec) -> int:
        """Blocks that the mask admits, over batch and heads."""
        admitted = admissible_blocks(q, k, mask, self.block_size)
        return int(admitted.expand(*q.shape[:2], -1, -1).sum())

    def _prepare(
        self, x: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, MaskSpec]:
        self.check_input(x, x.shape[1] if x.ndim == 3 else 0)
        mask = self.mask_of(attention_mask, *x.shape[:2])
        return *self.project(x), mask

    @torch.no_grad()
    def _choose(
        self, q: Tensor, k: Tensor, mask: MaskSpec
    ) -> tuple[BlockIndex, Tensor | None]:
        if self.pattern.by_content:
            found = select_blocks(
                q,
                k,
                mask,
                sparsity_ratio=self.sparsity_ratio,
                block_size=self.block_size,
                coverage=self.coverage,
                block_logits=None if self.gate is None else self.gate(q, k),
                remainder=self.remainder,
            )
            return found.index, found.missed_mass
        generator = None
        if self.pattern is SparsePattern.RANDOM:
            generator = torch.Generator().manual_seed(self.seed)
        index = build_block_index(
            q,
            k,
            self.pattern,
            sparsity_ratio=self.sparsity_ratio,
            block_size=self.block_size,
            mask=mask,
            generator=generator,
        )
        return index, None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_ran": None}


def _hollow(t: Tensor) -> Tensor:
    """Return a tensor of that shape which holds one element."""
    return t.new_empty(1, requires_grad=False).expand(t.shape)
