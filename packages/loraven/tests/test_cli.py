# SPDX-License-Identifier: Apache-2.0
"""The command line on a tiny BERT and GPT-2, and without what it needs."""

import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import loraven
from loraven import cli, commands
from torchworks_core.errors import CorruptFile, InvalidValue, MissingFile
from torchworks_core.testing import byte_tokenizer, save_tiny

# Half of them must do for the pooler, which sees one vector of each.
TEXTS = [f"text {k}: {'abcdefgh' * (1 + k % 5)}" for k in range(288)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    from transformers import BertConfig, BertModel

    base = tmp_path_factory.mktemp("models")
    save_tiny(base / "gpt2", "gpt2", num_hidden_layers=2)
    options = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
    options |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertModel(BertConfig(**options, pad_token_id=0)).save_pretrained(base / "bert")
    byte_tokenizer(base / "bert")
    return {name: base / name for name in ("bert", "gpt2")}


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def run(monkeypatch, *arguments: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["loraven", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def source(folder: Path, texts: list[str], **options: Any) -> commands.Source:
    given = {"batch_size": 16, "max_length": 128, "device": torch.device("cpu")}
    return commands.Source(folder, texts, **given | options)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_convert_saves_and_bench_loads(
    folders, texts, family, monkeypatch, capsys, tmp_path
):
    out = tmp_path / "factors"
    arguments = (folders[family], "--texts", texts, "--out", out, "--levels", "0.6,1.0")
    assert run(monkeypatch, "convert", *arguments) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if re.search(r"\d\.\d{4} ", line)]
    assert len(rows) == 2
    assert 0.5 < float(re.findall(r"\d+\.\d+", rows[0])[1]) <= 0.6
    assert re.search(r"\d+ layers converted, \d+ skipped; \d+ tokens", printed)
    assert f"saved in {out}" in printed
    model = commands.read_model(source(folders[family], TEXTS))
    assert list(loraven.load(model, out).levels) == [0.6, 1.0]
    # Nothing is converted again.
    monkeypatch.setattr(loraven, "convert", None)
    options = ("--factors", out, "--repeats", 1)
    assert run(monkeypatch, "bench", *arguments[:3], *options) == 0
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if " to " in line]) == 2


def test_convert_passes_its_options(folders, texts, monkeypatch, tmp_path):
    seen = {}

    def convert(model: Any, calibration: Any, **options: Any) -> None:
        seen.update(options, examples=sum(len(b["input_ids"]) for b in calibration))
        raise InvalidValue("enough")

    monkeypatch.setattr(loraven, "convert", convert)
    arguments = (folders["bert"], "--texts", texts, "--out", tmp_path / "factors")
    patterns = ("--include", "*query", "--include", "*key", "--exclude", "*.0.*")
    options = ("--cost", "energy", "--levels", "0.5", "--batch-size", "7")
    assert run(monkeypatch, "convert", *arguments, *patterns, *options) == 1
    assert seen == {
        "levels": (0.5,),
        "cost": "energy",
        "include": ["*query", "*key"],
        "exclude": ["*.0.*"],
        "examples": len(TEXTS),
    }


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_bench_compares_each_level(folders, texts, family, monkeypatch, capsys):
    options = ("--repeats", 1, "--levels", "0.7,1.0")
    assert run(monkeypatch, "bench", folders[family], "--texts", texts, *options) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if re.search(r"\d to \d", line)]
    assert len(rows) == 2
    reduced, full = (re.findall(r"\d+\.?\d*", row) for row in rows)
    assert (reduced[0], full[0]) == ("0.7", "1")
    # The last level is the model itself.
    assert full[4:] == ["1.0000", "1.0000", "1.0000"]
    assert 0 < float(reduced[-1]) < 1


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_audit_prints_its_verdict(folders, texts, family, monkeypatch, capsys):
    options = ("--target", 0.9, "--alpha", 0.2, "--levels", "0.6,0.8,1.0")
    assert run(monkeypatch, "audit", folders[family], "--texts", texts, *options) == 0
    printed = capsys.readouterr().out
    assert re.match(r"(static|adaptive): ", printed)
    assert "target 0.9, missed by at most 20 % of examples; 144 examples" in printed
    levels = re.findall(r"(?m)^ +(\d\.?\d*)  ", printed)
    assert levels == ["0.6", "0.8", "1"]


