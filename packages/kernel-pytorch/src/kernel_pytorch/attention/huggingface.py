# SPDX-License-Identifier: Apache-2.0
"""The plans of this package as attention of Hugging Face transformers models.

Decisions:

- Masks come as `MaskSpec` (see `huggingface_masks`), never as less than the model asked
  for: what can't be honoured raises NotImplementedError.
- One query, which is decoding, runs on transformers' own dense attention.
- With a group a model holds its rank's shard of the sequence, and only attention knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from kernel_pytorch.attention.agreement import agree_once
from kernel_pytorch.attention.block_sparse import block_sparse_attention
from kernel_pytorch.attention.blocks import autocast_enabled
from kernel_pytorch.attention.huggingface_masks import (
    LazyMask,
    exact_mask,
    make_mask_function,
)
from kernel_pytorch.attention.layout import resolve, shard_length, shard_positions
from kernel_pytorch.attention.masks import INF, MaskSpec
from kernel_pytorch.attention.patterns import SparsePattern, build_block_index
from kernel_pytorch.attention.ring import ring_attention
from kernel_pytorch.attention.streaming import attention_with_lse
from torchworks_core.errors import InvalidValue, MissingExtra

_REFUSED = ("softcap", "s_aux", "sinks", "head_mask", "output_attentions", "cache")
_FLASH = "kernel_pytorch_flash"
_agreed: WeakSet[Any] = WeakSet()


@dataclass(frozen=True, eq=False)
class Call:
    """One call of attention, as a plan gets it.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        v: Like ``k``.
        spec: What may be seen; keys count from 0.
        q_start: Position of the first query.
        scale: Factor of the scores.
        position_ids: As the model passes them, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    spec: MaskSpec
    q_start: int
    scale: float
    position_ids: Tensor | None = None


def register_with_transformers(
    group: Any = None,
    sparsity_ratio: float = 0.9,
    *,
    pattern: SparsePattern | str = SparsePattern.DYNAMIC_THRESHOLD,
    block_size: int = 64,
    coverage: float | None = None,
    remainder: bool = False,
    layout: str = "zigzag",
) -> None:
    """Make this package's attention known to transformers, by name.

    - ``"kernel_pytorch_ring"``: exact; streamed on one device, or with a group over
      its ranks: the model is given its rank's shard of the tokens (`shard_sequence`)
      and of an attention mask, and ``position_ids`` from `shard_positions`.
    - ``"kernel_pytorch_sparse"``: the blocks that ``pattern`` chooses. Dense where the
      keys fill less than two blocks, and on top of a filled KV cache.
    - ``"kernel_pytorch_flash"``: exact, on torch's fused attention where the mask
      allows. Models take the name for a flash kernel; they may leave out masks that
      those don't know, with an error or a warning of theirs.

    Models take the names as ``attn_implementation``. A call replaces what an earlier
    one registered, also for models made before. For the name with "flash" it also tells
    transformers that this kernel is loaded, which it would otherwise look for online.

    Args:
        group: ProcessGroup or 1-D DeviceMesh for the ring; None is one device.
        sparsity_ratio: For the sparse one; see `build_block_index`.
        pattern: Likewise.
        block_size: Likewise.
        coverage: Likewise.
        remainder: For the sparse one; see `block_sparse_attention`.
        layout: For the ring with a group: ``"zigzag"`` or ``"contiguous"``.

    Raises:
        InvalidValue: a value is out of its range.
        MissingExtra: transformers isn't installed.

    Models that then run raise NotImplementedError for what isn't honoured: dropout,
    softcap, attention sinks, a head mask, returned attention weights, a position bias
    that is trained; with a group also a KV cache and packed sequences.

    Example:
        >>> import transformers
        >>> register_with_transformers(sparsity_ratio=0.5, block_size=16)
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=10, hidden_size=16, intermediate_size=16,
        ...     num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
        >>> config._attn_implementation = "kernel_pytorch_sparse"
        >>> model = transformers.LlamaForCausalLM(config)
        >>> model(torch.zeros(1, 100, dtype=torch.long)).logits.shape
        torch.Size([1, 100, 10])
    """
    probe = torch.zeros(1, 1, 1, 1)
    options: dict[str, Any] = {"sparsity_ratio": sparsity_ratio}
    options |= {"block_size": block_size, "coverage": coverage, "pattern": pattern}
    build_block_index(probe, probe, **options)  # refuses what it can't use
    shard_length(1, 1, layout)
    _, _, world = resolve(group)
    try:
        import transformers
    except ImportError as error:
        what, why = "transformers", "it isn't installed"
        raise MissingExtra(what, why, "Install kernel-pytorch[transformers]") from error
    sharded = group is not None

    def own(positions: Tensor) -> bool:
        return _is_own(positions, positions.shape[1] * world, group, layout)

    def ring(call: Call) -> Tensor:
        return _ring(call, group, layout) if sharded else _dense(call)

    def sparse(call: Call) -> Tensor:
        return _sparse(call, options, remainder)

    for name, plan in (
        ("kernel_pytorch_ring", ring),
        ("kernel_pytorch_sparse", sparse),
        (_FLASH, _flash),
    ):
        shards = sharded and plan is ring
        function = _attention_function(plan, shards)
        transformers.AttentionInterface.register(name, function)
        mask_function = make_mask_function(own if shards else None)
        transformers.AttentionMaskInterface.register(name, mask_function)
    _let_pass(_FLASH)


