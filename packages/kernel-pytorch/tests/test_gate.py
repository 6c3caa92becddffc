# SPDX-License-Identifier: Apache-2.0
"""The learned gate against masses written out here, and what training may change."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_pytorch.attention import (
    BlockGate,
    DynamicSparseAttention,
    MaskSpec,
    build_block_index,
    create_sparse_attention,
    distill_gate,
)
from kernel_pytorch.attention import gate as module
from kernel_pytorch.attention.gate import pooled, true_block_mass

sys.path.insert(0, str(Path(__file__).parent))
from reference import dense_mask, mask_parts


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def dense_masses(q, k, mask, size):
    """Mean over a block's queries of the float64 softmax, summed by block of keys."""
    seen, bias = dense_mask(mask, *q.shape[:3], k.shape[2])
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.transpose(2, 3) * q.shape[3] ** -0.5 + bias
    alive = seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & alive, float("-inf"))
    weights = scores.softmax(-1) * alive
    columns = torch.stack([part.sum(-1) for part in weights.split(size, 3)], -1)
    pairs = zip(columns.split(size, 2), alive.split(size, 2), strict=True)
    rows = [c.sum(2) / a.sum(2).clamp_min(1) for c, a in pairs]
    return torch.stack(rows, 2)


@pytest.mark.critical
@pytest.mark.parametrize("kind", mask_parts(2, 4, 8))
def test_true_mass_is_that_of_dense_attention(kind, monkeypatch):
    for q_len, k_len in ((50, 50), (37, 64), (5, 30)):
        mask = MaskSpec(**mask_parts(2, 4, q_len, k_len)[kind])
        q, k = torch.randn(2, 4, q_len, 8) * 2, torch.randn(2, 2, k_len, 8)
        wanted = dense_masses(q, k, mask, 16)
        for chunk in (2**22, 2 * 4 * k_len * 7):
            monkeypatch.setattr(module, "_CHUNK", chunk)
            found = true_block_mass(q, k, mask, 16)
            torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)


def test_pooling_is_mean_and_maximum():
    x = torch.randn(2, 3, 37, 4)
    found = pooled(x, 16)
    for row, part in enumerate(x.split(16, 2)):
        wanted = torch.cat([part.mean(2), part.amax(2)], -1)
        torch.testing.assert_close(found[:, :, row], wanted)
    x[:, :, 20] = float("nan")
    x[:, :, 21] = float("inf")
    assert pooled(x, 16).isfinite().all()
    assert pooled(x[:, :, :0], 16).shape == (2, 3, 0, 8)


def test_logits_are_a_scaled_product_of_two_maps():
    for heads in (None, 4):
        gate = BlockGate(8, heads, 5, block_size=16)
        assert not gate.trained
        q, k = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 33, 8)
        assert not gate(q, k).any()
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter)
        found = gate(q, k)
        assert found.shape == (2, 4, 4, 3)
        a, b = pooled(q, 16), pooled(k, 16)
        for head in range(4):
            own = head if heads else 0
            left = a[:, head] @ gate.q_weight[own] + gate.q_bias[own]
            right = b[:, head // 2] @ gate.k_weight[own]
            wanted = left @ right.transpose(1, 2) / 5**0.5
            torch.testing.assert_close(found[:, head], wanted)
        assert torch.equal(gate.bfloat16()(q, k).bfloat16(), gate(q, k).bfloat16())


@pytest.mark.critical
@pytest.mark.parametrize("causal", [False, True])
def test_an_untrained_gate_changes_nothing(causal):
    options = {"sparsity_ratio": 0.7, "block_size": 16, "causal": causal}
    learned = create_sparse_attention(32, 4, pattern="learned", **options)
    dynamic = create_sparse_attention(32, 4, **options)
    assert dynamic.gate is None
    dynamic.load_state_dict(learned.state_dict(), strict=False)
    x = torch.randn(2, 200, 32)
    assert torch.equal(learned(x), dynamic(x))
    q, k, _ = learned.project(x)
    options = {"block_size": 16, "mask": MaskSpec(causal=causal)}
    for name, gate in (("learned", None), ("learned", learned.gate)):
        found = build_block_index(q, k, name, gate=gate, **options)
        plain = build_block_index(q, k, "dynamic_threshold", **options)
        assert torch.equal(found.block_mask(), plain.block_mask())


def blind_layer(heads=2, size=16):
    """A layer, and inputs whose important blocks few queries tell of.

    Channel 0 of an input marks queries that look for keys of channel 1; in each block
    one place alone does, at random, with a share of the mass that its block has not.
    Channel 2 says of all tokens of a block that such a key is among them.
    """
    layer = DynamicSparseAttention(
        heads * 8, heads, 0.75, "learned", block_size=size, causal=True
    )
    with torch.no_grad():
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj):
            linear.weight.normal_(std=0.02)
        for head in range(heads):
            layer.q_proj.weight[head * 8, 0] = 8.0
            layer.k_proj.weight[head * 8, 1] = 8.0
            layer.k_proj.weight[head * 8 + 1, 2] = 1.0
    return layer


