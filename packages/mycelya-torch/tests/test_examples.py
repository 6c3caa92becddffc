# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The examples run as they stand, with tiny random weights."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / name), *arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, timeout=240, check=False
    )


def output(name: str, *arguments: str) -> str:
    done = run(name, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    # transformers shows progress there.
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.mark.fast
@pytest.mark.parametrize("provider", ["local", "mock"])
def test_training_learns(provider):
    text = output("train.py", "--provider", provider, "--steps", "60")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", text)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
    accuracy = re.search(r"accuracy on new data: (\S+)%", text)
    assert accuracy is not None
    assert float(accuracy[1]) > 90
    assert "round_trips" in text


@pytest.mark.fast
def test_a_language_model_writes():
    text = output("smollm2.py", "--tokens", "8")
    assert "The capital of France is" in text
    assert "8 tokens" in text
    trips = re.search(r"(\S+) round trips", text)
    assert trips is not None
    assert float(trips[1]) < 2


@pytest.mark.fast
def test_a_model_in_a_folder_writes(tmp_path):
    from torchworks_core.testing import save_tiny

    save_tiny(tmp_path, "llama")
    text = output("smollm2.py", "--model", str(tmp_path), "--tokens", "4")
    assert "4 tokens" in text


@pytest.mark.fast
@pytest.mark.parametrize("family", ["gpt2", "llama", None])
def test_weights_are_loaded_without_passing_here(family, tmp_path):
    from torchworks_core.testing import save_tiny

    given = ["--model", str(save_tiny(tmp_path, family))] if family else []
    text = output("hf_loading.py", *given)
    size = re.search(r"\(root\): \d+ tensors, (\S+) bytes", text)
    moved = re.search(r"sent (\S+) bytes, received (\S+)", text)
    assert size is not None
    assert moved is not None
    total, *both = (int(n.replace(",", "")) for n in (size[1], *moved.groups()))
    assert sum(both) < total / 2


@pytest.mark.fast
def test_the_comparison_prints_a_ratio_for_each_row():
    text = output("compare.py", "--size", "64", "--repeats", "2")
    rows = [line for line in text.splitlines() if " us" in line]
    assert len(rows) == 5
    assert all(re.search(r" us +\d+\.\d\d  \d", row) for row in rows)


def test_the_check_of_modal_says_what_it_needs(tmp_path):
    """Without the extra or without credentials: one sentence, nothing started."""
    nothing = dict.fromkeys(("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"), "")
    config = str(tmp_path / "modal.toml")
    done = run(
        "modal_check.py", HOME=str(tmp_path), MODAL_CONFIG_PATH=config, **nothing
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("Modal can't be used: ")
    assert "mycelya-torch[modal]" in done.stderr or "MODAL_TOKEN_ID" in done.stderr
    assert "Traceback" not in done.stderr
