# SPDX-License-Identifier: Apache-2.0
"""When an environment is made anew, and how pip's wheel folders reach uv."""

from pathlib import Path

import pytest

from tools import environment
from tools.workspace import Package


@pytest.fixture
def tree(tmp_path):
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "packages/p/pyproject.toml",
        "packages/p/setup.py",
        "packages/p/src/p/__init__.py",
        "csrc/p/deep/x.cpp",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("old\n")
    folder = tmp_path / "environment"
    folder.mkdir()
    environment.write_stamp(folder, ["-e", "p"], tmp_path)
    return tmp_path


def current(tree, install=("-e", "p")) -> bool:
    return environment.is_current(tree / "environment", install, tree)


def test_an_environment_stays_while_nothing_changes(tree):
    assert current(tree)
    (tree / "packages/p/src/p/__init__.py").write_text("new\n")
    assert current(tree)


@pytest.mark.parametrize(
    "name",
    [
        "pyproject.toml",
        "constraints.txt",
        "packages/p/pyproject.toml",
        "packages/p/setup.py",
        "csrc/p/deep/x.cpp",
    ],
)
@pytest.mark.parametrize("how", ["changed", "deleted"])
def test_it_is_made_anew_when_something_it_was_made_from_changes(tree, name, how):
    if how == "changed":
        (tree / name).write_text("new\n")
    else:
        (tree / name).unlink()
    assert not current(tree)


def test_it_is_made_anew_for_a_new_file_another_command_or_another_python(
    tree, monkeypatch
):
    assert not current(tree, ("-e", "p", "-e", "q"))
    with monkeypatch.context() as patch:
        patch.setattr("sys.version", "4.0")
        assert not current(tree)
    (tree / "csrc/p/new.h").write_text("")
    assert not current(tree)


@pytest.fixture
def native(tree) -> Package:
    """The package as a native one, built and installed."""
    library = tree / "packages/p/src/p/_C.so"
    library.write_text("old\n")
    package = Package("p", "p", tree / "packages/p", {})
    environment.write_stamp(tree / "environment", ["-e", "p"], tree, [package])
    return package


def built(tree: Path, package: Package) -> bool:
    return environment.is_current(tree / "environment", ["-e", "p"], tree, [package])


def test_a_package_is_native_if_it_has_a_setup_script(tree, native):
    assert native.native
    (tree / "packages/p/setup.py").unlink()
    assert not native.native


def test_it_is_made_anew_when_the_library_in_the_tree_is_gone(tree, native):
    assert built(tree, native)
    (tree / "packages/p/src/p/_C.so").unlink()
    assert not built(tree, native)
    assert current(tree)


def test_it_is_made_anew_when_another_environment_built_the_library(tree, native):
    source = tree / "csrc/p/deep/x.cpp"
    source.write_text("new\n")
    (tree / "other").mkdir()
    environment.write_stamp(tree / "other", ["-e", "p"], tree, [native])
    source.write_text("old\n")
    assert current(tree)
    assert not built(tree, native)


def test_an_interrupted_install_leaves_no_stamp(tree):
    (tree / "environment" / environment.STAMP).unlink()
    assert not current(tree)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ("", None),
        (" \n", None),
        ("a/wheels", "a/wheels"),
        ("one two", "one,two"),
        ("\none\n  two\n", "one,two"),
    ],
)
def test_wheel_folders_are_passed_on_with_commas(monkeypatch, places, expected):
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_FIND_LINKS", places)
    assert environment.variables().get("UV_FIND_LINKS") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("printf 'one\\ntwo\\n'", "one,two"), ("echo error; exit 1", "")],
    ids=["set", "unset"],
)
def test_wheel_folders_come_from_the_settings_of_pip(
    monkeypatch, tmp_path, answer, expected
):
    python = tmp_path / "python"
    asked = "-m pip config get global.find-links"
    python.write_text(f'#!/bin/sh\n[ "$*" = "{asked}" ] || exit 9\n{answer}\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert environment.find_links() == expected


def test_a_setting_for_uv_wins(monkeypatch):
    monkeypatch.setenv("UV_FIND_LINKS", "mine")
    monkeypatch.setenv("PIP_FIND_LINKS", "theirs")
    assert "UV_FIND_LINKS" not in environment.variables()


def test_constraints_are_a_relative_path():
    # uv splits the variable at spaces, so an absolute path could be cut in two.
    assert environment.variables()["UV_CONSTRAINT"] == "constraints.txt"
