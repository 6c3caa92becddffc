# SPDX-License-Identifier: Apache-2.0
"""Running the Triton kernels: when they can, with which tiles, on which arguments.

triton is imported at the first call that wants it. Decisions:

- An explicit table of tiles, no autotuning: that takes seconds for each new shape, and
  its choice differs from run to run.
- `forward` waits for one flag of the device, to refuse a bad index as the other
  kernels do. While a CUDA graph is captured nothing may wait; then bad values are
  dropped (nothing outside the tensors is read), and not told.
- The transposed lists are made by one stable sort on the device, without waiting.
"""

from __future__ import annotations

import contextlib
import importlib
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernel_pytorch.attention.block_index import BlockIndex
from kernel_pytorch.attention.block_reference import Problem

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_DIM, _MAX_LENGTH, _MAX_PROGRAMS = 256, 2**30, 2**30
_MAX_STRIDE = 2**22
_CHUNK = 64


class Tiles(NamedTuple):
    """Greatest tile of queries and keys, and how the compiler shall run it.

    ``registers`` for each thread are the most that it may use; 0 = no limit.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int = 0


# By kernel, the first entry whose number is not below D: read off what triton 3.6
# compiles for sm_90, not measured. A tile of 64 queries fills one warpgroup's wgmma.
# 168 registers let three programs of 4 warps share a multiprocessor, so that one's
# softmax runs beside another's products; the loop over FULL blocks has no spill at
# that, and at 128 only with 8 warps. Stages as many as shared memory allows with two
# programs at least (D <= 128).
_HALF = {
    "forward": {
        64: Tiles(64, 64, 4, 3, 168),
        128: Tiles(64, 64, 4, 2),
        256: Tiles(64, 32, 8, 2),
    },
    # From blocks of 128 on: half the reads of K and V, which at 64 queries for each
    # come near to what the L2 cache can give.
    "forward of large blocks": {
        64: Tiles(128, 64, 8, 3, 128),
        128: Tiles(128, 64, 8, 2),
        256: Tiles(64, 32, 8, 2),
    },
    "query_grad": {
        64: Tiles(64, 64, 4, 3, 168),
        128: Tiles(64, 64, 4, 2),
        256: Tiles(64, 32, 8, 2),
    },
    "key_grad": {
        64: Tiles(64, 64, 4, 2),
        128: Tiles(64, 64, 8, 2),
        256: Tiles(32, 64, 8, 2),
    },
}
# Exact float32 products run without tensor cores, each thread with whole rows of both
# factors in registers: larger tiles spill by kilobytes and compile for minutes.
_SINGLE = {
    64: Tiles(16, 32, 4, 1),
    128: Tiles(16, 16, 8, 1),
    256: Tiles(16, 16, 8, 1),
}


class Lists(NamedTuple):
    """What ``split_kernel`` wrote.

    Attributes:
        entries: Int32 [B|1, H, Tq, width]: FULL blocks from the front, MIXED ones
            from the back.
        full: Int32 [B|1, H, Tq].
        mixed: Likewise.
        step: Rows of one batch entry; 0 if all share the lists.
        rest: Int8 [B|1, H, Tq, Tk], 1 where a block enters by its mean, or None.
    """

    entries: Tensor
    full: Tensor
    mixed: Tensor
    step: int
    rest: Tensor | None


@cache
def unavailable(device: torch.device) -> str:
    """Say why the kernels can't run on a device; "" if they can.

    Example:
        >>> unavailable(torch.device("cpu"))
        'the Triton kernels run on CUDA devices'
    """
    if device.type != "cuda":
        return "the Triton kernels run on CUDA devices"
    if torch.version.hip is not None:
        return "the Triton kernels were never tried on ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    try:
        importlib.import_module("kernel_pytorch.attention.triton_gradients")
    except ImportError as missing:
        return f"triton can't be imported: {missing}"
    return ""


def fits(q: Tensor, kv_len: int, block_size: int, has_bias: bool) -> bool:
    """Have the kernels a form for this problem, wherever it lies?"""
    batch, heads, q_len, dim = q.shape
    size = block_size % 16 == 0 and 16 <= block_size <= 256 and 0 < dim <= _MAX_DIM
    longest, tiles = max(q_len, kv_len), -(-max(q_len, kv_len) // 16)
    count = longest < _MAX_LENGTH and 2 * batch * heads * tiles < _MAX_PROGRAMS
    return q.dtype in _DTYPES and size and count and not has_bias


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Return out like q and lse float32 [B, H, Nq].

    Raises:
        InvalidValue: the index holds a bad value.
    """
    q, k, v = (_rows_dense(t) for t in (p.q, p.k, p.v))
    out = torch.empty(p.q.shape, dtype=p.q.dtype, device=p.q.device)
    lse = torch.empty(p.q.shape[:3], dtype=torch.float32, device=p.q.device)
    with _device(p.q):
        lists = _split(p, check=True)
        config, options = _configure(p, "forward")
        _launch(
            "forward",
            p.q.shape[0] * p.q.shape[1] * -(-p.q.shape[2] // config.rows),
            (q, k, v, out, lse, _strides(q, k, v), _row_lists(lists)),
            (_extra(p, lists), _mask(p), (p.q.shape[1], p.scale), config),
            options,
        )
    return out, lse


def backward(
    p: Problem, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor
) -> list[Tensor]:
    """Return the gradients of q, k, v, extra_k and extra_v.

    The last two are empty without a remainder.
    """
    q, k, v, d_out = (_rows_dense(t) for t in (p.q, p.k, p.v, d_out))
    out, lse, d_lse = out.contiguous(), lse.contiguous(), d_lse.contiguous()
    given = [p.q, p.k, p.v]
    given += [t for t in (p.extra_k, p.extra_v) if t is not None]
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given]
    delta, mask = torch.empty_like(lse), _mask(p)
    strides, numbers = _strides(q, k, v, d_out), (p.q.shape[1], p.scale)
    batch, heads, q_len, _ = p.q.shape
    owners = batch * p.k.shape[1]
    with _device(p.q):
        lists = _split(p, check=False)
        config, options = _configure(p, "query_grad")
        tensors = (q, k, v, d_out, out, lse, d_lse, delta, grads[0])
        rest = (strides, _row_lists(lists), _extra(p, lists), mask, numbers, config)
        programs = batch * heads * -(-q_len // config.rows)
        _launch("query_grad", programs, tensors, rest, options)
        config, options = _configure(p, "key_grad")
        tensors = (q, k, v, d_out, lse, delta, *grads[1:3])
        rest = (strides, _turned(p, lists), mask, numbers, config)
        programs = owners * -(-p.k.shape[2] // config.columns)
        _launch("key_grad", programs, tensors, rest, options)
        if p.extra_k is not None:
            tensors = (q, _extra(p, lists), d_out, lse, delta, *grads[3:])
            rest = (strides, lists.step, mask, numbers, config)
            programs = owners * -(-p.kv_blocks // config.columns)
            _launch("extra_grad", programs, tensors, rest, options)
    return grads + [p.q.new_empty(0) for _ in range(5 - len(grads))]


def _split(p: Problem, *, check: bool) -> Lists:
    """Sort the rows' lists; see ``split_kernel``."""
    batch, heads, q_len, _ = p.q.shape
    q_blocks, width = -(-q_len // p.block_size), p.blocks.shape[-1]
    own = p.key_padding is not None or p.documents is not None
    copies = batch if own else p.counts.shape[0]
    counts, blocks, device = p.counts.contiguous(), p.blocks.contiguous(), p.q.device
    shape = (copies, heads, q_blocks)
    entries = torch.empty(*shape, max(width, 1), dtype=torch.int32, device=device)
    full, mixed = (
        torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2)
    )
    rest = None
    if p.extra_k is not None:
        rest = torch.empty(*shape, p.kv_blocks, dtype=torch.int8, device=device)
    bad = torch.zeros(1, dtype=torch.int32, device=device)
    given = (counts, blocks, width, heads * q_blocks if len(counts) > 1 else 0)
    config, _ = _configure(p, "forward")
    tensors = (given, (entries, full, mixed), rest, bad)
    numbers = (_mask(p), _edges(p), heads, config, _CHUNK)
    _launch("split", full.numel(), tensors, numbers, _options(Tiles(0, 0, 4, 2)))
    if check and not _capturing(device) and bool(bad):
        index = BlockIndex(counts, blocks, p.block_size, q_len, p.k.shape[2])
        index.validate()
        raise RuntimeError("the Triton kernel refused an index that is right")
    return Lists(entries, full, mixed, heads * q_blocks if copies > 1 else 0, rest)


def _turned(p: Problem, lists: Lists) -> tuple[Tensor, Tensor, int]:
    """The transposed lists: blocks of queries, and where each list begins.

    There are two lists for each block of keys, one after the other: of the rows for
    which it is FULL, and of those for which it is MIXED.
    """
    copies, heads, q_blocks, width = lists.entries.shape
    place = torch.arange(width, device=p.q.device)
    full = place < lists.full[..., None]
    mixed = place >= width - lists.mixed[..., None]
    count = copies * heads * p.kv_blocks
    line = torch.arange(0, count, p.kv_blocks, dtype=torch.int32, device=p.q.device)
    number = 2 * (line.view(copies, heads, 1, 1) + lists.entries) + mixed
    number = number.masked_fill(~(full | mixed), 2 * count)
    found, at = number.flatten().sort(stable=True)
    ends = torch.arange(2 * count + 1, dtype=torch.int32, device=p.q.device)
    offsets = torch.searchsorted(found, ends)
    rows = (at // width % q_blocks).to(torch.int32)
    return rows, offsets, heads * p.kv_blocks if copies > 1 else 0


def _edges(p: Problem) -> tuple[Tensor | None, ...]:
    """What the mask's tensors hold of each block.

    Keys: 0 = none kept, 1 = some, 2 = all [B, Tk]; least and greatest document
    [B, Tk] of the keys and [B, Tq] of the queries.
    """
    kept = None
    if p.key_padding is not None:
        low, high = _extremes(p.key_padding.to(torch.int8), p.k.shape[2], p.block_size)
        kept = low + high
    if p.documents is None:
        return kept, None, None, None, None
    keys = _extremes(p.documents, p.k.shape[2], p.block_size)
    return kept, *keys, *_extremes(p.documents, p.q.shape[2], p.block_size)


def _extremes(values: Tensor, length: int, size: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of [B, N] in each block of the first ``length``."""
    blocks = -(-length // size)
    at = torch.arange(blocks * size, device=values.device).clamp(max=length - 1)
    tiles = values[:, at].unflatten(1, (blocks, size))
    return tiles.amin(2), tiles.amax(2)


def _row_lists(lists: Lists) -> tuple:
    return (*lists[:4], lists.entries.shape[-1])


def _extra(p: Problem, lists: Lists) -> tuple[Tensor | None, ...]:
    if p.extra_k is None or p.extra_v is None:
        return None, None, None
    return p.extra_k.contiguous(), p.extra_v.contiguous(), lists.rest


def _mask(p: Problem) -> tuple[Any, ...]:
    padding, documents, positions = p.key_padding, p.documents, 0
    if padding is not None:
        padding = padding.contiguous().view(torch.uint8)
    if documents is not None:
        documents, positions = documents.contiguous(), documents.shape[1]
    return padding, documents, p.q.shape[2], p.k.shape[2], positions, p.window


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(t.stride()[:3] for t in tensors)


def _rows_dense(tensor: Tensor) -> Tensor:
    """Make the strides what the kernels can read."""
    inner, row = tensor.stride(3), tensor.stride(2)
    return tensor if inner == 1 and row < _MAX_STRIDE else tensor.contiguous()


def _configure(p: Problem, name: str) -> tuple[Any, dict[str, int]]:
    """What a kernel is compiled for, and how."""
    kernels = importlib.import_module("kernel_pytorch.attention.triton_kernels")
    wide = max(16, 1 << (p.q.shape[3] - 1).bit_length())
    # The greatest power of two in the block, so that tiles never cross its end.
    most = p.block_size & -p.block_size
    tiles = _tiles(name, wide, p.q.dtype, most, _shared_memory(p.q.device))
    config = kernels.Config(
        block=p.block_size,
        rows=tiles.rows,
        columns=tiles.columns,
        dim=p.q.shape[3],
        wide=wide,
        group=p.q.shape[1] // p.k.shape[1],
        causal=p.causal,
        window=p.window > 0,
        padding=p.key_padding is not None,
        documents=p.documents is not None,
        extra=p.extra_k is not None,
        precision="ieee",
    )
    return config, _options(tiles)


def _options(tiles: Tiles) -> dict[str, int]:
    # Said because its default changes with triton's versions.
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    options["enable_fp_fusion"] = True
    return options | ({"maxnreg": tiles.registers} if tiles.registers else {})


def _tiles(name: str, wide: int, dtype: torch.dtype, most: int, shared: int) -> Tiles:
    """The table's tiles, cut to blocks and to a device's shared memory."""
    if dtype == torch.float32:
        table = _SINGLE
    elif name == "forward" and most >= 128:
        table = _HALF["forward of large blocks"]
    else:
        table = _HALF[name]
    tiles = table[max(64, wide)]
    if max(tiles.rows, tiles.columns) > most:
        tiles = tiles._replace(warps=4, registers=0)
    # Consumer cards have 99 KiB, the A100 163, the H100 and H200 227.
    if shared < 160 * 1024 and wide >= 128:
        tiles = tiles._replace(stages=1)
        most = min(most, 32 if wide == 256 else most)
    return tiles._replace(rows=min(most, tiles.rows), columns=min(most, tiles.columns))


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program can have."""
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 99 * 1024)


def _launch(
    name: str, programs: int, tensors: tuple, rest: tuple, options: dict[str, int]
) -> None:
    part = "triton_gradients" if name.endswith("grad") else "triton_kernels"
    module = importlib.import_module(f"kernel_pytorch.attention.{part}")
    kernel = getattr(module, f"{name}_kernel")
    kernel[(programs,)](*tensors, *rest, **options)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    cuda = tensor.device.type == "cuda"
    return torch.cuda.device(tensor.device) if cuda else contextlib.nullcontext()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