def _let_pass(name: str) -> None:
    """Keep transformers from looking for ``name`` among the kernels on its hub.

    It does so for every name that contains "flash", registered or not, unless that is
    the one it loaded last. Loading another later undoes this, with an error then.
    """
    from transformers import modeling_flash_attention_utils as utils

    if hasattr(utils, "_loaded_implementation"):
        utils._loaded_implementation = name


def _attention_function(plan: Callable[[Call], Tensor], sharded: bool) -> Callable:
    """Make what is registered with transformers' ``AttentionInterface``."""
    # Plans ask masks for their values; in a compiled graph this is a break. Not as a
    # decorator: that would import torch._dynamo with this file.
    run = torch.compiler.disable(_run)

    def attention_function(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        position_bias: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        _refuse(dropout, rest)
        if query.shape[2] == 1 and not sharded:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            mask = attention_mask
            if mask is not None and mask.ndim == 2:
                mask = mask[:, None, None] != 0
            # One query at the end sees all keys that the mask leaves.
            options = {"scaling": scaling, "position_bias": position_bias}
            return sdpa_attention_forward(
                module, query, key, value, mask, is_causal=False, **options
            )
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        how = (is_causal, sliding_window, position_bias, scaling, rest)
        out = run(plan, sharded, query, key, value, attention_mask, *how)
        return out.transpose(1, 2).contiguous(), None

    return attention_function


def _refuse(dropout: float, rest: dict[str, Any]) -> None:
    """Raise NotImplementedError for what would change the result."""
    if dropout > 0:
        raise NotImplementedError(
            f"attention dropout={dropout}: blockwise attention offers none. Set the "
            "model's attention dropout to 0, or train with another implementation."
        )
    wanted = dict(rest, output_attentions=_weights_wanted(rest))
    for name in _REFUSED:
        if wanted.get(name) is not None and wanted[name] is not False:
            raise NotImplementedError(
                f"{name}: this package's attention doesn't honour it. Use the model "
                "with attn_implementation='eager'."
            )


def _weights_wanted(rest: dict[str, Any]) -> bool:
    """Whether somebody collects attention weights; some models don't pass that on."""
    from transformers.utils import output_capturing

    variable = getattr(output_capturing, "_active_collector", None)
    collected = (variable.get() if variable is not None else None) or ()
    return bool(rest.get("output_attentions")) or any(
        "attentions" in name for name in collected
    )


def _check_mask(mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a mask that doesn't fit; a longer one would be cut at the wrong end."""
    if mask is None:
        return
    wanted = shape if mask.ndim == 4 else (shape[0], shape[3])
    found = zip(mask.shape[-2:], wanted[-2:], strict=True)
    if mask.ndim not in (2, 4) or any(x not in (1, y) for x, y in found):
        why = f"batch, queries and keys are {(shape[0], *shape[2:])}"
        raise InvalidValue(f"attention mask {tuple(mask.shape)}", why)


def _spec(
    mask: Tensor | None, shape: tuple[int, ...], is_causal: bool, window: int | None
) -> tuple[MaskSpec, int]:
    """The meaning of what the model passes as a mask, and where queries start."""
    if isinstance(mask, LazyMask):
        return mask.spec, mask.q_start
    if mask is not None and mask.ndim == 4:
        return MaskSpec(bias=mask), 0
    if is_causal and shape[2] != shape[3]:
        raise NotImplementedError(
            f"a causal layer with {shape[2]} queries and {shape[3]} keys, whose mask "
            f"({None if mask is None else tuple(mask.shape)}) doesn't say where the "
            "queries stand among the keys"
        )
    padding = None if mask is None else mask != 0
    return MaskSpec(is_causal, window, padding), 0


def _with_documents(
    spec: MaskSpec, rest: dict[str, Any], shape: tuple[int, ...]
) -> MaskSpec:
    """Honour sequence ends that are given as flash kernels want them."""
    ends, k_ends = rest.get("cu_seq_lens_q"), rest.get("cu_seq_lens_k")
    if ends is None or spec.documents is not None:
        return spec
    same = k_ends is None or torch.equal(ends, k_ends)
    if shape[0] != 1 or shape[2] != shape[3] or not same:
        raise NotImplementedError(
            f"cu_seq_lens_q with a batch of {shape[0]}, {shape[2]} queries and "
            f"{shape[3]} keys: packed sequences are known in one row, without a cache"
        )
    places = torch.arange(shape[3], device=ends.device)
    return replace(spec, documents=torch.bucketize(places, ends[1:], right=True)[None])


def _with_bias(
    spec: MaskSpec, q_start: int, bias: Tensor, shape: tuple[int, ...]
) -> MaskSpec:
    """Add a bias; a mask must go into it, for its rows count from the first query."""
    seen = exact_mask(spec, q_start, shape, bias.device)
    if seen.dtype == torch.bool:
        return MaskSpec(bias=bias.masked_fill(~seen, -INF))
    return MaskSpec(bias=bias + seen)


def _run(
    plan: Callable[[Call], Tensor],
    sharded: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    position_bias: Tensor | None,
    scale: float | None,
    rest: dict[str, Any],
) -> Tensor:
    """Run a plan with heads of one width and of one type."""
    shape = (q.shape[0], 1, q.shape[2], k.shape[2])
    if not sharded:
        _check_mask(mask, shape)
    elif position_bias is not None:
        raise NotImplementedError("position_bias with a group: it has no shards")
    spec, q_start = _spec(mask, shape, is_causal, window)
    spec = _with_documents(spec, rest, shape)
    if position_bias is not None:
        spec, q_start = _with_bias(spec, q_start, position_bias, shape), 0
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if autocast_enabled(q.device.type):
        kind = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(kind), k.to(kind), v.to(kind)
    width, missing = v.shape[-1], q.shape[-1] - v.shape[-1]
    if missing > 0:
        v = pad(v, (0, missing))
    elif missing < 0:
        q, k = pad(q, (0, -missing)), pad(k, (0, -missing))
    call = Call(q, k, v, spec, q_start, scale, rest.get("position_ids"))
    return plan(call)[..., :width]


def _dense(call: Call) -> Tensor:
    options = {"scale": call.scale, "q_start": call.q_start}
    return attention_with_lse(call.q, call.k, call.v, call.spec, **options)[0]


def _flash(call: Call) -> Tensor:
    spec, square = call.spec, call.q.shape[2] == call.k.shape[2]
    # On the CPU the plan takes the same kernel, and keeps NaN where it is hidden.
    if not call.q.is_cuda:
        return _dense(call)
    if spec.tensors() or spec.window is not None or (spec.causal and not square):
        return _dense(call)
    if spec.causal and call.q_start:
        return _dense(call)
    return scaled_dot_product_attention(
        call.q,
        call.k,
        call.v,
        is_causal=spec.causal,
        scale=call.scale,
        enable_gqa=call.q.shape[1] != call.k.shape[1],
    )


def _sparse(call: Call, options: dict[str, Any], remainder: bool) -> Tensor:
    short = call.k.shape[2] < 2 * options["block_size"]
    # The kernel counts queries and keys from the same place.
    if short or (call.q_start and (call.spec.causal or call.spec.window is not None)):
        return _dense(call)
    known = remainder and SparsePattern.of(options["pattern"]).by_content
    choice = options | {"mask": call.spec, "remainder": known}
    index = build_block_index(call.q, call.k, **choice)
    out = block_sparse_attention(
        *(call.q, call.k, call.v, index, call.spec),
        scale=call.scale,
        remainder=remainder,
    )
    assert isinstance(out, Tensor)
    return out


def _ring(call: Call, group: Any, layout: str) -> Tensor:
    process_group, _, world = resolve(group)

    def local() -> dict[str, Any]:
        _check_shard(call, world, group, layout)
        return {}

    agree_once(process_group, world, (), local, _agreed)
    options = {"group": group, "layout": layout, "scale": call.scale}
    return ring_attention(call.q, call.k, call.v, call.spec, **options)


def _check_shard(call: Call, world: int, group: Any, layout: str) -> None:
    queries, keys = call.q.shape[2], call.k.shape[2]
    if queries != keys or call.q_start:
        raise NotImplementedError(
            f"KV cache with a group ({queries} queries, {keys} keys): use one device "
            "to decode, or register without a group."
        )
    if call.spec.documents is not None:
        raise NotImplementedError(
            "packed sequences with a group: positions that start anew, or sequence "
            "ends. If nothing is packed, position_ids must be shard_positions(...)."
        )
    found = call.position_ids
    if found is None or found.ndim != 2 or call.spec.key_padding is not None:
        return
    if not _is_own(found, queries * world, group, layout):
        why = f"they aren't shard_positions({queries * world}, group, {layout!r})"
        raise InvalidValue("position_ids", why, "Pass those to the model")


def _is_own(positions: Tensor, total: int, group: Any, layout: str) -> bool:
    """Whether positions [B, n] are those of this rank's shard."""
    expected = shard_positions(total, group, layout).to(positions.device)
    same = positions.shape[1:] == expected.shape
    return same and bool((positions == expected).all())
