# SPDX-License-Identifier: Apache-2.0
"""What test_triton checks of the Triton kernels, on whatever device is the default.

As a script it runs them on CPU tensors under Triton's interpreter, which must be
switched on before triton is imported: ``python triton_cases.py fixed``, or ``random``.
"""

import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import test_block_sparse as shared

from kernel_pytorch.attention import block_sparse, triton_launch
from kernel_pytorch.attention.masks import MaskSpec

CASES = {}


def case(name, *arguments):
    def keep(function):
        CASES[name] = partial(function, *arguments)
        return function

    return keep


def check(dtype, sizes, lists, mask=None, batch=1, **options):
    """Sizes: heads, kv_heads, q_len, kv_len, dim; lists: block, keep, index batch."""
    (block, keep, copies), (heads, kv_heads, q_len, kv_len, dim) = lists, sizes
    tensors = shared.inputs(batch, heads, kv_heads, q_len, kv_len, dim, dtype)
    index = shared.random_index(heads, q_len, kv_len, block, keep, copies)
    assert block_sparse.kernel_for(tensors[0], index, mask) == "triton"
    rtol = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    return shared.check(tensors, index, mask, rtol=rtol, **options)


def masks(q_len, kv_len):
    longest = max(q_len, kv_len)
    place = torch.arange(kv_len)
    everywhere = torch.arange(longest).expand(2, -1)
    return {
        "none": MaskSpec(),
        "causal": MaskSpec(causal=True),
        # The edge between FULL and MIXED, at 18 queries in blocks of 16.
        "window": MaskSpec(window=17),
        "causal_window": MaskSpec(causal=True, window=20),
        "padding": MaskSpec(key_padding=place.expand(2, -1) % 19 != 3),
        "tail": MaskSpec(key_padding=torch.stack([place < kv_len // 2, place >= 0])),
        "documents": MaskSpec(documents=everywhere // 20),
        "mixed_documents": MaskSpec(documents=everywhere % 3, causal=True),
    }


for name in masks(1, 1):

    @case(f"mask-{name}", name)
    def check_mask(name):
        sizes, lists, mask = (1, 1, 18, 37, 16), (16, 0.6, 1), masks(18, 37)[name]
        remainder = name not in ("none", "causal_window")
        check(torch.float32, sizes, lists, mask, batch=2, remainder=remainder)


for dim in (1, 200):

    @case(f"dim-{dim}", dim)
    def check_dim(dim):
        check(torch.float32, (1, 1, 20, 34, dim), (16, 0.7, 2), batch=2)


for size in (48, 128):

    @case(f"block-{size}", size)
    def check_block(size):
        sizes = (1, 1, size + 5, size + 9, 16)
        mask = MaskSpec(causal=True)
        check(torch.float16, sizes, (size, 0.8, 1), mask, remainder=True)


@case("float16")
def check_float16():
    sizes = (2, 1, 34, 34, 24)
    check(torch.float16, sizes, (32, 0.3, 1), MaskSpec(causal=True), remainder=True)


@case("lists longer than a chunk")
def check_chunks():
    before, triton_launch._CHUNK = triton_launch._CHUNK, 2
    try:
        sizes = (1, 1, 17, 100, 16)
        check(torch.float32, sizes, (16, 0.6, 1), remainder=True)
    finally:
        triton_launch._CHUNK = before


@case("strides")
def check_strides():
    """Heads between tokens and features, one k for all heads, an expanded gradient."""
    q = torch.randn(1, 20, 2, 17).transpose(1, 2).requires_grad_()
    k = torch.randn(1, 1, 34, 17).expand(-1, 2, -1, -1).requires_grad_()
    v = torch.randn(1, 2, 17, 34).transpose(2, 3).requires_grad_()
    index = shared.random_index(2, 20, 34, 16, 0.7)
    shared.check([q, k, v], index)
    out = shared.block_sparse_attention(q, k, v, index)
    found = torch.autograd.grad(out.sum(), [q, k, v])
    wanted = shared.dense(q, k, v, index, MaskSpec())[0].sum()
    for a, b in zip(found, torch.autograd.grad(wanted, [q, k, v]), strict=True):
        shared.close(a, b, 2e-5)


@case("rows without keys")
def check_rows_without_keys():
    shared.test_rows_without_keys(None)


@case("large scores")
def check_large_scores():
    q, k, v = shared.inputs(1, 1, 1, 40, 100, 16)
    with torch.no_grad():
        k.mul_(torch.linspace(1, 40, 100)[:, None])
    index = shared.random_index(1, 40, 100, 16, 0.8)
    shared.check([q, k, v], index, rtol=1e-4, scale=0.7)


@case("short")
def check_short():
    for q_len, kv_len in ((0, 5), (5, 0), (1, 1)):
        shared.test_short(None, q_len, kv_len)


@case("one result used")
def check_one_result():
    shared.test_only_one_result_used(None)


@case("later keys do not leak")
def check_later_keys():
    """A NaN reaches only the queries that see it, in gradients, too."""
    tensors = shared.inputs(1, 1, 1, 36, 36, 16)
    index = shared.random_index(1, 36, 36, 16, 1.0)
    mask = MaskSpec(causal=True)
    wanted = shared.block_sparse_attention(*tensors, index, mask)
    with torch.no_grad():
        for t in tensors:
            t[:, :, 20] = math.nan
    out = shared.block_sparse_attention(*tensors, index, mask)
    assert torch.equal(out[:, :, :20], wanted[:, :, :20])
    assert out[:, :, 20:].isnan().all()
    (grad,) = torch.autograd.grad(out[:, :, :20].square().sum(), tensors[:1])
    assert grad[:, :, :20].isfinite().all()


@case("hidden keys do not leak")
def check_hidden_keys():
    """NaN and inf in keys and values that nobody sees change no bit."""
    tensors = shared.inputs(1, 1, 1, 20, 20, 16)
    index = shared.random_index(1, 20, 20, 16, 1.0)
    padding = torch.rand(1, 20) > 0.3
    mask = MaskSpec(key_padding=padding, causal=True)
    clean = shared.check(tensors, index, mask, remainder=True)
    for bad in (math.nan, math.inf):
        poisoned = [t.detach().clone() for t in tensors]
        for t in poisoned[1:]:
            t.transpose(1, 2)[~padding] = bad
        poisoned = [t.requires_grad_() for t in poisoned]
        out = shared.block_sparse_attention(*poisoned, index, mask, remainder=True)
        assert torch.equal(out, clean[0])
        for grad in torch.autograd.grad(out.square().sum(), poisoned):
            assert grad.isfinite().all()


@case("bad lists")
def check_bad_lists():
    for at, values in (
        ("counts", (-(2**31), 5)),
        ("blocks", (-1, 0, 2**31 - 1)),
    ):
        for value in values:
            shared.test_bad_index_is_refused(None, value, at)


def random_case(number):
    """Any shape, lists and mask; numbers differ in all of them."""
    torch.manual_seed(number)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), device="cpu"))]

    def upto(most):
        return int(torch.randint(1, most + 1, (), device="cpu"))

    kv_heads, q_len, kv_len, batch = pick(1, 2), upto(36), upto(36), pick(1, 2)
    sizes = (kv_heads * pick(1, 2), kv_heads, q_len, kv_len, upto(40))
    padding = torch.rand(batch, kv_len) < pick(0.5, 0.95)
    ids = torch.randint(0, 3, (batch, max(q_len, kv_len))).sort(1).values
    mask = MaskSpec(
        causal=pick(True, False),
        window=pick(None, upto(70)),
        key_padding=pick(None, padding),
        documents=pick(None, ids),
    )
    lists = (pick(16, 32), pick(0.0, 0.3, 0.7, 1.0), pick(1, batch))
    kind = pick(torch.float32, torch.float16)
    check(kind, sizes, lists, mask, batch=batch, remainder=pick(True, False))


def why_not():
    """Why the interpreter can't run a loop; triton 3.6 can't with NumPy 2.4."""
    import triton
    from triton import language as tl
    from triton.runtime.errors import InterpreterError

    @triton.jit
    def count(out, bound):
        for i in range(0, tl.load(bound)):
            tl.store(out + i, i)

    out, bound = torch.zeros(3, dtype=torch.int32), torch.tensor([3])
    try:
        count[(1,)](out, bound)
    except InterpreterError as broken:
        return f"triton {triton.__version__}'s interpreter: {broken}"
    assert out.tolist() == [0, 1, 2]
    return ""


def main():
    if reason := why_not():
        print("unusable:", reason)
        return
    triton_launch.unavailable = lambda device: ""
    block_sparse._fits_triton = triton_launch.fits
    chosen = {f"random {n}": partial(random_case, n) for n in range(10)}
    chosen = CASES if sys.argv[1] == "fixed" else chosen
    for name, run in chosen.items():
        torch.manual_seed(0)
        begin = time.perf_counter()
        run()
        print(f"passed: {name} ({time.perf_counter() - begin:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
