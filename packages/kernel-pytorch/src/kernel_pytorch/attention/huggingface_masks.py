# SPDX-License-Identifier: Apache-2.0
"""What transformers says of a mask, kept as a `MaskSpec`.

Decisions:

- The mask that travels through the model is a tensor without data that knows its
  `MaskSpec`. Our attention reads that; for everybody else (a model that slices or joins
  masks, accelerate moving it) it turns into the exact mask at the first operation.
- It has four dimensions, so that transformers takes it for a finished mask and doesn't
  convert it a second time (as `generate` does with a static cache).
- Known mask functions are told by their code object. One that isn't known, also of a
  later transformers, becomes the exact mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kernel_pytorch.attention.masks import EMPTY, MaskSpec


class LazyMask(torch.Tensor):
    """A bool mask [B, 1, Nq, Nk] that is built only if somebody looks at it.

    Args:
        spec: What may be seen; keys count from 0.
        q_start: Position of the first query.
        shape: (B, 1, Nq, Nk).
        device: Where the mask would be.

    Example:
        >>> mask = LazyMask(MaskSpec(causal=True), 0, (1, 1, 2, 2), "cpu")
        >>> mask[0, 0].tolist()
        [[True, False], [True, True]]
    """

    spec: MaskSpec
    q_start: int
    # Else each result would be made a LazyMask.
    # pyrefly: ignore [bad-override]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls,
        spec: MaskSpec,
        q_start: int,
        shape: tuple[int, ...],
        device: torch.device | str,
    ) -> LazyMask:
        """Make the tensor without data."""
        mask = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.bool, device=torch.device(device)
        )
        mask.spec, mask.q_start = spec, q_start
        return mask

    def __init__(self, *_: Any) -> None:
        super().__init__()

    @classmethod
    # pyrefly: ignore [bad-override]  (a classmethod to torch, too)
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation on the exact mask."""
        args, kwargs = tree_map_only(LazyMask, LazyMask.exact, (args, kwargs or {}))
        return func(*args, **kwargs)

    def exact(self) -> Tensor:
        """The mask, bool [B, 1, Nq, Nk], True = may attend."""
        mask = exact_mask(self.spec, self.q_start, tuple(self.shape), self.device)
        # As its strides say: operations on views were chosen by them.
        return mask.contiguous()


