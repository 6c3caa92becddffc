# SPDX-License-Identifier: Apache-2.0
"""Importing is light, and every public name is there."""

import subprocess
import sys

import pytest

import loraven

HEAVY = {"transformers", "matplotlib", "pynvml", "scipy", "typer", "rich", "tqdm"}


def modules_after(code):
    script = f"import sys, torch\nbefore = set(sys.modules)\n{code}\n"
    script += "print(*sorted(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.critical
def test_import_loads_nothing_heavy_and_prints_nothing():
    assert modules_after("import loraven") == {"loraven"}
    every = modules_after(
        "import loraven\nfor n in loraven.__all__: getattr(loraven, n)"
    )
    assert "loraven.conversion" in every
    assert not {name.partition(".")[0] for name in every} & HEAVY


def test_every_public_name_resolves():
    for name in loraven.__all__:
        assert getattr(loraven, name).__module__.startswith("loraven.")
    assert set(loraven.__all__) <= set(dir(loraven))
    assert sorted(loraven._HOME) == sorted(loraven.__all__)
    assert loraven.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="Nothing"):
        loraven.Nothing  # noqa: B018
