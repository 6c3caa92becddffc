# SPDX-License-Identifier: Apache-2.0
"""What is saved is loaded to the bit; what is anything else is refused untouched."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import loraven
from loraven.store import seal
from torchworks_core import checkpoint


def make(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False)
    return nn.Sequential(*layers).eval()


@pytest.fixture
def saved(tmp_path):
    """A folder with a conversion, and outputs at its levels."""
    model, x = make(), torch.randn(300, 64)
    summary = loraven.convert(model, [x], levels=(0.3, 0.6, 1.0))
    loraven.save(model, tmp_path / "family")
    outputs = []
    with torch.no_grad():
        for level in summary.levels:
            loraven.set_budget(model, level)
            outputs.append(model(x))
    return tmp_path / "family", summary, x, outputs


def test_the_folder_holds_one_document_and_one_file_of_weights(saved):
    folder = saved[0]
    names = sorted(path.name for path in folder.iterdir())
    assert names[-1] == "loraven.json"
    assert len(names) == 2
    assert names[0].startswith("loraven-")
    assert names[0].endswith(".safetensors")
    # Its own weights are not in it.
    tensors, _ = checkpoint.load(folder, document_name="loraven.json")
    assert {name.rpartition(".")[2] for name in tensors} == {
        "up",
        "down",
        "down_bias",
        "up_bias",
        "order",
    }


def test_loading_gives_the_same_family(saved):
    folder, summary, x, outputs = saved
    model = make()
    assert loraven.load(model, folder) == summary
    assert loraven.get_budget(model) == 1.0
    with torch.no_grad():
        for level, expected in zip(summary.levels, outputs, strict=True):
            loraven.set_budget(model, level)
            assert torch.equal(model(x), expected)
    first = model[0].original
    assert loraven.revert(model)[0] is first


_SCRIPT = """
import sys, torch, loraven
from torch import nn
torch.manual_seed(0)
layers = nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False)
model = nn.Sequential(*layers).eval()
summary = loraven.load(model, sys.argv[1])
data = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    for level, expected in zip(summary.levels, data["outputs"], strict=True):
        loraven.set_budget(model, level)
        assert torch.equal(model(data["x"]), expected), level
