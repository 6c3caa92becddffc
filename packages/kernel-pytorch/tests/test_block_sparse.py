# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention against dense attention in float64, on every kernel."""

import math
import multiprocessing
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernel_pytorch.attention import block_sparse, native
from kernel_pytorch.attention.block_index import BlockIndex
from kernel_pytorch.attention.block_sparse import block_sparse_attention, kernel_for
from kernel_pytorch.attention.masks import MaskSpec

sys.path.insert(0, str(Path(__file__).parent))
from reference import dense_attention

BEST = native.native_status().isa
ISAS = native.ISAS[: native.ISAS.index(BEST) + 1] if BEST else ()
KERNELS = [*ISAS, "reference"]


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    use(monkeypatch, request.param)
    return request.param


def use(monkeypatch, name):
    if name == "reference":
        monkeypatch.setattr(block_sparse, "_fits", lambda *_: False)
    else:
        monkeypatch.setenv("KP_ISA", name)


def random_index(heads, q_len, kv_len, block, keep, batch=1):
    rows, columns = math.ceil(q_len / block), math.ceil(kv_len / block)
    kept = torch.rand(batch, heads, rows, columns) < keep
    return BlockIndex.from_block_mask(kept, block, q_len, kv_len)


def seen_by(index, mask, q):
    """Bool [B, H, Nq, Nk], by the definition of each part."""
    size = index.block_size
    i, j = torch.arange(index.q_len)[:, None], torch.arange(index.kv_len)
    seen = torch.zeros(index.counts.shape[0], q.shape[1], *(i + j).shape).bool()
    for b, h, t in torch.cartesian_prod(*map(torch.arange, index.counts.shape)):
        for n in index.blocks[b, h, t, : index.counts[b, h, t]]:
            seen[b, h] |= (i // size == t) & (j // size == n)
    return seen.expand(len(q), -1, -1, -1) & allowed(mask, i, j, len(q))


def allowed(mask, i, j, batch):
    seen = torch.ones(batch, 1, *(i + j).shape).bool()
    if mask.causal:
        seen &= j <= i
    if mask.window:
        seen &= (i - j).abs() < mask.window
    if mask.key_padding is not None:
        seen &= mask.key_padding[:, None, None, : j.numel()]
    if mask.documents is not None:
        ids = mask.documents
        seen &= (ids[:, i] == ids[:, None, : j.numel()])[:, None]
    return seen


def dense(q, k, v, index, mask, scale=None, remainder=False):
    """Out and lse in float64; a second set of keys stands for the remainder."""
    q, k, v = q.double(), k.double(), v.double()
    group, size = q.shape[1] // k.shape[1], index.block_size
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen, scale = seen_by(index, mask, q), scale or q.shape[-1] ** -0.5
    scores = q @ k.transpose(2, 3) * scale
    if remainder:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        may, kept = allowed(mask, i, j, len(q)), index.block_mask()
        means = [[], [], []]
        for n in range(index.kv_blocks):
            part = slice(n * size, min((n + 1) * size, k.shape[2]))
            whole = may[..., part].all(-1)
            rows = [
                whole[..., t * size : (t + 1) * size].all(-1, keepdim=True)
                & ~kept[..., t, n, None]
                for t in range(index.q_blocks)
            ]
            rows = torch.cat([r.expand(len(q), q.shape[1], 1) for r in rows], -1)
            means[0].append(rows.repeat_interleave(size, -1)[..., : q.shape[2]])
            mean = k[:, :, part].mean(2, keepdim=True)
            weight = math.log(part.stop - part.start)
            means[1].append(q @ mean.transpose(2, 3) * scale + weight)
            means[2].append(v[:, :, part].mean(2, keepdim=True))
        seen = torch.cat([seen, torch.stack(means[0], -1)], -1)
        scores = torch.cat([scores, *means[1]], -1)
        v = torch.cat([v, *means[2]], 2)
    alive = seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & alive, -math.inf).masked_fill(~alive, 0.0)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp() * alive
    return weights @ v, lse.masked_fill(~alive[..., 0], -math.inf)


def inputs(batch, heads, kv_heads, q_len, kv_len, dim, dtype=torch.float32):
    q = torch.randn(batch, heads, q_len, dim).to(dtype)
    k, v = (torch.randn(batch, kv_heads, kv_len, dim).to(dtype) for _ in range(2))
    return [t.requires_grad_() for t in (q, k, v)]