def blind_batch(length=512, size=16, width=16):
    x = torch.randn(2, length, width) * 0.1
    x[..., :3] = 0.0
    blocks = length // size
    wanted = torch.rand(2, blocks) < 0.15
    for b in range(2):
        for block in range(blocks):
            # Every 8th query and the furthest ones are examined: hide from the first,
            # and let there be more that look than are.
            places = torch.arange(size)[torch.arange(size) % 8 != 7]
            x[b, block * size + places, 0] = 1.0
            if wanted[b, block]:
                x[b, block * size + torch.randint(size, (2,)), 1] = 1.0
                x[b, block * size : (block + 1) * size, 2] = 1.0
    return x


def recall(layer, x, mask):
    """Share of the true mass in the chosen blocks, and in as many best ones."""
    q, k, _ = layer.project(x)
    mass = true_block_mass(q, k, mask, layer.block_size)
    kept = layer.block_index(x).block_mask()
    best = mass.sort(-1, descending=True).values
    count = kept.sum(-1, keepdim=True)
    oracle = best.masked_fill(torch.arange(mass.shape[-1]) >= count, 0.0).sum()
    return float(mass.masked_fill(~kept, 0.0).sum() / oracle)


@pytest.mark.critical
def test_distilling_finds_what_the_sample_cannot_see():
    layer, mask = blind_layer(), MaskSpec(causal=True)
    batches, unseen = [blind_batch() for _ in range(4)], blind_batch()
    before = recall(layer, unseen, mask)
    losses = distill_gate(layer, batches, steps=200, lr=1e-2)
    after = recall(layer, unseen, mask)
    assert len(losses) == 200
    assert losses[-1] < 0.7 * losses[0], losses[::20]
    assert after > before + 0.05, (before, after)
    assert after > 0.85
    assert layer.gate.trained


def test_loss_is_the_divergence_from_the_true_mass():
    layer = blind_layer()
    x, keep = blind_batch(200), torch.ones(2, 200, dtype=torch.long)
    keep[0, 150:] = 0
    keep[1, :30] = 0
    first = distill_gate(layer, [(x, keep)], steps=1, lr=1e-9)[0]
    q, k, _ = layer.project(x)
    mask = MaskSpec(causal=True, key_padding=keep.bool())
    target = dense_masses(q.detach(), k.detach(), mask, 16)
    guess = module._content(q.detach(), k.detach(), mask, 16).double()
    alive = target.sum(-1) > 0
    assert not alive.all()
    tiny = torch.finfo(torch.float32).tiny
    ratio = target / guess.clamp_min(tiny)
    terms = torch.where(target > 0, target * ratio.clamp_min(1e-300).log(), 0.0)
    wanted = float(terms.sum(-1)[alive].mean())
    assert first == pytest.approx(wanted, rel=1e-4)


