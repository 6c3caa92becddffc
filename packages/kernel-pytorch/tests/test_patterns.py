# SPDX-License-Identifier: Apache-2.0
"""Patterns and selection against slow loops written out here, in float64."""

import itertools
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
from kernel_pytorch.attention import selection as module
from kernel_pytorch.attention.selection import (
    admissible_blocks,
    block_mass,
    select_blocks,
)

sys.path.insert(0, str(Path(__file__).parent))
from reference import dense_attention, gradients, mask_parts
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


def masses(mask, q, k, size):
    """Mean softmax weight by block over every 8th query, one query at a time."""
    seen, bias = token_mask(mask, *q.shape[:3], k.shape[2])
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    rows, columns = math.ceil(q.shape[2] / size), math.ceil(k.shape[2] / size)
    found = torch.zeros(*q.shape[:2], rows, columns, dtype=torch.float64)
    for b, h, row in itertools.product(*map(range, found.shape[:3])):
        start = row * size
        length = min(size, q.shape[2] - start)
        count = min(length, max(2, math.ceil(length / 8)))
        alive = 0
        for n in range(count):
            i = start + (n + 1) * length // count - 1
            visible = seen[b, h, i]
            if not visible.any():
                continue
            alive += 1
            logits = k[b, h] @ q[b, h, i].double() / math.sqrt(q.shape[3])
            logits = (logits + bias[b, h, i])[visible]
            weights = torch.zeros(k.shape[2], dtype=torch.float64)
            weights[visible] = torch.softmax(logits, 0)
            for j, part in enumerate(weights.split(size)):
                found[b, h, row, j] += part.sum()
        found[b, h, row] /= max(alive, 1)
    return found


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


@pytest.mark.parametrize("lengths", [(75, 75), (40, 90), (90, 40)])
def test_admissible_blocks_and_masses(lengths):
    q, k, _ = inputs(*lengths)
    for name, parts in mask_parts(2, 4, *lengths).items():
        mask = MaskSpec(**parts)
        wanted = admissible(mask, q, k, 16)
        got = admissible_blocks(q, k, mask, 16).expand_as(wanted)
        assert torch.equal(got, wanted), name
        whole = q.shape[2] // 16
        ranges = [(0, whole), (whole, whole + 1)]
        got = torch.cat([block_mass(q, k, mask, 16, *r) for r in ranges], 2)
        wanted = masses(mask, q, k, 16)
        torch.testing.assert_close(got.double(), wanted, atol=1e-6, rtol=1e-4, msg=name)
        index = build_block_index(q, k, "dynamic_threshold", block_size=16, mask=mask)
        assert not (index.block_mask() & ~admissible(mask, q, k, 16)).any(), name


@pytest.mark.parametrize("causal", [False, True])
def test_dynamic_keeps_the_best_masses_and_bounds(causal):
    q, k, _ = inputs(333, heads=2, kv_heads=1)
    q = q * 3
    mask = MaskSpec(causal=causal)
    found = select_blocks(q, k, mask, sparsity_ratio=0.5, block_size=16)
    kept, mass = found.index.block_mask(), masses(mask, q, k, 16)
    open_blocks = admissible(mask, q, k, 16)
    for b, h, row in itertools.product(*map(range, kept.shape[:3])):
        allowed = open_blocks[b, h, row].nonzero().flatten().tolist()
        budget = max(1, round(0.5 * len(allowed)))
        slots = int(budget / 10 + 0.5)
        order = sorted(allowed, key=lambda j: -mass[b, h, row, j])
        if causal:
            order = [row, *(j for j in order if j != row)]
        chosen = order[: budget - slots]
        mean = q[b, h, row * 16 : row * 16 + 16].double().mean(0)
        ends = [(part.amin(0), part.amax(0)) for part in k[b, 0].double().split(16)]
        bounds = [torch.maximum(mean * low, mean * high).sum() for low, high in ends]
        left = sorted(set(allowed) - set(chosen), key=lambda j: -bounds[j])
        chosen += left[:slots]
        assert kept[b, h, row].nonzero().flatten().tolist() == sorted(chosen)
        missed = float(mass[b, h, row].sum() - mass[b, h, row, chosen].sum())
        assert float(found.missed_mass[b, h, row]) == pytest.approx(missed, abs=1e-5)


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("causal", [False, True])
def test_coverage_is_reached_by_the_fewest_blocks(causal, share):
    q, k, _ = inputs(250, heads=2)
    q = q * 2
    mask = MaskSpec(causal=causal)
    found = select_blocks(q, k, mask, coverage=share, block_size=16)
    kept, mass = found.index.block_mask(), masses(mask, q, k, 16)
    assert float(found.missed_mass.max()) <= 1 - share + 1e-5
    for b, h, row in itertools.product(*map(range, kept.shape[:3])):
        chosen = kept[b, h, row]
        if causal:
            assert chosen[row]
        assert float(mass[b, h, row, chosen].sum()) >= share - 1e-5
        others = chosen.clone()
        others[row if causal else 0] &= not causal
        if others.any() and share < 1:
            least = mass[b, h, row, others].min()
            assert float(mass[b, h, row, chosen].sum() - least) < share + 1e-5
    public = build_block_index(
        q, k, "learned", coverage=share, block_size=16, mask=mask
    )
    assert torch.equal(public.counts, found.index.counts)


