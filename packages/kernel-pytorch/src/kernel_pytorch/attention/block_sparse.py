# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention: the operators, their gradients, and which kernel runs.

``block_sparse_attention`` checks its arguments and calls one custom operator, so that
autograd, autocast, fake tensors and ``torch.compile(fullgraph=True)`` see a single
opaque step. Inside it the native kernel runs on float32 and bfloat16 CPU tensors, the
Triton kernels on CUDA tensors, and `block_reference` on everything else. Decisions:

- The lists' values are checked inside the operator, where tensors are real.
- The compressed remainder's keys and values are made here, by differentiable torch
  operations; the kernels treat them as one more key for each block.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernel_pytorch.attention import native, triton_launch
from kernel_pytorch.attention.block_index import BlockIndex
from kernel_pytorch.attention.block_reference import Problem, backward, forward
from kernel_pytorch.attention.blocks import (
    check_qkv,
    checked_scale,
    in_autocast_dtype,
)
from kernel_pytorch.attention.mask_operands import check_mask_operands, mask_operands
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.partial import lay_mask, refuse_trained_bias
from torchworks_core.errors import InvalidValue

_MAX_DIM = 256
_warned = False
_warned_of_triton = False


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    mask: MaskSpec | None = None,
    *,
    scale: float | None = None,
    remainder: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the blocks of keys that ``index`` lists, exactly.

    softmax(scale * q k^T + mask) v over the listed blocks. With ``remainder``, a block
    that isn't listed, and of which every query of the row sees every key, enters as
    one key: the mean of its keys and values, with the logarithm of its length added to
    the logit.

    Args:
        q: [B, H, Nq, D]; any strides.
        k: [B, Hkv, Nk, D]; H must be a multiple of Hkv.
        v: Like ``k``.
        index: For H heads and these lengths.
        mask: Hides keys inside the listed blocks; positions count from 0 in both
            queries and keys.
        scale: Factor of the scores; D ** -0.5 if None.
        remainder: Let dropped blocks take part by their means.
        return_lse: Return the log of the softmax's denominator, too.

    Returns:
        out, like ``q``; with ``return_lse`` also lse [B, H, Nq] in float32 (float64
        for float64). A query that sees no key gets out 0, lse -inf and no gradient.
        Both are differentiable in q, k and v, once.

    Raises:
        InvalidValue: shapes, dtypes, devices or the index don't fit, or the index
            holds a bad value (the first is named).
        NotImplementedError: a bias that requires a gradient, or ``remainder`` with
            a bias.
        OutOfMemory: no room for the kernel's buffers.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 64, 8)
        >>> kept = torch.ones(1, 2, 4, 4, dtype=torch.bool)
        >>> index = BlockIndex.from_block_mask(kept, 16, 64, 64)
        >>> out = block_sparse_attention(q, k, v, index, MaskSpec(causal=True))
        >>> dense = torch.nn.functional.scaled_dot_product_attention
        >>> bool((out - dense(q, k, v, is_causal=True)).abs().max() < 1e-5)
        True
    """
    q, k, v = in_autocast_dtype(q, k, v)
    check_qkv(q, k, v)
    _check_index(q, k, index)
    _refuse_forward_mode(q, k, v)
    mask = MaskSpec() if mask is None else mask
    refuse_trained_bias(mask)
    # Dynamo can't trace the mask's own checks; the operator repeats what is unsafe.
    if not torch.compiler.is_compiling():
        lay_mask(mask, q, k)
    padding, documents, window = mask_operands(mask, q, k)
    bias = _bias_of(mask, q, k)
    if remainder and bias is not None:
        raise NotImplementedError(
            "remainder=True with mask.bias: whether a dropped block may enter by its "
            "mean can't be told from a bias. Leave one of them out."
        )
    extra_k, extra_v = _block_means(k, v, index, mask) if remainder else (None, None)
    out, lse = torch.ops.kernel_pytorch.block_sparse_forward(
        q,
        k,
        v,
        index.counts,
        index.blocks,
        padding,
        documents,
        bias,
        extra_k,
        extra_v,
        index.block_size,
        mask.causal,
        window,
        checked_scale(scale, q.shape[-1]),
    )
    return (out, lse) if return_lse else out


def kernel_for(q: Tensor, index: BlockIndex, mask: MaskSpec | None = None) -> str:
    """Name the kernel that `block_sparse_attention` runs for these arguments.

    Returns:
        ``"native-avx512"``, ``"native-avx2"``, ``"native-generic"``, ``"triton"`` or
        ``"reference"``.
    """
    has_bias = mask is not None and mask.bias is not None
    if not q.numel() or not index.kv_len:
        return "reference"
    if _fits_triton(q, index.kv_len, index.block_size, has_bias):
        return "reference" if triton_launch.unavailable(q.device) else "triton"
    if not _fits(q, index.block_size, has_bias):
        return "reference"
    status = native.native_status()
    return f"native-{status.isa}" if status.available else "reference"


def _run_forward(*args: Any) -> tuple[Tensor, Tensor]:
    problem = Problem(*args)
    _check_problem(problem)
    if _is_triton(problem):
        return triton_launch.forward(problem)
    if not _is_native(problem):
        _validate(problem)
        return forward(problem)
    q = problem.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _call("forward", problem, {"out": out, "lse": lse})
    return out, lse


def _run_backward(
    d_out: Tensor, d_lse: Tensor, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    problem = Problem(*args)
    _check_problem(problem)
    if _is_triton(problem):
        return tuple(triton_launch.backward(problem, out, lse, d_out, d_lse))
    if not _is_native(problem):
        _validate(problem)
        return tuple(backward(problem, out, lse, d_out, d_lse))
    dq, dk, dv, dek, dev = _empty_gradients(problem)
    tensors = {"dout": d_out, "dlse": d_lse, "out": out, "lse": lse}
    tensors |= {"dq": dq, "dk": dk, "dv": dv, "dextra_k": dek, "dextra_v": dev}
    _call("backward", problem, tensors)
    return dq, dk, dv, dek, dev


def _fake_forward(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=kind)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    return _empty_gradients(Problem(*args[4:]))


def _empty_gradients(p: Problem) -> tuple[Tensor, ...]:
    extra = [p.q.new_empty(0) if t is None else t for t in (p.extra_k, p.extra_v)]
    return tuple(t.new_empty(t.shape) for t in (p.q, p.k, p.v, *extra))


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:10])
    ctx.numbers = inputs[10:]


def _differentiate(ctx, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, q, *rest = ctx.saved_tensors
    # Where nothing but one of the two results was used, the other's gradient is None.
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_lse = torch.zeros_like(lse) if d_lse is None else d_lse
    run = torch.ops.kernel_pytorch.block_sparse_backward
    grads = run(d_out, d_lse, out, lse, q, *rest, *ctx.numbers)
    extra = (None, None) if rest[-1] is None else grads[3:]
    return *grads[:3], None, None, None, None, None, *extra, None, None, None, None


def _refuse_twice(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "second derivatives of block-sparse attention: its gradient has none"
    )


# By hand and not by ``torch.library.custom_op``: its first call imports all of
# torch._dynamo, which takes seconds.
_PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor counts, Tensor blocks, "
    "Tensor? key_padding, Tensor? documents, Tensor? bias, "
    "Tensor? extra_k, Tensor? extra_v, "
    "SymInt block_size, bool causal, SymInt window, float scale"
)
_FORWARD = "kernel_pytorch::block_sparse_forward"
_BACKWARD = "kernel_pytorch::block_sparse_backward"
torch.library.define(_FORWARD, f"({_PROBLEM}) -> (Tensor, Tensor)")
torch.library.define(
    _BACKWARD,
    f"(Tensor d_out, Tensor d_lse, Tensor out, Tensor lse, {_PROBLEM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
for _name, _run, _fake in (
    (_FORWARD, _run_forward, _fake_forward),
    (_BACKWARD, _run_backward, _fake_backward),
):
    torch.library.impl(_name, "CompositeExplicitAutograd", _run)
    torch.library.register_fake(_name, _fake)
torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_save)
torch.library.register_autograd(_BACKWARD, _refuse_twice)


def _fits(q: Tensor, block_size: int, has_bias: bool) -> bool:
    """Could the native kernel run this?"""
    right = q.device.type == "cpu" and native.dtype_code(q.dtype) is not None
    size = block_size % 16 == 0 and 16 <= block_size <= 256
    return right and size and not has_bias and 0 < q.shape[-1] <= _MAX_DIM


def _is_native(p: Problem) -> bool:
    global _warned
    if not _fits(p.q, p.block_size, p.bias is not None):
        return False
    if not p.q.numel() or not p.k.numel():
        return False
    status = native.native_status()
    if not status.available and not _warned:
        _warned = True
        text = f"block-sparse attention runs without its native kernel: {status.reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return status.available


def _fits_triton(q: Tensor, kv_len: int, block_size: int, has_bias: bool) -> bool:
    """Could the Triton kernels run this?"""
    fits = triton_launch.fits(q, kv_len, block_size, has_bias)
    return q.device.type == "cuda" and fits


def _is_triton(p: Problem) -> bool:
    global _warned_of_triton
    if not p.q.numel() or not p.k.numel():
        return False
    if not _fits_triton(p.q, p.k.shape[2], p.block_size, p.bias is not None):
        return False
    reason = triton_launch.unavailable(p.q.device)
    if reason and not _warned_of_triton:
        _warned_of_triton = True
        text = f"block-sparse attention runs without its Triton kernels: {reason}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return not reason


def _call(name: str, p: Problem, results: dict[str, Tensor]) -> None:
    """Run the native kernel on a problem that it fits."""
    weight = None if p.extra_k is None else p.extra_weight()
    tensors = {"q": p.q, "k": p.k, "v": p.v, "counts": p.counts, "blocks": p.blocks}
    tensors |= {"key_padding": p.key_padding, "documents": p.documents}
    tensors |= {"extra_k": p.extra_k, "extra_v": p.extra_v, "extra_weight": weight}
    tensors |= results
    ready = {n: _dense(n, t) for n, t in tensors.items() if t is not None}
    sizes = zip(("batch", "heads", "q_len", "dim"), p.q.shape, strict=True)
    done = native.call(
        name,
        ready,
        **dict(sizes),
        kv_heads=p.k.shape[1],
        kv_len=p.k.shape[2],
        index_batch=p.counts.shape[0],
        width=p.blocks.shape[-1],
        block=p.block_size,
        positions=0 if p.documents is None else p.documents.shape[1],
        causal=int(p.causal),
        window=p.window,
        scale=p.scale,
        dtype=native.dtype_code(p.q.dtype) or 0,
    )
    if not done:
        _validate(p)
        raise RuntimeError(f"the native kernel refused {name} arguments of {p}")


def _dense(name: str, tensor: Tensor) -> Tensor:
    """Make the strides what the kernel can read."""
    if name in ("q", "k", "v", "dout") and tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def _check_problem(p: Problem) -> None:
    """Refuse shapes that a kernel would read beyond: a compiled graph comes here."""
    check_qkv(p.q, p.k, p.v)
    check_mask_operands(p.key_padding, p.documents, p.q, p.k)
    batch, dim = p.q.shape[0], p.q.shape[3]
    means = (batch, p.k.shape[1], p.kv_blocks, dim)
    for name, found in (("extra_k", p.extra_k), ("extra_v", p.extra_v)):
        if found is not None and tuple(found.shape) != means:
            raise InvalidValue(f"{name} {tuple(found.shape)}", f"it must be {means}")
    if p.counts.shape[0] not in (1, batch) or p.counts.shape[1] != p.q.shape[1]:
        shapes = f"counts {tuple(p.counts.shape)}, q {tuple(p.q.shape)}"
        raise InvalidValue(shapes, "batch or heads of the index are others")


def _validate(p: Problem) -> None:
    size, q_len, kv_len = p.block_size, p.q.shape[2], p.k.shape[2]
    BlockIndex(p.counts, p.blocks, size, q_len, kv_len).validate()


def _refuse_forward_mode(*tensors: Tensor) -> None:
    """Raise for tangents, which an operator without a formula would drop in silence."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(
            "forward-mode differentiation (jvp) of block-sparse attention: it has "
            "gradients by backward only"
        )


