# SPDX-License-Identifier: Apache-2.0
"""Promises that need more than one part: padding, caches, dtypes, fits, old files."""

import copy
import hashlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from mol import MoLConfig, MoLRuntime, UnsupportedArchitectureError, fuse
from mol.cache import GateLayer, RunningMeanLayer
from torchworks_core.testing import byte_tokenizer, save_tiny, tiny_model

PAIR = ("gpt2", "llama")
STREAMS = ["single", "parallel"]


def _built(config, rows):
    runtime = MoLRuntime(config)
    runtime.setup_embeddings()
    runtime.setup_lm_head()
    for number, row in enumerate(rows):
        runtime.add_layer(row, number)
    return runtime


@torch.no_grad()
def _pieces(runtime, ids, sizes, mask=None):
    """Logits of the pieces of ``ids``, fed one after the other with a cache."""
    cache, start, parts = runtime.model.new_cache(), 0, []
    for size in sizes:
        stop = start + size
        padding = ()
        if mask is not None:
            padding = mask[:, :stop], _positions(mask)[:, start:stop]
        step = ids[:, start:stop], *padding
        parts.append(runtime.model(*step, past_key_values=cache).logits)
        start = stop
    return torch.cat(parts, 1)


def _positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def _blocks(model):
    return getattr(model.base_model, "h" if "transformer" in dir(model) else "layers")


def _rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    change(tensors)
    file.unlink()
    save_file(tensors, file)


@pytest.mark.critical
def test_left_padding_gives_the_logits_of_the_bare_sequence(make):
    runtime = make(*PAIR, stream="parallel", gate_share=0.1)
    pads, padded = (5, 3), torch.randint(0, 256, (2, 25))
    mask = (torch.arange(25) >= torch.tensor(pads)[:, None]).long()
    whole = runtime.model(padded, mask, _positions(mask), use_cache=False).logits
    # Cuts within the padding, at its end, and behind the first real token.
    for sizes in ([25], [3, 2, 20], [1, 3, 2, 1, 18], [4, 2, 19]):
        cached = _pieces(runtime, padded, sizes, mask)
        for row, pad in enumerate(pads):
            expected = runtime.logits(padded[row : row + 1, pad:])[0]
            for actual in (whole, cached):
                assert torch.allclose(actual[row, pad:], expected, atol=1e-4)


@pytest.mark.critical
def test_padding_in_the_middle_breaks_the_chain_of_evidence(make, base, ids):
    """A pair of tokens counts only where both are real; a plain float64 loop."""
    runtime = make(*PAIR, stream="parallel", gate_share=0.1)
    mask = torch.ones_like(ids)
    mask[0, 6:9] = 0
    mask[1, [3, 10, 11]] = 0
    call = {"attention_mask": mask, "position_ids": _positions(mask)}
    with torch.no_grad():
        logits = [base[name](ids, **call).logits for name in PAIR]
        whole = runtime.model(ids, **call, use_cache=False).logits
    probs = torch.stack(logits, 1).double().softmax(-1).numpy()
    cuts = [6, 3, 11], [4, 3, 4, 1, 8], [9, 1, 2, 8]
    parts = [_pieces(runtime, ids, sizes, mask) for sizes in cuts]
    for b in range(2):
        w = np.full(2, 0.5)
        for t in range(20):
            if t and mask[b, t] and mask[b, t - 1]:
                post = w * probs[b, :, t - 1, ids[b, t]]
                w = 0.9 * post / post.sum() + 0.1 / 2
            expected = torch.tensor(np.log((w[:, None] * probs[b, :, t]).sum(0)))
            if mask[b, t]:
                for actual in (whole, *parts):
                    assert torch.allclose(actual[b, t].double(), expected, atol=2e-4)


@pytest.mark.parametrize("stream", STREAMS)
def test_partial_crop_equals_a_run_over_what_is_kept(make, stir, ids, stream):
    runtime = make(*PAIR, stream=stream)
    if stream == "single":
        stir(runtime)
    kept = torch.cat([ids[:, :13], ids[:, 15:]], 1)
    expected = runtime.logits(kept)[:, 13:]
    cache = runtime.model.new_cache()
    with torch.no_grad():
        runtime.model(ids[:, :9], past_key_values=cache)
        runtime.model(ids[:, 9:15], past_key_values=cache)
        cache.crop(-2)
        actual = runtime.model(kept[:, 13:], past_key_values=cache).logits
    assert torch.allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("name", PAIR)
