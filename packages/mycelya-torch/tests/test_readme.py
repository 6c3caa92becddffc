# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The README names the files that there are, and its example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mycelya_torch

FOLDER = Path(__file__).parents[1]
PACKAGE = Path(mycelya_torch.__file__).parent
# A checkout may have turned the link into a text file.
NATIVE = (FOLDER / "csrc", FOLDER.parents[1] / "csrc/mycelya")
CSRC = next(folder for folder in NATIVE if folder.is_dir())
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
FILE = re.compile(r"[\w./-]+\.(?:py|cpp|h)\b")


def absent(text):
    """Return the file names in a text that stand for no file."""
    places = [(CSRC, "csrc/mycelya/"), (PACKAGE, "src/mycelya_torch/"), (FOLDER, "")]
    return {
        name
        for name in FILE.findall(text)
        # What made the tables belongs to the repository, not to the package.
        if name != "tools/bench/run.py"
        and not any((at / name.removeprefix(start)).is_file() for at, start in places)
    }


def unnamed(text):
    """Return the source files that a text does not name; a .cpp names its header."""
    named = set(FILE.findall(text))
    headers = {Path(name).stem + ".h" for name in named if name.endswith(".cpp")}
    files = {path.name for path in CSRC.iterdir() if path.suffix in (".cpp", ".h")}
    files |= {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    own = {name for name in files if name.endswith("__init__.py")}
    return files - named - headers - own


@pytest.mark.critical
def test_every_file_that_is_named_exists():
    assert absent(TEXT) == set()
    assert unnamed(TEXT) == set()


def test_a_wrong_name_and_a_new_file_are_noticed():
    wrong = TEXT.replace("MycelyaDynamic.cpp", "MycelyaNowhere.cpp")
    wrong = wrong.replace("`_life.py`", "`src/mycelya_torch/_lives.py`")
    wrong = wrong.replace("tests/test_opinfo.py", "tests/test_info.py")
    assert absent(wrong) == {
        *("MycelyaNowhere.cpp", "src/mycelya_torch/_lives.py", "tests/test_info.py")
    }
    assert unnamed(wrong) == {"MycelyaDynamic.cpp", "_life.py"}
    assert unnamed(TEXT.replace("`Mycelya.h`", "")) == {"Mycelya.h"}


@pytest.mark.fast
def test_the_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    where, total, loss, *table = done.stdout.splitlines()
    assert where == "mycelya:0 torch.Size([1000, 1000])"
    assert abs(float(total)) < 1e6
    assert 0 < float(loss) < 3
    assert any("round_trips" in line for line in table)