def _check_index(q: Tensor, k: Tensor, index: BlockIndex) -> None:
    batch, heads, q_len, _ = q.shape
    shapes = f"index of counts {tuple(index.counts.shape)}"
    if (index.q_len, index.kv_len) != (q_len, k.shape[2]):
        why = f"q {tuple(q.shape)} and k {tuple(k.shape)} have other lengths"
        lengths = f", q_len {index.q_len}, kv_len {index.kv_len}"
        raise InvalidValue(shapes + lengths, why)
    if index.counts.shape[0] not in (1, batch) or index.counts.shape[1] != heads:
        raise InvalidValue(shapes, f"q is {tuple(q.shape)}")
    if index.counts.device != q.device:
        raise InvalidValue(f"index on {index.counts.device}", f"q is on {q.device}")


def _bias_of(mask: MaskSpec, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias, four-dimensional and as long as q and k."""
    if mask.bias is None:
        return None
    bias = mask.bias.detach()
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    bias = bias if bias.shape[2] == 1 else bias[:, :, : q.shape[2]]
    return bias if bias.shape[3] == 1 else bias[..., : k.shape[2]]


def _block_means(
    k: Tensor, v: Tensor, index: BlockIndex, mask: MaskSpec
) -> list[Tensor]:
    """Mean key and value of each block, [B, Hkv, Tk, D]; padded keys count as 0."""
    size, blocks, kv_len = index.block_size, index.kv_blocks, k.shape[2]
    start = torch.arange(blocks, device=k.device) * size
    lengths = (kv_len - start).clamp(max=size)[:, None]
    means = []
    for tensor in (k, v):
        if mask.key_padding is not None:
            hidden = ~mask.key_padding[:, None, :kv_len, None]
            tensor = tensor.masked_fill(hidden, 0.0)
        whole = torch.nn.functional.pad(tensor, (0, 0, 0, blocks * size - kv_len))
        kind = torch.promote_types(tensor.dtype, torch.float32)
        total = whole.unflatten(2, (blocks, size)).sum(3, dtype=kind)
        means.append((total / lengths).to(tensor.dtype))
    return means