def snapshot(layer):
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    flags = [p.requires_grad for p in layer.parameters()]
    modes = [m.training for m in layer.modules()]
    return state, flags, modes, [p.grad for p in layer.parameters()]


@pytest.mark.critical
@pytest.mark.parametrize("fails", [False, True])
def test_only_the_gate_changes(fails):
    layer = blind_layer()
    layer.q_proj.weight.requires_grad_(False)
    layer.gate.q_bias.requires_grad_(False)
    layer.v_proj.eval()
    layer.k_proj.weight.grad = torch.ones_like(layer.k_proj.weight)
    before = snapshot(layer)
    batches = [blind_batch(64)]
    if fails:
        with pytest.raises(ValueError, match="hidden_states"):
            distill_gate(layer, [*batches, torch.zeros(1, 64, 3)], steps=5)
        assert not layer.gate.trained
    else:
        with torch.no_grad():
            distill_gate(layer, iter(batches), steps=5)
    after = snapshot(layer)
    assert after[1:3] == before[1:3]
    assert all(a is b for a, b in zip(after[3], before[3], strict=True))
    for name, old in before[0].items():
        same = torch.equal(old, after[0][name])
        assert same == (fails or not name.startswith("gate.")), name


def test_state_travels():
    layer = blind_layer()
    distill_gate(layer, [blind_batch(64)], steps=2)
    other = blind_layer()
    other.load_state_dict(layer.state_dict())
    assert other.gate.trained
    x = blind_batch(128)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    other.gate.reset_parameters()
    assert not other.gate.trained
    assert not other.gate(*other.project(x)[:2]).any()


def test_types_and_modes():
    x = blind_batch(128)
    wanted = distill_gate(blind_seeded(), [x], steps=4)
    with torch.inference_mode():
        assert distill_gate(blind_seeded(), [x.clone()], steps=4) == wanted
    with torch.autocast("cpu", torch.bfloat16):
        found = distill_gate(blind_seeded(), [x], steps=4)
    assert found == pytest.approx(wanted, rel=0.05)
    layer = blind_seeded().bfloat16()
    found = distill_gate(layer, [x.bfloat16()], steps=4)
    assert found == pytest.approx(wanted, rel=0.05)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def blind_seeded():
    torch.manual_seed(1)
    with torch.inference_mode(False):
        return blind_layer()


def test_errors_name_the_value():
    x = torch.zeros(1, 8, 16)
    layer = blind_layer()
    with pytest.raises(ValueError, match="the gate of DynamicSparseAttention"):
        distill_gate(create_sparse_attention(16, 2), [x])
    with pytest.raises(ValueError, match="steps=0"):
        distill_gate(layer, [x], steps=0)
    with pytest.raises(ValueError, match="lr=-1"):
        distill_gate(layer, [x], lr=-1)
    with pytest.raises(ValueError, match="batches: there is none"):
        distill_gate(layer, [])
    for options in ({"head_dim": 0}, {"width": 0}, {"num_heads": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=0"):
            BlockGate(**{"head_dim": 8} | options)
    gate = BlockGate(8, 2, block_size=16)
    with pytest.raises(ValueError, match=r"for 2 heads of 8"):
        gate(torch.zeros(1, 4, 9, 8), torch.zeros(1, 4, 9, 8))
    q = torch.zeros(1, 2, 64, 8)
    with pytest.raises(ValueError, match=r"block logits of shape \(1, 2, 4, 4\)"):
        build_block_index(q, q, "learned", gate=gate, block_size=32)


def test_example_runs():
    command = [sys.executable, "examples/distill_gate.py", "--tokens", "128"]
    for name in ("steps", "gate-steps", "layers", "batch", "threads"):
        command += [f"--{name}", "1"]
    folder = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = re.findall(r"(\w+): cross entropy ([\d.]+)", done.stdout)
    assert [name for name, _ in told] == ["dense", "untrained", "distilled"]
