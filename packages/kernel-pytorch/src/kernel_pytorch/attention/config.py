# SPDX-License-Identifier: Apache-2.0
"""Settings of attention layers as data: checked, and turned to a dict and back."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from kernel_pytorch.attention.layer_base import check_count, check_heads
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.patterns import SparsePattern
from kernel_pytorch.attention.selection import check_sparsity
from kernel_pytorch.precision.formats import FP8Format
from torchworks_core.errors import InvalidValue

_SCALINGS = ("per_head", "per_tensor")


class AttentionPatterns(enum.Enum):
    """Which keys a query attends to, and by which plan."""

    FULL = "full"
    CAUSAL = "causal"
    SLIDING_WINDOW = "sliding_window"
    SPARSE = "sparse"
    DYNAMIC_SPARSE = "dynamic_sparse"
    RING = "ring"
    CONTEXT_PARALLEL = "context_parallel"


@dataclass
class FP8AttentionConfig:
    """How queries, keys and values are rounded to float8.

    Args:
        format: An `FP8Format` or its value.
        scaling: ``"per_head"``: a scale for each batch entry and head;
            ``"per_tensor"``: one for all.
        smooth_k: Subtract the mean key of each head first; the softmax does not change
            (SageAttention, Zhang et al., 2024).

    Raises:
        InvalidValue: a value is unknown.

    Example:
        >>> FP8AttentionConfig(format="e5m2").format
        <FP8Format.E5M2: 'e5m2'>
    """

    format: FP8Format = FP8Format.E4M3
    scaling: str = "per_head"
    smooth_k: bool = True

    def __post_init__(self) -> None:
        self.format = _member(FP8Format, "format", self.format)
        if self.scaling not in _SCALINGS:
            why = f"it must be one of {_SCALINGS}"
            raise InvalidValue(f"scaling={self.scaling!r}", why)


@dataclass
class AttentionConfig:
    """Settings from which `create_attention` makes a layer.

    Args:
        embed_dim: Width of the input and the output.
        num_heads: Heads; must divide ``embed_dim``.
        num_kv_heads: Heads of keys and values; None is ``num_heads``.
        head_dim: Width of a head; None is ``embed_dim // num_heads``.
        pattern: An `AttentionPatterns` or its value.
        causal: Whether queries see no later keys; CAUSAL means it in any case.
        sliding_window_size: Keys with |i - j| below it are seen, under any pattern.
            None is no window, but for SLIDING_WINDOW the lesser of 1024 and
            ``max_sequence_length // 4``.
        attention_dropout: Dropout of attention weights. Plans refuse it in training.
        bias: Whether the projections have one.
        max_sequence_length: A longer sequence is refused.
        chunk_size: Query rows at a time; None chooses.
        sparsity_ratio: In [0, 0.95], for SPARSE and DYNAMIC_SPARSE.
        sparse_pattern: A `SparsePattern` or its value; DYNAMIC_SPARSE takes those that
            look at the content.
        block_size: Tokens in a block of SPARSE and DYNAMIC_SPARSE.
        fp8_config: Rounds q, k and v to float8 values; dense patterns only.
        context_parallel_size: Shards of CONTEXT_PARALLEL; None is the size of the
            default process group, or 1 without one.

    Raises:
        InvalidValue: values are unusable or don't fit each other.

    Example:
        >>> config = AttentionConfig(embed_dim=64, num_heads=4, pattern="causal")
        >>> AttentionConfig.from_dict(config.to_dict()) == config
        True
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    pattern: AttentionPatterns = AttentionPatterns.FULL
    causal: bool = False
    sliding_window_size: int | None = None
    attention_dropout: float = 0.0
    bias: bool = True
    max_sequence_length: int = 8192
    chunk_size: int | None = None
    sparsity_ratio: float = 0.9
    sparse_pattern: SparsePattern = SparsePattern.DYNAMIC_THRESHOLD
    block_size: int = 64
    fp8_config: FP8AttentionConfig | None = None
    context_parallel_size: int | None = None

    def __post_init__(self) -> None:
        self.pattern = _member(AttentionPatterns, "pattern", self.pattern)
        self.sparse_pattern = _member(
            SparsePattern, "sparse_pattern", self.sparse_pattern
        )
        check_count(self.embed_dim, "embed_dim")
        check_count(self.num_heads, "num_heads")
        if self.embed_dim % self.num_heads:
            why = f"num_heads={self.num_heads} must divide it"
            raise InvalidValue(f"embed_dim={self.embed_dim}", why)
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        check_heads(self.embed_dim, self.num_heads, kv_heads, self.head_dim)
        check_count(self.max_sequence_length, "max_sequence_length")
        for name in ("chunk_size", "context_parallel_size"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        if self.sliding_window_size is not None:
            check_count(self.sliding_window_size, "sliding_window_size")
        MaskSpec(causal=self.causal)
        check_sparsity(self.sparsity_ratio, self.block_size, None)
        dropout = self.attention_dropout
        if isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise InvalidValue(f"attention_dropout={dropout!r}", "it must be in [0, 1)")
        if self.fp8_config is not None and not isinstance(
            self.fp8_config, FP8AttentionConfig
        ):
            why = "it must be None or an FP8AttentionConfig"
            raise InvalidValue(f"fp8_config={self.fp8_config!r}", why)

    @property
    def window(self) -> int | None:
        """The window that applies, with SLIDING_WINDOW's default."""
        given = self.sliding_window_size
        if given is None and self.pattern is AttentionPatterns.SLIDING_WINDOW:
            return max(1, min(1024, self.max_sequence_length // 4))
        return given

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as JSON can hold them."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttentionConfig:
        """Make the settings that `to_dict` told.

        Raises:
            InvalidValue: an unknown key, or an unusable value.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            why = f"the settings are {', '.join(sorted(known))}"
            raise InvalidValue(f"unknown key {unknown[0]!r}", why)
        given = dict(values)
        if isinstance(given.get("fp8_config"), Mapping):
            given["fp8_config"] = _fp8_from(given["fp8_config"])
        return cls(**given)


def _fp8_from(values: Mapping[str, Any]) -> FP8AttentionConfig:
    known = {field.name for field in fields(FP8AttentionConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        why = f"the settings are {', '.join(sorted(known))}"
        raise InvalidValue(f"unknown key {unknown[0]!r} of fp8_config", why)
    return FP8AttentionConfig(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value.value if isinstance(value, enum.Enum) else value


def _member(kind: type[enum.Enum], name: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        valid = ", ".join(repr(member.value) for member in kind)
        raise InvalidValue(f"{name}={value!r}", f"it must be of {valid}") from None
