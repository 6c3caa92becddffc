# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention as an operator: compiled, transformed, and called raw."""

import pytest
import torch

from kernel_pytorch.attention.block_index import BlockIndex
from kernel_pytorch.attention.block_sparse import block_sparse_attention
from kernel_pytorch.attention.masks import MaskSpec


def inputs(tokens, kv_heads=2, dtype=torch.float32):
    """Leaves q, k, v of two heads, and an index that keeps most blocks of 16."""
    torch.manual_seed(0)
    heads = (2, kv_heads, kv_heads)
    leaves = [
        torch.randn(1, h, tokens, 8, dtype=dtype, requires_grad=True) for h in heads
    ]
    blocks = -(-tokens // 16)
    kept = torch.rand(1, 2, blocks, blocks) < 0.7
    return leaves, BlockIndex.from_block_mask(kept, 16, tokens, tokens)


@pytest.mark.fast
def test_operators_are_well_formed():
    tensors, index = inputs(40, kv_heads=1)
    none = [None] * 5
    args = (*tensors, index.counts, index.blocks, *none, 16, True, 0, 0.3)
    torch.library.opcheck(torch.ops.kernel_pytorch.block_sparse_forward, args)


@pytest.mark.slow
def test_compile_without_a_graph_break():
    tensors, index = inputs(64, kv_heads=1)
    mask = MaskSpec(causal=True, key_padding=torch.arange(64)[None] > 3)

    def run(q, k, v):
        out = block_sparse_attention(q * 2, k, v, index, mask, remainder=True)
        return out.square()

    wanted = run(*tensors)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = compiled(*tensors)
    assert torch.equal(found, wanted)
    right = torch.autograd.grad(wanted.sum(), tensors)
    for a, b in zip(torch.autograd.grad(found.sum(), tensors), right, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_call_reads_nothing_outside():
    (q, k, v), index = inputs(64)
    q, k, v = (t.detach() for t in (q, k, v))
    options = {"fullgraph": True, "backend": "eager"}
    run = torch.compile(
        lambda keep: block_sparse_attention(q, k, v, index, MaskSpec(key_padding=keep)),
        **options,
    )
    with pytest.raises(ValueError, match=r"key_padding \(1, 5\): it must be \(1, 64\)"):
        run(torch.ones(1, 5, dtype=torch.bool))
    bias = torch.zeros(64, requires_grad=True)
    run = torch.compile(
        lambda bias: block_sparse_attention(q, k, v, index, MaskSpec(bias=bias)),
        **options,
    )
    with pytest.raises(Exception, match=r"mask\.bias requires a gradient"):
        run(bias)
    raw = torch.ops.kernel_pytorch.block_sparse_forward
    numbers = (16, False, 0, 1.0)
    parts = (index.counts, index.blocks, None, None, None, None, None)
    with pytest.raises(ValueError, match="k and v must be alike"):
        raw(q, k, v[:, :, :5], *parts, *numbers)


# torch makes its own forward-mode formulas by it.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_formula_is_refused(dtype):
    (q, k, v), index = inputs(64, dtype=dtype)
    out = block_sparse_attention(q, k, v, index)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.square().sum().backward()
    q, k, v = (t.detach() for t in (q, k, v))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: block_sparse_attention(q, k, v, index), (q,), (q,))
    with pytest.raises(ValueError, match="scale=nan"):
        block_sparse_attention(q, k, v, index, scale=float("nan"))