def exact_mask(
    spec: MaskSpec, q_start: int, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Build what a spec says of all queries and keys, bool or float.

    Example:
        >>> exact_mask(MaskSpec(window=1), 0, (1, 1, 2, 2), torch.device("cpu"))[0, 0]
        tensor([[ True, False],
                [False,  True]])
    """
    rows, columns = shape[2:]
    laid = spec.lay(range(q_start, q_start + rows), range(columns))
    tile = laid.tile(0, rows, 0, columns)
    if not isinstance(tile, Tensor):
        return torch.full(shape, tile is not EMPTY, dtype=torch.bool, device=device)
    return tile.to(device).expand(shape[0], -1, rows, columns)


class Described(NamedTuple):
    """What a mask function of transformers means.

    Attributes:
        causal: As in `MaskSpec`.
        window: As in `MaskSpec`.
        documents: Integer [B, N] of packed sequences, or None.
        positions: Int64 [B, N], the positions that packing was found by, or None.
    """

    causal: bool
    window: int | None
    documents: Tensor | None = None
    positions: Tensor | None = None


def describe(function: Callable) -> Described | None:
    """Tell the meaning of a mask function, without calling it.

    Returns:
        None if it isn't made of causal, bidirectional, sliding-window and
        packed-sequence parts alone.

    Example:
        >>> from transformers.masking_utils import sliding_window_causal_mask_function
        >>> describe(sliding_window_causal_mask_function(5))
        Described(causal=True, window=5, documents=None, positions=None)
        >>> describe(lambda batch, head, q, k: q == k) is None
        True
    """
    parts = _parts(function)
    if parts is None:
        return None
    found = {name: [value for n, value in parts if n == name] for name, _ in parts}
    causal = "causal" in found
    # Keys later than i - w are a window of MaskSpec only where j <= i, too.
    if "after" in found and not causal:
        return None
    windows = found.get("after", []) + [w + 1 for w in found.get("near", [])]
    ids, positions = found.get("documents", []), found.get("positions", [])
    if len(ids) > 1 or len(positions) > 1 or len(ids) < len(positions):
        return None
    if positions and not _runs(positions[0], ids[0]):
        return None
    return Described(
        causal,
        min(windows) if windows else None,
        ids[0] if ids else None,
        positions[0] if positions else None,
    )


def make_mask_function(own: Callable[[Tensor], bool] | None = None) -> Callable:
    """Make what is registered with transformers' ``AttentionMaskInterface``.

    Args:
        own: With a group: tells if positions [B, n] are those of this rank's shard.
            The mask is the shard's own then, and of its keys alone.
    """

    def mask_function(**given: Any) -> Tensor | None:
        if own is None and given["q_length"] == 1:
            from transformers.masking_utils import sdpa_mask

            return sdpa_mask(**given)
        return describe_lazily(own, **given)

    # Describing a mask asks for values; left out of a compiled graph, it stays lazy.
    # Not as a decorator: that would import torch._dynamo with this file.
    describe_lazily = torch.compiler.disable(_mask)
    return mask_function


def _mask(
    own: Callable[[Tensor], bool] | None,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **_: Any,
) -> Tensor:
    known, shape = describe(mask_function), (batch_size, 1, q_length, kv_length)
    if known is not None:
        documents = known.documents
        if own is not None and known.positions is not None and own(known.positions):
            documents = None  # zigzag shards have a jump that isn't a new sequence
        padding = _padding(attention_mask, kv_length, kv_offset)
        spec = MaskSpec(known.causal, known.window, padding, documents)
        return LazyMask(spec, int(q_offset) - kv_offset, shape, device)
    if own is not None:
        name = getattr(mask_function, "__qualname__", mask_function)
        raise NotImplementedError(
            f"mask function {name} with a group: only causal, bidirectional and "
            "sliding-window masks, and padding, are known on shards."
        )
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    assert mask is not None
    return mask


def _padding(mask: Tensor | None, length: int, offset: int) -> Tensor | None:
    """The keys that are kept, bool [B, length]; None is all. Absent ones are hidden."""
    if mask is None:
        return None
    short = length + offset - mask.shape[1]
    mask = torch.nn.functional.pad(mask, (0, short)) if short > 0 else mask
    mask = mask[:, offset : offset + length].bool()
    return None if bool(mask.all()) else mask


@functools.cache
def _code() -> dict[Any, str]:
    """Code objects of transformers' mask factories, with the factories' names."""
    from transformers import masking_utils

    ids = torch.zeros(1, 1, dtype=torch.long)
    arguments: dict[str, tuple] = {
        "and_masks": (),
        "sliding_window_overlay": (1,),
        "sliding_window_bidirectional_overlay": (1,),
        "packed_sequence_mask_function": (ids,),
        "remap_positions_for_packed_sequence": (None, ids),
    }
    makers = {name: getattr(masking_utils, name, None) for name in arguments}
    return {
        make(*arguments[name]).__code__: name for name, make in makers.items() if make
    }


def _parts(function: Callable) -> list[tuple[str, Any]] | None:
    """The parts that a mask function joins by "and"; None if one is unknown."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return [("causal", True)]
    if function is masking_utils.bidirectional_mask_function:
        return []
    name = _code().get(getattr(function, "__code__", None))
    if name is None:
        return None
    names = function.__code__.co_freevars
    cells = function.__closure__ or ()
    held = {n: c.cell_contents for n, c in zip(names, cells, strict=True)}
    if name == "and_masks":
        lists = [_parts(part) for part in held.get("mask_functions", (None,))]
        return None if None in lists else [p for part in lists for p in part or ()]
    if name == "remap_positions_for_packed_sequence":
        inner, positions = _parts(held["mask_function"]), held.get("position_ids")
        return None if inner is None else [*inner, ("positions", positions)]
    of = {
        "sliding_window_overlay": ("after", "sliding_window"),
        "sliding_window_bidirectional_overlay": ("near", "sliding_window"),
        "packed_sequence_mask_function": ("documents", "packed_sequence_mask"),
    }
    kind, variable = of[name]
    return [(kind, held[variable])] if variable in held else None


def _runs(positions: Tensor, ids: Tensor) -> bool:
    """Whether positions rise by one within each document, and documents in order.

    Then causal and window mean the same by position as by place.
    """
    if positions.shape != ids.shape:
        return False
    new, step = ids.diff(dim=1), positions.diff(dim=1)
    return bool(((new > 0) | ((new == 0) & (step == 1))).all())
