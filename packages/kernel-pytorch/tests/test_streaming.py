# SPDX-License-Identifier: Apache-2.0
"""The streaming plan: exact under every mask, and never a tensor of N * N."""

import resource
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parent))

from reference import dense_attention, gradients, mask_parts

from kernel_pytorch.attention import blocks, tiling
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.projection import Projections, project_and_attend
from kernel_pytorch.attention.streaming import attention, attention_with_lse

KINDS = list(mask_parts(1, 1, 8))


class Largest(TorchDispatchMode):
    """Remember the most elements any op returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, torch.Tensor):
                # A broadcast view takes no memory.
                size = t.untyped_storage().nbytes() // t.element_size()
                self.elements = max(self.elements, min(size, t.numel()))
        return found


def inputs(batch=2, heads=4, kv_heads=2, n=37, dim=8, dtype=torch.float32):
    q = torch.randn(batch, heads, n, dim, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, n, dim, dtype=dtype) for _ in range(2))
    return q, k, v


def check(function, tensors, mask, tolerance=1e-5):
    d_out = torch.randn(tensors[0].shape)
    found = gradients(lambda *t: (function(*t), torch.zeros(())), tensors, d_out)
    wanted = gradients(lambda *t: dense_attention(*t, mask), tensors, d_out)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(found[0].double(), wanted[0], **close)
    for a, b in zip(found[2], wanted[2], strict=True):
        size = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * size)


@pytest.mark.critical
@pytest.mark.parametrize("chunk", [None, 1, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_mask_and_chunk(kind, chunk):
    mask = MaskSpec(**mask_parts(2, 4, 37)[kind])
    check(lambda *t: attention(*t, mask, chunk_size=chunk), inputs(), mask)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_much_smaller_than_the_sequence(kind, monkeypatch):
    monkeypatch.setattr(tiling, "TILE", 32 * 32)
    monkeypatch.setattr(tiling, "_NARROW", 32)
    monkeypatch.setattr(tiling, "_WIDE", 48)
    monkeypatch.setattr(tiling, "_KEYS", 16)
    mask = MaskSpec(**mask_parts(1, 2, 300)[kind])
    check(lambda *t: attention(*t, mask), inputs(1, 2, 1, 300), mask)


@pytest.mark.critical
@pytest.mark.parametrize("path", ["fast", "reference", "strict"])
@pytest.mark.parametrize("kind", [k for k in KINDS if "bias" not in k])
def test_no_tensor_of_the_size_of_the_scores(kind, path, monkeypatch):
    n = 4096 if path == "fast" else 2048
    parts = mask_parts(1, 1, n)[kind] if kind != "everything" else {}
    if kind == "everything":
        whole = mask_parts(1, 1, n)[kind]
        parts = {key: whole[key] for key in whole if key != "bias"}
    if "window" in parts:
        parts["window"] = min(parts["window"], 300)
    if path == "reference":
        monkeypatch.setattr(blocks, "_cpu_flash_works", lambda: False)
    monkeypatch.setattr(tiling, "TILE", 1 << 18)
    q, k, v = inputs(1, 1, 1, n, 8)
    if path == "strict":
        k[:, :, n // 3] = float("nan")
    q.requires_grad_()
    mask = MaskSpec(**parts)
    with Largest() as largest:
        attention(q, k, v, mask).sum().backward()
    assert largest.elements <= max(n * n // 8, 8 * n)


@pytest.mark.fast
def test_masks_are_cut_to_tiles_at_their_real_size():
    n = 8192
    q, k, v = inputs(1, 1, 1, n, 8)
    documents = (torch.arange(n) // 3000)[None]
    mask = MaskSpec(window=5000, documents=documents)
    with Largest() as largest:
        attention(q, k, v, mask)
    assert largest.elements <= tiling.TILE < n * n // 4


@pytest.mark.fast
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 150),
    names=st.sets(st.sampled_from(["causal", "window", "key_padding", "documents"])),
    chunk=st.none() | st.integers(1, 80),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_mask(n, names, chunk, heads, seed):
    torch.manual_seed(seed)
    parts = mask_parts(1, 1, n, seed=seed)["everything"]
    mask = MaskSpec(**{name: parts[name] for name in names})
    tensors = inputs(1, *heads, n=n, dim=4)
    check(lambda *t: attention(*t, mask, chunk_size=chunk), tensors, mask)


@pytest.mark.fast
def test_work_of_a_window_is_linear():
    n, window = 16384, 256
    q, k, v = inputs(1, 1, 1, n, 8)
    with tiling.counting() as work:
        attention(q, k, v, MaskSpec(causal=True, window=window))
    assert work.pairs <= n * (window + 512) * 1.2


@pytest.mark.fast
def test_work_of_another_thread_is_not_counted():
    other = inputs(1, 1, 1, 8, 4, dtype=torch.float64)
    with tiling.counting() as work:
        thread = threading.Thread(target=attention, args=other)
        thread.start()
        thread.join()
        assert (work.pairs, work.backends) == (0, set())
        attention(*inputs(1, 1, 1, 8, 4))
    assert work.pairs == 64


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    mask = MaskSpec(causal=True, window=9)
    tolerance = 1e-6 if dtype == torch.float64 else 2e-2
    check(lambda *t: attention(*t, mask), inputs(dtype=dtype), mask, tolerance)


@pytest.mark.fast
def test_errors():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="chunk_size=0"):
        attention(q, k, v, chunk_size=0)
    with pytest.raises(ValueError, match=r"q \(2, 4, 37, 8\), k \(2, 3, 37, 8\)"):
        attention(q, q[:, :3], q[:, :3])


@pytest.mark.fast
def test_queries_at_the_end_of_a_cache():
    q, k, v = inputs(n=37)
    mask = MaskSpec(causal=True)
    whole, lse = attention_with_lse(q, k, v, mask)
    part, part_lse = attention_with_lse(q[:, :, 30:], k, v, mask, q_start=30)
    torch.testing.assert_close(part, whole[:, :, 30:])
    torch.testing.assert_close(part_lse, lse[:, :, 30:])


def layer(width=24, heads=4, kv_heads=2, bias=True, dtype=torch.float32):
    inner, narrow = width, width // heads * kv_heads
    shapes = [(inner, width), (narrow, width), (narrow, width), (width, inner)]
    weights = [torch.randn(s, dtype=dtype) / width**0.5 for s in shapes]
    biases = [torch.randn(s[0], dtype=dtype) if bias else None for s in shapes]
    return weights + biases


def plain_layer(x, parts, heads, kv_heads, mask):
    w = Projections(*parts)

    def project(weight, bias, count):
        y = torch.nn.functional.linear(x, weight, bias)
        return y.unflatten(-1, (count, -1)).transpose(1, 2)

    q, k, v = (
        project(w.q, w.q_bias, heads),
        project(w.k, w.k_bias, kv_heads),
        project(w.v, w.v_bias, kv_heads),
    )
    out, lse = dense_attention(q, k, v, mask)
    out = out.transpose(1, 2).flatten(2).to(x.dtype)
    return torch.nn.functional.linear(out, w.out, w.out_bias), lse


@pytest.mark.critical
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "everything"])
def test_streamed_layer(kind, bias):
    mask = MaskSpec(**mask_parts(2, 4, 37)[kind])
    x, parts = torch.randn(2, 37, 24), layer(bias=bias)
    d_y = torch.randn(2, 37, 24)
    given_parts = [p for p in parts if p is not None]

    def stream(x, *found):
        found = Projections(*found)
        return project_and_attend(x, found, 4, 2, mask, chunk_size=16)

    found = gradients(stream, [x, *given_parts], d_y)
    wanted = gradients(
        lambda x, *p: plain_layer(x, p, 4, 2, mask),
        [t.double() for t in (x, *given_parts)],
        d_y,
    )
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-5)
    for a, b in zip(found[2], wanted[2], strict=True):
        size = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5 * size)


class Traffic(TorchDispatchMode):
    """Count the elements that ops read and return, and the calls of each op."""

    def __init__(self):
        super().__init__()
        self.elements, self.calls = 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.calls[func] += 1
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, found))
            touched = {id(t): t.numel() for t in leaves if isinstance(t, torch.Tensor)}
            self.elements += sum(touched.values())
        return found


@pytest.mark.critical
@pytest.mark.parametrize("kind", ["causal", "both_sides", "padding", "documents"])
def test_a_window_makes_the_streamed_layer_linear(kind):
    counts = []
    for n in (4096, 8192):
        keep = torch.ones(1, n, dtype=torch.bool)
        keep[:, -3:] = False
        padding = keep if kind == "padding" else None
        documents = (torch.arange(n) // 50)[None] if kind == "documents" else None
        mask = MaskSpec(kind != "both_sides", 16, padding, documents)
        x, parts = torch.randn(1, n, 32, requires_grad=True), layer(32, 2, 1)
        w = Projections(*(p.requires_grad_() for p in parts))
        ran = Traffic(), Traffic()
        with ran[0]:
            y = project_and_attend(x, w, 2, 1, mask, chunk_size=64)[0].sum()
        with ran[1]:
            y.backward()
        counts.append([t.elements for t in ran])
    for once, twice in zip(*counts, strict=True):
        assert twice <= 2.1 * once


@pytest.mark.critical
@pytest.mark.parametrize("kind", ["padding", "bias"])
def test_hidden_keys_that_overflow_harm_no_chunk(kind):
    n, bad = 37, 20
    x, parts = torch.randn(2, n, 24), layer(bias=False)[:4]
    # K is infinite in one token by the first feature, which nothing else uses.
    for weight, factor in zip(parts, (0.0, 1e20, 0.0, 1.0), strict=True):
        weight[:, 0] *= factor
    x[:, :, 0] = 0.0
    x[:, bad, 0] = 1e20
    assert (x[:, bad] @ parts[1].T).isinf().any()
    keep = torch.ones(2, n, dtype=torch.bool)
    keep[:, bad] = False
    padded = mask = MaskSpec(causal=True, key_padding=keep)
    if kind == "bias":
        mask = MaskSpec(causal=True, bias=keep[:, None, None].expand(2, 1, n, n))
    d_y = torch.randn(2, n, 24)
    d_y[:, bad] = 0.0

    def stream(x, *w):
        return project_and_attend(x, Projections(*w), 4, 2, mask, chunk_size=8)

    found = gradients(stream, [x, *parts], d_y)
    wanted = gradients(
        lambda x, *w: plain_layer(x, [*w, *[None] * 4], 4, 2, padded),
        [t.double() for t in (x, *parts)],
        d_y,
    )
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-4, atol=1e-4)
    for a, b in zip(found[2], wanted[2], strict=True):
        assert a.isfinite().all()
        a, b = a[..., 1:], b[..., 1:]
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.fast
def test_half_precision_gradients_do_not_fade_over_many_chunks():
    n, width = 2048, 8
    x, parts = torch.randn(1, n, width), layer(width, 2, 1)
    x, *parts = (t.bfloat16() for t in (x, *parts))
    d_y = (torch.randn(1, n, width) + 0.5).bfloat16()
    mask = MaskSpec(causal=True, window=4)
    wanted = gradients(
        lambda x, *w: plain_layer(x, w, 2, 1, mask),
        [t.double() for t in (x, *parts)],
        d_y,
    )[2]

    def errors(chunk):
        def stream(x, *w):
            w = Projections(*w)
            return project_and_attend(x, w, 2, 1, mask, chunk_size=chunk)

        found = gradients(stream, [x, *parts], d_y)[2]
        pairs = [(a.double(), b) for a, b in zip(found, wanted, strict=True)]
        return [(a - b).norm() / b.norm() for a, b in pairs]

    names = ["x", *Projections._fields]
    for name, once, often in zip(names, errors(n), errors(16), strict=True):
        # A bias of K changes nothing: its gradient is 0, and found as rounding.
        assert name == "k_bias" or often <= max(1.5 * once, 2e-3), name


def every_gradient(x, parts, chunk=16):
    w = Projections(*parts)
    y = project_and_attend(x, w, 4, 2, MaskSpec(causal=True), chunk_size=chunk)[0]
    with Traffic() as traffic, tiling.counting() as work:
        y.square().sum().backward()
    return [t.grad for t in (x, *parts)], traffic.calls, work.calls


@pytest.mark.fast
@pytest.mark.parametrize("frozen", [range(1, 9), [0], [0, 2, 6], [3, 7], range(8)])
def test_frozen_weights_get_and_cost_nothing(frozen):
    def leaves():
        torch.manual_seed(0)
        given = [torch.randn(2, 37, 24), *layer()]
        return [t.requires_grad_() for t in given]

    tensors = leaves()
    wanted, products, calls = every_gradient(tensors[0], tensors[1:])
    tensors = leaves()
    for place in frozen:
        tensors[place].requires_grad_(False)
    found, fewer, fewer_calls = every_gradient(tensors[0], tensors[1:])
    for place, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if place in frozen:
            assert a is None
        else:
            torch.testing.assert_close(a, b)
    # Only the last bias is left in the last case: it needs no attention.
    assert fewer_calls == (0 if frozen == range(8) else calls)
    op = torch.ops.aten.mm.default
    # In each of 3 chunks, q, k and v have a product for x, and each weight has one.
    spared = sum(place in frozen for place in range(1, 5)) + 3 * (0 in frozen)
    assert fewer[op] <= products[op] - 3 * spared


@pytest.mark.fast
def test_streamed_layer_refuses_wrong_weights():
    x, parts = torch.randn(2, 37, 24), layer()
    with pytest.raises(ValueError, match="do not divide"):
        project_and_attend(x, Projections(*parts), 5, 5)
    with pytest.raises(ValueError, match=r"must be \(\(24, 24\), \(24, 24\)"):
        project_and_attend(x, Projections(*parts), 4, 4)
    with pytest.raises(ValueError, match="x must be"):
        project_and_attend(x[0], Projections(*parts), 4, 2)


@pytest.mark.slow
def test_a_million_tokens_with_a_window():
    n, dim = 1 << 20, 64
    q, k, v = (torch.randn(1, 1, n, dim) for _ in range(3))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    out = attention(q, k, v, MaskSpec(causal=True, window=1024))
    seconds = time.monotonic() - begin
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert extra <= 5 * n * dim * 4
    assert seconds <= 300  # a bound for a busy machine, not the figure
    last = dense_attention(q[:, :, -1:], k[:, :, -1024:], v[:, :, -1024:])[0]
    torch.testing.assert_close(out[:, :, -1:].double(), last, rtol=1e-5, atol=1e-5)
