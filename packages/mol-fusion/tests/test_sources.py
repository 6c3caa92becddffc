# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mol import MoLConfig, UnsupportedArchitectureError, fuse
from mol.sources import ModelSource, available_memory, check_memory


def _open(folder, **options):
    return ModelSource(str(folder), MoLConfig([str(folder)], **options))


def _edit(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps(config))


def test_info_comes_from_config_and_headers(folders, base):
    info = _open(folders["llama"]).info
    assert (info.model_type, info.architecture) == ("llama", "LlamaForCausalLM")
    assert (info.hidden_size, info.num_layers, info.vocab_size) == (96, 4, 256)
    assert (info.max_positions, info.dtype, info.kind) == (128, "float32", "decoder")
    assert info.num_parameters == base["llama"].num_parameters()


def test_reading_is_bit_equal_to_the_library(folders):
    source = _open(folders["gpt2"])
    expected = load_file(f"{folders['gpt2']}/model.safetensors")
    actual = source.read(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    key = next(iter(expected))
    digest = hashlib.sha256(expected[key].numpy().tobytes()).hexdigest()
    assert source.sha256(key) == digest
    assert source.num_bytes(expected) == sum(t.nbytes for t in expected.values())


def test_files_without_the_prefix_are_found(copied):
    folder = copied("gpt2")
    file = folder / "model.safetensors"
    bare = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    save_file(bare, file)
    source = _open(folder)
    assert source.locate("transformer.wte.weight") == "wte.weight"
    assert "attn.c_attn.weight" in source.under("transformer.h.1.")
    assert source.locate("transformer.nothing") is None


def test_shards_read_like_one_file(copied, base):
    folder = copied("llama")
    single = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    base["llama"].save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    source = _open(folder)
    tensors = source.read(single)
    assert all(torch.equal(tensors[name], single[name]) for name in single)


def test_cast_and_private_copy(copied):
    folder = copied("gpt2")
    half = _open(folder, dtype="bfloat16")
    assert half.read(["transformer.wte.weight"])["transformer.wte.weight"].dtype == (
        torch.bfloat16
    )
    assert half.num_bytes(["transformer.wte.weight"]) == 256 * 64 * 2
    private = _open(folder, memory_efficient=False)
    kept = private.read(["transformer.wte.weight"])["transformer.wte.weight"]
    before = kept.clone()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-200_000, os.SEEK_END)
        file.write(b"\0" * 200_000)
    assert torch.equal(kept, before)


def test_file_changed_after_opening_is_noticed(copied):
    folder = copied("gpt2")
    source = _open(folder)
    os.utime(folder / "model.safetensors", ns=(0, 0))
    with pytest.raises(RuntimeError, match="changed after it was opened"):
        source.read(["transformer.wte.weight"])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("./nothing", FileNotFoundError),
        ("/nothing", FileNotFoundError),
        ("a/b/c", FileNotFoundError),
        ("gpt2", NotImplementedError),
        ("microsoft/DialoGPT-small", NotImplementedError),
    ],
)
def test_name_that_is_no_folder(name, error):
    with pytest.raises(error, match=name):
        _open(name)


def test_folder_without_config_or_weights(tmp_path, copied):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        _open(tmp_path)
    folder = copied("gpt2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        _open(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(ValueError, match="pickled"):
        _open(folder)


def test_shard_index_is_checked(copied):
    folder = copied("gpt2")
    index = folder / "model.safetensors.index.json"
    (folder / "model.safetensors").unlink()
    for shard in ("../x.safetensors", "/etc/passwd", ""):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(ValueError, match="name"):
            _open(folder)
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        _open(folder)
    for damaged in (
        {},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": {"a": 3}},
    ):
        index.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="weight_map"):
            _open(folder)


def test_shard_that_is_a_link_out_of_the_folder(copied, folders):
    folder = copied("gpt2")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(f"{folders['gpt2']}/model.safetensors")
    with pytest.raises(ValueError, match="link"):
        _open(folder)


def test_snapshot_of_the_hub_cache_may_link_to_its_blobs(tmp_path, folders):
    blobs = tmp_path / "models--x" / "blobs"
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"{folders['gpt2']}/{name}", blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert _open(snapshot).info.model_type == "gpt2"


