# SPDX-License-Identifier: Apache-2.0
"""Masks as data: one description, asked tile by tile, never built as a whole.

A plan asks for the tile of some queries and keys and gets EMPTY (skip it), FULL (no
mask work) or a small tensor. Decisions:

- Positions are global, so a shard or a chunk asks with its own offsets and causal and
  window come out right; the tensors of a mask are indexed by position, too.
- True means "may attend" in every bool tensor.
- A tile keeps the smallest shape that broadcasts: padding alone is [B, 1, 1, keys].
- Tiles are classified from host copies, so that a CUDA mask costs one copy for each
  call and not one wait for each tile.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from torchworks_core.errors import InvalidValue


class Tile(enum.Enum):
    """What a tile is when no mask tensor is needed."""

    EMPTY = "empty"
    FULL = "full"


EMPTY, FULL = Tile.EMPTY, Tile.FULL
INF = float("inf")
Positions = range | Tensor
# Position plus window must fit into int64, as must what ranks tell each other.
_WIDEST = 1 << 62


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """Which keys each query may attend to; the parts are combined by "and".

    Args:
        causal: Key j is seen by query i only if j <= i.
        window: 1 <= w <= 2**62. Without ``causal`` |i - j| < w, with it
            i - w < j <= i.
        key_padding: Bool [B, Nk], True = keep.
        documents: Integer [B, N]; queries see keys of their own document only.
        bias: Bool (True = may attend) or float (added to the scaled scores), at most
            four dimensions, broadcast to [B, H, Nq, Nk].

    Raises:
        InvalidValue: a part has a wrong type, rank or range.

    Example:
        >>> mask = MaskSpec(causal=True, window=2)
        >>> mask.tile(4, 8, 0, 3), mask.tile(0, 1, 0, 1)
        (<Tile.EMPTY: 'empty'>, <Tile.FULL: 'full'>)
        >>> mask.tile(0, 3, 0, 3)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    causal: bool = False
    window: int | None = None
    key_padding: Tensor | None = None
    documents: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.causal, bool):
            raise InvalidValue(f"causal={self.causal!r}", "it must be True or False")
        window = self.window
        if window is not None:
            if isinstance(window, bool) or not isinstance(window, int) or window < 1:
                why = "it must be None or an int >= 1"
                raise InvalidValue(f"window={window!r}", why)
            if window > _WIDEST:
                why = "it must be at most 2**62; None is no window"
                raise InvalidValue(f"window={window!r}", why)
        for name, tensor in self.tensors().items():
            _check_part(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are tensors, by name; absent ones are left out."""
        names = ("key_padding", "documents", "bias")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def tile(
        self,
        q0: int,
        q1: int,
        k0: int,
        k1: int,
        *,
        q_positions: Tensor | None = None,
        k_positions: Tensor | None = None,
    ) -> Tile | Tensor:
        """Return the mask of queries q0..q1 and keys k0..k1 (ends excluded).

        Args:
            q0: First query.
            q1: End of the queries.
            k0: First key.
            k1: End of the keys.
            q_positions: Int64 [queries]; if given, q0 and q1 count in this vector,
                and it says the position of each. So does ``k_positions``.
            k_positions: Int64 [keys].

        Returns:
            EMPTY, FULL, or a bool tensor (True = may attend), or, with a float
            bias, a float tensor to be added with -inf where hidden; its shape
            broadcasts to [B, H, q1 - q0, k1 - k0].

        Raises:
            InvalidValue: a tensor of the mask is too short for these positions.
        """
        rows = range(q0, q1) if q_positions is None else q_positions[q0:q1]
        columns = range(k0, k1) if k_positions is None else k_positions[k0:k1]
        return self.lay(rows, columns).tile(0, len(rows), 0, len(columns))

    def lay(self, rows: Positions, columns: Positions) -> LaidMask:
        """Cut the mask to queries at positions ``rows`` and keys at ``columns``.

        Raises:
            InvalidValue: a tensor of the mask is too short for these positions.
        """
        documents, padding, bias = self.documents, self.key_padding, self.bias
        if bias is not None:
            bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
            bias = _take("bias", bias, 2, rows, broadcast=True)
            bias = _take("bias", bias, 3, columns, broadcast=True)
        return LaidMask(
            self.causal,
            self.window,
            rows,
            columns,
            None if padding is None else _take("key_padding", padding, 1, columns),
            None if documents is None else _take("documents", documents, 1, rows),
            None if documents is None else _take("documents", documents, 1, columns),
            bias,
        )


@dataclass(frozen=True, eq=False)
class LaidMask:
    """A mask over given queries and keys; plans ask it by local index.

    Args:
        causal: As in `MaskSpec`.
        window: As in `MaskSpec`.
        rows: Positions of the queries.
        columns: Positions of the keys.
        keep: Bool [B, keys] or None.
        q_documents: Integer [B, queries] or None.
        k_documents: Integer [B, keys] or None.
        bias: [1|B, 1|H, 1|queries, 1|keys] or None.
    """

    causal: bool
    window: int | None
    rows: Positions
    columns: Positions
    keep: Tensor | None = None
    q_documents: Tensor | None = None
    k_documents: Tensor | None = None
    bias: Tensor | None = None
    checks: bool = field(init=False, default=True)
    _alike: dict[tuple[int, int, int], Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        found = (self.keep, self.q_documents, self.bias)
        fake = any(t is not None and is_abstract(t) for t in found)
        object.__setattr__(self, "checks", not fake)

    @property
    def span(self) -> tuple[float, float]:
        """Smallest and largest allowed difference of query and key position."""
        high = INF if self.window is None else self.window - 1
        return (0 if self.causal else -high), high

    @cached_property
    def _host(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        found = (self.keep, self.q_documents, self.k_documents)
        keep, queries, keys = (None if t is None else t.cpu() for t in found)
        return keep, queries, keys

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> Tile | Tensor:
        """As `MaskSpec.tile`, with indices into ``rows`` and ``columns``."""
        if q0 >= q1 or k0 >= k1:
            return EMPTY
        rows, columns = self.rows[q0:q1], self.columns[k0:k1]
        parts = [
            self._seen(rows, columns),
            self._by_padding(k0, k1),
            self._by_document(q0, q1, k0, k1),
            self._by_bias(q0, q1, k0, k1),
        ]
        if EMPTY in parts:
            return EMPTY
        return _combine([p for p in parts if isinstance(p, Tensor)], self.checks)

    def keys_of(self, q0: int, q1: int) -> tuple[int, int]:
        """First and end index of the keys that queries q0..q1 may see."""
        rows, (low, high) = self.rows[q0:q1], self.span
        first, end = 0, len(self.columns)
        if not len(rows) or not end:
            return 0, 0
        if isinstance(self.columns, range):
            start, (least, most) = self.columns.start, _ends(rows)
            first = int(max(first, least - high - start))
            end = int(min(end, most - low - start + 1))
        seen = self._seen_by(q0, q1, first, end) if self.checks else None
        if seen is not None and first < end:
            found = seen.nonzero()
            if not len(found):
                return 0, 0
            first, end = first + int(found[0]), first + int(found[-1]) + 1
        return (first, end) if first < end else (0, 0)

    def _seen_by(self, q0: int, q1: int, first: int, end: int) -> Tensor | None:
        """Keys that padding and documents may leave to these queries, bool [keys]."""
        keep, q_ids, k_ids = self._host
        seen = None if keep is None else keep[:, first:end]
        if q_ids is not None and k_ids is not None:
            ids, keys = q_ids[:, q0:q1], k_ids[:, first:end]
            least, most = ids.amin(1, keepdim=True), ids.amax(1, keepdim=True)
            same = (keys >= least) & (keys <= most)
            seen = same if seen is None else seen & same
        return None if seen is None else seen.any(0)

    def by_position(self, rows: Positions, columns: Positions) -> Tile | None:
        """EMPTY, FULL, or None for mixed, from causal and window alone."""
        if not len(rows) or not len(columns):
            return EMPTY
        low, high = self.span
        (q_min, q_max), (k_min, k_max) = _ends(rows), _ends(columns)
        least, most = q_min - k_max, q_max - k_min
        if most < low or least > high:
            return EMPTY
        return FULL if least >= low and most <= high else None

    def _seen(self, rows: Positions, columns: Positions) -> Tile | Tensor:
        """As `tile`, from causal and window alone."""
        if (known := self.by_position(rows, columns)) is not None:
            return known
        low, high = self.span
        device = self._device()
        # Tiles along a window are all alike: only the distance of rows and keys counts.
        like = None
        if isinstance(rows, range) and isinstance(columns, range):
            like = (rows.start - columns.start, len(rows), len(columns))
            if like in self._alike:
                return self._alike[like]
        q, k = _vector(rows, device), _vector(columns, device)
        distance = q[:, None] - k[None, :]
        seen = distance >= low if low > -INF else None
        if high < INF:
            near = distance <= high
            seen = near if seen is None else seen.logical_and_(near)
        assert seen is not None
        if like is not None:
            if len(self._alike) > 8:
                self._alike.clear()
            self._alike[like] = seen[None, None]
        return seen[None, None]

    def _by_padding(self, k0: int, k1: int) -> Tile | Tensor:
        if self.keep is None:
            return FULL
        host = self._host[0] if self.checks else None
        if host is not None:
            host = host[:, k0:k1]
            if bool(host.all()):
                return FULL
            if not bool(host.any()):
                return EMPTY
        return self.keep[:, None, None, k0:k1]

    def _by_document(self, q0: int, q1: int, k0: int, k1: int) -> Tile | Tensor:
        if self.q_documents is None or self.k_documents is None:
            return FULL
        _, queries, keys = self._host if self.checks else (None, None, None)
        if queries is not None and keys is not None:
            q_least, q_most = queries[:, q0:q1].aminmax(dim=1)
            k_least, k_most = keys[:, k0:k1].aminmax(dim=1)
            if bool(((q_most < k_least) | (q_least > k_most)).all()):
                return EMPTY
            if bool(((q_least == k_most) & (k_least == q_most)).all()):
                return FULL
        q, k = self.q_documents[:, q0:q1], self.k_documents[:, k0:k1]
        return (q[:, :, None] == k[:, None, :])[:, None]

    def _by_bias(self, q0: int, q1: int, k0: int, k1: int) -> Tile | Tensor:
        if self.bias is None:
            return FULL
        bias = self.bias
        bias = bias if bias.shape[2] == 1 else bias[:, :, q0:q1]
        bias = bias if bias.shape[3] == 1 else bias[:, :, :, k0:k1]
        if bias.dtype == torch.bool and self.checks and bias.device.type == "cpu":
            if bool(bias.all()):
                return FULL
            if not bool(bias.any()):
                return EMPTY
        return bias

    def _device(self) -> torch.device | None:
        found = (self.keep, self.q_documents, self.bias)
        return next((t.device for t in found if t is not None), None)


def is_abstract(t: Tensor) -> bool:
    """True if ``t`` has a shape but no values (meta and fake tensors)."""
    return t.is_meta or is_fake(t)


def _combine(parts: list[Tensor], checks: bool) -> Tile | Tensor:
    """Join bool parts by "and", a float part by adding."""
    if not parts:
        return FULL
    flags = [part for part in parts if part.dtype == torch.bool]
    floats = [part for part in parts if part.dtype != torch.bool]
    if not flags:
        return floats[0]
    seen = flags[0]
    for part in flags[1:]:
        seen = seen & part
    on_host = checks and seen.device.type == "cpu"
    if len(flags) > 1 and on_host and not bool(seen.any()):
        return EMPTY
    return floats[0].masked_fill(~seen, -INF) if floats else seen


def _ends(positions: Positions) -> tuple[int, int]:
    if isinstance(positions, range):
        return positions[0], positions[-1]
    least, most = positions.aminmax()
    return int(least), int(most)


def _vector(positions: Positions, device: torch.device | None) -> Tensor:
    if isinstance(positions, range):
        return torch.arange(positions.start, positions.stop, device=device)
    return positions.to(device)


def _take(
    name: str, part: Tensor, dim: int, positions: Positions, broadcast: bool = False
) -> Tensor:
    """Select ``positions`` along ``dim``."""
    if not len(positions):
        return part.narrow(dim, 0, 0)
    if broadcast and part.shape[dim] == 1:
        return part
    least, most = _ends(positions)
    if most >= part.shape[dim] or least < 0:
        needs = f"positions {least}..{most} are asked for in dimension {dim}"
        raise InvalidValue(f"{name} of shape {tuple(part.shape)}", needs)
    if isinstance(positions, range):
        return part.narrow(dim, positions.start, len(positions))
    return part.index_select(dim, positions.to(part.device))


def _check_part(name: str, part: Tensor) -> None:
    if not isinstance(part, Tensor):
        raise InvalidValue(f"{name}={part!r}", "it must be a tensor")
    kind, shape = part.dtype, tuple(part.shape)
    numeric = not (kind.is_floating_point or kind.is_complex or kind == torch.bool)
    right = {
        "key_padding": (part.ndim == 2 and kind == torch.bool, "bool [B, Nk]"),
        "documents": (part.ndim == 2 and numeric, "integer [B, N]"),
        "bias": (
            part.ndim <= 4 and (kind == torch.bool or kind.is_floating_point),
            "bool or float, broadcasting to [B, H, Nq, Nk]",
        ),
    }
    fits, wanted = right[name]
    if not fits:
        raise InvalidValue(f"{name} of shape {shape}, {kind}", f"it must be {wanted}")