def with_needle(q_len, kv_len, dim, seed, row):
    """Random q and k; the queries of block ``row`` look for one key, far from it."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 1, q_len, dim, generator=rng)
    k = torch.randn(1, 1, kv_len, dim, generator=rng)
    way = torch.nn.functional.normalize(torch.randn(dim, generator=rng), dim=0)
    at = int(torch.randint(row * 64 // 2, (1,), generator=rng))
    if q_len < kv_len:
        at = kv_len - 1 - at
    k[0, 0, at] = way * 2 * dim**0.5
    q[0, 0, row * 64 : row * 64 + 64] += way * dim**0.5
    return q, k, at // 64


def finds(q, k, block, row, mask):
    index = build_block_index(q, k, "dynamic_threshold", mask=mask)
    return bool(index.block_mask()[0, 0, row, block])


def test_one_strong_far_key_is_kept():
    for seed in range(5):
        q, k, block = with_needle(4096, 4096, 32, seed, 60)
        assert finds(q, k, block, 60, MaskSpec(causal=True))


@pytest.mark.slow
def test_one_strong_far_key_among_16k_is_kept():
    for seed in range(40):
        q, k, block = with_needle(1024, 16384, 64, seed, 15)
        assert finds(q, k, block, 15, None)


def test_bound_finds_what_the_sample_misses():
    q, k, block = with_needle(2048, 2048, 32, 0, 30)
    # The queries that are sampled know nothing of the needle, the others do.
    q[0, 0, 30 * 64 + 7 : 31 * 64 : 8] = torch.randn(8, 32)
    k[0, 0, block * 64 : block * 64 + 64] *= 3
    mass = block_mass(q, k, MaskSpec(), 64, 30, 31)[0, 0, 0]
    rank = int((mass > mass[block]).sum())
    index = select_blocks(q, k, sparsity_ratio=0.75).index
    assert index.counts[0, 0, 30] == 8
    assert index.block_mask()[0, 0, 30, block], rank


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


def test_chunks_change_nothing_and_bound_memory(monkeypatch):
    q, k, _ = inputs(700, batch=1)
    mask = MaskSpec(causal=True)
    whole = select_blocks(q, k, mask, block_size=16)
    sizes = []
    monkeypatch.setattr(module, "_CHUNK", 4 * 2 * 700 * 3)
    real = module._masked
    monkeypatch.setattr(
        module, "_masked", lambda t, *rest: sizes.append(t.numel()) or real(t, *rest)
    )
    parts = select_blocks(q, k, mask, block_size=16)
    assert torch.equal(whole.index.block_mask(), parts.index.block_mask())
    assert len(sizes) == 16
    assert max(sizes) <= module._CHUNK


def test_hidden_nan_stays_hidden():
    q, k, _ = inputs(200)
    padding = torch.ones(2, 200, dtype=torch.bool)
    padding[:, 150:] = False
    mask = MaskSpec(causal=True, key_padding=padding)
    options = {"sparsity_ratio": 0.5, "block_size": 16, "mask": mask}
    clean = build_block_index(q, k, "dynamic_threshold", **options)
    k[:, :, 150:] = float("nan")
    dirty = build_block_index(q, k, "dynamic_threshold", **options)
    assert torch.equal(clean.block_mask(), dirty.block_mask())


def test_nan_in_view_changes_no_budget():
    q, k, _ = inputs(200)
    clean = build_block_index(q, k, "dynamic_threshold", block_size=16)
    k[:, :, 20] = float("nan")
    mask = MaskSpec(causal=True)
    dirty = build_block_index(q, k, "dynamic_threshold", block_size=16)
    assert torch.equal(clean.counts, dirty.counts)
    dirty = build_block_index(q, k, "dynamic_threshold", block_size=16, mask=mask)
    assert dirty.block_mask().diagonal(dim1=2, dim2=3).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    q, k, _ = inputs(256)
    q, k = q.to(dtype), k.to(dtype)
    got = build_block_index(q, k, "dynamic_threshold", block_size=32)
    wanted = build_block_index(q.float(), k.float(), "dynamic_threshold", block_size=32)
    assert torch.equal(got.block_mask(), wanted.block_mask())


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
