# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from mol import MoLConfig, MoLRuntime
from mol.adapters import resize
from mol.blocks import find_blocks
from mol.fusion import Expert, start_weights, statistics


def _expert(name, primary):
    return Expert(name, 0, 0, 8, primary)


def test_start_weights():
    primary, guest = _expert("a", True), _expert("b", False)
    assert start_weights([primary, guest], 0.9) == pytest.approx([0.9, 0.1])
    assert start_weights([guest, primary, guest], 0.9) == pytest.approx(
        [0.05, 0.9, 0.05]
    )
    assert start_weights([primary, primary, guest], 0.9) == pytest.approx(
        [0.45, 0.45, 0.1]
    )
    assert start_weights([guest, guest], 0.9) == [0.5, 0.5]
    assert start_weights([primary], 0.9) == [1.0]
    assert start_weights([primary, guest], None) == [0.5, 0.5]


def _run_block(base, name, index, stream):
    """The block as its own model would run it, no mask but causality."""
    model, positions = base[name], torch.arange(stream.shape[1])[None]
    block = find_blocks(model).get(model)[index]
    if name == "llama":
        rotary = model.model.rotary_emb(stream, positions)
        return block(stream, position_embeddings=rotary)
    return block(stream)


@pytest.mark.critical
@pytest.mark.parametrize(("primary", "guest"), [("gpt2", "llama"), ("llama", "gpt2")])
@pytest.mark.parametrize("router", ["simple", "token_level"])
def test_row_is_the_stated_formula(make, base, folders, stir, primary, guest, router):
    runtime = stir(make(primary, guest, router_type=router))
    ids = torch.randint(0, 256, (2, 9))
    seen = {}
    layer = runtime.model.streams.layers[1]

    def catch(_module, args, kwargs, output):
        seen.update(stream=args[0], out=output[0], weights=output[1])

    layer.register_forward_hook(catch, with_kwargs=True)
    with torch.no_grad():
        runtime.logits(ids)
        stream, width = seen["stream"], base[primary].config.hidden_size
        own = _run_block(base, primary, 1, stream[..., :width])
        y_primary = torch.cat([own, stream[..., width:]], -1)
        index = round(1 * (base[guest].config.num_hidden_layers - 1) / 3)
        z = stream @ layer.pre["1"].weight.T + layer.pre["1"].bias
        change = _run_block(base, guest, index, z) - z
        y_guest = stream + change @ layer.post["1"].weight.T + layer.post["1"].bias
        w = seen["weights"]
        expected = w[..., :1] * y_primary + w[..., 1:] * y_guest
    assert torch.allclose(seen["out"], expected, atol=2e-5)
    assert torch.allclose(w.sum(-1), torch.ones(2, 9))
    assert w.std(dim=(0, 1)).min() > 1e-4


def test_gradients_reach_every_trained_tensor_and_nothing_else(make, stir, ids):
    runtime = stir(make("gpt2", "llama"))
    runtime.model.train()
    runtime.model(ids, labels=ids).loss.backward()
    for name, parameter in runtime.named_parameters():
        trained = ".layers." in name and (".router." in name or ".p" in name)
        trained = trained and name.startswith("model.streams.layers.")
        if trained:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_checkpointing_gives_the_same_gradients(make, stir, ids):
    grads = []
    for saving, use_cache in ((False, None), (True, None), (True, True)):
        runtime = stir(make("gpt2", "llama", use_gradient_checkpointing=saving))
        runtime.model.train()
        calls = []
        for layer in runtime.model.streams.layers:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        output = runtime.model(ids, labels=ids, use_cache=use_cache)
        output.loss.backward()
        # Computed twice with checkpointing; never twice into one cache.
        assert len(calls) == (8 if saving and not use_cache else 4)
        if use_cache:
            assert output.past_key_values.get_seq_length() == 20
        layers = runtime.model.streams.layers
        grads.append({n: p.grad for n, p in layers.named_parameters()})
    for name, value in grads[0].items():
        for other in grads[1:]:
            assert torch.allclose(value, other[name], atol=1e-6), name


def test_wider_target_keeps_the_primary_exact(folders, base, ids):
    config = MoLConfig([folders["gpt2"], folders["llama"]], target_hidden_dim=128)
    runtime = MoLRuntime(config)
    assert runtime.target_hidden_dim == 128
    runtime.setup_embeddings()
    runtime.setup_lm_head()
    for i in range(4):
        runtime.add_layer([(folders["gpt2"], i), (folders["llama"], i)], i)
    with torch.no_grad(), runtime.force_expert(folders["gpt2"]):
        assert torch.equal(runtime.logits(ids), base["gpt2"](ids).logits)
        hidden, _ = runtime.forward(ids)
    assert hidden.shape == (2, 20, 128)
    assert torch.equal(hidden[..., 64:], resize(hidden[..., :64] * 0, 64))


def test_one_model_twice_in_a_row_and_in_rows(folders, ids):
    a = folders["llama"]
    runtime = MoLRuntime(MoLConfig([a]))
    runtime.setup_embeddings()
    runtime.setup_lm_head()
    runtime.add_layer([(a, 0), (a, 0)], 0)
    runtime.add_layer([(a, 0)], 1)
    blocks = runtime.model.streams.stack(a).blocks
    assert len(blocks) == 3
    assert blocks[0].mlp.up_proj.weight is blocks[2].mlp.up_proj.weight
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        runtime.generate(ids, **kwargs),
        runtime.generate(ids, use_cache=False, **kwargs),
    )
    single = MoLRuntime(MoLConfig([a]))
    single.setup_embeddings()
    single.setup_lm_head()
    single.add_layer([(a, 0)], 0)
    single.add_layer([(a, 0)], 1)
    with torch.no_grad():
        assert torch.allclose(runtime.logits(ids), single.logits(ids), atol=1e-5)


def test_statistics_count_real_tokens_only():
    weights = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).requires_grad_()
    mask = torch.tensor([[0, 1]])
    stats = statistics([("a", 0), ("b", 1)], weights, mask)
    assert stats["tokens_per_expert"].tolist() == [1, 1]
    assert stats["experts"] == (("a", 0), ("b", 1))
    assert stats["num_experts"] == 2
    assert stats["flops_fraction"] == 1.0
    expected = -(0.9 * torch.tensor(0.9).log() + 0.1 * torch.tensor(0.1).log())
    assert stats["router_entropy"].item() == pytest.approx(expected.item())
    assert not stats["expert_weights"].requires_grad


def test_entropy_coefficient_acts_on_the_training_loss_only(make, stir, ids):
    plain = stir(make("gpt2", "llama"))
    sharp = stir(make("gpt2", "llama", entropy_coeff=0.5))
    with torch.no_grad():
        assert plain.model(ids, labels=ids).loss == sharp.model(ids, labels=ids).loss
        _, stats = plain.forward(ids, return_router_stats=True)
        mean = sum(s["router_entropy"] for s in stats.values()) / len(stats)
        plain.model.train()
        sharp.model.train()
        difference = (
            sharp.model(ids, labels=ids).loss - plain.model(ids, labels=ids).loss
        )
    assert difference.item() == pytest.approx(0.5 * mean.item(), rel=1e-4)
