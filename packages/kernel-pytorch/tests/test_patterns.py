# SPDX-License-Identifier: Apache-2.0
"""Patterns against slow loops written out here; the choice by content has its own."""

import math
import sys
from pathlib import Path

import pytest
import torch

from kernel_pytorch.attention import (
    BlockIndex,
    MaskSpec,
    SparsePattern,
    block_sparse_attention,
    build_block_index,
)

sys.path.insert(0, str(Path(__file__).parent))
from reference import dense_attention, gradients
from reference import dense_mask as token_mask

RULES = ("random", "block_sparse", "strided", "local_global")
PATTERNS = (*RULES, "dynamic_threshold", "learned")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(q_len, kv_len=None, heads=4, kv_heads=2, batch=2, dim=8):
    kv_len = q_len if kv_len is None else kv_len
    q = torch.randn(batch, heads, q_len, dim)
    return q, *torch.randn(2, batch, kv_heads, kv_len, dim)


def blocks_of(seen, size):
    """Bool [B, H, Tq, Tk]: does the block hold a True? By a loop over blocks."""
    batch, heads, rows, columns = seen.shape
    shape = batch, heads, math.ceil(rows / size), math.ceil(columns / size)
    found = torch.zeros(shape, dtype=torch.bool)
    for row in range(shape[2]):
        for column in range(shape[3]):
            part = seen[:, :, row * size : (row + 1) * size]
            part = part[..., column * size : (column + 1) * size]
            found[:, :, row, column] = part.flatten(2).any(-1)
    return found


