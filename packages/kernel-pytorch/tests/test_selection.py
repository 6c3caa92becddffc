# SPDX-License-Identifier: Apache-2.0
"""Choosing by content, in C and in torch, against slow loops in float64."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernel_pytorch.attention import MaskSpec, build_block_index
from kernel_pytorch.attention import selection as module
from kernel_pytorch.attention.native_selection import fits
from kernel_pytorch.attention.selection import (
    admissible_blocks,
    full_blocks,
    select_blocks,
)

sys.path.insert(0, str(Path(__file__).parent))
from reference import dense_mask, mask_parts

INF = float("inf")


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    torch.manual_seed(0)
    if request.param == "torch":
        monkeypatch.setattr(module, "fits", lambda *_: False)
    elif not fits(*torch.ones(2, 1, 1, 1, 1), MaskSpec(), 16):
        pytest.skip("there is no native kernel")
    return request.param


def inputs(q_len, kv_len=None, heads=2, kv_heads=1, batch=2, dim=8):
    kv_len = q_len if kv_len is None else kv_len
    q = torch.randn(batch, heads, q_len, dim)
    return q, torch.randn(batch, kv_heads, kv_len, dim)


class Dense:
    """One head's logits, and what is chosen of them, by the definitions."""

    def __init__(self, q, k, mask, size, b, h):
        kv = h * k.shape[1] // q.shape[1]
        seen, bias = dense_mask(mask, *q.shape[:3], k.shape[2])
        self.q, self.k = q[b, h].double(), k[b, kv].double()
        self.seen, self.bias, self.size = seen[b, h], bias[b, h], size
        shown = torch.ones(len(self.k), dtype=torch.bool)
        if mask.key_padding is not None:
            shown = mask.key_padding[b]
        self.k[~shown] = 0.0
        far = (self.k - self.k[shown].mean(0)).square().sum(-1)
        far[~shown] = -1.0
        self.far = [j for j in far.argsort(descending=True).tolist()[:32] if shown[j]]
        self.starts = range(0, len(self.k), size)

    def logits(self, query, row):
        found = self.k @ query / math.sqrt(self.q.shape[1]) + self.bias[row]
        return found.masked_fill(~self.seen[row], -INF)

    def examined(self, rows, grouped):
        """(query, row at which the mask is asked) of each."""
        length = len(rows)
        count = min(length, max(2, math.ceil(length / 11)))
        if grouped:
            ends = [(n + 1) * length // count for n in range(count)]
            groups = zip([0, *ends], ends, strict=False)
            return [(self.q[rows[i:j]].mean(0), rows[j - 1]) for i, j in groups]
        half = count - count // 2
        chosen = [rows[(n + 1) * length // half - 1] for n in range(half)]
        away = self.q - self.q[rows].mean(0)
        others = [i for i in rows if i not in chosen]
        others.sort(key=lambda i: -float(away[i].square().sum()))
        return [(self.q[i], i) for i in chosen + sorted(others[: count // 2])]

    def by_block(self, weights):
        return torch.stack([weights[s : s + self.size].sum() for s in self.starts])

    def judge(self, row, grouped=False):
        """Mass, lost mass, peak and the two halves' masses of a block of queries."""
        rows = range(row * self.size, min((row + 1) * self.size, len(self.q)))
        mass = torch.zeros(len(self.starts), dtype=torch.float64)
        lost, peak, halves, least = mass.clone(), mass.clone(), [[], []], INF
        alive = 0
        for n, (query, i) in enumerate(self.examined(list(rows), grouped)):
            logits = self.logits(query, i)
            lse = logits.logsumexp(0)
            weights = self.by_block((logits - lse).exp() if lse > -INF else logits * 0)
            weights = torch.zeros_like(mass) if lse == -INF else weights
            halves[n % 2].append(weights)
            if lse == -INF:
                continue
            alive, least = alive + 1, min(least, float(lse))
            mass, peak = mass + weights, torch.maximum(peak, weights)
            lost = lost + weights
            for j, s in enumerate(self.starts if grouped else ()):
                if self.seen[rows.start : rows.stop, s : s + self.size].all():
                    keys = self.k[s : s + self.size]
                    logit = keys.mean(0) @ query / math.sqrt(self.q.shape[1])
                    lost[j] -= min(float(weights[j]), len(keys) * (logit - lse).exp())
        for i in rows:
            logits = self.logits(self.q[i], i)[self.far]
            if not len(logits) or logits.max() == -INF:
                continue
            top = max(float(logits.max()), -INF if least == INF else least)
            for j, share in zip(self.far, (logits - top).exp().tolist(), strict=True):
                peak[j // self.size] = max(float(peak[j // self.size]), share)
        halves = [torch.stack(h).sum(0) if h else mass * 0 for h in halves]
        if any(h.sum() == 0 for h in halves):
            halves = [mass, mass]
        return mass / max(alive, 1), lost / max(alive, 1), peak, halves


def best(scores, allowed, count, first=()):
    first = [j for j in first if j in allowed]
    others = sorted(set(allowed) - set(first), key=lambda j: -float(scores[j]))
    return (first + others)[:count]


def held(halves, allowed, count, first):
    share = 0.0
    for ours, theirs in (halves, halves[::-1]):
        chosen = best(ours, allowed, count, first)
        share += float(theirs[chosen].sum() / theirs.sum()) / 2
    return share


def expected(dense, row, causal, share=0.5, coverage=None, grouped=False):
    """The blocks chosen for a row, and the missed mass."""
    size = dense.size
    part = dense.seen[row * size : (row + 1) * size]
    allowed = [j for j, s in enumerate(dense.starts) if part[:, s : s + size].any()]
    if not allowed:
        return [], 0.0
    first = [row] if causal else []
    mass, lost, peak, halves = dense.judge(row, grouped)
    if mass.sum() == 0:
        if coverage is not None:
            return allowed, 0.0
        halves = [torch.ones_like(mass)] * 2
    budget = max(1, round(share * len(allowed)))
    if coverage is not None:
        budget = 1
        while budget < len(allowed) and held(halves, allowed, budget, first) < coverage:
            budget += 1
        chosen = best(mass, allowed, budget, first)
    else:
        chosen = best(lost, allowed, budget - int(budget / 10 + 0.5), first)
        chosen += best(peak, sorted(set(allowed) - set(chosen)), budget - len(chosen))
    missed = 1 - held(halves, allowed, budget, first) if mass.sum() else 0.0
    return sorted(chosen), missed


def check(found, q, k, mask, size, **options):
    kept = found.index.block_mask()
    found.index.validate()
    for b, h in {(0, 0), (q.shape[0] - 1, q.shape[1] - 1)}:
        dense = Dense(q, k, mask, size, b, h)
        for row in range(kept.shape[2]):
            chosen, missed = expected(dense, row, mask.causal, **options)
            where = f"batch {b}, head {h}, row {row}"
            assert kept[b, h, row].nonzero().flatten().tolist() == chosen, where
            got = float(found.missed_mass[b, h, row])
            assert got == pytest.approx(missed, abs=1e-5), where


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_choice_is_the_definitions(path, causal, grouped):
    mask = MaskSpec(causal=causal)
    for length, size in ((333, 16), (530, 64)):
        q, k = inputs(length)
        options = {"sparsity_ratio": 0.5, "block_size": size, "remainder": grouped}
        found = select_blocks(q * 2, k, mask, **options)
        check(found, q * 2, k, mask, size, grouped=grouped)


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("causal", [False, True])
def test_coverage_is_the_definition(path, causal, share):
    q, k = inputs(250)
    mask = MaskSpec(causal=causal)
    found = select_blocks(q * 2, k, mask, coverage=share, block_size=32)
    assert float(found.missed_mass.max()) <= 1 - share + 1e-5
    check(found, q * 2, k, mask, 32, coverage=share)


@pytest.mark.parametrize("lengths", [(75, 75), (40, 90), (90, 40)])
def test_every_mask(path, lengths):
    q, k = inputs(*lengths, heads=4, kv_heads=2)
    for name, parts in mask_parts(2, 4, *lengths).items():
        mask = MaskSpec(**parts)
        seen = dense_mask(mask, *q.shape[:3], k.shape[2])[0]
        for blocks, whole in ((admissible_blocks, False), (full_blocks, True)):
            got = blocks(q, k, mask, 16).expand(2, 4, -1, -1)
            for row, column in itertools.product(*map(range, got.shape[2:])):
                part = seen[:, :, row * 16 : row * 16 + 16]
                part = part[..., column * 16 : column * 16 + 16].flatten(2)
                right = part.all(-1) if whole else part.any(-1)
                assert torch.equal(got[:, :, row, column], right), name
        for grouped in (False, True):
            if grouped and mask.bias is not None:
                continue
            options = {"sparsity_ratio": 0.5, "block_size": 16, "remainder": grouped}
            found = select_blocks(q, k, mask, **options)
            check(found, q, k, mask, 16, grouped=grouped)


def test_a_far_key_counts_only_for_who_sees_it(path):
    """The last query of a block wants a key that the mask leaves to the first only."""
    q, k = inputs(320, heads=1, batch=1, dim=16)
    way = torch.nn.functional.normalize(torch.randn(16), dim=0)
    ids = torch.full((1, 320), 9)
    ids[:, 80:88], ids[:, 160] = 7, 7
    for parts, at in (({"window": 90}, 85), ({"documents": ids}, 84)):
        keys, queries = k.clone(), q.clone()
        keys[0, 0, at], queries[0, 0, 175] = way * 20, way * 20
        mask = MaskSpec(**parts)
        found = select_blocks(queries, keys, mask, sparsity_ratio=0.4, block_size=16)
        check(found, queries, keys, mask, 16, share=0.6)


def test_native_is_the_torch_path():
    """Larger than the loops above can be: other tiles, groups of heads, a gate."""
    torch.manual_seed(0)
    if not fits(*torch.ones(2, 1, 1, 1, 1), MaskSpec(), 16):
        pytest.skip("there is no native kernel")
    ids = torch.arange(900).expand(2, -1) // 250
    padding = torch.rand(2, 900) < 0.8
    for size, dim, grouped in ((64, 64, False), (128, 80, True), (48, 17, True)):
        q, k = inputs(700, 900, heads=4, kv_heads=2, dim=dim)
        rows, columns = -(-700 // size), -(-900 // size)
        for parts in (
            {},
            {"causal": True, "key_padding": padding},
            {"window": 200, "documents": ids},
        ):
            for logits in (None, torch.randn(2, 4, rows, columns)):
                mask, choice = (
                    MaskSpec(**parts),
                    module.Choice(size, 0.4, None, grouped),
                )
                native = module.select_native(q, k, mask, logits, choice)
                plain = module._select_by_torch(q, k, mask, logits, choice)
                assert torch.equal(native[0], plain[0])
                for b, h, row in itertools.product(range(2), range(4), range(rows)):
                    count = int(plain[0][b, h, row])
                    lists = [found[1][b, h, row, :count] for found in (native, plain)]
                    assert torch.equal(*lists), (parts.keys(), size, b, h, row, lists)
                torch.testing.assert_close(native[2], plain[2], atol=1e-5, rtol=0)


def true_masses(q, k, size):
    logits = q.double() @ k.double().transpose(2, 3) / math.sqrt(q.shape[3])
    by_block = logits.softmax(-1).unflatten(3, (-1, size)).sum(-1)
    return by_block.unflatten(2, (-1, size)).mean(3)


def clustered(length, dim, seed):
    """Runs of 32 tokens about one of 24 topics."""
    rng = torch.Generator().manual_seed(seed)
    topics = torch.randn(24, dim, generator=rng)

    def tokens(noise):
        which = torch.randint(24, (length // 32,), generator=rng)
        which = which.repeat_interleave(32)
        return topics[which] + torch.randn(length, dim, generator=rng) * noise

    return tokens(1.2)[None, None], tokens(0.6)[None, None]


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("kind", ["random", "peaked", "clustered"])
def test_coverage_holds_for_all_queries(kind, share):
    """Not of the examined queries, of all, on the average of the rows, within 0.02."""
    torch.manual_seed(0)
    q, k = inputs(2048, heads=1, batch=1, dim=64)
    q = q * 2 if kind == "peaked" else q
    q, k = clustered(2048, 64, 0) if kind == "clustered" else (q, k)
    found = select_blocks(q, k, coverage=share)
    truth = (true_masses(q, k, 64) * found.index.block_mask()).sum(-1)
    assert float(truth.mean()) >= share - 0.02
    assert float(truth.mean()) <= share + 0.15
    estimate = 1 - found.missed_mass.double()
    assert abs(float((estimate - truth).mean())) <= 0.05


def with_needle(seed, whole, length=16384, dim=64):
    """Random q and k; one query of a block, or all, want one key far away."""
    rng = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, length, dim, generator=rng)
    way = torch.nn.functional.normalize(torch.randn(dim, generator=rng), dim=0)
    blocks = length // 64
    row = int(torch.randint(blocks // 2, blocks, (1,), generator=rng))
    at = int(torch.randint(row * 32, (1,), generator=rng))
    strong = 1 + seed % 3 / 2  # the key's part, or the query's, or both alike
    k[0, 0, at] = way * strong * dim**0.5
    one = row * 64 + int(torch.randint(64, (1,), generator=rng))
    who = slice(row * 64, row * 64 + 64) if whole else slice(one, one + 1)
    q[0, 0, who] += way * 2 / strong * dim**0.5
    return q, k, row, at // 64


def found_needles(trials, whole):
    count = 0
    for seed in range(trials):
        q, k, row, block = with_needle(seed, whole)
        mask = MaskSpec(causal=seed % 2 == 0)
        index = build_block_index(q, k, "dynamic_threshold", mask=mask)
        count += bool(index.block_mask()[0, 0, row, block])
    return count


@pytest.mark.parametrize("whole", [True, False])
def test_one_strong_far_key_is_kept(whole):
    assert found_needles(9, whole) == 9


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_one_strong_far_key_is_kept_in_200_trials(whole):
    assert found_needles(200, whole) >= 198


def test_the_remainder_changes_what_matters(path):
    """A block of equal keys is left to its mean, however heavy it is."""
    q, k = inputs(256, heads=1, batch=1, dim=16)
    way = torch.nn.functional.normalize(torch.randn(16), dim=0)
    q = q + way * 4
    k[0, 0, 32:48] = way * 12
    k[0, 0, 80:96] = way * 12 + torch.randn(16, 16) * 2
    options = {"sparsity_ratio": 0.9, "block_size": 16}
    plain = select_blocks(q, k, **options).index.block_mask()
    rest = select_blocks(q, k, remainder=True, **options).index.block_mask()
    assert plain[0, 0, :, 2].all()
    assert not rest[0, 0, :, 2].any()
    assert rest[0, 0, :, 5].all()


def test_chunks_change_nothing_and_bound_memory(monkeypatch):
    torch.manual_seed(0)
    q, k = inputs(700, batch=1)
    mask, choice = MaskSpec(causal=True), module.Choice(16, 0.1, None, False)
    whole = module._select_by_torch(q, k, mask, None, choice)
    sizes, real = [], module.estimate
    monkeypatch.setattr(module, "_CHUNK", 2 * 2 * 700 * 3)

    def watched(q, k, mask, size, rows, *rest):
        sizes.append((rows[1] - rows[0]) * 2 * 2 * 700)
        return real(q, k, mask, size, rows, *rest)

    monkeypatch.setattr(module, "estimate", watched)
    parts = module._select_by_torch(q, k, mask, None, choice)
    assert all(torch.equal(a, b) for a, b in zip(whole[:2], parts[:2], strict=True))
    assert len(sizes) == 16
    assert max(sizes) <= module._CHUNK


def test_hidden_nan_stays_hidden(path):
    q, k = inputs(200)
    padding = torch.ones(2, 200, dtype=torch.bool)
    padding[:, 150:] = False
    mask = MaskSpec(causal=True, key_padding=padding)
    options = {"sparsity_ratio": 0.5, "block_size": 16}
    for grouped in (False, True):
        clean = select_blocks(q, k, mask, remainder=grouped, **options)
        dirty = k.clone()
        dirty[:, :, 150:] = float("nan")
        dirty = select_blocks(q, dirty, mask, remainder=grouped, **options)
        assert torch.equal(clean.index.block_mask(), dirty.index.block_mask())
        assert torch.equal(clean.missed_mass, dirty.missed_mass)


@pytest.mark.parametrize("grouped", [False, True])
def test_nan_in_view_changes_no_budget(path, grouped):
    q, k = inputs(200)
    options = {"block_size": 16, "remainder": grouped}
    clean = select_blocks(q, k, **options).index
    k[:, :, 20] = float("nan")
    q[:, :, 100] = INF
    dirty = select_blocks(q, k, **options).index
    assert torch.equal(clean.counts, dirty.counts)
    dirty = select_blocks(q, k, MaskSpec(causal=True), **options).index
    dirty.validate()
    assert dirty.block_mask().diagonal(dim1=2, dim2=3).all()
    select_blocks(q, k, coverage=0.5, **options).index.validate()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    torch.manual_seed(0)
    q, k = (t.to(dtype) for t in inputs(256))
    got = build_block_index(q, k, "dynamic_threshold", block_size=32)
    wanted = build_block_index(q.float(), k.float(), "dynamic_threshold", block_size=32)
    assert torch.equal(got.block_mask(), wanted.block_mask())


def test_strides_change_nothing():
    torch.manual_seed(0)
    q, k = inputs(256)
    odd = q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT
    assert not any(t.is_contiguous() for t in odd)
    got, wanted = (select_blocks(*pair, block_size=16) for pair in (odd, (q, k)))
    assert torch.equal(got.index.blocks, wanted.index.blocks)


def test_fake_tensors_give_shapes():
    if not fits(*torch.ones(2, 1, 1, 1, 1), MaskSpec(), 16):
        pytest.skip("there is no native kernel")
    with FakeTensorMode():
        q, k = inputs(256)
        found = select_blocks(q, k, MaskSpec(causal=True), block_size=16)
    assert found.index.blocks.shape == (2, 2, 16, 2)
    assert found.missed_mass.shape == (2, 2, 16)


@pytest.mark.parametrize("name", ["key_padding", "documents", "logits"])
def test_the_raw_operator_reads_nothing_outside(name):
    q, k = inputs(64)
    parts = {
        "key_padding": torch.ones(2, 64, dtype=torch.bool),
        "documents": torch.zeros(2, 64, dtype=torch.int64),
        "logits": torch.zeros(2, 2, 4, 4),
    }
    raw = torch.ops.kernel_pytorch.select_blocks
    numbers = (16, False, 0, 0.5, 0.0, False)
    if fits(q, k, MaskSpec(), 16):
        assert raw(q, k, *parts.values(), *numbers)[0].shape == (2, 2, 4)
    parts[name] = parts[name][..., :3]
    with pytest.raises(ValueError, match=rf"{name}.*\(2, .*3\).*it must be"):
        raw(q, k, *parts.values(), *numbers)


def test_errors():
    q, k = inputs(64)
    mask = MaskSpec(bias=torch.zeros(64, 64))
    with pytest.raises(NotImplementedError, match=r"remainder=True with mask\.bias"):
        select_blocks(q, k, mask, remainder=True)
    with pytest.raises(ValueError, match="remainder=True: RANDOM"):
        build_block_index(q, k, "random", remainder=True)
