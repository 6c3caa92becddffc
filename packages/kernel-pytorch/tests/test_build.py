# SPDX-License-Identifier: Apache-2.0
"""The build hook: with and without a compiler, from the tree and from the sdist."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

PACKAGE = Path(__file__).resolve().parent.parent
pytest.importorskip("hatchling", reason="hatchling builds the wheels")
pytestmark = pytest.mark.skipif(
    not (PACKAGE / "hatch_build.py").exists(), reason="not in a source tree"
)


def hatchling(folder, target, out, **environment):
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    env = {**os.environ, **environment}
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = Path(out).iterdir()
    return built, run.stdout + run.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the package with the C files in place of the link."""
    folder = tmp_path_factory.mktemp("tree") / "package with a space"
    left_out = shutil.ignore_patterns("_native", "__pycache__", "tests", "examples")
    shutil.copytree(PACKAGE, folder, ignore=left_out)
    readme = folder / "README.md"
    if not readme.exists():
        readme.write_text("# kernel-pytorch\n")
    return folder


def record_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if "/_native/" in n]
        record = json.loads(archive.read("kernel_pytorch/_native/build.json"))
        library = "kernel_pytorch/_native/libkp.so"
        data = archive.read(library) if library in names else None
    return record, data


@pytest.mark.fast
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/bin/false", "/bin/false ended with 1"),
        ("/no/such/compiler", "can't be run"),
        ("", "no C compiler was found"),
    ],
)
def test_wheel_without_a_compiler(tree, tmp_path, compiler, reason):
    empty = tmp_path / "bin"
    empty.mkdir()
    out = tmp_path / "out"
    wheel, output = hatchling(tree, "wheel", out, CC=compiler, PATH=str(empty))
    record, library = record_of(wheel)
    assert wheel.name.endswith("py3-none-any.whl")
    assert library is None
    assert reason in record["reason"]
    assert "no native kernel" in output


@pytest.mark.slow
def test_wheel_from_the_sdist_has_the_kernel(tree, tmp_path):
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    sdist, _ = hatchling(tree, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert (folder / "csrc" / "block_sparse.h").is_file()
    assert not list(folder.rglob("*.so"))
    wheel, output = hatchling(folder, "wheel", tmp_path / "out", CC="")
    record, library = record_of(wheel)
    assert record["reason"] == "", output
    assert hashlib.sha256(library).hexdigest() == record["sha256"]
    assert "py3-none-" in wheel.name
    assert not wheel.name.endswith("any.whl")
    assert not (folder / "src" / "kernel_pytorch" / "_native").exists()


@pytest.mark.fast
def test_editable_builds_into_the_source_tree(tree, monkeypatch):
    """The hook alone: a whole editable build needs one more package, editables."""
    spec = importlib.util.spec_from_file_location("hook", tree / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    warned = []
    fields = {"root": str(tree), "target_name": "wheel"}
    fields["app"] = SimpleNamespace(display_warning=warned.append)
    hook = object.__new__(type("Hook", (module.CustomBuildHook,), fields))
    monkeypatch.setenv("CC", "/bin/false")
    data = {"force_include": {}}
    hook.initialize("editable", data)
    folder = tree / "src" / "kernel_pytorch" / "_native"
    record = json.loads((folder / "build.json").read_text())
    shutil.rmtree(folder)
    assert record["reason"] in warned[0]
    assert data == {"force_include": {}}