def test_forced_model_with_a_cache_is_that_model(make, base, folders, ids, name):
    runtime = make(*PAIR, stream="parallel")
    cache, other = runtime.model.new_cache(), DynamicCache(config=base[name].config)
    with torch.no_grad(), runtime.force_expert(folders[name]):
        for piece in ids.split([9, 1, 1, 9], dim=1):
            expected = base[name](piece, past_key_values=other)
            actual = runtime.model(piece, past_key_values=cache)
            assert torch.equal(actual.logits, expected.logits)


@pytest.mark.parametrize("pair", [PAIR, PAIR[::-1]])
def test_forced_guest_with_a_cache_equals_no_cache(make, stir, folders, ids, pair):
    runtime = stir(make(*pair))
    with runtime.force_expert(folders[pair[1]]):
        whole = runtime.logits(ids)
        cached = _pieces(runtime, ids, [8, 1, 4, 7])
    assert not torch.allclose(whole, runtime.logits(ids), atol=1e-2)
    assert torch.allclose(cached, whole, atol=1e-4)


class _Average(torch.nn.ModuleList):
    def forward(self, *args, **kwargs):
        return sum(block(*args, **kwargs) for block in self) / len(self)


@pytest.mark.parametrize("guest", [False, True])
def test_model_twice_in_a_row_counts_half_and_half(folders, base, stir, ids, guest):
    a, b = (folders[name] for name in PAIR)
    rows = [[(a, 0), *([(b, 1)] if guest else []), (a, 2)], [(a, 3)]]
    runtime = stir(_built(MoLConfig([a, b] if guest else [a]), rows))
    own = copy.deepcopy(base["gpt2"])
    h = own.transformer.h
    own.transformer.h = torch.nn.ModuleList([_Average([h[0], h[2]]), h[3]])
    with torch.no_grad():
        expected = own(ids, use_cache=False).logits
        assert not torch.allclose(runtime.logits(ids), expected, atol=1e-3)
        with runtime.force_expert(a):
            assert torch.allclose(runtime.logits(ids), expected, atol=1e-5)
            cached = _pieces(runtime, ids, [7, 1, 12])
    assert torch.allclose(cached, expected, atol=1e-4)


def test_width_and_row_weights_of_parallel_streams(folders, base, ids):
    """The width asked for; a row that lacks a model still sums to 1."""
    a, b, c = (folders[name] for name in (*PAIR, "scaled"))
    rows = [[(a, 0), (b, 0), (c, 0)], [(b, 1)], [(c, 2), (a, 1)], [(a, 2)], [(a, 3)]]
    config = MoLConfig([a, b, c], stream="parallel", target_hidden_dim=128)
    runtime = _built(config, rows)
    hidden, stats = runtime.forward(ids, return_router_stats=True)
    assert hidden.shape == (2, 20, 128)
    with torch.no_grad():
        assert torch.equal(runtime.lm_head(hidden), base["gpt2"](ids).logits)
    gate = stats["gate"]["expert_weights"]
    for number, members in enumerate(([0, 1, 2], [1], [2, 0])):
        own = stats[f"layer_{number}"]["expert_weights"]
        expected = gate[..., members] / gate[..., members].sum(-1, keepdim=True)
        assert torch.allclose(own, expected, atol=1e-6)
        assert torch.allclose(own.sum(-1), torch.ones(2, 20), atol=1e-6)


def test_bfloat16_rows_are_summed_in_float32(folders, stir, ids):
    """What comes out is the exact weighted sum, rounded once."""
    a, b = folders["llama"], folders["gpt2"]
    runtime = stir(fuse(MoLConfig([a, b], dtype="bfloat16", router_init=0.4)))
    calls = []
    for layer in runtime.model.streams.layers:
        layer.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        runtime.model(ids, use_cache=False)
        for layer, (stream,), kwargs, (out, weights) in calls:
            own, block = kwargs["blocks"]
            guest = layer.pre["1"](stream)
            other = stream + layer.post["1"](block(guest) - guest)
            results = torch.stack([own(stream), other], -1)
            assert results.dtype == out.dtype == torch.bfloat16
            exact = (results.double() * weights.double()[..., None, :]).sum(-1)
            error = (out.double() - exact).abs()
            assert (error <= exact.abs() * 2**-8 * 1.01 + 1e-6).all()
    assert len(calls) == 4


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("flip", [False, True])
def test_models_of_different_dtypes_fuse(folders, base, tmp_path, ids, stream, flip):
    half = tiny_model("llama", seed=7, hidden_size=96).bfloat16()
    half.save_pretrained(tmp_path)
    byte_tokenizer(tmp_path)
    names, own = [folders["gpt2"], str(tmp_path)], base["gpt2"]
    if flip:
        # Not `half` itself: bfloat16() rounds its rotary frequencies, too.
        names, own = names[::-1], AutoModelForCausalLM.from_pretrained(tmp_path)
    runtime = fuse(MoLConfig(names, stream=stream))
    assert runtime.logits(ids).isfinite().all()
    with torch.no_grad(), runtime.force_expert(names[0]):
        assert torch.equal(runtime.logits(ids), own(ids).logits)
    assert runtime.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 23)
    runtime.verify().raise_if_failed()


