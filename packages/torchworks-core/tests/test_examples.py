# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings and in the README run as written."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

MODULES = ["errors", "logs", "_files", "_headers", "checkpoint", "devices", "bench"]
MODULES += ["hub", "testing"]
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(f"torchworks_core.{name}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.skipif(not README.is_file(), reason="the README is not installed")
def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
