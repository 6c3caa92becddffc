# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on CUDA: the kernels of the backward pass, in Triton.

P = exp(S - lse) is computed anew with the final lse, and dS = P * (dO V^T - delta), as
in Dao et al., FlashAttention (2022). ``query_grad_kernel`` walks the row lists, and
``key_grad_kernel`` their transpose; `triton_kernels` says how all of them work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernel_pytorch.attention.triton_kernels import (
    INF,
    LOG2E,
    add_product,
    base_of,
    dot,
    extra_keys,
    extra_of,
    extra_weight,
    is_seen,
    load_rows,
    row_program,
    store_rows,
)


@triton.jit
def query_grad_kernel(
    q, k, v, d_out, out, lse, d_lse, delta, dq,
    strides, lists, extra, mask, numbers, C: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile of queries, and its delta = sum(dO * O) - dlse."""
    ROWS: tl.constexpr = C.rows
    WIDE: tl.constexpr = C.wide
    PARTS: tl.constexpr = C.block // C.columns
    heads, scale = numbers
    entries, full, mixed, row, tile, head, batch = row_program(lists, mask, heads, C)
    width, q_len, kv_len = lists[4], mask[2], mask[3]
    own, first = tl.cast(batch * heads + head, tl.int64), tile * C.rows
    rows = first + tl.arange(0, C.rows)
    inside = rows < q_len
    q = base_of(q, batch, head, strides[0])
    k = base_of(k, batch, head // C.group, strides[1])
    v = base_of(v, batch, head // C.group, strides[2])
    d_out = base_of(d_out, batch, head, strides[3])
    query = load_rows(q, first, strides[0][2], inside, C.rows, C)
    slope = load_rows(d_out, first, strides[3][2], inside, C.rows, C)
    found = load_rows(out + own * q_len * C.dim, first, C.dim, inside, C.rows, C)
    change = tl.sum(slope.to(tl.float32) * found.to(tl.float32), 1)
    change -= tl.load(d_lse + own * q_len + rows, inside, other=0.0)
    tl.store(delta + own * q_len + rows, change, inside)
    side = (query, slope, _level(lse + own * q_len, rows, inside), change)
    acc = tl.zeros([ROWS, WIDE], tl.float32)
    for i in range(0, full * PARTS):
        start = tl.load(entries + i // PARTS) * C.block + i % PARTS * C.columns
        key = load_rows(k, start, strides[1][2], None, C.columns, C)
        value = load_rows(v, start, strides[2][2], None, C.columns, C)
        acc = _fold_keys(acc, side, key, value, None, None, scale, C)
    for i in range(0, mixed * PARTS):
        n = tl.load(entries + width - 1 - i // PARTS)
        start = n * C.block + i % PARTS * C.columns
        columns = start + tl.arange(0, C.columns)
        seen = is_seen(rows, columns, batch, mask, False, C)
        key = load_rows(k, start, strides[1][2], columns < kv_len, C.columns, C)
        value = load_rows(v, start, strides[2][2], columns < kv_len, C.columns, C)
        acc = _fold_keys(acc, side, key, value, None, seen, scale, C)
    if C.extra:
        extra_k, extra_v, rest = extra_of(extra, batch, head, heads, row, mask, C)
        for start in range(0, tl.cdiv(kv_len, C.block), C.columns):
            take, key, value, weight = extra_keys(
                extra_k, extra_v, rest, start, kv_len, C
            )
            seen = inside[:, None] & take[None, :]
            acc = _fold_keys(acc, side, key, value, weight, seen, scale, C)
    store_rows(dq, own, q_len, first, acc * scale, inside, C.rows, C)


@triton.jit
def _fold_keys(acc, side, key, value, weight, seen, scale, C: tl.constexpr):
    """Add one tile of keys to dq / scale."""
    query, slope, level, change = side
    scores = dot(query, tl.trans(key), None, C) * (scale * LOG2E)
    if weight is not None:
        scores += weight[None, :]
    weights = tl.exp2(scores - level[:, None])
    steep = weights * (dot(slope, tl.trans(value), None, C) - change[:, None])
    if seen is not None:
        steep = tl.where(seen, steep, 0.0)
    return add_product(steep, key, seen, acc, C)


@triton.jit
def key_grad_kernel(
    q, k, v, d_out, lse, delta, dk, dv,
    strides, turned, mask, numbers, C: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of keys, over all heads of its group."""
    COLUMNS: tl.constexpr = C.columns
    WIDE: tl.constexpr = C.wide
    PARTS: tl.constexpr = C.block // C.rows
    heads, scale = numbers
    entries, offsets, step = turned
    kv_len, kv_blocks = mask[3], tl.cdiv(mask[3], C.block)
    tiles, kv_heads = tl.cdiv(kv_len, C.columns), heads // C.group
    tile, owner = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    kv_head, batch = owner % kv_heads, owner // kv_heads
    first = tile * C.columns
    columns = first + tl.arange(0, C.columns)
    inside = columns < kv_len
    k = base_of(k, batch, kv_head, strides[1])
    v = base_of(v, batch, kv_head, strides[2])
    key = load_rows(k, first, strides[1][2], inside, C.columns, C)
    value = load_rows(v, first, strides[2][2], inside, C.columns, C)
    grads = tl.zeros([COLUMNS, WIDE], tl.float32), tl.zeros([COLUMNS, WIDE], tl.float32)
    for member in range(0, C.group):
        head = kv_head * C.group + member
        at = 2 * (batch * step + head * kv_blocks + first // C.block)
        full, mixed = tl.load(offsets + at), tl.load(offsets + at + 1)
        stop = tl.load(offsets + at + 2)
        side = _queries(q, d_out, lse, delta, strides, batch, head, heads, mask)
        for i in range(0, (mixed - full).to(tl.int32) * PARTS):
            start = tl.load(entries + full + i // PARTS) * C.block + i % PARTS * C.rows
            grads = _fold_queries(grads, side, start, key, value, None, None, scale, C)
        for i in range(0, (stop - mixed).to(tl.int32) * PARTS):
            start = tl.load(entries + mixed + i // PARTS) * C.block + i % PARTS * C.rows
            rows = start + tl.arange(0, C.rows)
            seen = is_seen(rows, columns, batch, mask, True, C)
            grads = _fold_queries(grads, side, start, key, value, None, seen, scale, C)
    store_rows(dk, owner, kv_len, first, grads[0] * scale, inside, C.columns, C)
    store_rows(dv, owner, kv_len, first, grads[1], inside, C.columns, C)


@triton.jit
def extra_grad_kernel(
    q, extra, d_out, lse, delta, dk, dv,
    strides, lists_step, mask, numbers, C: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one tile of the remainder's keys and values."""
    COLUMNS: tl.constexpr = C.columns
    WIDE: tl.constexpr = C.wide
    heads, scale = numbers
    q_len, kv_len = mask[2], mask[3]
    q_blocks, kv_blocks = tl.cdiv(q_len, C.block), tl.cdiv(kv_len, C.block)
    tiles, kv_heads = tl.cdiv(kv_blocks, C.columns), heads // C.group
    tile, owner = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    kv_head, batch = owner % kv_heads, owner // kv_heads
    first = tile * C.columns
    columns = first + tl.arange(0, C.columns)
    inside = columns < kv_blocks
    weight = extra_weight(columns, kv_len, C)
    extra_k, extra_v, rest = extra
    offset = tl.cast(owner, tl.int64) * kv_blocks * C.dim
    key = load_rows(extra_k + offset, first, C.dim, inside, C.columns, C)
    value = load_rows(extra_v + offset, first, C.dim, inside, C.columns, C)
    grads = tl.zeros([COLUMNS, WIDE], tl.float32), tl.zeros([COLUMNS, WIDE], tl.float32)
    for member in range(0, C.group):
        head = kv_head * C.group + member
        line = tl.cast(batch * lists_step + head * q_blocks, tl.int64)
        side = _queries(q, d_out, lse, delta, strides, batch, head, heads, mask)
        for start in range(0, q_len, C.rows):
            flags = rest + (line + start // C.block) * kv_blocks + columns
            take = tl.load(flags, inside, other=0) != 0
            seen = take[:, None] & (start + tl.arange(0, C.rows) < q_len)[None, :]
            grads = _fold_queries(
                grads, side, start, key, value, weight, seen, scale, C
            )
    store_rows(dk, owner, kv_blocks, first, grads[0] * scale, inside, C.columns, C)
    store_rows(dv, owner, kv_blocks, first, grads[1], inside, C.columns, C)


@triton.jit
def _queries(q, d_out, lse, delta, strides, batch, head, heads, mask):
    """One head's queries, gradients of out, lse and delta, with their strides."""
    q_len = mask[2]
    own = tl.cast(batch * heads + head, tl.int64) * q_len
    q = base_of(q, batch, head, strides[0])
    d_out = base_of(d_out, batch, head, strides[3])
    return q, d_out, lse + own, delta + own, strides[0][2], strides[3][2], q_len


@triton.jit
def _fold_queries(grads, side, start, key, value, weight, seen, scale, C: tl.constexpr):
    """Add one tile of queries to dk / scale and dv."""
    q, d_out, lse, delta, q_stride, slope_stride, q_len = side
    dk, dv = grads
    rows = start + tl.arange(0, C.rows)
    inside = rows < q_len
    query = load_rows(q, start, q_stride, inside, C.rows, C)
    slope = load_rows(d_out, start, slope_stride, inside, C.rows, C)
    level = _level(lse, rows, inside)
    change = tl.load(delta + rows, inside, other=0.0)
    scores = dot(key, tl.trans(query), None, C) * (scale * LOG2E)
    if weight is not None:
        scores += weight[:, None]
    weights = tl.exp2(scores - level[None, :])
    if seen is not None:
        weights = tl.where(seen, weights, 0.0)
    dv = add_product(weights, slope, seen, dv, C)
    steep = weights * (dot(value, tl.trans(slope), None, C) - change[None, :])
    if seen is not None:
        steep = tl.where(seen, steep, 0.0)
    return add_product(steep, query, seen, dk, C), dv


@triton.jit
def _level(lse, rows, inside):
    """The lse times log2(e); inf, so that all weights are 0, where there is none."""
    level = tl.load(lse + rows, inside, other=float("-inf")) * LOG2E
    return tl.where(level == float("-inf"), INF, level)