def check(tensors, index, mask=None, rtol=2e-5, gradients=True, **options):
    """Compare out, lse and all gradients; return the tested ones."""
    mask = mask or MaskSpec()
    out, lse = block_sparse_attention(*tensors, index, mask, return_lse=True, **options)
    wanted, wanted_lse = dense(*tensors, index, mask, **options)
    assert out.dtype == tensors[0].dtype
    close(out, wanted, rtol)
    assert torch.equal(lse == -math.inf, wanted_lse == -math.inf)
    alive = wanted_lse != -math.inf
    close(lse[alive], wanted_lse[alive], rtol)
    if not gradients:
        return None
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    total = (out * d_out).sum() + (lse[alive] * d_lse[alive]).sum()
    found = torch.autograd.grad(total, tensors)
    total = (wanted * d_out).sum() + (wanted_lse[alive] * d_lse[alive]).sum()
    for a, b in zip(found, torch.autograd.grad(total, tensors), strict=True):
        close(a, b, rtol)
    return out, lse, found


def close(found, wanted, rtol):
    found, wanted = found.detach(), wanted.detach()
    if found.numel():
        error = (found.double() - wanted.double()).abs().max()
        # `not >`: a NaN must fail.
        assert error <= rtol * max(1.0, wanted.abs().max()), error


@pytest.mark.critical
@pytest.mark.parametrize("dim", [8, 17, 64, 80, 128, 256])
def test_forward_and_backward(kernel, dim):
    tensors = inputs(2, 4, 2, 133, 201, dim)
    check(tensors, random_index(4, 133, 201, 32, 0.4, batch=2))


