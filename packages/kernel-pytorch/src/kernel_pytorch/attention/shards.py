# SPDX-License-Identifier: Apache-2.0
"""The work of one rank of a ring on one shard of keys; no communication."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernel_pytorch.attention.blocks import INF, lse_dtype
from kernel_pytorch.attention.layout import segments, take_shard
from kernel_pytorch.attention.masks import EMPTY, LaidMask, MaskSpec
from kernel_pytorch.attention.tiling import backward, forward, merge_into
from torchworks_core.errors import InvalidValue


@dataclass(frozen=True, eq=False)
class Keys:
    """One shard of keys: k, v [B, Hkv, n, D], and what masks need to know of them.

    Args:
        k: [B, Hkv, n, D].
        v: Like ``k``.
        keep: Bool [B, n] or None.
        documents: Integer [B, n] or None.
    """

    k: Tensor
    v: Tensor
    keep: Tensor | None = None
    documents: Tensor | None = None

    @classmethod
    def of(cls, k: Tensor, v: Tensor, mask: MaskSpec) -> Keys:
        """Join k, v and the shards of the mask that belong to keys."""
        return cls(k.detach(), v.detach(), mask.key_padding, mask.documents)

    def pack(self) -> list[Tensor]:
        """Return contiguous tensors that every backend can send."""
        found = [self.k, self.v]
        if self.keep is not None:
            found.append(self.keep.to(torch.uint8))
        if self.documents is not None:
            found.append(self.documents)
        return [t.contiguous() for t in found]

    @classmethod
    def unpack(cls, tensors: list[Tensor], mask: MaskSpec) -> Keys:
        """Undo `pack`; ``mask`` says which parts there are."""
        rest = tensors[2:]
        keep = rest.pop(0).bool() if mask.key_padding is not None else None
        return cls(tensors[0], tensors[1], keep, rest[0] if rest else None)


@dataclass(frozen=True)
class ShardPlan:
    """Which positions meet on which rank, and how to attend there.

    Args:
        causal: As in `MaskSpec`.
        window: As in `MaskSpec`.
        world: Number of ranks.
        total_length: Tokens of the whole sequence, without padding.
        layout: ``"zigzag"`` or ``"contiguous"``.
        scale: Factor of the scores.

    Example:
        >>> ShardPlan(True, 8, 4, 64, "contiguous", 1.0).steps()
        (0, 1)
        >>> ShardPlan(True, 8, 4, 64, "zigzag", 1.0).steps()
        (0, 1, 3)
    """

    causal: bool
    window: int | None
    world: int
    total_length: int
    layout: str
    scale: float

    def parts(self, rank: int) -> list[tuple[slice, range]]:
        """Where each stretch of positions lies in the shard, without padding."""
        found, offset = [], 0
        for part in segments(self.total_length, rank, self.world, self.layout):
            real = range(part.start, min(part.stop, self.total_length))
            if len(real):
                found.append((slice(offset, offset + len(real)), real))
            offset += len(part)
        return found

    def without_padding(self, x: Tensor, rank: int) -> Tensor:
        """Drop the padding of a shard [B, n]."""
        kept = [x[:, place] for place, _ in self.parts(rank)]
        return torch.cat(kept, 1) if kept else x[:, :0]

    def document_range(self, ids: Tensor | None, rank: int) -> Tensor:
        """Smallest and largest document id of a shard: int64 [B, 2] on the CPU."""
        assert ids is not None
        ids = self.without_padding(ids, rank)
        if not ids.shape[1]:
            return torch.tensor([1, 0]).expand(len(ids), 2)
        return torch.stack(ids.aminmax(dim=1), 1).long().cpu()

    def steps(self, documents: Tensor | None = None) -> tuple[int, ...]:
        """Steps in which some rank has something to see, from 0 on.

        Args:
            documents: Smallest and largest id of each rank, [world, B, 2], or None.
        """
        world = range(self.world)
        needed = [0]
        for step in world[1:]:
            pairs = ((rank, (rank - step) % self.world) for rank in world)
            if any(self._meets(*pair, documents) for pair in pairs):
                needed.append(step)
        return tuple(needed)

    def start(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return out and lse before any key was seen."""
        kind = lse_dtype(q)
        lse = q.new_full(q.shape[:3], -INF, dtype=kind)
        return torch.zeros_like(q, dtype=kind, requires_grad=False), lse

    def attend(
        self,
        rank: int,
        source: int,
        q: Tensor,
        keys: Keys,
        mask: MaskSpec,
        state: tuple[Tensor, Tensor],
    ) -> None:
        """Merge attention of ``rank``'s queries to ``source``'s keys into ``state``.

        Args:
            rank: Whose queries.
            source: Whose keys.
            q: [B, H, n, D].
            keys: The shard of keys.
            mask: The mask of ``rank``: its documents and bias are read.
            state: out and lse, as from `start`; changed in place.
        """
        out, lse = state
        for rows, columns, laid in self._blocks(rank, source, keys, mask):
            k, v = keys.k[:, :, columns], keys.v[:, :, columns]
            part = forward(q[:, :, rows], k, v, laid, self.scale)
            merge_into(out[:, :, rows], lse[:, :, rows], *part)

    def attend_backward(
        self,
        rank: int,
        source: int,
        saved: tuple[Tensor, Tensor, Tensor],
        grads: tuple[Tensor, Tensor | None],
        keys: Keys,
        mask: MaskSpec,
        dq: Tensor,
    ) -> list[Tensor]:
        """Add to ``dq`` in place; return dk and dv of this meeting, in fp32.

        Args:
            rank: Whose queries.
            source: Whose keys.
            saved: q, and the final out and lse of its rows.
            grads: Gradients of out and lse (or None).
            keys: The shard of keys.
            mask: As in `attend`.
            dq: [B, H, n, D] in fp32 (fp64 for fp64).
        """
        q, out, lse = saved
        d_out, d_lse = grads
        dk, dv = (torch.zeros_like(t, dtype=lse.dtype) for t in (keys.k, keys.v))
        for rows, columns, laid in self._blocks(rank, source, keys, mask):
            k, v = keys.k[:, :, columns], keys.v[:, :, columns]
            backward(
                d_out[:, :, rows],
                None if d_lse is None else d_lse[:, :, rows],
                (q[:, :, rows], k, v, out[:, :, rows], lse[:, :, rows]),
                laid,
                self.scale,
                into=(dq[:, :, rows], dk[:, :, columns], dv[:, :, columns]),
            )
        return [dk, dv]

    def _blocks(
        self, rank: int, source: int, keys: Keys, mask: MaskSpec
    ) -> Iterator[tuple[slice, slice, LaidMask]]:
        """Pairs of stretches that may see each other, each with its mask."""
        everything = [(slice(0, keys.k.shape[2]), range(keys.k.shape[2]))]
        rows, columns = self.parts(rank), self.parts(source)
        by_position = self.causal or self.window is not None or mask.bias is not None
        full = all(
            sum(len(real) for _, real in part) == keys.k.shape[2]
            for part in (rows, columns)
        )
        if not by_position and full:
            rows = columns = everything  # one large call is faster than four
        for place, real in rows:
            for k_place, k_real in columns:
                laid = self._lay(place, real, k_place, k_real, keys, mask)
                if laid.by_position(real, k_real) is not EMPTY:
                    yield place, k_place, laid

    def _lay(
        self,
        place: slice,
        real: range,
        k_place: slice,
        k_real: range,
        keys: Keys,
        mask: MaskSpec,
    ) -> LaidMask:
        laid = LaidMask(self.causal, self.window, real, k_real)
        if keys.keep is not None:
            laid = replace(laid, keep=keys.keep[:, k_place])
        if keys.documents is not None and mask.documents is not None:
            ids = mask.documents[:, place], keys.documents[:, k_place]
            laid = replace(laid, q_documents=ids[0], k_documents=ids[1])
        if mask.bias is not None:
            bias = mask.bias.reshape((1,) * (4 - mask.bias.ndim) + mask.bias.shape)
            bias = bias if bias.shape[2] == 1 else bias[:, :, place]
            if bias.shape[3] > 1:
                bias = bias[..., k_real.start : k_real.stop]
            laid = replace(laid, bias=bias)
        return laid

    def _meets(self, rank: int, source: int, documents: Tensor | None) -> bool:
        if documents is not None:
            mine, theirs = documents[rank], documents[source]
            apart = (mine[:, 1] < theirs[:, 0]) | (mine[:, 0] > theirs[:, 1])
            if bool(apart.all()):
                return False
        return any(
            LaidMask(self.causal, self.window, real, k_real).by_position(real, k_real)
            is not EMPTY
            for _, real in self.parts(rank)
            for _, k_real in self.parts(source)
        )


def cut_mask(
    mask: MaskSpec, total: int, rank: int, world: int, layout: str
) -> MaskSpec:
    """Cut a mask of ``total`` queries and keys to one rank's shard.

    Raises:
        InvalidValue: a tensor of the mask has another length.

    Example:
        >>> mask = MaskSpec(documents=torch.tensor([[1, 1, 2, 2]]))
        >>> cut_mask(mask, 4, 1, 2, "contiguous").documents
        tensor([[2, 2]])
    """
    found: dict[str, Any] = {}
    for name, part in mask.tensors().items():
        dim = part.ndim - 2 if name == "bias" else 1
        length = part.shape[dim] if dim >= 0 else 1
        if length != total and not (name == "bias" and length == 1):
            shape = tuple(part.shape)
            raise InvalidValue(f"{name} of shape {shape}", f"there are {total} tokens")
        if name == "bias" and length == 1:
            continue
        found[name] = take_shard(part, dim, rank, world, layout)
    return replace(mask, **found)
