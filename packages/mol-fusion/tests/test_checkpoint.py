# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mol import MoLConfig, MoLRuntime, fuse


@pytest.fixture
def rows(folders, stir):
    """A runtime with rows [(a, 2), (b, 1)] and [(b, 3)], stirred."""
    a, b = folders["gpt2"], folders["llama"]
    runtime = MoLRuntime(MoLConfig([a, b], router_type="token_level"))
    runtime.setup_embeddings()
    runtime.setup_lm_head()
    runtime.add_layer([(a, 2), (b, 1)], 0)
    runtime.add_layer([(b, 3), (a, 0)], 1)
    return stir(runtime)


def _document(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.critical
@pytest.mark.parametrize("use_safetensors", [True, False])
def test_fresh_process_gives_equal_bits(rows, ids, tmp_path, use_safetensors):
    rows.save_checkpoint(tmp_path / "saved", use_safetensors=use_safetensors)
    suffix = "safetensors" if use_safetensors else "pt"
    assert len(list((tmp_path / "saved").glob(f"model-*.{suffix}"))) == 1
    torch.save({"ids": ids}, tmp_path / "ids")
    script = f"""
        import torch
        from mol import MoLRuntime
        runtime = MoLRuntime.load_checkpoint({str(tmp_path / "saved")!r})
        ids = torch.load({str(tmp_path / "ids")!r}, weights_only=True)["ids"]
        torch.set_num_threads({torch.get_num_threads()})
        torch.save({{"logits": runtime.logits(ids)}}, {str(tmp_path / "out")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    loaded = torch.load(tmp_path / "out", weights_only=True)["logits"]
    assert torch.equal(loaded, rows.logits(ids))


@pytest.mark.parametrize("stream", ["single", "parallel"])
@pytest.mark.parametrize("use_safetensors", [True, False])
def test_auto_classes_and_generation_settings(
    make, ids, tmp_path, stream, use_safetensors
):
    runtime = make("gpt2", "llama", stream=stream)
    runtime.model.generation_config.max_new_tokens = 7
    runtime.save_checkpoint(tmp_path / "x", use_safetensors=use_safetensors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(ids).logits, runtime.logits(ids))
    assert model.generate(ids, do_sample=False).shape == (2, 27)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "x")
    assert tokenizer.get_vocab() == runtime.tokenizer.get_vocab()
    model.save_pretrained(tmp_path / "y")
    again = MoLRuntime.load_checkpoint(tmp_path / "y")
    assert torch.equal(again.logits(ids), runtime.logits(ids))
    with pytest.raises(TypeError, match="quantization_config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "x", quantization_config={1: 2})


def test_document_holds_what_is_needed_to_rebuild(rows, folders, tmp_path):
    rows.save_checkpoint(tmp_path / "x")
    document = _document(tmp_path / "x")
    assert document["rows"][0] == [[folders["gpt2"], 2], [folders["llama"], 1]]
    source = document["sources"][folders["llama"]]
    stored = load_file(f"{folders['llama']}/model.safetensors")
    used = {k for k in stored if ".layers.1." in k or ".layers.3." in k}
    assert set(source["tensors"]) == used
    for key in used:
        digest = hashlib.sha256(stored[key].numpy().tobytes()).hexdigest()
        assert source["tensors"][key]["sha256"] == digest


def test_saving_again_replaces_and_removes(rows, stir, ids, tmp_path):
    folder = tmp_path / "x"
    for use_safetensors in (True, False, True):
        stir(rows, seed=use_safetensors + 5)
        rows.save_checkpoint(folder, use_safetensors=use_safetensors)
        assert len([f for f in folder.iterdir() if f.name.startswith("model-")]) == 1
        loaded = MoLRuntime.load_checkpoint(folder)
        assert torch.equal(loaded.logits(ids), rows.logits(ids))


def _save_until_killed(folder, runtime, step):
    """Save in a forked process that is killed at its ``step``-th file operation."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(original):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            runtime.save_checkpoint(folder)
        finally:
            os._exit(0 if step > count else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kill_during_save_leaves_old_or_new(rows, ids, tmp_path):
    folder, old = tmp_path / "x", rows.logits(ids)
    rows.save_checkpoint(folder)
    saved = shutil.copytree(folder, tmp_path / "saved")
    with torch.no_grad():
        for p in rows.model.streams.layers.parameters():
            p.add_(1.0)
    new, outcomes = rows.logits(ids), []
    for step in (*range(1, 28, 2), 100):
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
        code = _save_until_killed(folder, rows, step)
        logits = MoLRuntime.load_checkpoint(folder).logits(ids)
        is_new = torch.equal(logits, new)
        assert is_new or torch.equal(logits, old)
        outcomes.append((code, is_new))
    assert (-signal.SIGKILL, False) in outcomes
    assert outcomes[-1] == (0, True)


def test_moved_and_changed_sources(copied, ids, tmp_path):
    a, b = copied("gpt2", "a"), copied("llama", "b")
    runtime = MoLRuntime(MoLConfig([str(a), str(b)]))
    runtime.setup_embeddings()
    runtime.setup_lm_head()
    runtime.add_layer([(str(a), 0), (str(b), 0)], 0)
    runtime.save_checkpoint(tmp_path / "x")
    expected = runtime.logits(ids)
    moved = b.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"load_checkpoint\(path, models="):
        MoLRuntime.load_checkpoint(tmp_path / "x")
    loaded = MoLRuntime.load_checkpoint(tmp_path / "x", models={str(b): str(moved)})
    assert torch.equal(loaded.logits(ids), expected)
    file = moved / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{key}.*hash"):
        MoLRuntime.load_checkpoint(tmp_path / "x", models={str(b): str(moved)})
    tensors[key] = tensors[key].half()
    save_file(tensors, file)
    with pytest.raises(ValueError, match="F16"):
        MoLRuntime.load_checkpoint(tmp_path / "x", models={str(b): str(moved)})


def test_source_changed_before_saving_is_noticed(copied, tmp_path):
    a = copied("gpt2", "a")
    runtime = MoLRuntime(MoLConfig([str(a)]))
    runtime.setup_embeddings()
    runtime.setup_lm_head()
    runtime.add_layer([(str(a), 0)], 0)
    os.utime(a / "model.safetensors", ns=(0, 0))
    with pytest.raises(RuntimeError, match="changed after it was opened"):
        runtime.save_checkpoint(tmp_path / "x")


def test_values_that_are_not_finite_are_refused_before_and_after(
    rows, tmp_path, monkeypatch
):
    rows.save_checkpoint(tmp_path / "x")
    before = sorted((tmp_path / "x").iterdir())
    rows.model.streams.layers[0].router.weight.data[0, 0] = float("inf")
    message = r"layers\.0\.router\.weight.*not finite"
    with pytest.raises(ValueError, match=message):
        rows.save_checkpoint(tmp_path / "x")
    assert sorted((tmp_path / "x").iterdir()) == before
    MoLRuntime.load_checkpoint(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr("mol.checkpoint._check_finite", lambda *_: None)
        rows.save_checkpoint(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        MoLRuntime.load_checkpoint(tmp_path / "x")


def test_nothing_else_is_overwritten(copied, ids, tmp_path, monkeypatch):
    a, other = copied("gpt2", "a"), copied("llama", "other")
    (tmp_path / "link").symlink_to(a)
    runtime = fuse(MoLConfig([str(a)]))
    before = {f: f.read_bytes() for f in (*a.iterdir(), *other.iterdir())}
    monkeypatch.chdir(tmp_path)
    for target, why in (
        (a, "folder of a source"),
        (tmp_path / "link", "folder of a source"),
        (other, "model of type 'llama'"),
        ("", "empty"),
    ):
        for use_safetensors in (True, False):
            with pytest.raises(ValueError, match=why):
                runtime.save_checkpoint(target, use_safetensors=use_safetensors)
    assert {f: f.read_bytes() for f in before} == before


def test_what_a_checkpoint_cannot_hold_is_refused(make, ids, tmp_path):
    for stream in ("single", "parallel"):
        runtime = make("gpt2", "llama", stream=stream)
        block = next(p for n, p in runtime.named_parameters() if ".layers." not in n)
        with torch.no_grad():
            block.add_(1)
        with pytest.raises(ValueError, match="of an expert was changed"):
            runtime.save_checkpoint(tmp_path / "x")
        runtime = make("gpt2", "llama", stream=stream)
        runtime.requires_grad_(True)
        with pytest.raises(ValueError, match="may be trained"):
            runtime.save_checkpoint(tmp_path / "x")
        runtime = make("gpt2", "llama", stream=stream).to(torch.bfloat16)
        with pytest.raises(ValueError, match=r"cast from torch\.float32"):
            runtime.save_checkpoint(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_changed_source_configuration_is_named(copied, tmp_path):
    a = copied("llama", "a")
    runtime = fuse(MoLConfig([str(a)]))
    runtime.save_checkpoint(tmp_path / "x")
    config = json.loads((a / "config.json").read_text())
    config["transformers_version"] = "0.0.0"
    (a / "config.json").write_text(json.dumps(config))
    MoLRuntime.load_checkpoint(tmp_path / "x")
    config["hidden_act"] = "relu"
    (a / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"hidden_act='relu'.*'silu'"):
        MoLRuntime.load_checkpoint(tmp_path / "x")


def test_tokenizer_is_the_one_that_was_saved(copied, tmp_path):
    a = copied("llama", "a")
    fuse(MoLConfig([str(a)])).save_checkpoint(tmp_path / "x")
    for file in a.glob("tokenizer*"):
        file.unlink()
    loaded = MoLRuntime.load_checkpoint(tmp_path / "x")
    assert loaded.tokenizer("abc")["input_ids"] == [97, 98, 99]
    copy = tmp_path / "x" / "tokenizer.json"
    copy.write_text(copy.read_text().replace("BPE", "WordLevel"))
    # A copy that is not of this save is not read.
    loaded = MoLRuntime.load_checkpoint(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        _ = loaded.tokenizer


def test_damaged_checkpoints_are_named(rows, tmp_path):
    folder = tmp_path / "x"
    with pytest.raises(FileNotFoundError, match="x"):
        MoLRuntime.load_checkpoint(folder)
    rows.save_checkpoint(folder)
    good = _document(folder)
    changes = {
        "model_type": "gpt2",
        "mol_schema": 2,
        "rows": [None],
        "tokenizer": [],
        "sources": {},
        "fusion": {**good["fusion"], "streem": "single"},
    }
    for key, value in changes.items():
        (folder / "config.json").write_text(json.dumps({**good, key: value}))
        with pytest.raises(ValueError, match=r"config\.json|streem"):
            MoLRuntime.load_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(good))
    with pytest.raises(ValueError, match="models names 'typo'"):
        MoLRuntime.load_checkpoint(folder, models={"typo": "x"})
    fewer = {**good, "rows": good["rows"][:1]}
    (folder / "config.json").write_text(json.dumps(fewer))
    with pytest.raises(ValueError, match="not those of its rows"):
        MoLRuntime.load_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(good))
    weights = next(folder.glob("model-*"))
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(ValueError, match=weights.name):
        MoLRuntime.load_checkpoint(folder)


def test_pickle_in_a_pt_file_is_never_run(rows, tmp_path):
    folder = tmp_path / "x"
    rows.save_checkpoint(folder, use_safetensors=False)
    weights = next(folder.glob("model-*.pt"))

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    torch.save({"x": Evil()}, weights)
    with pytest.raises(ValueError, match="sha256"):
        MoLRuntime.load_checkpoint(folder)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    document = _document(folder)
    document["torchworks"]["sha256"] = {weights.name: digest}
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"{weights.name}.*cannot be read"):
        MoLRuntime.load_checkpoint(folder)
    assert not (tmp_path / "hacked").exists()


def test_file_in_place_of_the_folder(rows, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="is a file"):
        rows.save_checkpoint(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"