def test_audit_passes_its_options(folders, texts, monkeypatch, capsys):
    seen = {}

    def audit(model: Any, data: Any, **options: Any) -> str:
        seen.update(options, examples=sum(len(b["input_ids"]) for b in data))
        seen["levels"] = loraven.get_budget(model)
        return "verdict: static"

    monkeypatch.setattr(loraven, "audit", audit)
    arguments = (folders["bert"], "--texts", texts, "--target", 0.9, "--alpha", 0.1)
    assert run(monkeypatch, "audit", *arguments) == 0
    assert "verdict: static" in capsys.readouterr().out
    assert seen == {"target": 0.9, "alpha": 0.1, "examples": 144, "levels": 1.0}


def test_padding_is_masked(folders):
    found = commands.read_batches(source(folders["bert"], TEXTS, batch_size=5), TEXTS)
    assert [len(batch["input_ids"]) for batch in found] == [5] * 57 + [3]
    batch = found[0]
    lengths = [len(text) for text in TEXTS[:5]]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (
        batch["input_ids"].shape == batch["attention_mask"].shape == (5, max(lengths))
    )
    short = commands.read_batches(source(folders["bert"], TEXTS, max_length=3), TEXTS)
    assert short[0]["input_ids"].shape == (16, 3)
    # What stands in the padding changes nothing.
    model = commands.read_model(source(folders["bert"], TEXTS))
    other = batch | {
        "input_ids": batch["input_ids"] + 7 * (1 - batch["attention_mask"])
    }
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    pooled, expected = commands._pooled(model, batch), commands._pooled(model, other)
    torch.testing.assert_close(pooled, expected)
    with torch.no_grad():
        alone = model(torch.tensor([list(TEXTS[1].encode())])).last_hidden_state
    torch.testing.assert_close(pooled[1], alone[0].mean(0))
    cosines = commands._cosines(model, [batch, other], [pooled, -pooled])
    assert cosines.tolist() == pytest.approx([1.0] * 5 + [-1.0] * 5)


def test_the_model_is_of_its_own_class(folders):
    found = {f: commands.read_model(source(folders[f], TEXTS)) for f in folders}
    assert type(found["bert"]).__name__ == "BertModel"
    assert type(found["gpt2"]).__name__ == "GPT2LMHeadModel"
    assert not any(model.training for model in found.values())


def test_files_that_are_not_what_they_should_be(folders, texts, tmp_path):
    with pytest.raises(MissingFile, match="no such file"):
        commands.read_texts(tmp_path / "nowhere.txt")
    for content, error in ((b"\n \n", InvalidValue), (b"\xff\xfe\xfa", CorruptFile)):
        texts.write_bytes(content)
        with pytest.raises(error, match="texts"):
            commands.read_texts(texts)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CorruptFile, match="model"):
        commands.read_model(source(tmp_path, TEXTS))
    with pytest.raises(CorruptFile, match="tokenizer"):
        commands.read_batches(source(tmp_path, TEXTS), TEXTS)


def test_mistakes_are_one_sentence_and_exit_code_1(
    folders, texts, monkeypatch, capsys, tmp_path
):
    good = (folders["bert"], "--texts", texts, "--out", tmp_path / "out")
    for arguments, message in (
        ((tmp_path / "nowhere", *good[1:]), "has no config.json"),
        ((*good[:2], tmp_path / "no.txt", *good[3:]), "there is no such file"),
        ((*good, "--levels", "half"), "Give numbers with commas"),
        ((*good, "--device", "cuda:99"), "--device 'cuda:99'"),
        ((*good, "--levels", "2.0"), "2.0"),
    ):
        assert run(monkeypatch, "convert", *arguments) == 1
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert message in error.splitlines()[-1]
        assert error.splitlines()[-1].startswith("loraven: ")
    assert not (tmp_path / "out").exists()
    texts.write_text("just one\n")
    assert run(monkeypatch, "bench", *good[:3]) == 1
    assert "can't both calibrate and measure" in capsys.readouterr().err


