# SPDX-License-Identifier: Apache-2.0
"""transformers models with this package's attention, against their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from transformers import masking_utils

sys.path.insert(0, str(Path(__file__).parent))

import huggingface_cases as cases

from kernel_pytorch.attention import MaskSpec, huggingface, register_with_transformers
from kernel_pytorch.attention.huggingface_masks import LazyMask, describe

NAMES = ("kernel_pytorch_ring", "kernel_pytorch_sparse", "kernel_pytorch_flash")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
VOCABULARY = cases.VOCABULARY


@pytest.fixture(autouse=True)
def exact():
    """Every name is exact: the sparse one keeps all blocks, of 8 tokens."""
    torch.manual_seed(0)
    register_with_transformers(sparsity_ratio=0.0, block_size=8)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(1)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"vocab_size": VOCABULARY, "intermediate_size": 16}
    gqa = small | {"num_key_value_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    gpt2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4}
    gpt2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    bert = small | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    gemma = gqa | {"head_dim": 8, "sliding_window": 6, "layer_types": None}
    gemma["layer_types"] = ["sliding_attention", "full_attention"]
    gemma |= ends
    made = {
        "llama": transformers.LlamaForCausalLM(cases.llama_config()),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, **ends)),
        "bert": transformers.BertModel(transformers.BertConfig(**bert)),
        "mistral": transformers.MistralForCausalLM(
            transformers.MistralConfig(**gqa, **ends, sliding_window=5)
        ),
        "gemma3": transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(**gemma)
        ),
    }
    for model in made.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made


def run(model, name, inputs, keep, **options):
    """Output at the kept tokens, and gradients of a weighted sum of them."""
    model.set_attn_implementation(name)
    model.zero_grad()
    found = model(inputs, **options)
    out = getattr(found, "logits", None)
    out = (found.last_hidden_state if out is None else out)[keep]
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    grads = {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
    return out.detach(), grads


def paddings(batch, length):
    left, right = torch.ones(2, batch, length, dtype=torch.long)
    left[1, : length // 3] = 0
    right[1, -length // 3 :] = 0
    middle = left.clone()
    middle[0, 5:9] = 0
    return {"none": None, "left": left, "right": right, "middle": middle}


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], **CLOSE)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        size = max(1.0, float(grad.abs().max()))
        torch.testing.assert_close(
            found[1][name] / size, grad / size, **CLOSE, msg=lambda m, n=name: n + m
        )


@pytest.mark.critical
@pytest.mark.parametrize("kind", ["none", "left", "right", "middle"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mistral", "gemma3"])
def test_output_and_gradients(models, family, kind):
    model, length = models[family], 21
    inputs = torch.randint(VOCABULARY, (2, length))
    mask = paddings(2, length)[kind]
    keep = torch.ones(2, length, dtype=torch.bool) if mask is None else mask.bool()
    model.train()
    wanted = run(model, "eager", inputs, keep, attention_mask=mask)
    for name in NAMES:
        found = run(model, name, inputs, keep, attention_mask=mask)
        assert_same(found, wanted)
    assert not torch.equal(wanted[1][next(iter(wanted[1]))], torch.zeros(()))


@pytest.mark.critical
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_sequences(models, family):
    model, length = models[family], 30
    inputs = torch.randint(VOCABULARY, (1, length))
    parts = [torch.arange(n) for n in (9, 14, 7)]
    positions = torch.cat(parts)[None]
    keep = torch.ones(1, length, dtype=torch.bool)
    options = {"position_ids": positions, "use_cache": False}
    wanted = run(model, "eager", inputs, keep, **options)
    apart = [
        model(part[None], use_cache=False).logits[0]
        for part in inputs[0].split([9, 14, 7])
    ]
    torch.testing.assert_close(wanted[0], torch.cat(apart), **CLOSE)
    ends = torch.tensor([0, 9, 23, 30], dtype=torch.int32)
    flash = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    for name in NAMES:
        assert_same(run(model, name, inputs, keep, **options), wanted)
        # As a collator for flash kernels gives it, where a cache hides the positions.
        with_ends = {"position_ids": positions} | flash
        assert_same(run(model, name, inputs, keep, **with_ends), wanted)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q with a batch of 2"):
        model(inputs.expand(2, -1), **flash)


@pytest.mark.critical
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_generate_gives_the_same_tokens(models, family, cache):
    model = models[family].eval()
    inputs = torch.randint(2, VOCABULARY, (2, 13))
    mask = paddings(2, 13)["left"]
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    options |= {"cache_implementation": cache, "disable_compile": True}
    for given in (None, mask):
        found = {}
        for name in ("eager", *NAMES):
            model.set_attn_implementation(name)
            given = torch.ones_like(mask) if given is None else given
            found[name] = model.generate(inputs, attention_mask=given, **options)
        for name in NAMES:
            assert torch.equal(found[name], found["eager"]), name
    assert len(found["eager"].unique()) > 4


@pytest.mark.critical
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_prefill_by_chunks(models, family, static):
    """Several queries on top of a filled cache, then single ones."""
    model = models[family].eval()
    inputs = torch.randint(VOCABULARY, (2, 24))
    mask = paddings(2, 24)["left"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        options = {"attention_mask": mask, "position_ids": positions}
        wanted = model(inputs, **options).logits[mask.bool()]
        for name in NAMES:
            model.set_attn_implementation(name)
            cache = transformers.DynamicCache(config=model.config)
            if static:
                cache = transformers.StaticCache(model.config, max_cache_len=32)
            parts = []
            for first, end in ((0, 10), (10, 17), (17, 23), (23, 24)):
                options = {"attention_mask": mask[:, :end], "past_key_values": cache}
                options["position_ids"] = positions[:, first:end]
                parts.append(model(inputs[:, first:end], **options).logits)
            found = torch.cat(parts, 1)[mask.bool()]
            torch.testing.assert_close(found, wanted, **CLOSE)


def test_masks_of_the_users_own(models):
    model, inputs = models["llama"].train(), torch.randint(VOCABULARY, (2, 20))
    seen = torch.rand(2, 1, 20, 20) > 0.4
    seen |= torch.eye(20, dtype=torch.bool)
    float_mask = torch.randn(2, 1, 20, 20).masked_fill(~seen, float("-inf"))
    keep = torch.ones(2, 20, dtype=torch.bool)
    for mask in (seen, float_mask):
        wanted = run(model, "sdpa", inputs, keep, attention_mask=mask)
        for name in NAMES:
            assert_same(run(model, name, inputs, keep, attention_mask=mask), wanted)
            with pytest.raises(ValueError, match="queries and keys are"):
                model(inputs[:, :15], attention_mask=mask)


def test_a_position_bias_is_honoured():
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs, labels = torch.randint(VOCABULARY, (2, 2, 20))
    given = {"attention_mask": paddings(2, 20)["right"], "decoder_input_ids": labels}
    with torch.no_grad():
        model.set_attn_implementation("eager")
        wanted = model(inputs, **given).logits
        for name in NAMES:
            model.set_attn_implementation(name)
            found = model(inputs, **given).logits
            torch.testing.assert_close(found, wanted, **CLOSE)
    with pytest.raises(NotImplementedError, match="bias"):
        model(inputs, **given)


def test_sparse_chooses_blocks_and_the_last_call_counts(models, monkeypatch):
    model, inputs = models["llama"].eval(), torch.randint(VOCABULARY, (1, 128))
    seen = []
    real = huggingface.block_sparse_attention

    def watch(q, k, v, index, mask, **options):
        seen.append((index.density, options["remainder"], index.block_size))
        return real(q, k, v, index, mask, **options)

    monkeypatch.setattr(huggingface, "block_sparse_attention", watch)
    model.set_attn_implementation("kernel_pytorch_sparse")
    found = []
    with torch.no_grad():
        for options in ({"block_size": 16}, {"block_size": 8, "remainder": True}):
            register_with_transformers(sparsity_ratio=0.5, **options)
            found.append(model(inputs).logits)
            model(inputs[:, : 2 * options["block_size"] - 1])
        model.set_attn_implementation("eager")
        dense = model(inputs).logits
    torch.testing.assert_close(found[0][:, :16], dense[:, :16], **CLOSE)
    assert (found[0] - dense).abs().max() > 0.01
    assert [entry[1:] for entry in seen] == [(False, 16)] * 2 + [(True, 8)] * 2
    assert all(0.2 < density < 0.4 for density, *_ in seen)


REFUSALS = {
    "dropout": lambda: transformers.LlamaForCausalLM(
        cases.llama_config(attention_dropout=0.1)
    ),
    "softcap": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**cases.SMALL, head_dim=8)
    ),
    "s_aux": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**cases.SMALL, head_dim=8, num_local_experts=2)
    ),
}


@pytest.mark.parametrize("name", ["kernel_pytorch_ring", "kernel_pytorch_sparse"])
@pytest.mark.parametrize("what", REFUSALS)
def test_what_is_not_honoured_raises(what, name):
    model = REFUSALS[what]()
    model.set_attn_implementation(name)
    for length in (1, 20):
        with pytest.raises(NotImplementedError, match=what):
            model(torch.zeros(1, length, dtype=torch.long))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_attention_weights_are_refused(models, family):
    models[family].set_attn_implementation("kernel_pytorch_ring")
    with pytest.raises(NotImplementedError, match="output_attentions"):
        models[family](torch.zeros(1, 9, dtype=torch.long), output_attentions=True)


def test_other_arguments_of_attention():
    function = transformers.AttentionInterface()["kernel_pytorch_ring"]
    module = torch.nn.Module()
    module.is_causal = True
    q, k = torch.randn(1, 2, 9, 12), torch.randn(1, 1, 9, 12)
    v = torch.randn(1, 1, 9, 8)
    found, _ = function(module, q, k, v, None, sliding_window=3)
    seen = torch.ones(9, 9, dtype=torch.bool).tril().triu(-2)
    dense = torch.nn.functional.scaled_dot_product_attention
    wanted = dense(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, wanted, **CLOSE)
    found, _ = function(module, q[..., :4], k[..., :4], v, None, is_causal=False)
    wanted = dense(q[..., :4], k[..., :4], v, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(found, wanted, **CLOSE)
    keep = torch.tensor([[0, 0, 1, 1, 1, 0, 1, 1, 1]])
    for rows in (9, 1):
        found, _ = function(module, q[:, :, -rows:], k, v, keep, is_causal=False)
        options = {"attn_mask": keep[:, None, None].bool(), "enable_gqa": True}
        wanted = dense(q[:, :, -rows:], k, v, **options).transpose(1, 2)
        torch.testing.assert_close(found, wanted, **CLOSE)
    with pytest.raises(NotImplementedError, match="5 queries and 9 keys"):
        function(module, q[:, :, :5], k, v, None)
    for name in ("head_mask", "cache"):
        with pytest.raises(NotImplementedError, match=name):
            function(module, q, k, v, None, **{name: torch.ones(2)})


def call_mask(name, **options):
    given = {"batch_size": 2, "q_length": 12, "kv_length": 12, "q_offset": 0}
    given |= {"kv_offset": 0, "device": "cpu", "attention_mask": None} | options
    return transformers.AttentionMaskInterface()[name](**given)


def mask_functions():
    m = masking_utils
    packed = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2]]).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in (5, 6, 1)]).expand(2, -1)
    causal, window = m.causal_mask_function, m.sliding_window_causal_mask_function(4)
    pack = m.packed_sequence_compatibility_function
    near = m.sliding_window_bidirectional_mask_function(3)
    return {
        "causal": (causal, True),
        "both": (m.bidirectional_mask_function, True),
        "window": (window, True),
        "near": (near, True),
        "packed": (pack(causal, positions, packed), True),
        "packed window": (pack(window, positions, packed), True),
        "shuffled": (pack(causal, positions.flip(1), packed), False),
        "chunks": (m.chunked_causal_mask_function(4, torch.tensor([0, 1])), False),
        "late": (m.sliding_window_overlay(3), False),
        "either": (m.or_masks(window, near), False),
        "nested": (m.and_masks(window, m.or_masks(near)), False),
        "own": (lambda b, h, q, k: (q + k) % 3 > 0, False),
    }


@pytest.mark.critical
@pytest.mark.parametrize("name", mask_functions())
def test_a_mask_function_keeps_its_meaning(name):
    function, known = mask_functions()[name]
    assert (describe(function) is not None) == known
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[1, :6] = False
    sizes = [(12, 12, 0, 0)]
    if "packed" not in name and name != "shuffled":
        sizes += [(5, 12, 7, 0), (7, 20, 4, 0), (6, 9, 8, 5), (3, 30, 0, 0)]
    for q_length, kv_length, q_offset, kv_offset in sizes:
        given = {"q_length": q_length, "kv_length": kv_length, "kv_offset": kv_offset}
        given |= {"q_offset": torch.tensor(q_offset), "mask_function": function}
        for mask in (None, padding[:, : q_offset + q_length]):
            given["attention_mask"] = mask
            found = call_mask("kernel_pytorch_ring", **given)
            assert isinstance(found, LazyMask) == known
            assert found.shape == (2, 1, q_length, kv_length)
            options = given | {"allow_is_causal_skip": False, "batch_size": 2}
            wanted = masking_utils.sdpa_mask(**options)
            assert torch.equal(found & True, wanted)


def test_a_plain_mask_makes_no_square():
    padding = torch.ones(2, 2**20, dtype=torch.bool)
    padding[0, :7] = False
    found = call_mask(
        "kernel_pytorch_sparse",
        q_length=2**20,
        kv_length=2**20,
        attention_mask=padding,
        mask_function=masking_utils.sliding_window_causal_mask_function(9),
    )
    assert found.shape == (2, 1, 2**20, 2**20)
    assert (found.spec.causal, found.spec.window) == (True, 9)
    assert torch.equal(found.spec.key_padding, padding)


def test_a_lazy_mask_is_a_mask():
    spec = MaskSpec(causal=True, window=3)
    mask = LazyMask(spec, 2, (2, 1, 4, 6), "cpu")
    wanted = torch.ones(4, 6, dtype=torch.bool).tril(2).triu()
    wanted = wanted.expand(2, 1, 4, 6)
    assert (mask.dtype, mask.shape) == (torch.bool, (2, 1, 4, 6))
    assert mask.to(torch.bool) is mask
    assert torch.equal(mask[:, :, -2:], wanted[:, :, -2:])
    assert torch.equal(mask.float(), wanted.float())
    assert torch.equal(torch.cat([mask, ~mask], -1), torch.cat([wanted, ~wanted], -1))
    assert torch.equal(mask.clone(), wanted)
    assert "True" in repr(mask)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sparsity_ratio": 0.99}, "sparsity_ratio=0.99"),
        ({"pattern": "spiral"}, "pattern='spiral'"),
        ({"block_size": 0}, "block_size=0"),
        ({"coverage": 2.0}, "coverage=2.0"),
        ({"layout": "spiral"}, "layout='spiral'"),
    ],
)
def test_errors_name_the_value(options, match):
    with pytest.raises(ValueError, match=match):
        register_with_transformers(**options)


def test_transformers_is_imported_by_the_call_alone():
    code = (
        "import sys; from kernel_pytorch.attention import register_with_transformers\n"
        "assert 'transformers' not in sys.modules\n"
        "sys.modules['transformers'] = None\n"
        "try: register_with_transformers()\n"
        "except ImportError as error: print(error)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "kernel-pytorch[transformers]" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Run both ranks once: this process is one of them, to save an import."""
    folder = tmp_path_factory.mktemp("group")
    context = mp.get_context("spawn")
    other = context.Process(target=cases.worker, args=(1, str(folder)))
    other.start()
    try:
        cases.worker(0, str(folder))
    finally:
        other.join(timeout=60)
        other.kill()
    assert other.exitcode == 0
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.critical
@pytest.mark.parametrize("name", cases.GROUP_CASES)
def test_shards_over_a_group_are_one_device(reports, name):
    for report in reports:
        out, grads = report["errors"][name]
        assert out <= 1e-5
        assert grads <= 1e-5


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cache", "NotImplementedError: KV cache with a group (2 queries, 10 keys)"),
        ("packed", "NotImplementedError: packed sequences with a group"),
        ("positions", "InvalidValue: rank 0: InvalidValue: position_ids"),
        ("mask", "NotImplementedError: mask function"),
        ("bias", "NotImplementedError: position_bias with a group"),
    ],
)
def test_a_group_refuses(reports, name, told):
    messages = [report["refusals"][name] for report in reports]
    assert messages[0] == messages[1]
    assert messages[0].startswith(told)
