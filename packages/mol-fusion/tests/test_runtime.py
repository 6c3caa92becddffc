# SPDX-License-Identifier: Apache-2.0
import inspect
import math

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

import mol
from mol import MoLConfig, MoLRuntime, UnsupportedArchitectureError


@pytest.fixture
def pair(folders):
    return [folders["gpt2"], folders["llama"]]


@pytest.mark.critical
def test_signatures_are_the_specified_ones():
    runtime = MoLRuntime

    def names(function):
        return [
            (p.name, p.default)
            for p in inspect.signature(function).parameters.values()
            if p.kind is not p.VAR_KEYWORD and p.name != "self"
        ]

    none = inspect.Parameter.empty
    assert issubclass(runtime, nn.Module)
    assert names(runtime) == [("config", none)]
    assert names(runtime.setup_embeddings) == names(runtime.setup_lm_head) == []
    assert names(runtime.add_layer) == [("layer_specs", none), ("layer_idx", none)]
    assert names(runtime.forward) == [
        ("input_ids", none),
        ("attention_mask", None),
        ("return_router_stats", False),
    ]
    assert names(runtime.generate) == [("input_ids", none)]
    assert names(runtime.save_checkpoint) == [("path", none), ("use_safetensors", True)]
    assert names(runtime.load_checkpoint)[0] == ("path", none)
    assert names(runtime.push_to_hf) == [("repo_id", none), ("fusion_type", "runtime")]


@pytest.mark.critical
def test_the_specifications_basic_usage(pair):
    config = MoLConfig(
        models=pair,
        adapter_type="linear",
        router_type="simple",
        max_layers=2,
        memory_efficient=True,
    )
    runtime = MoLRuntime(config)
    runtime.setup_embeddings()
    runtime.setup_lm_head()
    for layer_idx in range(2):
        runtime.add_layer([(name, layer_idx) for name in pair], layer_idx=layer_idx)
    inputs = runtime.tokenizer("Hello, how are you?", return_tensors="pt")
    hidden, stats = runtime.forward(
        inputs["input_ids"], inputs["attention_mask"], return_router_stats=True
    )
    assert hidden.shape == (1, 19, 96)
    assert list(stats) == ["layer_0", "layer_1"]
    assert stats["layer_0"]["expert_weights"].shape == (1, 19, 2)
    assert stats["layer_0"]["expert_weights"][0, 0].tolist() == pytest.approx(
        [0.9, 0.1]
    )
    assert stats["layer_1"]["experts"] == ((pair[0], 1), (pair[1], 1))
    output = runtime.generate(inputs["input_ids"], max_length=30)
    assert output.shape == (1, 30)
    assert output.dtype == torch.int64
    assert torch.equal(output[:, :19], inputs["input_ids"])
    assert isinstance(runtime.tokenizer.decode(output[0]), str)
    assert isinstance(runtime.tokenizer, PreTrainedTokenizerBase)
    assert runtime.config is config
    assert runtime.target_hidden_dim == 96
    assert runtime.model_infos[pair[1]].hidden_size == 96


def test_forward_without_statistics_is_still_a_pair(make, ids):
    hidden, stats = make("gpt2")(ids)
    assert hidden.shape == (2, 20, 64)
    assert stats is None


def test_head_of_the_hidden_states_gives_the_logits(make, stir, ids):
    runtime = stir(make("gpt2", "llama"))
    hidden, _ = runtime.forward(ids)
    assert torch.equal(runtime.lm_head(hidden), runtime.logits(ids))
    with pytest.raises(ValueError, match="hidden_states has shape"):
        runtime.lm_head(hidden[..., :-1])


def test_constructor_reads_no_tensor(pair, monkeypatch):
    def refuse(*_args):
        raise AssertionError("read")

    monkeypatch.setattr("mol.sources.ModelSource.read", refuse)
    runtime = MoLRuntime(MoLConfig(pair))
    with pytest.raises(AssertionError, match="read"):
        runtime.setup_embeddings()


@pytest.mark.parametrize("stream", ["single", "parallel"])
def test_missing_calls_are_named(pair, ids, stream, tmp_path):
    runtime = MoLRuntime(MoLConfig(pair, stream=stream))
    uses = [
        lambda: runtime.forward(ids),
        lambda: runtime.generate(ids),
        lambda: runtime.logits(ids),
        lambda: runtime.save_checkpoint(tmp_path / "x"),
        runtime.verify,
    ]
    steps = [
        ("add_layer", lambda: runtime.add_layer([(pair[0], 0), (pair[1], 0)], 0)),
        (r"setup_embeddings\(\)", runtime.setup_embeddings),
        (r"setup_lm_head\(\)", runtime.setup_lm_head),
    ]
    for message, step in steps:
        for use in uses:
            with pytest.raises(RuntimeError, match=message):
                use()
        step()
        step() if "setup" in message else None
    assert not (tmp_path / "x").exists()
    assert runtime.logits(ids).isfinite().all()