def test_hostile_header_is_refused(copied):
    folder = copied("gpt2")
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        _open(folder)


def test_family_and_remote_code(copied):
    folder = copied("gpt2")
    _edit(folder, auto_map={"AutoModel": "code.Model"})
    with pytest.raises(ValueError, match="auto_map"):
        _open(folder)
    _edit(folder, auto_map=None, model_type="mistral")
    with pytest.raises(NotImplementedError, match="mistral"):
        _open(folder)
    _edit(folder, model_type="t5")
    with pytest.raises(NotImplementedError, match="t5"):
        _open(folder)
    _edit(folder, model_type="mamba")
    with pytest.raises(UnsupportedArchitectureError, match="no attention blocks"):
        _open(folder)
    _edit(folder, model_type=["gpt2"])
    with pytest.raises(UnsupportedArchitectureError, match="gpt2"):
        _open(folder)
    _edit(folder, model_type="no-such-family")
    with pytest.raises(UnsupportedArchitectureError, match="no-such-family"):
        _open(folder)


def test_tokenizer_that_would_run_code_is_refused(copied):
    folder = copied("gpt2")
    (folder / "code.py").write_text("raise SystemExit('executed')")
    settings = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["code.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"tokenizer of .* has auto_map"):
        _open(folder).tokenizer()


def test_relative_folder_stays_the_same_after_a_change_of_directory(
    copied, tmp_path, monkeypatch
):
    copied("gpt2", "model")
    monkeypatch.chdir(tmp_path)
    source = _open("./model")
    monkeypatch.chdir("/")
    assert source.tokenizer() is not None
    assert source.read(["transformer.wte.weight"])


def test_configuration_that_does_not_fit_the_files_is_refused(copied):
    folder = copied("gpt2")
    _edit(folder, n_layer=10_000_000)
    with pytest.raises(ValueError, match="10000000 layers"):
        _open(folder)
    _edit(folder, n_layer=4, n_head=0)
    with pytest.raises((ValueError, UnsupportedArchitectureError), match=str(folder)):
        fuse(MoLConfig([str(folder)]))
    _edit(folder, n_layer=3, n_head=4)
    with pytest.warns(UserWarning, match="more than the 3 layers"):
        fuse(MoLConfig([str(folder)]))
    save_file({}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="no tensor"):
        _open(folder)


def test_single_file_wins_over_an_index_as_in_transformers(copied, base):
    folder = copied("gpt2")
    key = "transformer.wte.weight"
    save_file({key: torch.zeros(256, 64)}, folder / "other.safetensors")
    index = {"weight_map": {key: "other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    stored = base["gpt2"].transformer.wte.weight
    assert torch.equal(_open(folder).read([key])[key], stored)


def test_mixed_dtypes_are_read_as_the_main_one(copied):
    folder = copied("llama")
    file = folder / "model.safetensors"
    tensors = {
        k: v if "norm" in k else v.bfloat16() for k, v in load_file(file).items()
    }
    save_file(tensors, file)
    runtime = fuse(MoLConfig([str(folder)]))
    assert {p.dtype for p in runtime.model.streams.stacks.parameters()} == {
        torch.bfloat16
    }
    assert runtime.logits(torch.tensor([[1, 2, 3]])).isfinite().all()


def test_revision_of_a_local_folder_is_refused(folders):
    folder = folders["gpt2"]
    with pytest.raises(ValueError, match="revisions"):
        _open(folder, revisions={folder: "main"})


def test_quantised_weights_are_refused(copied):
    folder = copied("gpt2")
    file = folder / "model.safetensors"
    save_file({k: v.to(torch.int8) for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="I8"):
        _open(folder)


def test_memory_check(monkeypatch):
    free = available_memory()
    assert free is None or free > 1 << 20
    monkeypatch.setattr("mol.sources.available_memory", lambda: 1000)
    check_memory("small", 1000)
    with pytest.raises(MemoryError, match=r"'large' needs 1,001 bytes.*1,000"):
        check_memory("large", 1001)
