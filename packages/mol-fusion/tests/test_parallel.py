# SPDX-License-Identifier: Apache-2.0
import json
import math

import numpy as np
import pytest
import torch

from mol import MoLConfig, MoLRuntime, fuse
from mol.shell import Tower

PAIR = ("gpt2", "llama")


@pytest.fixture
def both(make):
    return make(*PAIR, stream="parallel")


def _reference(base, ids, share=0.02, start=0):
    """The mixture in float64, token by token, from the base models' logits.

    ``start``: first real position. Returns log-probabilities and weights.
    """
    with torch.no_grad():
        logits = [base[name](ids).logits.double() for name in PAIR]
    probs = torch.stack([x.softmax(-1) for x in logits], 1).numpy()
    out = np.zeros((*ids.shape, probs.shape[-1]))
    weights = np.zeros((*ids.shape, 2))
    for b in range(len(ids)):
        w = np.full(2, 0.5)
        for t in range(ids.shape[1]):
            if t > start:
                post = w * probs[b, :, t - 1, ids[b, t]]
                w = (1 - share) * post / post.sum() + share / 2
            out[b, t] = np.log((w[:, None] * probs[b, :, t]).sum(0))
            weights[b, t] = w
    return torch.tensor(out), torch.tensor(weights)


@pytest.mark.critical
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
def test_mixture_equals_plain_float64(make, base, ids, share):
    runtime = make(*PAIR, stream="parallel", gate_share=share)
    expected, weights = _reference(base, ids, share)
    logits = runtime.logits(ids)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), expected, atol=2e-4)
    _, stats = runtime.forward(ids, return_router_stats=True)
    actual = stats["gate"]["expert_weights"].double()
    assert torch.allclose(actual, weights, atol=2e-4)
    for layer in (0, 3):
        in_row = stats[f"layer_{layer}"]["expert_weights"].double()
        assert torch.allclose(in_row, weights, atol=2e-4)


def test_bound_holds_for_every_sequence(both, base):
    ids = torch.randint(0, 256, (16, 40))
    ids[:4] = torch.arange(40) % 7

    def loss(logits):
        logp = logits.float().log_softmax(-1)[:, :-1]
        return -logp.gather(-1, ids[:, 1:, None]).sum((1, 2))

    with torch.no_grad():
        best = torch.minimum(*(loss(base[name](ids).logits) for name in PAIR))
        mixed = loss(both.logits(ids))
    assert (mixed <= best + (math.log(2) - 38 * math.log(1 - 0.01)) + 1e-3).all()


def test_one_model_forced_is_that_model(both, base, folders, ids):
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    for name in PAIR:
        with torch.no_grad(), both.force_expert(folders[name]):
            assert torch.equal(both.logits(ids), base[name](ids).logits)
            actual = both.generate(ids, **kwargs)
        assert torch.equal(actual, base[name].generate(ids, **kwargs))


