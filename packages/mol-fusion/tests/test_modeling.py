# SPDX-License-Identifier: Apache-2.0
import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from mol import MoLConfig, MoLRuntime, fuse

PAIRS = [("gpt2", "llama"), ("llama", "gpt2"), ("scaled", "llama")]
GREEDY = {"max_new_tokens": 10, "do_sample": False}


def _padded(ids):
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[0, :4] = 0
    mask[1, :2] = 0
    return padded, mask


@pytest.mark.critical
@pytest.mark.parametrize("pair", PAIRS)
def test_routed_to_the_primary_is_the_primary(make, base, folders, stir, ids, pair):
    runtime, own = stir(make(*pair)), base[pair[0]]
    padded, mask = _padded(ids)
    with torch.no_grad(), runtime.force_expert(folders[pair[0]]):
        assert torch.equal(runtime.logits(ids), own(ids).logits)
        actual = runtime.logits(padded, mask)
        assert torch.equal(actual, own(padded, attention_mask=mask).logits)
        cache, other = runtime.model.new_cache(), DynamicCache(config=own.config)
        for piece in ids.split([9, 1, 1, 9], dim=1):
            step = runtime.model(piece, past_key_values=cache).logits
            assert torch.equal(step, own(piece, past_key_values=other).logits)
    for kwargs in (GREEDY, {**GREEDY, "num_beams": 3}):
        with runtime.force_expert(folders[pair[0]]):
            actual = runtime.generate(padded, attention_mask=mask, **kwargs)
        assert torch.equal(actual, own.generate(padded, attention_mask=mask, **kwargs))


@pytest.mark.parametrize("pair", PAIRS)
def test_single_expert_rows_are_the_model(make, base, ids, pair):
    runtime = make(pair[0])
    assert torch.equal(runtime.logits(ids), base[pair[0]](ids).logits)
    torch.manual_seed(3)
    actual = runtime.generate(ids, do_sample=True, max_new_tokens=12, temperature=0.8)
    torch.manual_seed(3)
    expected = base[pair[0]].generate(
        ids, do_sample=True, max_new_tokens=12, temperature=0.8
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "attribute"),
    [("gpt2", "transformer.h"), ("llama", "model.layers"), ("scaled", "transformer.h")],
)
def test_layers_out_of_order_equal_a_model_cut_by_hand(
    folders, base, ids, name, attribute
):
    runtime = MoLRuntime(MoLConfig([folders[name]]))
    runtime.setup_embeddings()
    runtime.setup_lm_head()
    for number, index in enumerate((2, 0)):
        runtime.add_layer([(folders[name], index)], number)
    parent, _, leaf = attribute.rpartition(".")
    owner = base[name].get_submodule(parent)
    blocks = getattr(owner, leaf)
    config = owner.config
    depth = config.num_hidden_layers
    try:
        setattr(owner, leaf, torch.nn.ModuleList([blocks[2], blocks[0]]))
        config.num_hidden_layers = 2
        expected = base[name](ids, use_cache=False).logits
    finally:
        setattr(owner, leaf, blocks)
        config.num_hidden_layers = depth
    assert torch.equal(runtime.logits(ids), expected)
    assert torch.equal(
        runtime.generate(ids, **GREEDY),
        runtime.generate(ids, use_cache=False, **GREEDY),
    )


@pytest.mark.critical
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("router", ["simple", "token_level"])
def test_no_later_position_changes_an_earlier_logit(make, stir, ids, pair, router):
    runtime = stir(make(*pair, router_type=router))
    before = runtime.logits(ids)
    for cut in (1, 10, 19):
        changed = ids.clone()
        changed[:, cut:] = (changed[:, cut:] + 91) % 256
        after = runtime.logits(changed)
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert not torch.equal(after[:, cut:], before[:, cut:])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("router", ["simple", "token_level"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_cached_generation_equals_uncached(make, stir, ids, pair, router, options):
    runtime = stir(make(*pair, router_type=router))
    padded, mask = _padded(ids)
    kwargs = {**GREEDY, **options, "attention_mask": mask}
    cached = runtime.generate(padded, **kwargs)
    assert torch.equal(cached, runtime.generate(padded, use_cache=False, **kwargs))
    assert cached.shape == (2, 34)


def test_left_padding_changes_nothing(make, stir, ids):
    runtime = stir(make("gpt2", "llama"))
    padded, mask = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], 1), None
    mask = (torch.arange(24) >= 4).long().expand(2, -1)
    actual = runtime.generate(padded, attention_mask=mask, **GREEDY)[:, 4:]
    assert torch.equal(actual, runtime.generate(ids, **GREEDY))


