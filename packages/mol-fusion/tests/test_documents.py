# SPDX-License-Identifier: Apache-2.0
"""The README's code and the examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchworks_core.testing import save_tiny

PACKAGE = Path(__file__).resolve().parents[1]


@pytest.fixture
def two_models(tmp_path, monkeypatch):
    save_tiny(tmp_path / "prose", "gpt2")
    save_tiny(tmp_path / "code", "llama")
    monkeypatch.chdir(tmp_path)


@pytest.mark.critical
def test_readme_blocks_run_in_order(two_models, capsys):
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "R2 stream" in printed
    assert "torch.Size([1, 15, 2])" in printed


def test_example_runs(two_models):
    script = PACKAGE / "examples" / "fuse_two_models.py"
    done = subprocess.run(
        [sys.executable, str(script), "./prose", "./code", "Hello"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "GPT2Block" in done.stdout
    assert done.stdout.count("\n") > 37