def test_loss_is_divided_by_the_items_named(make, base, ids):
    labels = ids.clone()
    labels[:, :4] = -100
    named = {"labels": labels, "num_items_in_batch": 7}
    with torch.no_grad():
        for stream in STREAMS:
            model = make(*PAIR, stream=stream).model
            mean, loss = model(ids, labels=labels).loss, model(ids, **named).loss
            assert torch.allclose(loss, mean * 32 / 7)
        actual = make("gpt2").model(ids, **named).loss
        assert torch.equal(actual, base["gpt2"](ids, **named).loss)


@pytest.mark.parametrize("stream", STREAMS)
def test_generation_settings_of_the_primary_and_int32_ids(copied, folders, ids, stream):
    folder = copied("gpt2")
    (folder / "generation_config.json").write_text('{"max_new_tokens": 5}')
    runtime = fuse(MoLConfig([str(folder), folders["llama"]], stream=stream))
    assert runtime.generate(ids).shape == (2, 25)
    with torch.no_grad():
        assert torch.equal(runtime.model(ids.int()).logits, runtime.model(ids).logits)


@pytest.mark.parametrize("models", [("llama",), PAIR, PAIR[::-1]])
def test_block_that_looks_ahead_is_refused_in_parallel(make, monkeypatch, models):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    original = LlamaDecoderLayer.forward

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return out + out.mean(1, keepdim=True)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    with pytest.raises(UnsupportedArchitectureError, match="future leak check"):
        make(*models, stream="parallel")


def test_parallel_checkpoint_knows_every_block(make, copied, folders, tmp_path):
    make(*PAIR, stream="parallel").save_checkpoint(tmp_path / "x")
    sources = json.loads((tmp_path / "x" / "config.json").read_text())["sources"]
    keys = "transformer.h.2.mlp.c_fc.weight", "model.layers.3.mlp.up_proj.weight"
    for name, key in zip(PAIR, keys, strict=True):
        stored = load_file(f"{folders[name]}/model.safetensors")
        digest = hashlib.sha256(stored[key].numpy().tobytes()).hexdigest()
        recorded = sources[folders[name]]["tensors"]
        assert recorded[key]["sha256"] == digest
        assert set(recorded) == set(stored)
        changed = copied(name, name)
        moved = {folders[name]: str(changed)}
        MoLRuntime.load_checkpoint(tmp_path / "x", models=moved)
        _rewrite(changed, lambda tensors, key=key: tensors[key].mul_(2))
        with pytest.raises(ValueError, match=f"{key}.*has the hash"):
            MoLRuntime.load_checkpoint(tmp_path / "x", models=moved)


@torch.no_grad()
def _run_hooked(model, ids, index=None, stream=None):
    """(in, out) of each block; block ``index`` gets ``stream`` instead of its own."""
    entered, left, hooks = [], [], []
    for i, block in enumerate(_blocks(model)):

        def before(_m, args, i=i):
            entered.append(stream if i == index else args[0])
            return (entered[-1], *args[1:])

        hooks.append(block.register_forward_pre_hook(before))
        hooks.append(block.register_forward_hook(lambda _m, _a, out: left.append(out)))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return entered, left


