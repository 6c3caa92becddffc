# SPDX-License-Identifier: Apache-2.0
"""A source distribution is complete: it builds the same wheel in another place."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools.workspace import ROOT, Package, packages

NAMES = [p.name for p in packages()]


def build(source: Path, out: Path, kind: str) -> Path:
    """Build with the back end that is installed here: no isolation, no network."""
    command = ["uv", "build", "--quiet", "--offline", "--no-build-isolation", kind]
    command += ["--python", sys.executable, "--no-create-gitignore"]
    command += ["--out-dir", str(out), str(source)]
    subprocess.run(command, check=True, cwd=source)
    (built,) = out.iterdir()
    return built


def copy(package: Package, top: Path) -> Path:
    """Copy a native package, link to the C++ sources included, as if built in place.

    setuptools makes an sdist in the package's own folder, where the repository's
    checks, which may run at the same time, would find it.
    """
    folder = top / "packages" / package.name
    made = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(package.folder, folder, symlinks=True, ignore=made)
    os.symlink(ROOT / "csrc", top / "csrc")
    for name in ("_C.so", "_C.torch", "__pycache__/x.pyc"):
        path = folder / "src" / package.import_name / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    return folder


@pytest.fixture(scope="module", params=NAMES)
def package(request):
    (found,) = [p for p in packages() if p.name == request.param]
    return found


@pytest.fixture(scope="module")
def sdist(package, tmp_path_factory) -> Path:
    source = package.folder
    if package.native:
        source = copy(package, tmp_path_factory.mktemp("tree"))
    return build(source, tmp_path_factory.mktemp("sdist"), "--sdist")


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory) -> Path:
    """The sdist in a folder with a space, outside this repository."""
    folder = tmp_path_factory.mktemp("un packed")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


def test_it_holds_regular_files_only(sdist):
    with tarfile.open(sdist) as archive:
        odd = [m.name for m in archive.getmembers() if not (m.isfile() or m.isdir())]
    assert odd == []


def test_it_holds_source_tests_readme_changelog_and_licence(package, unpacked):
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"):
        assert (unpacked / name).read_bytes() == (package.folder / name).read_bytes()
    for part in ("src", "tests", "examples", "csrc"):
        for path in (package.folder / part).rglob("*"):
            if path.suffix in {".py", ".typed", ".c", ".cpp", ".h"}:
                inside = unpacked / path.relative_to(package.folder)
                assert inside.read_bytes() == path.read_bytes()


def test_it_holds_nothing_that_was_made_by_running(unpacked):
    made = {"__pycache__", ".pytest_cache", ".ruff_cache", ".nox", ".hypothesis"}
    found = {path.name for path in unpacked.rglob("*")}
    assert not found & made
    assert not [name for name in found if name.endswith((".pyc", ".so", "_C.torch"))]


def test_it_builds_a_wheel_elsewhere_that_holds_the_package_and_no_more(
    package, unpacked, tmp_path
):
    wheel = build(unpacked, tmp_path / "wheel", "--wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    source = package.folder / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and path.suffix in {".py", ".typed"}
    }
    assert expected <= names
    tops = {name.partition("/")[0] for name in names}
    info = f"{package.name.replace('-', '_')}-{package.version}.dist-info"
    assert tops == {package.import_name, info}
    assert f"{info}/licenses/LICENSE" in names
    assert f"License-Expression: {package.licence}" in text
    assert f"Version: {package.version}" in text


def test_the_build_sees_a_link_if_there_is_one(package, tmp_path):
    """A link inside a package must reach the sdist as a file, not as a link."""
    (tmp_path / "p").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "hatch_build.py"):
        if (package.folder / name).exists():
            (tmp_path / "p" / name).write_bytes((package.folder / name).read_bytes())
    home = tmp_path / "p/src" / package.import_name
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/data.txt").write_text("x")
    os.symlink("../../../shared", home / "data")
    if package.pyproject["build-system"]["build-backend"] != "hatchling.build":
        pytest.skip("what this back end does with links is its package's own test")
    with tarfile.open(build(tmp_path / "p", tmp_path / "out", "--sdist")) as archive:
        linked = [m for m in archive.getmembers() if m.name.endswith("data/data.txt")]
        assert [m.isfile() for m in linked] == [True]
        assert not any(m.issym() or m.islnk() for m in archive.getmembers())