def test_what_can_be_refused_is_refused_before_the_model_is_read(
    folders, texts, monkeypatch, capsys, tmp_path
):
    def read_model(_: Any) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr(commands, "read_model", read_model)
    start, out = (folders["bert"], "--texts", texts), tmp_path / "out"
    for arguments, message in (
        (("convert", *start, "--out", texts), "is a file"),
        (("convert", *start, "--out", texts / "a" / "b"), "is a file"),
        (("convert", *start, "--out", out, "--levels", "0.5,0.5"), "one is there"),
        (("audit", *start, "--target", 2), "target=2.0: no reduced level reaches it"),
        (("audit", *start, "--alpha", 0), "alpha=0.0"),
        (("bench", *start, "--levels", "1.5"), "in (0, 1]"),
    ):
        assert run(monkeypatch, *arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not out.exists()


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    # Whoever runs the tests may write everywhere.
    monkeypatch.setattr(commands.os, "access", lambda *_: False)
    with pytest.raises(InvalidValue, match="is read-only"):
        commands._check_out(tmp_path / "a" / "b")
    monkeypatch.undo()
    commands._check_out(tmp_path / "a" / "b")
    commands._check_out(tmp_path)
    assert not (tmp_path / "a").exists()


def test_a_failure_of_the_disk_is_one_sentence(
    folders, texts, monkeypatch, capsys, tmp_path
):
    def save(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loraven, "save", save)
    arguments = (folders["bert"], "--texts", texts, "--out", tmp_path / "factors")
    assert run(monkeypatch, "convert", *arguments, "--levels", "0.6") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("loraven: --out ")
    assert "No space left on device" in last


def test_a_folder_that_lies_is_one_sentence(
    folders, texts, monkeypatch, capsys, tmp_path
):
    folder = shutil.copytree(folders["bert"], tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    arguments = (folder, "--texts", texts, "--out", tmp_path / "out")
    assert run(monkeypatch, "convert", *arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"loraven: model '{folder}': ")


@pytest.mark.parametrize("name", ["_check_extra", "import_module"])
def test_interrupted_while_it_starts(monkeypatch, capsys, name):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, name, interrupt)
    assert run(monkeypatch, "convert", "x") == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "loraven: interrupted\n")


@pytest.mark.parametrize("name", ["loraven", "loraven.cli"])
def test_the_module_is_the_command(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", ["-m", "--help"])
    # runpy warns of a module that was imported before it is run.
    monkeypatch.delitem(sys.modules, "loraven.cli")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(name, run_name="__main__")
    assert not caught.value.code
    printed = capsys.readouterr().out
    assert "Usage: loraven" in printed
    assert all(name in printed for name in ("convert", "audit", "bench"))


def test_usage(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("convert", "audit", "bench"))
    assert run(monkeypatch, "convert") == 2


def test_warnings_are_one_line(folders, texts, monkeypatch, capsys, tmp_path):
    def convert(*_: Any, **__: Any) -> None:
        warnings.simplefilter("always")
        warnings.warn("too few", UserWarning, stacklevel=2)
        raise InvalidValue("enough")

    monkeypatch.setattr(loraven, "convert", convert)
    arguments = (folders["bert"], "--texts", texts, "--out", tmp_path / "factors")
    assert run(monkeypatch, "convert", *arguments) == 1
    lines = capsys.readouterr().err.splitlines()[-2:]
    assert lines == ["loraven: warning: too few", "loraven: enough."]


@pytest.mark.parametrize("name", ["typer", "rich", "tqdm", "transformers"])
def test_without_the_extra(monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert run(monkeypatch, "convert", "x") == 2
    captured = capsys.readouterr()
    expected = f"loraven: command line: {name} is missing. "
    expected += "Run: pip install 'loraven[cli]'.\n"
    assert (captured.out, captured.err) == ("", expected)