@pytest.mark.critical
@pytest.mark.parametrize(
    "mask",
    [
        MaskSpec(causal=True),
        MaskSpec(window=37),
        MaskSpec(causal=True, window=20),
        MaskSpec(key_padding=torch.arange(170).expand(2, -1) % 7 != 3),
        MaskSpec(
            key_padding=torch.stack([torch.arange(170) < 101, torch.ones(170)]) > 0
        ),
        MaskSpec(documents=(torch.arange(170) // 45).expand(2, -1)),
        MaskSpec(documents=(torch.arange(170) % 3).expand(2, -1), causal=True),
    ],
    ids=["causal", "window", "both", "padding", "tail", "documents", "mixed"],
)
@pytest.mark.parametrize("remainder", [False, True])
def test_masks(kernel, mask, remainder):
    tensors = inputs(2, 2, 1, 150, 170, 24)
    index = random_index(2, 150, 170, 16, 0.5)
    check(tensors, index, mask, remainder=remainder)


@pytest.mark.fast
@pytest.mark.parametrize("block", [16, 48, 64, 112, 128, 256])
def test_block_sizes(kernel, block):
    tensors = inputs(1, 2, 2, 300, 277, 40)
    index = random_index(2, 300, 277, block, 0.6)
    check(tensors, index, MaskSpec(causal=True), remainder=True)


@pytest.mark.fast
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_few_heads(kernel, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensors = inputs(1, 2, 1, 200, 200, 32)
        index = random_index(2, 200, 200, 16, 0.3)
        check(tensors, index, remainder=True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.fast
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_shape(kernel, data):
    draw = data.draw
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    q_len, kv_len = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    batch, heads = draw(st.integers(1, 2)), kv_heads * group
    torch.manual_seed(draw(st.integers(0, 9999)))
    tensors = inputs(batch, heads, kv_heads, q_len, kv_len, draw(st.integers(1, 40)))
    keep, lists = draw(st.floats(0, 1)), draw(st.sampled_from([1, batch]))
    index = random_index(
        heads, q_len, kv_len, draw(st.sampled_from([16, 32])), keep, lists
    )
    window = draw(st.none() | st.integers(1, 100))
    padding = torch.rand(batch, kv_len) < draw(st.floats(0, 1))
    ids = torch.randint(0, 3, (batch, max(q_len, kv_len))).sort(1).values
    mask = MaskSpec(
        causal=draw(st.booleans()),
        window=window,
        key_padding=padding if draw(st.booleans()) else None,
        documents=ids if draw(st.booleans()) else None,
    )
    check(tensors, index, mask, remainder=draw(st.booleans()))


@pytest.mark.fast
def test_bfloat16(kernel):
    tensors = inputs(1, 4, 2, 130, 130, 48, torch.bfloat16)
    index = random_index(4, 130, 130, 32, 0.5)
    check(tensors, index, MaskSpec(causal=True), rtol=2e-2, remainder=True)


@pytest.mark.fast
def test_strides(kernel):
    """Heads between tokens and features, one k for all heads, an expanded gradient."""
    q = torch.randn(2, 70, 4, 24).transpose(1, 2).requires_grad_()
    k = torch.randn(2, 1, 90, 24).expand(-1, 2, -1, -1).requires_grad_()
    v = torch.randn(2, 2, 24, 90).transpose(2, 3).requires_grad_()
    index = random_index(4, 70, 90, 16, 0.5)
    check([q, k, v], index)
    out = block_sparse_attention(q, k, v, index)
    found = torch.autograd.grad(out.sum(), [q, k, v])
    wanted = torch.autograd.grad(dense(q, k, v, index, MaskSpec())[0].sum(), [q, k, v])
    for a, b in zip(found, wanted, strict=True):
        close(a, b, 2e-5)


@pytest.mark.critical
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_hidden_keys_do_not_leak(kernel, value):
    """What a query doesn't see can't change it, nor get a gradient from it."""
    tensors = inputs(2, 2, 2, 100, 100, 16)
    index = random_index(2, 100, 100, 16, 0.7)
    padding = torch.rand(2, 100) > 0.3
    for mask in (
        MaskSpec(key_padding=padding),
        MaskSpec(key_padding=padding, causal=True),
    ):
        for remainder in (False, True):
            clean = check(tensors, index, mask, remainder=remainder)
            poisoned = [t.detach().clone() for t in tensors]
            for t in poisoned[1:]:
                t.transpose(1, 2)[~padding] = value
            poisoned = [t.requires_grad_() for t in poisoned]
            out = block_sparse_attention(*poisoned, index, mask, remainder=remainder)
            assert torch.equal(out, clean[0])
            for grad in torch.autograd.grad(out.square().sum(), poisoned):
                assert grad.isfinite().all()


@pytest.mark.fast
@pytest.mark.parametrize("remainder", [False, True])
def test_later_keys_do_not_leak(kernel, remainder):
    """NaN in the last key reaches only the last query, when causal."""
    tensors = inputs(1, 1, 1, 70, 70, 16)
    index = random_index(1, 70, 70, 16, 1.0)
    wanted = block_sparse_attention(*tensors, index, MaskSpec(causal=True))
    with torch.no_grad():
        for t in tensors:
            t[:, :, 65] = math.nan
    options = {"remainder": remainder}
    out = block_sparse_attention(*tensors, index, MaskSpec(causal=True), **options)
    assert torch.equal(out[:, :, :65], wanted[:, :, :65])
    assert out[:, :, 65:].isnan().all()
    # Keys and values do get NaN: the last queries, which are NaN, see all of them.
    (grad,) = torch.autograd.grad(out[:, :, :65].square().sum(), tensors[:1])
    assert grad[:, :, :65].isfinite().all()


@pytest.mark.fast
def test_rows_without_keys(kernel):
    tensors = inputs(1, 2, 1, 64, 64, 16)
    kept = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    kept[0, 0, 1, 2] = kept[0, 1, 0, 3] = True
    index = BlockIndex.from_block_mask(kept, 16, 64, 64)
    out, lse, grads = check(tensors, index, MaskSpec(causal=True))
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.fast
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (1, 1), (0, 0)])
def test_short(kernel, q_len, kv_len):
    tensors = inputs(2, 2, 1, q_len, kv_len, 8)
    check(
        tensors, random_index(2, q_len, kv_len, 16, 1.0), remainder=q_len * kv_len > 0
    )


@pytest.mark.fast
def test_large_scores(kernel):
    """Weights that underflow, maxima that rise late, and a scale of one's own."""
    q, k, v = inputs(1, 1, 1, 80, 320, 16)
    with torch.no_grad():
        k.mul_(torch.linspace(1, 40, 320)[:, None])
    check([q, k, v], random_index(1, 80, 320, 16, 0.8), rtol=1e-4, scale=0.7)


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(1, 1, 60, 60), (2, 1, 1, 60), (60,)])
@pytest.mark.parametrize("flags", [True, False])
def test_bias_takes_the_reference(shape, flags):
    tensors = inputs(2, 2, 1, 60, 60, 16)
    index = random_index(2, 60, 60, 16, 0.7)
    bias = torch.randn(shape)
    mask = MaskSpec(bias=bias > -0.5 if flags else bias)
    assert kernel_for(tensors[0], index, mask) == "reference"
    out = block_sparse_attention(*tensors, index, mask)
    q, k, v = (t.double() for t in tensors)
    seen = seen_by(index, MaskSpec(), q)
    scores = q @ k.transpose(2, 3) * 0.25
    scores = scores.masked_fill(~mask.bias, -math.inf) if flags else scores + mask.bias
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    close(out, weights @ v, 1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("remainder", [False, True])
def test_float64_gradients(remainder):
    tensors = [t.double().detach() for t in inputs(1, 2, 1, 20, 35, 3)]
    index, mask = random_index(2, 20, 35, 7, 0.5), MaskSpec(window=30)
    assert kernel_for(tensors[0], index, mask) == "reference"
    tensors = [t.requires_grad_() for t in tensors]
    options = {"remainder": remainder, "return_lse": True}

    def run(q, k, v):
        out, lse = block_sparse_attention(q, k, v, index, mask, **options)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.fast
def test_only_one_result_used(kernel):
    tensors = inputs(1, 1, 1, 32, 32, 8)
    index = random_index(1, 32, 32, 16, 1.0)
    wanted = dense(*tensors, index, MaskSpec())
    for n in range(2):
        pair = block_sparse_attention(*tensors, index, return_lse=True)
        found = torch.autograd.grad(pair[n].sum(), tensors[:2], retain_graph=True)
        right = torch.autograd.grad(wanted[n].sum(), tensors[:2], retain_graph=True)
        for a, b in zip(found, right, strict=True):
            close(a, b, 1e-5)


@pytest.mark.critical
@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31), 0])
@pytest.mark.parametrize("at", ["counts", "blocks"])
def test_bad_index_is_refused(kernel, bad, at):
    tensors = inputs(1, 2, 2, 64, 64, 16)
    index = random_index(2, 64, 64, 16, 1.0)
    part = getattr(index, at)
    place = (0, 1, 2) if at == "counts" else (0, 1, 2, 1)
    if (at, bad) in (("counts", 4), ("counts", 0)):
        bad = 5
    part[place] = bad
    with pytest.raises(ValueError, match=rf"{at} at \(head 1, row 2\), value {bad}"):
        block_sparse_attention(*tensors, index)


