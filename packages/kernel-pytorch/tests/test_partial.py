# SPDX-License-Identifier: Apache-2.0
"""Partial attention and merging against dense attention in float64."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from reference import dense_attention, gradients, mask_parts

from kernel_pytorch.attention import blocks
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.partial import merge_partials, partial_attention

KINDS = list(mask_parts(1, 1, 8))


def inputs(batch=2, heads=4, kv_heads=2, n=37, m=None, dim=8, dtype=torch.float32):
    m = n if m is None else m
    q = torch.randn(batch, heads, n, dim, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, m, dim, dtype=dtype) for _ in range(2))
    return q, k, v


def check(function, tensors, mask, with_lse=True, tolerance=1e-5, **options):
    q = tensors[0]
    d_out = torch.randn(q.shape)
    d_lse = torch.randn(q.shape[:3]) if with_lse else None
    found = gradients(function, tensors, d_out, d_lse)
    wanted = gradients(
        lambda *t: dense_attention(*t, mask, **options), tensors, d_out, d_lse
    )
    torch.testing.assert_close(
        found[0].double(), wanted[0], rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        found[1].double(), wanted[1], rtol=tolerance, atol=tolerance
    )
    for a, b in zip(found[2], wanted[2], strict=True):
        size = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * size)


@pytest.mark.critical
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_lse", [False, True])
def test_every_mask(kind, with_lse):
    mask = MaskSpec(**mask_parts(2, 4, 37)[kind])
    check(lambda *t: partial_attention(*t, mask), inputs(), mask, with_lse)


@pytest.mark.critical
def test_every_combination_of_parts():
    parts = mask_parts(2, 4, 30)["everything"]
    tensors = inputs(n=30)
    for size in range(2, len(parts) + 1):
        for names in itertools.combinations(parts, size):
            mask = MaskSpec(**{name: parts[name] for name in names})
            check(lambda *t, m=mask: partial_attention(*t, m), tensors, mask)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_more_keys_than_queries(kind):
    mask = MaskSpec(**mask_parts(2, 4, 19, 50)[kind])
    tensors = inputs(n=19, m=50)
    check(lambda *t: partial_attention(*t, mask), tensors, mask)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_torch_reference_path(kind, monkeypatch):
    monkeypatch.setattr(blocks, "_cpu_flash_works", lambda: False)
    mask = MaskSpec(**mask_parts(2, 4, 37)[kind])
    check(lambda *t: partial_attention(*t, mask), inputs(), mask)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_parts_at_their_positions_merge_to_the_whole(kind):
    n, cut = 37, 14
    mask = MaskSpec(**mask_parts(2, 4, n)[kind])

    def in_parts(q, k, v):
        found = []
        for rows in (slice(0, 11), slice(11, n)):
            parts = [
                partial_attention(
                    *(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask),
                    q_start=rows.start,
                    k_start=keys.start,
                )
                for keys in (slice(0, cut), slice(cut, n))
            ]
            found.append(merge_partials(*parts[0], *parts[1]))
        return tuple(torch.cat(t, 2) for t in zip(*found, strict=True))

    check(in_parts, inputs(n=n), mask)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["none", "causal", "everything"])
def test_gradcheck(kind):
    mask = MaskSpec(**mask_parts(1, 2, 5)[kind])
    tensors = [
        t.requires_grad_() for t in inputs(1, 2, 1, 5, dim=3, dtype=torch.float64)
    ]

    def function(*t):
        out, lse = partial_attention(*t, mask)
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "everything"])
def test_half_precision(dtype, kind):
    mask = MaskSpec(**mask_parts(2, 4, 37)[kind])
    tensors = inputs(dtype=dtype)
    out, lse = partial_attention(*tensors, mask)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    check(lambda *t: partial_attention(*t, mask), tensors, mask, False, 2e-2)


@pytest.mark.critical
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["padding", "causal", "documents", "bool_bias"])
def test_hidden_keys_never_leak(kind, value):
    parts = mask_parts(2, 4, 37)[kind]
    if kind == "bool_bias":
        parts["bias"] = parts["bias"].expand(2, 1, 37, 37).clone()
        parts["bias"][..., 30] = False
        parts["bias"][:, :, -1, 30] = True
    mask = MaskSpec(**parts)
    tensors = inputs()
    broken = [t.clone() for t in tensors]
    for t in broken[1:]:
        if kind == "padding":
            t.masked_fill_(~mask.key_padding[:, None, :, None], value)
        else:
            t[:, :, 30] = value
    seen = dense_visible(mask, 30) if kind != "padding" else torch.zeros(2, 4, 37)
    d_out = torch.randn(2, 4, 37, 8) * (seen == 0)[..., None]
    found = gradients(lambda *t: partial_attention(*t, mask), broken, d_out)
    wanted = gradients(lambda *t: partial_attention(*t, mask), tensors, d_out)
    clean = (seen == 0)[..., None]
    assert torch.where(clean, found[0], 0.0).isfinite().all()
    torch.testing.assert_close(
        torch.where(clean, found[0], 0.0), torch.where(clean, wanted[0], 0.0)
    )
    if kind == "padding":
        for a, b in zip(found[2], wanted[2], strict=True):
            torch.testing.assert_close(a, b)
    # A row that sees the key must not be made to look right.
    rows = seen.bool()
    assert not found[0][rows].isfinite().all(-1).any()
    assert torch.where(clean, found[2][0], 0.0).isfinite().all()


def dense_visible(mask, key):
    from reference import dense_mask

    return dense_mask(mask, 2, 4, 37, 37)[0][..., key].float()


@pytest.mark.fast
def test_strict_gradients_with_a_loss_on_clean_rows_of_one_batch():
    q, k, v = inputs()
    k[1, :, 30], v[1, :, 30] = float("nan"), float("nan")
    d_out = torch.randn(2, 4, 37, 8)
    d_out[1] = 0
    mask = MaskSpec(causal=True)
    found = gradients(lambda *t: partial_attention(*t, mask), (q, k, v), d_out)
    for grad in found[2]:
        assert grad[0].isfinite().all()


@pytest.mark.critical
def test_rows_without_keys():
    q, k, v = (t.requires_grad_() for t in inputs())
    mask = MaskSpec(key_padding=torch.zeros(2, 37, dtype=torch.bool))
    out, lse = partial_attention(q, k, v, mask)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    (out.sum() + lse.exp().sum()).backward()
    assert all((t.grad == 0).all() for t in (q, k, v))
    a = merge_partials(out, lse, out, lse)
    assert (a[0] == 0).all()
    assert (a[1] == float("-inf")).all()


@pytest.mark.fast
@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_no_tokens(n, m):
    q, k, v = (t.requires_grad_() for t in inputs(n=n, m=m))
    for mask in (None, MaskSpec(causal=True), MaskSpec(window=2)):
        out, lse = partial_attention(q, k, v, mask)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(g.shape == t.shape for g, t in zip(grads, (q, k, v), strict=True))


@pytest.mark.fast
@pytest.mark.parametrize("strides", ["transposed", "expanded", "sliced"])
def test_strided_inputs(strides):
    q, k, v = inputs(kv_heads=4)
    if strides == "transposed":
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    elif strides == "expanded":
        k, v = (t[:, :1].expand(-1, 4, -1, -1) for t in (k, v))
    else:
        q, k, v = (torch.cat([t, t], 3)[..., ::2] for t in (q, k, v))
    mask = MaskSpec(causal=True)
    check(lambda *t: partial_attention(*t, mask), (q, k, v), mask)


@pytest.mark.fast
def test_meta_and_fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mask = MaskSpec(causal=True)
    q, k, v = (t.to("meta").requires_grad_() for t in inputs())
    out, lse = partial_attention(q, k, v, mask)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape
    with FakeTensorMode():
        q, k, v = inputs()
        out, lse = partial_attention(q, k, v, mask)
    assert (out.shape, lse.dtype) == (q.shape, torch.float32)


@pytest.mark.fast
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 4, 8), (2, 4, 5, 8), (2, 4, 5, 8)),
        ((2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
        ((2, 4, 5, 8), (2, 4, 5, 6), (2, 4, 5, 6)),
        ((2, 4, 5, 8), (1, 4, 5, 8), (1, 4, 5, 8)),
        ((2, 4, 5, 8), (2, 4, 5, 8), (2, 4, 6, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_quoted(shapes):
    tensors = [torch.zeros(s) for s in shapes]
    with pytest.raises(ValueError, match=r"q \(.*, k \(.*, v \("):
        partial_attention(*tensors)


@pytest.mark.fast
def test_masks_that_do_not_fit():
    q, k, v = inputs()
    for mask in (
        MaskSpec(key_padding=torch.ones(3, 37, dtype=torch.bool)),
        MaskSpec(key_padding=torch.ones(2, 30, dtype=torch.bool)),
        MaskSpec(bias=torch.zeros(3, 37, 37)),
        MaskSpec(bias=torch.zeros(2, 37)),
    ):
        with pytest.raises(ValueError, match=r"key_padding|bias"):
            partial_attention(q, k, v, mask)
    mask = MaskSpec(bias=torch.zeros(37, 37, requires_grad=True))
    with pytest.raises(NotImplementedError, match=r"mask\.bias"):
        partial_attention(q, k, v, mask)
    with pytest.raises(ValueError, match="dtypes"):
        partial_attention(q, k.double(), v.double())
    with pytest.raises(ValueError, match="q_start=-1"):
        partial_attention(q, k, v, q_start=-1)


@pytest.mark.fast
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    m=st.integers(1, 70),
    starts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    kind=st.sampled_from(["none", "causal", "window", "causal_window"]),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3)]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_position(n, m, starts, kind, heads, seed):
    torch.manual_seed(seed)
    mask = MaskSpec(**mask_parts(1, 1, 30)[kind])
    tensors = inputs(1, *heads, n=n, m=m, dim=4)
    q_start, k_start = starts
    check(
        lambda *t: partial_attention(*t, mask, q_start=q_start, k_start=k_start),
        tensors,
        mask,
        q_positions=torch.arange(n) + q_start,
        k_positions=torch.arange(m) + k_start,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_kernels(dtype, kind):
    parts = mask_parts(2, 4, 130)[kind]
    mask = MaskSpec(**parts)
    moved = MaskSpec(
        **{k: v.cuda() if hasattr(v, "cuda") else v for k, v in parts.items()}
    )
    tensors = inputs(n=130, dim=32, dtype=dtype)

    def on_gpu(*t):
        out, lse = partial_attention(*(x.cuda() for x in t), moved)
        return out.cpu(), lse.cpu()

    check(on_gpu, tensors, mask, False, 2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.fast
def test_a_second_derivative_is_refused():
    q, k, v = (t.requires_grad_() for t in inputs())
    out, _ = partial_attention(q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(grad.sum(), q)


@pytest.mark.critical
@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-30])
@pytest.mark.parametrize("causal", [False, True])
def test_any_finite_scale(scale, causal):
    tensors = [torch.randn(1, 2, 65, 16) for _ in range(3)]
    mask, d_out = MaskSpec(causal=causal), torch.randn(1, 2, 65, 16)
    found = gradients(
        lambda *t: partial_attention(*t, mask, scale=scale), tensors, d_out
    )
    wanted = gradients(
        lambda *t: dense_attention(*t, mask, scale),
        [t.double() for t in tensors],
        d_out,
    )
    pairs = zip((*found[:2], *found[2]), (*wanted[:2], *wanted[2]), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="scale=inf"):
        partial_attention(*tensors, scale=float("inf"))