def _fit(x, y, ridge):
    """Weight and R2 of a ridge regression with an offset, in float64."""
    x, y = (v.flatten(0, 1).double().numpy() for v in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    gram = x.T @ x
    gram += ridge * np.diag(gram).mean() * np.eye(len(gram))
    weight = np.linalg.solve(gram, x.T @ y)
    return weight, 1 - ((y - x @ weight) ** 2).sum() / (y**2).sum()


@pytest.mark.parametrize("pair", [PAIR, PAIR[::-1]])
def test_delta_fit_equals_one_on_hooked_models(make, base, pair):
    runtime = make(*pair)
    ids = torch.randint(0, 256, (16, 64))
    reports = {0.1: runtime.align(ids), 5.0: runtime.align(ids, delta_ridge=5.0)}
    entered, left = _run_hooked(base[pair[0]], ids)
    for number, layer in enumerate(runtime.model.streams.layers):
        index = layer.experts[1].index
        width = entered[number].shape[-1]
        z = layer.pre["1"](F.pad(entered[number], (0, 96 - width))).detach()
        changed = _run_hooked(base[pair[1]], ids, index, z)[1][index] - z
        for ridge, report in reports.items():
            weight, r2 = _fit(changed, left[number] - entered[number], ridge)
            assert report[number].r2_delta == pytest.approx(r2, abs=1e-3)
        post = layer.post["1"].weight.detach()[:width]
        assert np.allclose(post.T.numpy(), weight, atol=2e-3)
        gain = reports[0.1][number].r2_delta - reports[5.0][number].r2_delta
        assert gain > 5e-3


def test_rows_without_the_primary_fit_at_equal_relative_depth(folders, base):
    a, b = (folders[name] for name in PAIR)
    rows = [[(b, 0)], [(b, 1)], [(b, 1), (b, 2)], [(b, 3)], [(b, 3)]]
    runtime = _built(MoLConfig([a, b]), rows)
    ids = torch.randint(0, 256, (16, 64))
    report = runtime.align(ids)
    entered, _ = _run_hooked(base["gpt2"], ids)
    guest, _ = _run_hooked(base["llama"], ids)
    found = [(row.layer, row.expert[1]) for row in report]
    assert found == [(0, 0), (1, 1), (2, 1), (2, 2), (3, 3), (4, 3)]
    for row in report:
        at = {0: 0, 1: 1, 2: 2, 3: 2, 4: 3}[row.layer]
        _, r2 = _fit(entered[at], guest[row.expert[1]], 1e-2)
        assert row.r2_stream == pytest.approx(r2, abs=1e-4)


LEFTOVERS = {
    "gpt2": {
        "transformer.h.{}.attn.bias": torch.ones(1, 1, 128, 128).tril(),
        "transformer.h.{}.attn.masked_bias": torch.tensor(-1e4),
    },
    "llama": {"model.layers.{}.self_attn.rotary_emb.inv_freq": torch.full((12,), 3.0)},
}


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("name", PAIR)
def test_constants_in_old_files_are_left_out(copied, base, ids, stream, name):
    folder = copied(name)
    surplus = LEFTOVERS[name].items()
    more = {key.format(i): value.clone() for key, value in surplus for i in range(4)}
    _rewrite(folder, lambda tensors: tensors.update(more))
    runtime = fuse(MoLConfig([str(folder)], stream=stream))
    with torch.no_grad(), runtime.force_expert(str(folder)):
        assert torch.equal(runtime.logits(ids), base[name](ids).logits)
    runtime.verify().raise_if_failed()


@pytest.mark.parametrize("stream", STREAMS)
def test_one_layer_models_fuse(folders, tmp_path, ids, stream):
    one = str(save_tiny(tmp_path / "one", "gpt2", seed=5, num_hidden_layers=1))
    runtime = fuse(MoLConfig([one, folders["llama"]], stream=stream))
    assert len(runtime.model.streams.rows) == (1 if stream == "single" else 4)
    runtime.verify().raise_if_failed()
    own = AutoModelForCausalLM.from_pretrained(one).eval()
    with torch.no_grad(), runtime.force_expert(one):
        assert torch.equal(runtime.logits(ids), own(ids).logits)


def test_max_layers_cuts_every_parallel_model(make, base, folders, ids):
    runtime = make(*PAIR, stream="parallel", max_layers=2)
    assert len(runtime.model.streams.rows) == 2
    for name in PAIR:
        own = copy.deepcopy(base[name])
        del _blocks(own)[2:]
        own.config.num_hidden_layers = 2
        with torch.no_grad(), runtime.force_expert(folders[name]):
            assert torch.equal(runtime.logits(ids), own(ids, use_cache=False).logits)


@pytest.mark.parametrize("kind", [GateLayer, RunningMeanLayer])
def test_state_layer_forgets_everything_and_reorders_its_past(kind):
    values = torch.arange(18.0).reshape(3, 6)
    layer = kind()
    for steps in (5, 70):
        layer.record(steps, lambda t: {"x": values[:, t % 6]})
    layer.reset()
    assert vars(layer) == vars(kind())
    layer.record(5, lambda t: {"x": values[:, t]})
    layer.record(2, lambda t: {"x": values[:, 5] * 10 + t})
    order = torch.tensor([2, 0, 0])
    layer.reorder_cache(order)
    for expected in (values[order, 5] * 10, values[order, 4]):
        layer.crop(-1)
        assert torch.equal(layer.state["x"], expected)
