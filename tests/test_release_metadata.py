# SPDX-License-Identifier: Apache-2.0
"""Versions, changelogs, tags, the arguments of ``nox -s release``, the lowest core."""

import subprocess
from pathlib import Path

import pytest

from tools import releases
from tools.workspace import ROOT, packages, requirement_name, settings

NAMES = [p.name for p in packages()]
PYPROJECT = """\
[project]
name = "{name}"
version = "0.2.0"
license = "Apache-2.0"
dependencies = ["torchworks-core>={lowest},<1"]
"""


def git(root: Path, *arguments: str) -> None:
    who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git repository with the core and mol-fusion at 0.2.0, committed, no tags."""
    root_pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(root_pyproject, encoding="utf-8")
    for name in ("torchworks-core", "mol-fusion"):
        folder = tmp_path / "packages" / name
        (folder / "src").mkdir(parents=True)
        (folder / "src/x.py").write_text("x = 1\n")
        text = PYPROJECT.format(name=name, lowest="0.1")
        (folder / "pyproject.toml").write_text(text)
        (folder / "CHANGELOG.md").write_text("## [0.2.0] - 2026-02-01\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "x")
    return tmp_path


def mol(tree: Path):
    return packages(tree)[1]


@pytest.mark.critical
@pytest.mark.parametrize("name", NAMES)
def test_a_release_of_this_package_would_be_accepted(name):
    (package,) = [p for p in packages() if p.name == name]
    problems = releases.changelog_problems(package, f"{name}-v{package.version}")
    # Between releases an Unreleased heading may stand above the versions.
    assert [p for p in problems if "at a tag" not in p] == []


@pytest.mark.parametrize(
    ("text", "tag", "problem"),
    [
        ("## [0.2.0] - 2026-02-01\n", None, None),
        ("## [Unreleased]\n\n## [0.2.0] - 2026-02-01\n", None, None),
        ("## [0.2.0] - 2026-02-01\n", "mol-fusion-v0.2.0", None),
        ("## [0.2.0] - 2026-02-01\n", "mol-fusion-v0.2.1", "is not mol-fusion-v0.2.0"),
        ("## [0.2.0] - 2026-02-01\n", "loraven-v0.2.0", "is not mol-fusion-v0.2.0"),
        ("## [0.2.0] - 2026-02-01\n", "v0.2.0", "is not mol-fusion-v0.2.0"),
        (
            "## [Unreleased]\n## [0.2.0] - 2026-02-01\n",
            "mol-fusion-v0.2.0",
            "at a tag nothing may be Unreleased",
        ),
        ("## [0.1.0] - 2026-02-01\n", None, "first version is 0.1.0"),
        (
            "## [0.3.0] - 2026-03-01\n## [0.2.0] - 2026-02-01\n",
            None,
            "first version is 0.3.0",
        ),
        ("## [0.2.0] - 2026-02-01\n## [Unreleased]\n", None, "must be the first"),
        ("## [0.2.0]\n", None, "needs a date"),
        ("## [0.2.0] - soon\n", None, "needs a date"),
        ("# Changelog\n", None, "first version is none"),
        ("## [0.2.0] - 2026-02-01\n" * 2, None, "stands twice"),
    ],
)
def test_version_changelog_and_tag_must_agree(tree, text, tag, problem):
    package = mol(tree)
    (package.folder / "CHANGELOG.md").write_text(text)
    found = releases.changelog_problems(package, tag)
    if problem is None:
        assert found == []
    else:
        assert any(problem in line for line in found), found


def test_a_change_after_the_tag_needs_an_unreleased_entry(tree):
    package = mol(tree)
    (package.folder / "src/x.py").write_text("x = 2\n")
    assert releases.compared_with_tags(tree) == []
    assert releases.unreleased_entry(tree) == []
    git(tree, "tag", "mol-fusion-v0.2.0")
    assert releases.compared_with_tags(tree) == ["mol-fusion"]
    (problem,) = releases.unreleased_entry(tree)
    assert "CHANGELOG.md" in problem
    text = "## [Unreleased]\n\n- x\n\n## [0.2.0] - 2026-02-01\n"
    (package.folder / "CHANGELOG.md").write_text(text)
    assert releases.unreleased_entry(tree) == []


def test_only_a_clean_tagged_commit_is_published(tree):
    (problem,) = releases.publish_problems(mol(tree), tree)
    assert "no tag mol-fusion-v0.2.0" in problem
    git(tree, "tag", "mol-fusion-v0.2.0")
    assert releases.publish_problems(mol(tree), tree) == []
    (tree / "new.py").write_text("")
    (problem,) = releases.publish_problems(mol(tree), tree)
    assert "uncommitted" in problem


def test_no_change_after_the_tag_needs_no_entry(tree):
    git(tree, "tag", "mol-fusion-v0.2.0")
    assert releases.unreleased_entry(tree) == []


def test_a_package_that_changed_since_its_tag_says_so():
    if not releases.compared_with_tags():
        pytest.skip("no package has its tag in this clone: nothing to compare with")
    assert releases.unreleased_entry() == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "required: PACKAGE"),
        (["nothing"], "no package 'nothing'; there are: torchworks-core, mol-fusion"),
        (["mol-fusion", "--dry"], "unrecognized arguments: --dry"),
        (["mol-fusion", "--tag"], "expected one argument"),
    ],
)
def test_release_refuses_wrong_arguments(tree, capsys, given, message):
    with pytest.raises(SystemExit) as refusal:
        releases.arguments(given, tree)
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


def test_release_takes_a_package_and_options(tree):
    given = releases.arguments(["mol-fusion", "--dry-run", "--tag", "t"], tree)
    assert (given.package.name, given.dry_run, given.tag) == ("mol-fusion", True, "t")
    assert not releases.arguments(["mol-fusion"], tree).dry_run


def test_a_wheel_with_compiled_code_is_not_published(tmp_path):
    names = ["a-1.tar.gz", "a-1-py3-none-any.whl", "a-1-py3-none-linux_x86_64.whl"]
    for name in names:
        (tmp_path / name).write_text("")
    assert releases.drop_native_wheels(tmp_path) == names[2:]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[:2])


@pytest.mark.parametrize(
    ("lowest", "tags", "expected"),
    [
        ("0.1", ["0.1.0", "0.2.0"], "torchworks-core-v0.1.0"),
        ("0.1.2", ["0.1.0", "0.1.2"], "torchworks-core-v0.1.2"),
        ("0.1", ["0.2.0"], None),
        ("0.1", [], None),
    ],
)
def test_the_lowest_core_is_the_one_that_is_declared(tree, lowest, tags, expected):
    file = mol(tree).folder / "pyproject.toml"
    file.write_text(PYPROJECT.format(name="mol-fusion", lowest=lowest))
    for tag in tags:
        git(tree, "tag", f"torchworks-core-v{tag}")
    assert releases.lowest_core_tag(mol(tree), "torchworks-core", tree) == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_lowest_core_that_is_declared_is_not_newer_than_the_one_here(name):
    core, *_ = packages()
    (package,) = [p for p in packages() if p.name == name]
    if package.name != settings()["core"]:
        names = [requirement_name(d) for d in package.dependencies]
        asked = package.dependencies[names.index(core.name)]
        lowest = asked.partition(">=")[2].partition(",")[0].split(".")
        assert [int(n) for n in lowest] <= [int(n) for n in core.version.split(".")]


def test_constraints_pin_torch_exactly_and_neither_our_packages_nor_triton():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    names = [requirement_name(line) for line in pins]
    assert names.count("torch") == 1
    assert "triton" not in names
    assert not set(names) & set(settings()["imports"])
    assert all("==" in pin and not pin.startswith("-") for pin in pins)
    for package in packages():
        for requirement in package.dependencies:
            name = requirement_name(requirement)
            assert name in names or name in settings()["imports"]