print("equal")
"""


@pytest.mark.critical
def test_a_fresh_process_computes_the_same_to_the_bit(saved, tmp_path):
    folder, _, x, outputs = saved
    torch.save({"x": x, "outputs": outputs}, tmp_path / "data.pt")
    paths = [str(Path(loraven.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    found = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder), str(tmp_path / "data.pt")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | threads,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == "equal\n", found.stderr


def test_gpt2_and_bert(gpt2, bert, sentences, tmp_path):
    ids = torch.randint(0, 256, (24, 24))
    cases = [(gpt2, [(ids,)]), (bert, sentences())]
    for number, (kind, data) in enumerate(cases):
        one, two = kind(), kind()
        summary = loraven.convert(one, data)
        loraven.save(one, tmp_path / str(number))
        assert loraven.load(two, tmp_path / str(number)) == summary
        mine, other = one.state_dict(), two.state_dict()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype(tmp_path, dtype):
    one, two, x = make().to(dtype), make().to(dtype), torch.randn(300, 64).to(dtype)
    loraven.convert(one, [x])
    loraven.save(one, tmp_path)
    loraven.load(two, tmp_path)
    with torch.no_grad():
        for level in (0.3, 0.7):
            loraven.set_budget(one, level)
            loraven.set_budget(two, level)
            assert torch.equal(one(x), two(x))


def test_saving_again_replaces_the_conversion(saved):
    folder, _, x, _ = saved
    model = make()
    summary = loraven.convert(model, [x], levels=(0.5,))
    loraven.save(model, folder)
    assert len(list(folder.iterdir())) == 2
    assert loraven.load(make(), folder) == summary


def test_what_can_not_be_saved_or_loaded(saved, tmp_path):
    folder = saved[0]
    with pytest.raises(RuntimeError, match="was not converted"):
        loraven.save(make(), tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        loraven.load(make(), tmp_path / "nothing")
    with pytest.raises(TypeError, match="not a str"):
        loraven.load("model", folder)
    model = make()
    loraven.load(model, folder)
    with pytest.raises(ValueError, match="already converted"):
        loraven.load(model, folder)


def refused(folder, match, model=None, error=ValueError):
    """Loading raises, and leaves the model as it was."""
    model = model or make()
    modules, state = list(model.modules()), vars(model).copy()
    keys = list(model.state_dict())
    with pytest.raises(error, match=match):
        loraven.load(model, folder)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert list(model.state_dict()) == keys
    assert vars(model).keys() == state.keys()


def edit(folder, change, sealed=True):
    """Change the document, as someone who means harm or made a mistake would."""
    path = folder / "loraven.json"
    document = json.loads(path.read_text())
    change(document)
    if sealed:
        document["sha256"] = seal(document)
    path.write_text(json.dumps(document))


def in_layer(key, value):
    return lambda document: document["layers"][0].__setitem__(key, value)


def at_top(key, value):
    return lambda document: document.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (in_layer("ranks", [-8, 8, 64]), "layer '0', field 'ranks'"),
        (in_layer("ranks", [0, 8, 64]), "layer '0', field 'ranks'"),
        (in_layer("ranks", [8.0, 8, 64]), "layer '0', field 'ranks'"),
        (in_layer("ranks", [True, 8, 64]), "layer '0', field 'ranks'"),
        (in_layer("ranks", [8, 16, 65]), "3 ranks from 1 to 64"),
        (in_layer("ranks", [8, 64]), "layer '0', field 'ranks'"),
        (in_layer("ranks", {"8": 8}), "layer '0', field 'ranks'"),
        (in_layer("forms", ["exec", "gauge", "dense"]), "layer '0', field 'forms'"),
        (in_layer("forms", [["dense"]] * 3), "layer '0', field 'forms'"),
        (in_layer("forms", "dense"), "layer '0', field 'forms'"),
        (in_layer("forms", ["dense"] * 3), "is not 64 where it is dense"),
        (
            lambda d: d["layers"][0].update(ranks=[64] * 3, forms=["dense"] * 3),
            r"tensor '0\.(up|down).*not",
        ),
        (in_layer("in_features", 65), r"field 'in_features'.*the model has 64"),
        (in_layer("out_features", 96.0), "field 'out_features'"),
        (in_layer("expected_error", [0.1, -1, 0]), "field 'expected_error'"),
        (in_layer("expected_error", ["a", 0, 0]), "field 'expected_error'"),
        (in_layer("expected_error", None), "field 'expected_error'"),
        (in_layer("sha256", "0" * 64), r"layer '0', field 'sha256'.*other weights"),
        (in_layer("sha256", None), "layer '0', field 'sha256'"),
        (in_layer("name", "1"), r"layer '1'.*no such layer"),
        (in_layer("name", "2"), "layer '2', field 'in_features'"),
        (lambda d: d["layers"].append(d["layers"][0]), r"layer '0': .*twice"),
        (in_layer("name", "../up"), "no such layer"),
        (in_layer("name", 3), r"layer 0.*has no name"),
        (at_top("layers", []), "field 'layers'"),
        (at_top("layers", ["0"]), "has no name"),
        (at_top("layers", None), "field 'layers'"),
        (at_top("loraven", 2), r"field 'loraven'.*is 2, this version reads 1"),
        (at_top("loraven", True), "field 'loraven'"),
        (at_top("levels", []), "field 'levels'"),
        (at_top("levels", [0.6, 0.3, 1.0]), "not ascending"),
        (at_top("levels", [0.0, 0.3, 1.0]), "field 'levels'"),
        (at_top("levels", [0.3, 0.6, 1.5]), "field 'levels'"),
        (at_top("levels", [0.3, 0.6]), "field 'ranks'"),
        (at_top("levels", [0.1 * i for i in range(1, 9)]), "field 'levels'"),
        (at_top("cost_fraction", [0.3]), "field 'cost_fraction'"),
        (at_top("model_macs_fraction", [2, 2, 2]), "field 'model_macs_fraction'"),
        (at_top("resident_bytes", [-1, 0, 0]), "field 'resident_bytes'"),
        (at_top("tokens", "many"), "field 'tokens'"),
        (at_top("seconds", None), "field 'seconds'"),
        (at_top("skipped", {"a": 1}), "field 'skipped'"),
        (at_top("cost", 3), "'cost'"),
        (at_top("torchworks", {"schema": 99}), "schema 99"),
        (at_top("torchworks", None), "schema version"),
    ],
)
def test_a_changed_document_is_refused(saved, change, match):
    folder = saved[0]
    edit(folder, change)
    refused(folder, match)


@pytest.mark.critical
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (in_layer("forms", ["gauge"] * 3), r"layer '0', field 'forms'.*at level 1.0"),
        (in_layer("forms", ["gauge", "dense", "gauge"]), r"field 'forms'.*level 1.0"),
        (in_layer("ranks", [16, 8, 64]), r"field 'ranks'.*not ascending"),
        (in_layer("ranks", [8, 16, 32]), r"field 'ranks'.*not 64 where it is dense"),
        (at_top("levels", [0.1, 0.6, 1.0]), r"field 'cost_fraction'.*at level 0.1"),
        (at_top("levels", [0.3, 0.6, 1]), r"field 'levels'.*no floats"),
        (at_top("cost_fraction", [0.2, 0.4, 0.9]), r"'cost_fraction'.*layer is dense"),
        (at_top("cost_fraction", [0.0, 0.0, 1.0]), r"'cost_fraction'.*by its plans"),
        (at_top("cost_fraction", [0.29, 0.28, 1.0]), r"'cost_fraction'.*ascending"),
        (at_top("cost_fraction", [0.3, 0.7, 1.0]), r"'cost_fraction'.*at level 0.6"),
        (at_top("cost", "\x1b[2Jmacs"), "'cost': holds characters"),
        (at_top("cost", "macs\n"), "'cost': holds characters"),
        (at_top("skipped", {"a": "\x1b]0;owned\x07"}), r"'skipped'.*holds characters"),
        (at_top("skipped", {"\x1b[31m": "b"}), r"'skipped'.*holds characters"),
        (at_top("skipped", {"a": "\u202eb"}), r"'skipped'.*holds characters"),
    ],
)
def test_a_document_that_contradicts_itself_is_refused(saved, change, match):
    edit(saved[0], change)
    refused(saved[0], match)


def test_no_refusal_repeats_control_characters(saved):
    edit(saved[0], in_layer("name", "\x1b[2J\u202e"))
    with pytest.raises(ValueError, match="no such layer") as caught:
        loraven.load(make(), saved[0])
    assert str(caught.value).isprintable()


def test_a_level_below_may_be_dense_but_then_all_above_are(saved):
    def change(document):
        document["levels"] = [0.3, 0.6, 0.7]
        document["cost_fraction"] = [*document["cost_fraction"][:2], 0.7]
        for layer in document["layers"]:
            layer["forms"] = [layer["forms"][0], "dense", "gauge"]
            layer["ranks"] = [layer["ranks"][0], 64, 64]

    edit(saved[0], change)
    refused(saved[0], r"field 'forms'.*smaller at a level than at the one below")


def test_sizes_are_those_of_the_plans_whatever_the_document_says(saved):
    folder, summary, *_ = saved

    def change(document):
        document["resident_bytes"], document["family_bytes"] = [1, 2, 3], 4

    edit(folder, change)
    assert loraven.load(make(), folder) == summary


def test_damage_to_the_document_is_found(saved):
    folder = saved[0]
    for change in (at_top("tokens", 301), in_layer("expected_error", [0, 0, 0])):
        edit(folder, change, sealed=False)
        refused(folder, "field 'sha256': is not that of the document")
    edit(folder, lambda document: document.pop("sha256"), sealed=False)
    refused(folder, "field 'sha256'")


@pytest.mark.parametrize("cost", ["energy", lambda m, n, r, f: 1.0 + r])
def test_what_other_costs_chose_is_loaded(tmp_path, cost):
    model, levels = make(), (0.3, 0.6, 0.8, 1.0)
    summary = loraven.convert(model, [torch.randn(300, 64)], cost=cost, levels=levels)
    loraven.save(model, tmp_path)
    assert loraven.load(make(), tmp_path) == summary


def with_tensors(folder, change):
    """Write the conversion again with other tensors, hashes and all."""
    tensors, document = checkpoint.load(folder, document_name="loraven.json")
    change(tensors)
    names = {"document_name": "loraven.json", "stem": "loraven"}
    checkpoint.save(folder, tensors, document, **names)


def filled(name, value):
    return lambda tensors: tensors[name].view(-1)[:1].fill_(value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (filled("0.up", torch.nan), r"tensor '0\.up', holds NaN|'0\.up': holds NaN"),
        (filled("2.down", torch.inf), r"'2\.down': holds NaN or infinity"),
        (filled("0.order", 10**9), r"'0\.order': is no order of 96"),
        (filled("0.order", -1), r"'0\.order': is no order"),
        (lambda t: t["0.up"].zero_(), r"'0\.up': (has no form|gives forms)"),
        (lambda t: t.update({"0.up": t["0.up"].T}), r"'0\.up': is torch\.float32"),
        (lambda t: t.update({"0.up": t["0.up"][:4]}), r"'0\.up': is torch\.float32"),
        (lambda t: t.update({"0.up": t["0.up"].double()}), r"is torch\.float64"),
        (lambda t: t.update({"2.order": t["2.order"].int()}), r"is torch\.int32"),
        (lambda t: t.pop("2.up_bias"), r"tensor '2\.up_bias'.*missing or too many"),
        (lambda t: t.update({"3.up": t["2.up"]}), r"tensor '3\.up'"),
    ],
)
def test_changed_tensors_are_refused(saved, change, match):
    folder = saved[0]
    with_tensors(folder, change)
    refused(folder, match)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_is_unpickled(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = saved[0]
    (weights,) = folder.glob("*.safetensors")
    for path in (weights, folder / "loraven.json"):
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(Bomb()))
        refused(folder, path.name)
        path.write_bytes(before)
    assert not (tmp_path / "exploded").exists()
    loraven.load(make(), folder)


def test_damaged_and_missing_files(saved):
    folder = saved[0]
    (weights,) = folder.glob("*.safetensors")
    document = folder / "loraven.json"
    before, text = weights.read_bytes(), document.read_text()
    for raw in (b"", before[:-1], before[:-1] + bytes([before[-1] ^ 1]), before + b"0"):
        weights.write_bytes(raw)
        refused(folder, weights.name)
    weights.unlink()
    refused(folder, weights.name, error=FileNotFoundError)
    weights.write_bytes(before)
    for bad in ("", "[]", "{", text[:-2], text.replace("0.6", "NaN")):
        document.write_text(bad)
        refused(folder, "loraven.json")
    document.write_text(text + " " * (16 << 20))
    refused(folder, r"loraven\.json.*more than 16777216 bytes")
    document.unlink()
    refused(folder, "loraven.json", error=FileNotFoundError)


def test_other_weights_are_refused(saved):
    folder = saved[0]
    refused(folder, "layer '0', field 'sha256'", make(seed=1))
    model = make()
    with torch.no_grad():
        model[0].bias[3] += 1e-6
    refused(folder, "layer '0', field 'sha256'", model)
    refused(folder, "layer '0', field 'sha256'", make().double())
    small = nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 64))
    refused(folder, "field 'in_features': is 64, the model has 32", small)
    tied = make()
    refused(folder, "layer '0': shared", nn.Sequential(tied[0], tied[2], tied[0]))