def test_crop_takes_routers_and_keys_back(make, stir, ids):
    runtime = stir(make("gpt2", "llama"))
    cache = runtime.model.new_cache()
    with torch.no_grad():
        runtime.model(ids[:, :9], past_key_values=cache)
        runtime.model(ids[:, 9:15].flip(1), past_key_values=cache)
        cache.crop(-6)
        after = runtime.model(ids[:, 9:12], past_key_values=cache).logits
    assert torch.allclose(after, runtime.logits(ids[:, :12])[:, 9:], atol=1e-4)


@pytest.mark.parametrize("stream", ["single", "parallel"])
def test_assisted_decoding_equals_greedy(make, ids, stream):
    runtime = make("gpt2", "llama", stream=stream)
    prompt = torch.cat([ids[:1], ids[:1]], 1)
    expected = runtime.generate(prompt, max_new_tokens=20, do_sample=False)
    guessed = runtime.generate(
        prompt, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4
    )
    assert torch.equal(guessed, expected)


@pytest.mark.parametrize("stream", ["single", "parallel"])
def test_copy_and_32_bit_ids_give_the_same_logits(make, ids, stream):
    runtime = make("gpt2", "llama", stream=stream)
    expected = runtime.logits(ids)
    assert torch.equal(copy.deepcopy(runtime).logits(ids), expected)
    assert torch.equal(runtime.logits(ids.int()), expected)


@pytest.mark.parametrize("stream", ["single", "parallel"])
def test_blocks_run_once_for_each_layer_and_expert(make, ids, stream):
    runtime = make("gpt2", "llama", stream=stream)
    counts = {}
    for name, module in runtime.model.named_modules():
        if type(module).__name__ in ("GPT2Block", "LlamaDecoderLayer"):
            module.register_forward_hook(
                lambda _m, _a, _o, name=name: counts.update(
                    {name: counts.get(name, 0) + 1}
                )
            )
    runtime.logits(ids)
    assert len(counts) == 4 * 2
    assert set(counts.values()) == {1}


def test_loss_is_the_cross_entropy_of_the_next_token(make, ids):
    for stream in ("single", "parallel"):
        model = make("gpt2", "llama", stream=stream).model
        labels = ids.clone()
        labels[:, :3] = -100
        with torch.no_grad():
            output = model(ids, labels=labels)
        expected = F.cross_entropy(
            output.logits[:, :-1].reshape(-1, 256), labels[:, 1:].reshape(-1)
        )
        assert torch.allclose(output.loss, expected)