def test_rows_are_checked_before_anything_is_loaded(pair):
    runtime = MoLRuntime(MoLConfig(pair, max_layers=2))
    bad = [
        ([("other", 0)], 0, "'other' is unknown"),
        ([(pair[0], 4)], 0, r"layer 4 .*4 layers"),
        ([(pair[0], -1)], 0, "layer -1"),
        ([(pair[0], 0), (pair[1], 9)], 0, "layer 9"),
        ([], 0, "layer_specs is empty"),
        ("ab", 0, "layer_specs='ab'"),
        ([pair[0]], 0, "no expert"),
        ([(pair[0], 0)], 1, "layer_idx=1"),
        ([(pair[0], 0)], True, "layer_idx=True"),
    ]
    for specs, number, message in bad:
        with pytest.raises(ValueError, match=message):
            runtime.add_layer(specs, number)
        assert runtime.model.streams.rows == []
        assert sum(1 for _ in runtime.model.streams.stacks.parameters()) == 0
    runtime.add_layer([(pair[0], 0)], 0)
    runtime.add_layer([(pair[1], 0)], 1)
    with pytest.raises(ValueError, match="max_layers=2"):
        runtime.add_layer([(pair[0], 1)], 2)
    with pytest.raises(ValueError, match="layer_idx=1"):
        runtime.add_layer([(pair[0], 1)], 1)


def test_failure_in_a_row_undoes_its_first_blocks(pair, monkeypatch):
    runtime = MoLRuntime(MoLConfig(pair))
    runtime.add_layer([(name, 0) for name in pair], 0)
    before = {n: id(p) for n, p in runtime.named_parameters()}
    from mol import stack

    original = stack._probe

    def probe(source, *args):
        if source.name == pair[1]:
            raise UnsupportedArchitectureError("planted", "", "")
        original(source, *args)

    monkeypatch.setattr(stack, "_probe", probe)
    with pytest.raises(UnsupportedArchitectureError, match="planted"):
        runtime.add_layer([(name, 1) for name in pair], 1)
    assert {n: id(p) for n, p in runtime.named_parameters()} == before
    assert [s.picks for s in runtime.model.streams.stacks.values()] == [[0], [0]]


def test_parameters_stay_the_same_objects_when_a_layer_is_added(pair):
    runtime = MoLRuntime(MoLConfig(pair))
    runtime.add_layer([(name, 0) for name in pair], 0)
    streams = runtime.model.streams
    kept = {
        n: p
        for part in ("stacks.0.blocks", "stacks.1.blocks", "layers")
        for n, p in streams.get_submodule(part).named_parameters()
    }
    runtime.add_layer([(name, 1) for name in pair], 1)
    now = {id(p) for p in runtime.parameters()}
    assert all(id(p) in now for p in kept.values())


def test_inputs_are_checked(make, ids):
    runtime = make("gpt2", "llama")
    mask = torch.ones_like(ids)
    mask[0, 3] = 2
    bad = {
        "reach from 0 to 256": (torch.tensor([[0, 256]]), None),
        "reach from -1": (torch.tensor([[0, -1]]), None),
        "dtype torch.float32": (torch.zeros(1, 2), None),
        "attention_mask holds 2": (ids, mask),
    }
    for message, (tokens, given) in bad.items():
        for call in (runtime.forward, runtime.logits):
            with pytest.raises(ValueError, match=message):
                call(tokens, given)
        with pytest.raises(ValueError, match=message):
            runtime.generate(tokens, attention_mask=given)


def test_generation_beyond_the_positions_is_refused_at_once(make, ids):
    runtime = make("llama", "gpt2")
    for kwargs in ({"max_new_tokens": 110}, {"max_length": 130}):
        with pytest.raises(ValueError, match="128 positions"):
            runtime.generate(ids, do_sample=False, **kwargs)
    assert runtime.generate(ids, max_length=129, do_sample=False).shape == (2, 129)


def test_forcing_is_checked_and_ends_with_its_block(make, folders, ids):
    runtime = make("gpt2", "llama")
    before = runtime.logits(ids)
    with pytest.raises(ValueError, match="'x' is unknown"), runtime.force_expert("x"):
        pass
    with runtime.force_expert(folders["llama"]):
        forced = runtime.logits(ids)
        with runtime.force_expert(folders["gpt2"]):
            assert not torch.equal(runtime.logits(ids), forced)
        assert torch.equal(runtime.logits(ids), forced)
    assert torch.equal(runtime.logits(ids), before)


