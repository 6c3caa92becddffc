# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention on CUDA: the kernels, in Triton.

`triton_launch` calls them; nothing else imports this file, because it imports triton.

- ``split_kernel`` sorts each row's list into blocks that need no mask (FULL: every
  query of the row sees every key) and the others (MIXED), drops the empty ones, and
  looks for values that are not allowed. The other kernels read only what it wrote.
- ``forward_kernel`` and ``query_grad_kernel`` have one program for each tile of
  queries, ``key_grad_kernel`` and ``extra_grad_kernel`` one for each tile of keys. A
  program alone owns what it writes: no atomics, the same bits in every run.

Decisions:

- Two loops, one over FULL blocks, one over MIXED ones: the first has plain loads that
  Triton can pipeline and no work on masks; all care is in the second.
- 0 times NaN is NaN. What a query doesn't see must not reach it, so that in MIXED
  blocks rows that aren't finite are taken out of a product, and the results that did
  see one get NaN.
- Scores are kept times log2(e): the hardware has exp2.
- Offsets of a tile are 64 bit, those inside a tile 32 bit.
- ``C`` is a `Config`; what needs a constexpr by name gets one (triton 3.6).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


class Config(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        block: Tokens in a block of the index.
        rows: Queries in a tile; divides ``block``, like ``columns``.
        columns: Keys in a tile.
        dim: D.
        wide: D rounded up to a power of two, at least 16.
        group: Heads of queries for each head of keys.
        causal: As in `MaskSpec`.
        window: Whether there is one.
        padding: Whether there is a key padding.
        documents: Whether there are documents.
        extra: Whether there is a compressed remainder.
        precision: Of a product of float32: ``"ieee"`` or ``"tf32"``.
    """

    block: int
    rows: int
    columns: int
    dim: int
    wide: int
    group: int
    causal: bool
    window: bool
    padding: bool
    documents: bool
    extra: bool
    precision: str


@triton.jit
def split_kernel(
    given, lists, rest, bad, mask, edges, heads, C: tl.constexpr, CHUNK: tl.constexpr
):
    """One row: its FULL blocks to the front of its list, the MIXED ones to the back."""
    counts, blocks, width, given_step = given
    entries, full_counts, mixed_counts = lists
    q_blocks, kv_blocks = tl.cdiv(mask[2], C.block), tl.cdiv(mask[3], C.block)
    row = tl.program_id(0)
    line, batch = row % (heads * q_blocks), row // (heads * q_blocks)
    there = tl.cast(batch * given_step + line, tl.int64)
    count = tl.load(counts + there)
    wrong = ((count < 0) | (count > width)).to(tl.int32)
    count = tl.minimum(tl.maximum(count, 0), width)
    source, target = blocks + there * width, entries + tl.cast(row, tl.int64) * width
    full_count, mixed_count = row * 0, row * 0
    for begin in range(0, count, CHUNK):
        j = begin + tl.arange(0, CHUNK)
        n = tl.load(source + j, j < count, other=-1)
        before = tl.load(source + j - 1, (j > 0) & (j < count), other=-1)
        good = (n > before) & (n < kv_blocks)
        wrong = tl.maximum(wrong, tl.max(((j < count) & ~good).to(tl.int32), 0))
        n = tl.where(good, n, 0)
        whole, some = _relation(n, line % q_blocks, batch, mask, edges, C)
        full = (good & whole & ((n + 1) * C.block <= mask[3])).to(tl.int32)
        mixed = (good & some).to(tl.int32) * (1 - full)
        tl.store(target + full_count + tl.cumsum(full, 0) - 1, n, full > 0)
        tl.store(target + width - mixed_count - tl.cumsum(mixed, 0), n, mixed > 0)
        full_count += tl.sum(full, 0)
        mixed_count += tl.sum(mixed, 0)
    tl.store(full_counts + row, full_count)
    tl.store(mixed_counts + row, mixed_count)
    tl.store(bad, 1, wrong > 0)
    if C.extra:
        rest += tl.cast(row, tl.int64) * kv_blocks
        _mark_rest(
            source,
            count,
            rest,
            kv_blocks,
            line % q_blocks,
            batch,
            mask,
            edges,
            C,
            CHUNK,
        )


@triton.jit
def _mark_rest(
    source, count, rest, kv_blocks, row, batch, mask, edges, C: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Set 1 for the blocks of keys that enter by their means, 0 for the others."""
    at = row * 0
    for begin in range(0, kv_blocks, CHUNK):
        n = begin + tl.arange(0, CHUNK)
        # The list rises: those of this chunk are the next ones in it.
        j = at + tl.arange(0, CHUNK)
        listed = tl.load(source + j, j < count, other=kv_blocks)
        hit = tl.max((n[:, None] == listed[None, :]).to(tl.int32), 1)
        at += tl.sum((listed < begin + CHUNK).to(tl.int32), 0)
        inside = n < kv_blocks
        whole, _ = _relation(tl.where(inside, n, 0), row, batch, mask, edges, C)
        tl.store(rest + n, (whole & (hit == 0)).to(tl.int8), inside)


@triton.jit
def _relation(n, row, batch, mask, edges, C: tl.constexpr):
    """Of key blocks n: does every query of the row's block see every key; any a key?"""
    q_len, kv_len, window = mask[2], mask[3], mask[5]
    kept, key_low, key_high, row_low, row_high = edges
    first, top = n * C.block, row * C.block
    last = tl.minimum(first + C.block, kv_len) - 1
    bottom = tl.minimum(top + C.block, q_len) - 1
    whole, some = n >= 0, n >= 0
    if C.causal:
        whole &= last <= top
        some &= first <= bottom
    if C.window:
        whole &= (first > bottom - window) & (last < top + window)
        some &= (first < bottom + window) & (last > top - window)
    key = batch * tl.cdiv(kv_len, C.block) + n
    if C.padding:
        state = tl.load(kept + key)
        whole &= state == 2
        some &= state > 0
    if C.documents:
        query = batch * tl.cdiv(q_len, C.block) + row
        low, high = tl.load(key_low + key), tl.load(key_high + key)
        ours_low, ours_high = tl.load(row_low + query), tl.load(row_high + query)
        whole &= (low == high) & (low == ours_low) & (low == ours_high)
        some &= (low <= ours_high) & (high >= ours_low)
    return whole, some


@triton.jit
def forward_kernel(
    q, k, v, out, lse, strides, lists, extra, mask, numbers, C: tl.constexpr
):
    """Write out and lse of one tile of queries."""
    ROWS: tl.constexpr = C.rows
    WIDE: tl.constexpr = C.wide
    PARTS: tl.constexpr = C.block // C.columns
    heads, scale = numbers
    entries, full, mixed, row, tile, head, batch = row_program(lists, mask, heads, C)
    width, q_len, kv_len = lists[4], mask[2], mask[3]
    rows = tile * C.rows + tl.arange(0, C.rows)
    inside = rows < q_len
    q = base_of(q, batch, head, strides[0])
    k = base_of(k, batch, head // C.group, strides[1])
    v = base_of(v, batch, head // C.group, strides[2])
    query = load_rows(q, tile * C.rows, strides[0][2], inside, C.rows, C)
    factor = scale * LOG2E
    best = tl.full([ROWS], float("-inf"), tl.float32)
    state = (best, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDE], tl.float32))
    for i in range(0, full * PARTS):
        start = tl.load(entries + i // PARTS) * C.block + i % PARTS * C.columns
        key = load_rows(k, start, strides[1][2], None, C.columns, C)
        value = load_rows(v, start, strides[2][2], None, C.columns, C)
        scores = dot(query, tl.trans(key), None, C) * factor
        state = _soften(scores, value, None, state, C)
    for i in range(0, mixed * PARTS):
        n = tl.load(entries + width - 1 - i // PARTS)
        start = n * C.block + i % PARTS * C.columns
        columns = start + tl.arange(0, C.columns)
        seen = is_seen(rows, columns, batch, mask, False, C)
        key = load_rows(k, start, strides[1][2], columns < kv_len, C.columns, C)
        value = load_rows(v, start, strides[2][2], columns < kv_len, C.columns, C)
        scores = dot(query, tl.trans(key), None, C) * factor
        scores = tl.where(seen, scores, float("-inf"))
        state = _soften(scores, value, seen, state, C)
    if C.extra:
        extra_k, extra_v, rest = extra_of(extra, batch, head, heads, row, mask, C)
        for start in range(0, tl.cdiv(kv_len, C.block), C.columns):
            take, key, value, weight = extra_keys(
                extra_k, extra_v, rest, start, kv_len, C
            )
            scores = dot(query, tl.trans(key), None, C) * factor + weight[None, :]
            scores = tl.where(take[None, :], scores, float("-inf"))
            state = _soften(scores, value, None, state, C)
    best, total, acc = state
    # A query that saw nothing has total 0 and best -inf: out 0, lse -inf.
    total = tl.where(total == 0.0, 1.0, total)
    own = tl.cast(batch * heads + head, tl.int64)
    tl.store(lse + own * q_len + rows, best * LN2 + tl.log(total), inside)
    store_rows(out, own, q_len, tile * C.rows, acc / total[:, None], inside, C.rows, C)


@triton.jit
def _soften(scores, value, seen, state, C: tl.constexpr):
    """One step of the running softmax; ``seen`` where a value may be hidden."""
    best, total, acc = state
    new = tl.maximum(best, tl.max(scores, 1))
    # As long as nothing was seen the maximum is -inf, and -inf - -inf would be NaN.
    safe = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(best - safe)
    total = total * shrink + tl.sum(weights, 1)
    return new, total, add_product(weights, value, seen, acc * shrink[:, None], C)


@triton.jit
def row_program(lists, mask, heads, C: tl.constexpr):
    """Which tile of queries this program has, and the list of its block."""
    entries, full_counts, mixed_counts, step, width = lists
    q_len = mask[2]
    tiles = tl.cdiv(q_len, C.rows)
    tile, owner = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if C.causal:
        # The longest rows start first.
        tile = tiles - 1 - tile
    head, batch = owner % heads, owner // heads
    block = tile * C.rows // C.block
    row = batch * step + head * tl.cdiv(q_len, C.block) + block
    full, mixed = tl.load(full_counts + row), tl.load(mixed_counts + row)
    return entries + tl.cast(row, tl.int64) * width, full, mixed, row, tile, head, batch


@triton.jit
def base_of(pointer, batch, head, strides):
    """Where a head begins in a strided tensor [B, H, N, D]."""
    return (
        pointer
        + tl.cast(batch, tl.int64) * strides[0]
        + tl.cast(head, tl.int64) * strides[1]
    )


@triton.jit
def load_rows(base, start, stride, inside, SIZE: tl.constexpr, C: tl.constexpr):
    """SIZE rows of D from ``start`` on; zero where ``inside`` (if given) is False."""
    dims = tl.arange(0, C.wide)
    line = tl.arange(0, SIZE) * stride
    pointers = base + tl.cast(start, tl.int64) * stride + line[:, None] + dims[None, :]
    if inside is None:
        if C.dim == C.wide:
            return tl.load(pointers)
        else:
            return tl.load(pointers, (dims < C.dim)[None, :], other=0.0)
    else:
        return tl.load(pointers, inside[:, None] & (dims < C.dim)[None, :], other=0.0)


@triton.jit
def store_rows(
    base, owner, length, start, x, inside, SIZE: tl.constexpr, C: tl.constexpr
):
    """Write rows from ``start`` on into a complete tensor [owners, length, D]."""
    dims = tl.arange(0, C.wide)
    line = tl.arange(0, SIZE) * C.dim
    base += (tl.cast(owner, tl.int64) * length + start) * C.dim
    pointers = base + line[:, None] + dims[None, :]
    allowed = inside[:, None] & (dims < C.dim)[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), allowed)


@triton.jit
def dot(a, b, acc, C: tl.constexpr):
    """``a @ b`` plus ``acc``, if given, in float32."""
    return tl.dot(a, b, acc, input_precision=C.precision)


@triton.jit
def add_product(weights, x, seen, acc, C: tl.constexpr):
    """``acc + weights @ x``; with ``seen``, 0 counts even against a NaN not seen."""
    if seen is None:
        return dot(weights.to(x.dtype), x, acc, C)
    else:
        odd = tl.max((~(tl.abs(x.to(tl.float32)) < INF)).to(tl.int32), 1) > 0
        clean = tl.where(odd[:, None], tl.zeros_like(x), x)
        acc = dot(weights.to(x.dtype), clean, acc, C)
        reached = tl.max((seen & odd[None, :]).to(tl.int32), 1) > 0
        return tl.where(reached[:, None], float("nan"), acc)


@triton.jit
def is_seen(rows, columns, batch, mask, TURNED: tl.constexpr, C: tl.constexpr):
    """Bool [rows, columns], or [columns, rows]: which keys each query sees."""
    padding, documents, q_len, kv_len, positions, window = mask
    AXIS: tl.constexpr = 0 if TURNED else 1
    row, column = tl.expand_dims(rows, AXIS), tl.expand_dims(columns, 1 - AXIS)
    seen = (row < q_len) & (column < kv_len)
    if C.causal:
        seen &= column <= row
    if C.window:
        seen &= (row - column < window) & (column - row < window)
    if C.padding:
        line = padding + tl.cast(batch, tl.int64) * kv_len
        keep = tl.load(line + columns, columns < kv_len, other=0) != 0
        seen &= tl.expand_dims(keep, 1 - AXIS)
    if C.documents:
        line = documents + tl.cast(batch, tl.int64) * positions
        ours = tl.load(line + rows, rows < q_len, other=0)
        theirs = tl.load(line + columns, columns < kv_len, other=0)
        seen &= tl.expand_dims(ours, AXIS) == tl.expand_dims(theirs, 1 - AXIS)
    return seen


@triton.jit
def extra_of(extra, batch, head, heads, row, mask, C: tl.constexpr):
    """The remainder's keys, values and flags for this head and list."""
    extra_k, extra_v, rest = extra
    kv_blocks = tl.cdiv(mask[3], C.block)
    owner = (batch * (heads // C.group) + head // C.group).to(tl.int64)
    offset = owner * kv_blocks * C.dim
    return extra_k + offset, extra_v + offset, rest + tl.cast(row, tl.int64) * kv_blocks


@triton.jit
def extra_keys(extra_k, extra_v, rest, start, kv_len, C: tl.constexpr):
    """A tile of the remainder: which take part, keys, values, weights of the keys."""
    columns = start + tl.arange(0, C.columns)
    there = columns < tl.cdiv(kv_len, C.block)
    take = tl.load(rest + columns, there, other=0) != 0
    key = load_rows(extra_k, start, C.dim, take, C.columns, C)
    value = load_rows(extra_v, start, C.dim, take, C.columns, C)
    return take, key, value, extra_weight(columns, kv_len, C)


@triton.jit
def extra_weight(columns, kv_len, C: tl.constexpr):
    """Logarithm to base 2 of the length of key blocks."""
    length = tl.minimum(kv_len - columns * C.block, C.block)
    return tl.log2(tl.maximum(length, 1).to(tl.float32))