def test_training_lowers_the_loss_and_leaves_the_experts(make):
    runtime = make("gpt2", "llama")
    experts = {
        n: p.clone() for n, p in runtime.named_parameters() if ".layers." not in n
    }
    ids = torch.arange(32)[None].repeat(2, 1) % 5
    trained = [p for p in runtime.model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    runtime.model.train()
    losses = []
    for _ in range(12):
        loss = runtime.model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    for name, value in experts.items():
        assert torch.equal(value, runtime.get_parameter(name))


def test_frozen_experts_have_no_dropout_in_training(copied, ids):
    runtime = fuse(MoLConfig([str(copied("gpt2"))]))
    runtime.train()
    assert runtime.model.training
    dropouts = [m for m in runtime.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts
    assert not any(m.training for m in dropouts)
    assert torch.equal(runtime.logits(ids), runtime.logits(ids))


def test_logits_to_keep(make, ids):
    for stream in ("single", "parallel"):
        model = make("gpt2", "llama", stream=stream).model
        with torch.no_grad():
            whole = model(ids).logits
            last = model(ids, logits_to_keep=3).logits
            some = model(ids, logits_to_keep=torch.tensor([0, 7])).logits
        assert torch.allclose(last, whole[:, -3:], atol=1e-5)
        assert torch.allclose(some, whole[:, [0, 7]], atol=1e-5)


def test_tied_and_untied_heads(copied, base, ids):
    runtime = fuse(MoLConfig([str(copied("gpt2"))]))
    causal = runtime.model.streams.shell.causal
    assert causal.lm_head.weight is causal.transformer.wte.weight
    untied = copied("llama", "untied")
    file = untied / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = torch.randn(256, 96)
    save_file(tensors, file)
    text = (untied / "config.json").read_text()
    for value in ("true", "false"):
        other = "true" if value == "false" else "false"
        (untied / "config.json").write_text(
            text.replace(
                f'"tie_word_embeddings": {other}', f'"tie_word_embeddings": {value}'
            )
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runtime = fuse(MoLConfig([str(untied)]))
        differ = [w for w in caught if "differ in the files" in str(w.message)]
        assert bool(differ) == (value == "true")
        expected = AutoModelForCausalLM.from_pretrained(untied)(ids).logits
        assert torch.equal(runtime.logits(ids), expected)


def test_head_stored_without_its_tied_embedding(copied, base, ids):
    folder = copied("gpt2")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, file)
    runtime = fuse(MoLConfig([str(folder)]))
    assert torch.equal(runtime.logits(ids), base["gpt2"](ids).logits)


def test_lower_precision_follows_the_base_model(folders, ids):
    for dtype in ("bfloat16", "float16"):
        runtime = fuse(MoLConfig([folders["llama"], folders["gpt2"]], dtype=dtype))
        own = AutoModelForCausalLM.from_pretrained(
            folders["llama"], dtype=getattr(torch, dtype)
        ).eval()
        with torch.no_grad(), runtime.force_expert(folders["llama"]):
            assert torch.equal(runtime.logits(ids), own(ids).logits)
        assert runtime.logits(ids).isfinite().all()


def test_two_threads_may_share_a_model(make, stir):
    runtime = stir(make("gpt2", "llama"))
    inputs = [torch.randint(0, 256, (2, 11 + i)) for i in range(4)]
    expected = [runtime.logits(x) for x in inputs]
    wrong = []

    def work(number):
        for _ in range(6):
            if not torch.equal(runtime.logits(inputs[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_foreign_caches_and_unknown_arguments_are_refused(make, base, ids):
    model = make("gpt2", "llama").model
    filled = base["llama"](ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled DynamicCache"):
        model(ids, past_key_values=filled)
    assert model(ids, past_key_values=DynamicCache()).past_key_values is not None
    with pytest.raises(TypeError, match="inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(1, 1, 64))
    with pytest.raises(TypeError, match="output_attentions"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    assert isinstance(model(ids, return_dict=False), tuple)


def test_filled_cache_of_another_shape_is_refused(make, ids):
    one, two = make("gpt2").model, make("gpt2", "llama").model
    cache = one(ids).past_key_values
    with pytest.raises(ValueError, match=r"has 8 layers.*has 12"):
        two(ids[:, :1], past_key_values=cache)


def test_shapes_and_position_limit(make, ids):
    runtime = make("gpt2", "llama")
    bad = {
        "input_ids has shape": (torch.zeros(3, dtype=torch.long), None),
        r"shape \(2, 0\)": (torch.zeros(2, 0, dtype=torch.long), None),
        "attention_mask has shape": (ids, torch.ones(2, 19)),
        "128 positions": (torch.zeros(1, 129, dtype=torch.long), None),
    }
    for message, (tokens, mask) in bad.items():
        with pytest.raises(ValueError, match=message):
            runtime.model(tokens, attention_mask=mask)
    cache = runtime.model.new_cache()
    runtime.model(torch.zeros(1, 128, dtype=torch.long), past_key_values=cache)
    with pytest.raises(ValueError, match="129 tokens are more than"):
        runtime.model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