def test_forcing_needs_the_model_in_every_row(folders, ids):
    a, b = folders["gpt2"], folders["llama"]
    runtime = MoLRuntime(MoLConfig([a, b]))
    runtime.add_layer([(a, 0), (b, 0)], 0)
    runtime.add_layer([(b, 1)], 1)
    with pytest.raises(RuntimeError, match="row 1"), runtime.force_expert(a):
        pass


def test_row_without_the_primary_is_uniform(folders, ids):
    a, b = folders["gpt2"], folders["llama"]
    runtime = MoLRuntime(MoLConfig([a, b]))
    runtime.setup_embeddings()
    runtime.setup_lm_head()
    runtime.add_layer([(b, 0), (b, 1)], 0)
    _, stats = runtime.forward(ids, return_router_stats=True)
    assert torch.allclose(stats["layer_0"]["expert_weights"], torch.tensor(0.5))
    assert stats["layer_0"]["router_entropy"].item() == pytest.approx(math.log(2))


def test_padding_only_row_is_finite_and_not_counted(make, stir, ids):
    runtime = stir(make("gpt2", "llama"))
    mask = torch.ones_like(ids)
    mask[1] = 0
    assert runtime.logits(ids, mask).isfinite().all()
    _, stats = runtime.forward(ids, mask, return_router_stats=True)
    _, alone = runtime.forward(ids[:1], return_router_stats=True)
    for name in stats:
        assert stats[name]["tokens_per_expert"].tolist() == [20, 20]
        assert stats[name]["router_entropy"].item() == pytest.approx(
            alone[name]["router_entropy"].item(), abs=1e-6
        )


def test_fuse_places_experts_at_equal_relative_depth(make, folders):
    rows = make("gpt2", "scaled").model.streams.rows
    assert [[i for _, i in row] for row in rows] == [[0, 0], [1, 1], [2, 1], [3, 2]]
    assert len(make("gpt2", "llama", max_layers=2).model.streams.rows) == 2


def test_memory_is_checked_before_reading(pair, monkeypatch):
    monkeypatch.setattr("mol.sources.available_memory", lambda: 10)
    with pytest.raises(MemoryError, match="needs"):
        MoLRuntime(MoLConfig(pair))
    monkeypatch.undo()
    runtime = MoLRuntime(MoLConfig(pair))
    monkeypatch.setattr("mol.sources.available_memory", lambda: 10)
    with pytest.raises(MemoryError, match="needs"):
        runtime.add_layer([(pair[0], 0)], 0)


def test_devices_are_checked(pair):
    MoLRuntime(MoLConfig(pair, device_map={pair[0]: "cpu"}))
    if torch.cuda.device_count() < 2:
        with pytest.raises(ValueError, match="cuda:1' is not on this machine"):
            MoLRuntime(MoLConfig(pair, device_map={pair[1]: "cuda:1"}))
    with pytest.raises(ValueError, match="nowhere"):
        MoLRuntime(MoLConfig(pair, device_map={pair[1]: "nowhere"}))


def test_config_changed_after_an_error_is_used_again(pair):
    config = MoLConfig(pair, target_hidden_dim=8)
    with pytest.raises(ValueError, match="target_hidden_dim=8"):
        MoLRuntime(config)
    config.target_hidden_dim = None
    config.memory_efficient = False
    config.max_layers = 2
    MoLRuntime(config)
    config.temperature = 0
    with pytest.raises(ValueError, match="temperature"):
        MoLRuntime(config)
    with pytest.raises(TypeError, match="MoLConfig"):
        MoLRuntime({"models": pair})


def test_missing_tokenizer_is_named(copied):
    folder = copied("gpt2")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    runtime = MoLRuntime(MoLConfig([str(folder)]))
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        _ = runtime.tokenizer


def test_explain_names_who_runs(make, folders):
    text = make("gpt2", "llama").explain()
    assert f"{folders['gpt2']}:3 GPT2Block, width 64" in text
    assert f"{folders['llama']}:0 LlamaDecoderLayer, width 96" in text
    assert "linear adapters of" in text
    assert text.count("layer ") >= 4


def test_push_is_refused_until_it_is_built(make):
    with pytest.raises(NotImplementedError, match="push_to_hf"):
        make("gpt2").push_to_hf("user/model")


def test_runtime_starts_in_eval_mode(make):
    assert not make("gpt2").training
    assert not mol.MoLRuntime(MoLConfig([make("gpt2").model.streams.primary])).training