@pytest.mark.fast
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_names(kind):
    q, index = torch.zeros(1, 1, 32, 8, dtype=kind), random_index(1, 32, 32, 16, 1.0)
    native_kernel = f"native-{BEST}" if BEST else "reference"
    wanted = "reference" if kind == torch.float16 else native_kernel
    assert kernel_for(q, index) == wanted
    assert kernel_for(q.to("meta"), index) == "reference"
    odd = random_index(1, 32, 32, 24, 1.0)
    assert kernel_for(q, odd) == "reference"
    out = block_sparse_attention(q, q, q, odd)
    assert (out == 0).all()


@pytest.mark.fast
def test_wrong_arguments_are_quoted():
    q, k, v = inputs(1, 4, 2, 64, 64, 16)
    index = random_index(4, 64, 64, 16, 1.0)
    with pytest.raises(ValueError, match=r"q \(1, 4, 64, 16\), k \(1, 2, 64, 16\)"):
        block_sparse_attention(q, k, v[..., :3], index)
    with pytest.raises(ValueError, match="other lengths"):
        block_sparse_attention(q[:, :, 1:], k, v, index)
    with pytest.raises(ValueError, match="counts"):
        block_sparse_attention(q[:, :2], k, v, index)
    bias = torch.zeros(64, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"mask\.bias"):
        block_sparse_attention(q, k, v, index, MaskSpec(bias=bias))
    mask = MaskSpec(bias=bias.detach())
    with pytest.raises(NotImplementedError, match="remainder"):
        block_sparse_attention(q, k, v, index, mask, remainder=True)


@pytest.mark.fast
def test_autocast():
    tensors = inputs(1, 2, 2, 48, 48, 16)
    index = random_index(2, 48, 48, 16, 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(*tensors, index)
    assert out.dtype == torch.bfloat16
    close(out, dense(*tensors, index, MaskSpec())[0], 3e-2)
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scales_that_are_not_positive(kernel, scale):
    q, k, v = torch.randn(3, 1, 2, 64, 8).unbind()
    kept = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    index = BlockIndex.from_block_mask(kept, 16, 64, 64)
    mask = MaskSpec(causal=True)
    out = block_sparse_attention(q, k, v, index, mask, scale=scale)
    want, _ = dense_attention(q, k, v, mask, scale)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.fast
def test_without_the_library(monkeypatch, tmp_path):
    """One warning, then the reference; the same numbers."""
    tensors = inputs(1, 2, 1, 40, 40, 8)
    index = random_index(2, 40, 40, 16, 0.7)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(block_sparse, "_warned", False)
    assert kernel_for(tensors[0], index) == "reference"
    with pytest.warns(RuntimeWarning, match=r"build\.json is missing"):
        check(tensors, index)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block_sparse_attention(*tensors, index)


def _in_child(queue):
    q, k, v = inputs(1, 2, 2, 64, 64, 16)
    index = random_index(2, 64, 64, 16, 1.0)
    out = block_sparse_attention(q, k, v, index)
    queue.put((native.native_status().threads, float(out.detach().abs().max())))


@pytest.mark.fast
@pytest.mark.skipif(not BEST, reason="the native kernel was not built")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forked_child_uses_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        q, k, v = inputs(1, 2, 2, 64, 64, 16)
        block_sparse_attention(q, k, v, random_index(2, 64, 64, 16, 1.0))
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(queue,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get()[0] == 1
    finally:
        torch.set_num_threads(before)