def test_cached_steps_continue_the_gate(both, ids):
    whole = both.logits(ids)
    cache, parts = both.model.new_cache(), []
    with torch.no_grad():
        for piece in ids.split([7, 1, 2, 10], dim=1):
            parts.append(both.model(piece, past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


@pytest.mark.parametrize("chunk", [30, 79])
def test_long_prompt_is_scored_in_chunks(both, monkeypatch, chunk):
    ids = torch.randint(0, 256, (2, 80))
    expected = both.logits(ids)[:, -1:]
    with torch.no_grad():
        whole = both.model(ids).past_key_values.layers[-1].state
        head, pieces = Tower.head, []

        def counted(tower, stream):
            pieces.append(stream.shape[1])
            return head(tower, stream)

        monkeypatch.setattr(Tower, "head", counted)
        monkeypatch.setattr("mol.parallel.HEAD_CHUNK", chunk)
        output = both.model(ids, logits_to_keep=1)
    assert pieces == {30: [30, 30, 19, 64], 79: [79, 64]}[chunk] * 2
    assert torch.allclose(output.logits, expected, atol=1e-5)
    state = output.past_key_values.layers[-1].state
    for name, value in whole.items():
        assert torch.allclose(state[name].float(), value.float(), atol=1e-5)


def test_left_padding_changes_nothing(both, ids):
    kwargs = {"max_new_tokens": 10, "do_sample": False}
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    actual = both.generate(padded, attention_mask=mask, **kwargs)[:, 5:]
    assert torch.equal(actual, both.generate(ids, **kwargs))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_cached_generation_equals_uncached(both, ids, options):
    kwargs = {"max_new_tokens": 10, "do_sample": False, **options}
    assert torch.equal(
        both.generate(ids, **kwargs), both.generate(ids, use_cache=False, **kwargs)
    )


def test_crop_takes_the_gate_back(both, ids):
    cache = both.model.new_cache()
    with torch.no_grad():
        both.model(ids[:, :9], past_key_values=cache)
        both.model(ids[:, 9:15].flip(1), past_key_values=cache)
        cache.crop(-6)
        after = both.model(ids[:, 9:12], past_key_values=cache).logits
    assert torch.allclose(after, both.logits(ids[:, :12])[:, 9:], atol=1e-4)


def test_hidden_states_are_the_primarys(both, base, ids):
    hidden, stats = both.forward(ids)
    assert stats is None
    assert hidden.shape == (2, 20, 96)
    with torch.no_grad():
        assert torch.equal(both.lm_head(hidden), base["gpt2"](ids).logits)


def test_cut_model_runs_only_its_named_layers(folders, base, ids):
    a, b = (folders[name] for name in PAIR)
    runtime = MoLRuntime(MoLConfig([a, b], stream="parallel"))
    runtime.setup_lm_head()
    runtime.setup_embeddings()
    runtime.add_layer([(a, 0), (b, 1)], 0)
    runtime.add_layer([(b, 3)], 1)
    assert f"{a} is cut: it runs 1 of 4" in runtime.explain()
    with pytest.raises(ValueError, match="rising"):
        runtime.add_layer([(a, 2), (b, 2)], 2)
    assert len(runtime.model.streams.rows) == 2
    assert runtime.model.streams.tower(a).picks == [0]
    layers = base["llama"].model.layers
    try:
        base["llama"].model.layers = torch.nn.ModuleList([layers[1], layers[3]])
        with torch.no_grad(), runtime.force_expert(b):
            expected = base["llama"](ids, use_cache=False).logits
            assert torch.equal(runtime.logits(ids), expected)
    finally:
        base["llama"].model.layers = layers
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        runtime.generate(ids, **kwargs),
        runtime.generate(ids, use_cache=False, **kwargs),
    )


def test_model_without_layers_is_named(folders):
    a, b = (folders[name] for name in PAIR)
    runtime = MoLRuntime(MoLConfig([a, b], stream="parallel"))
    runtime.setup_lm_head()
    runtime.setup_embeddings()
    runtime.add_layer([(a, 0)], 0)
    with pytest.raises(RuntimeError, match=f"model '{b}' has no layers"):
        runtime.logits(torch.zeros(1, 2, dtype=torch.long))


def test_different_vocabularies_are_refused(folders, copied):
    folder = copied("llama")
    file = folder / "tokenizer.json"
    text = json.loads(file.read_text())
    vocab = text["model"]["vocab"]
    one, two = list(vocab)[65:67]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    file.write_text(json.dumps(text))
    config = MoLConfig([folders["gpt2"], str(folder)], stream="parallel")
    with pytest.raises(ValueError, match=f"token '{one}' is"):
        fuse(config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.warns(UserWarning, match="no tokenizer files"):
        fuse(config)


def test_different_sizes_are_refused(folders, tmp_path):
    from torchworks_core.testing import save_tiny

    other = str(save_tiny(tmp_path / "other", "gpt2", vocab_size=300))
    with pytest.raises(ValueError, match="256 token ids"):
        fuse(MoLConfig([folders["gpt2"], other], stream="parallel"))


def test_padding_only_row_is_finite_and_not_counted(both, ids):
    mask = torch.ones_like(ids)
    mask[1] = 0
    assert both.logits(ids, mask).isfinite().all()
    _, stats = both.forward(ids, mask, return_router_stats=True)
    assert stats["gate"]["tokens_per_expert"].tolist() == [20, 20]
    assert math.isfinite(stats["gate"]["router_entropy"])