def admissible(mask, q, k, size):
    return blocks_of(token_mask(mask, *q.shape[:3], k.shape[2])[0], size)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_is_dense_under_the_index(pattern, causal):
    q, k, v = inputs(200)
    mask = MaskSpec(causal=causal)
    options = {"sparsity_ratio": 0.6, "block_size": 16, "mask": mask}
    index = build_block_index(q.requires_grad_(), k, pattern, **options)
    index.validate()
    assert not index.blocks.requires_grad
    both = index.dense_mask()
    if causal:
        both = both & torch.ones(200, 200, dtype=torch.bool).tril()

    def sparse(q, k, v):
        return block_sparse_attention(q, k, v, index, mask, return_lse=True)

    def dense(q, k, v):
        return dense_attention(q, k, v, MaskSpec(bias=both))

    d_out = torch.randn(q.shape)
    out, lse, grads = gradients(sparse, (q, k, v), d_out)
    wanted, wanted_lse, wanted_grads = gradients(dense, (q, k, v), d_out)
    pairs = zip((out, lse, *grads), (wanted, wanted_lse, *wanted_grads), strict=True)
    for got, right in pairs:
        torch.testing.assert_close(got.double(), right.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("lengths", [(160, 160), (150, 150), (70, 200), (200, 70)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_budgets_are_exact(pattern, lengths, ratio):
    q, k, _ = inputs(*lengths)
    for mask in (MaskSpec(), MaskSpec(causal=True), MaskSpec(causal=True, window=60)):
        options = {"sparsity_ratio": ratio, "block_size": 16, "mask": mask}
        index = build_block_index(q, k, pattern, **options)
        index.validate()
        open_blocks, kept = admissible(mask, q, k, 16), index.block_mask()
        assert not (kept & ~open_blocks).any()
        count = open_blocks.sum(-1)
        wanted = [max(1, round((1 - ratio) * n)) if n else 0 for n in range(99)]
        wanted = torch.tensor(wanted)[count[: len(kept)]]
        if pattern == "local_global" and not mask.causal:
            wanted[..., 0] = count[: len(kept), :, 0]
        assert index.counts.tolist() == wanted.tolist()
        if ratio == 0:
            assert torch.equal(kept, open_blocks[: len(kept)])
        if mask.causal:
            row = torch.arange(min(kept.shape[2:]))
            diagonal = open_blocks[: len(kept), :, row, row]
            assert torch.equal(kept[..., row, row], diagonal)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_same_seed_same_index(pattern):
    q, k, _ = inputs(300)
    found = []
    for seed in (5, 5, 6):
        rng = torch.Generator().manual_seed(seed)
        index = build_block_index(
            q, k, pattern, sparsity_ratio=0.7, block_size=16, generator=rng
        )
        found.append(index.block_mask())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2]) == (pattern != "random")
    if pattern == "random":
        assert not torch.equal(found[0][:, 0], found[0][:, 1])


def kept_of(pattern, causal=False, row=10, **options):
    q, k, _ = inputs(320, batch=1, heads=1, kv_heads=1)
    mask = MaskSpec(causal=causal)
    index = build_block_index(q, k, pattern, block_size=16, mask=mask, **options)
    return index.block_mask()[0, 0, row].nonzero().flatten().tolist()


def test_shapes_of_the_rules():
    half = {"sparsity_ratio": 0.7}
    assert kept_of("block_sparse", **half) == [7, 8, 9, 10, 11, 12]
    assert kept_of("block_sparse", row=0, **half) == [0, 1, 2, 3, 4, 5]
    assert kept_of("block_sparse", True, 19, window_blocks=3) == [17, 18, 19]
    assert kept_of("strided", True, 19, **half) == [1, 7, 13, 17, 18, 19]
    assert kept_of("strided", True, 19, stride=4, **half) == [7, 11, 15, 17, 18, 19]
    assert kept_of("strided", True, 9, window_blocks=2, stride=3) == [0, 3, 6, 8, 9]
    assert kept_of("strided", True, 9, window_blocks=4) == [1, 5, 6, 7, 8, 9]
    found = kept_of("local_global", True, 19, global_blocks=2, **half)
    assert found == [0, 1, 16, 17, 18, 19]
    assert kept_of("local_global", row=10, **half) == [0, 8, 9, 10, 11, 12]
    assert kept_of("local_global", row=0, **half) == list(range(20))
    assert kept_of("local_global", row=5, window_blocks=1) == [0, 5]
    assert kept_of("local_global", row=0, global_blocks=0, window_blocks=2) == [0, 1]


def test_learned_adds_the_gate():
    q, k, _ = inputs(256)
    options = {"sparsity_ratio": 0.75, "block_size": 16}
    plain = build_block_index(q, k, SparsePattern.DYNAMIC_THRESHOLD, **options)
    logits = torch.zeros(2, 4, 16, 16)
    same = build_block_index(q, k, "learned", gate=lambda q, k: logits, **options)
    assert torch.equal(plain.block_mask(), same.block_mask())
    logits[..., 3] = 50.0
    found = build_block_index(q, k, "learned", gate=lambda q, k: logits, **options)
    assert found.block_mask()[..., 3].all()
    with pytest.raises(ValueError, match=r"block logits of shape \(2, 4, 16, 15\)"):
        build_block_index(
            q, k, "learned", gate=lambda q, k: logits[..., :15], **options
        )


@pytest.mark.parametrize("lengths", [(0, 0), (0, 5), (5, 0), (1, 1), (1, 100)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_length(pattern, lengths):
    q, k, _ = inputs(*lengths)
    index = build_block_index(q, k, pattern, block_size=16)
    assert isinstance(index, BlockIndex)
    assert (index.q_len, index.kv_len) == lengths
    each = 7 if pattern == "local_global" and lengths == (1, 100) else 1
    assert set(index.counts.flatten().tolist()) <= {each if lengths[1] else 0}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity_ratio": 0.96}, r"sparsity_ratio=0.96: .*\[0, 0.95\]"),
        ({"sparsity_ratio": -0.1}, r"sparsity_ratio=-0.1"),
        ({"sparsity_ratio": float("nan")}, r"sparsity_ratio=nan"),
        ({"coverage": 0.0}, r"coverage=0.0: .*\(0, 1\]"),
        ({"coverage": 1.5}, r"coverage=1.5"),
        ({"coverage": 0.5, "pattern": "random"}, "coverage=0.5: RANDOM"),
        ({"pattern": "spiral"}, "pattern='spiral': .*'random'.*'learned'"),
        ({"block_size": 0}, "block_size=0"),
        ({"window_blocks": 0}, "window_blocks=0"),
        ({"global_blocks": -1}, "global_blocks=-1"),
        ({"stride": 0}, "stride=0"),
        ({"gate": lambda q, k: q}, "gate: DYNAMIC_THRESHOLD"),
        ({"q": torch.zeros(2, 3, 8)}, r"q \(2, 3, 8\)"),
        ({"q": torch.zeros(2, 3, 8, 8)}, "multiple"),
    ],
)
def test_errors_name_the_value(options, match):
    q, k, _ = inputs(64)
    whole = {"q": q, "k": k, "pattern": "dynamic_threshold"} | options
    with pytest.raises(ValueError, match=match):
        build_block_index(**whole)
