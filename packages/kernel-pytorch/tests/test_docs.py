# SPDX-License-Identifier: Apache-2.0
"""The README's and the examples' code runs and does what is said of it."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_pytorch import attention

PACKAGE = Path(__file__).resolve().parent.parent


def test_readme_examples():
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    examples = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, "README.md", None, 0)
    assert len(test.examples) > 5
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0


def test_readme_names_the_files():
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+\.py)`", text))
    there = Path(attention.__file__).parent.glob("*.py")
    assert named == {file.name for file in there} - {"__init__.py"}


@pytest.mark.fast
def test_ring_example_has_the_loss_of_one_process():
    losses = []
    for processes in ("1", "2"):
        command = [sys.executable, "examples/train_ring.py", "--processes", processes]
        command += ["--tokens", "128"]
        done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = re.findall(r"loss ([\d.]+)", done.stdout)
        losses.append([float(loss) for loss in found])
    assert len(losses[0]) == 2
    assert losses[0][1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


@pytest.mark.fast
def test_long_document_example_equals_dense_attention():
    command = [sys.executable, "examples/long_document.py", "--tokens", "6000"]
    command += ["--window", "300"]
    done = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (error,) = re.findall(r"from dense attention: (\S+)", done.stdout)
    assert float(error) < 1e-4
    (share,) = re.findall(r"([\d.]+) % of the blocks", done.stdout)
    assert 4 < float(share) < 8
