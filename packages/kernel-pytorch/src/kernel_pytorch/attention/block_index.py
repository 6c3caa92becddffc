# SPDX-License-Identifier: Apache-2.0
"""BlockIndex: which blocks of keys each block of queries attends to.

Every pattern and selector makes one, and every sparse kernel reads it. Decisions:

- Rows are lists, not a mask: their size follows what is kept, and a kernel walks them.
- Entries beyond a row's count may hold anything; nothing reads them.
- The first dimension is 1 where all batch entries share the lists.
- Making an index checks shapes and dtypes; the values are checked by `validate`, which
  reads them all, and once more by each kernel before it starts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchworks_core.errors import InvalidValue

_INT = (int, torch.SymInt)


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Lists of key blocks for query blocks.

    Args:
        counts: Int32 [B|1, H, Tq], the length of each row's list.
        blocks: Int32 [B|1, H, Tq, width], key blocks in ascending order.
        block_size: Tokens in a block, of queries as of keys; the last may be shorter.
        q_len: Queries; Tq is q_len / block_size, rounded up.
        kv_len: Keys; Tk likewise.

    Raises:
        InvalidValue: shapes, dtypes or devices don't fit together.

    Example:
        >>> kept = torch.eye(3, dtype=torch.bool).expand(1, 1, 3, 3)
        >>> index = BlockIndex.from_block_mask(kept, 16, 40, 40)
        >>> index.counts.tolist(), index.blocks.flatten().tolist()
        ([[[1, 1, 1]]], [0, 1, 2])
        >>> round(index.density, 3), index.dense_mask().shape
        (0.333, torch.Size([1, 1, 40, 40]))
    """

    counts: Tensor
    blocks: Tensor
    block_size: int
    q_len: int
    kv_len: int

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("q_len", 0), ("kv_len", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, _INT) or value < least:
                raise InvalidValue(f"{name}={value!r}", f"it must be an int >= {least}")
        counts, blocks = self.counts, self.blocks
        shapes = f"counts {tuple(counts.shape)}, blocks {tuple(blocks.shape)}"
        if blocks.ndim != 4 or counts.shape != blocks.shape[:3]:
            raise InvalidValue(shapes, "they must be [B|1, H, Tq] and [B|1, H, Tq, w]")
        if counts.shape[2] != self.q_blocks:
            why = f"q_len {self.q_len} makes {self.q_blocks} blocks of queries"
            raise InvalidValue(shapes, f"{why}, of {self.block_size}")
        for name, part in (("counts", counts), ("blocks", blocks)):
            if part.dtype != torch.int32:
                raise InvalidValue(f"{name} of {part.dtype}", "it must be torch.int32")
        if counts.device != blocks.device:
            raise InvalidValue(shapes, f"on {counts.device} and {blocks.device}")

    @property
    def q_blocks(self) -> int:
        """Blocks of queries, Tq."""
        return -(-self.q_len // self.block_size)

    @property
    def kv_blocks(self) -> int:
        """Blocks of keys, Tk."""
        return -(-self.kv_len // self.block_size)

    @property
    def density(self) -> float:
        """Blocks kept / all blocks; 0.0 if there is none."""
        everything = self.counts.numel() * self.kv_blocks
        return float(self.counts.sum()) / everything if everything else 0.0

    @classmethod
    def from_block_mask(
        cls, kept: Tensor, block_size: int, q_len: int, kv_len: int
    ) -> BlockIndex:
        """Make the lists of a mask over blocks.

        Args:
            kept: Bool [B|1, H, Tq, Tk].
            block_size: As for `BlockIndex`.
            q_len: As for `BlockIndex`.
            kv_len: As for `BlockIndex`.

        Raises:
            InvalidValue: ``kept`` has another dtype or shape.
        """
        shape = f"block mask of shape {tuple(kept.shape)}, {kept.dtype}"
        if kept.ndim != 4 or kept.dtype != torch.bool:
            raise InvalidValue(shape, "it must be bool [B|1, H, Tq, Tk]")
        if block_size < 1 or kept.shape[3] != -(-kv_len // block_size):
            why = f"it does not fit kv_len {kv_len} in blocks of {block_size}"
            raise InvalidValue(shape, why)
        counts = kept.sum(-1, dtype=torch.int32)
        width = int(counts.max()) if counts.numel() else 0
        # A stable sort puts the kept columns first and leaves them ascending.
        order = (~kept).byte().argsort(dim=-1, stable=True)[..., :width]
        blocks = order.to(torch.int32).contiguous()
        return cls(counts, blocks, block_size, q_len, kv_len)

    def block_mask(self) -> Tensor:
        """The mask over blocks, bool [B|1, H, Tq, Tk]; undoes `from_block_mask`."""
        columns, used = self.kv_blocks, self._used()
        # What lies beyond a count goes to a column of its own, which is cut off.
        at = torch.where(used, self.blocks, columns).long()
        kept = used.new_zeros(*self.counts.shape, columns + 1)
        return kept.scatter_(-1, at, True)[..., :columns]

    def dense_mask(self) -> Tensor:
        """The mask over tokens, bool [B|1, H, q_len, kv_len]; for small tests."""
        rows = self.block_mask().repeat_interleave(self.block_size, 2)
        rows = rows[:, :, : self.q_len]
        return rows.repeat_interleave(self.block_size, 3)[..., : self.kv_len]

    def transposed(self) -> BlockIndex:
        """For each block of keys the blocks of queries that attend to it.

        Example:
            >>> kept = torch.tensor([[[[True, True], [False, True]]]])
            >>> index = BlockIndex.from_block_mask(kept, 16, 32, 32)
            >>> index.transposed().counts.tolist()
            [[[1, 2]]]
        """
        turned = self.block_mask().transpose(2, 3)
        size, q_len, kv_len = self.block_size, self.q_len, self.kv_len
        return BlockIndex.from_block_mask(turned, size, kv_len, q_len)

    def validate(self) -> None:
        """Check every value.

        Raises:
            InvalidValue: names the first bad (head, row, value): a count outside
                [0, width], a block outside [0, Tk), or a list that doesn't rise.

        Example:
            >>> counts = torch.ones(1, 1, 1, dtype=torch.int32)
            >>> blocks = torch.tensor([[[[2]]]], dtype=torch.int32)
            >>> BlockIndex(counts, blocks, 16, 16, 16).validate()
            Traceback (most recent call last):
            ...
            torchworks_core.errors.InvalidValue: blocks at (head 0, row 0), value 2: ...
        """
        counts, blocks, width = self.counts, self.blocks, self.blocks.shape[-1]
        found = (counts < 0) | (counts > width)
        _refuse("counts", counts, found, f"a count must be in [0, {width}]")
        used = self._used()
        found = used & ((blocks < 0) | (blocks >= self.kv_blocks))
        why = f"there are {self.kv_blocks} blocks of keys"
        _refuse("blocks", blocks, found, why)
        found = used.clone()
        found[..., :1] = False
        found[..., 1:] &= blocks[..., 1:] <= blocks[..., :-1]
        _refuse("blocks", blocks, found, "each must be greater than the one before it")

    def to_flex(self) -> torch.nn.attention.flex_attention.BlockMask:
        """The same lists for ``torch.nn.attention.flex_attention``.

        Every block is given as a full one; ``block_size`` is the tile of both sides.
        """
        from torch.nn.attention.flex_attention import BlockMask

        # Flex reads lists as wide as there are blocks of keys.
        order = (~self.block_mask()).byte().argsort(dim=-1, stable=True)
        lists, none = order.to(torch.int32), torch.zeros_like(self.counts)
        return BlockMask.from_kv_blocks(
            none,
            torch.zeros_like(lists),
            self.counts,
            lists,
            BLOCK_SIZE=self.block_size,
            seq_lengths=(self.q_len, self.kv_len),
        )

    def _used(self) -> Tensor:
        """Bool like ``blocks``: True where a row's list reaches."""
        width = self.blocks.shape[-1]
        place = torch.arange(width, device=self.blocks.device)
        return place < self.counts[..., None]


def _refuse(name: str, values: Tensor, bad: Tensor, why: str) -> None:
    if not bool(bad.any()):
        return
    batch, head, row, *_ = (place := tuple(bad.nonzero()[0].tolist()))
    entry = f" of batch entry {batch}" if values.shape[0] > 1 else ""
    value = int(values[place])
    raise InvalidValue(f"{name} at (head {head}, row {row}), value {value}{entry}", why)
