# SPDX-License-Identifier: Apache-2.0
"""The repository's own rules hold here, and each notices what it is there for."""

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tools import checks
from tools.workspace import ROOT, files, package, packages, requirement_name

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{name}"
version = "0.1.0"
description = "d"
readme = "README.md"
license = "Apache-2.0"
license-files = ["LICENSE"]
requires-python = ">=3.11"
authors = [{{ name = "n" }}]
dependencies = [{dependencies}]
[dependency-groups]
tests = ["pytest"]
"""
HEADER = "# SPDX-" + "License-Identifier: Apache-2.0\n"
COMMANDS = "".join(f"pip install 'nox[uv]' && nox -s {s}\n" for s in ("tour", "tests"))


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small workspace of two packages in which every rule holds."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    shared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in checks.TOP_LEVEL_REQUIRED - {".ci", ".github", "packages", "tools"}:
        write(tmp_path, f"{name}/test_x.py" if name == "tests" else name, HEADER)
    write(tmp_path, "pyproject.toml", shared)
    write(tmp_path, "LICENSE", "Apache License\n")
    write(tmp_path, "README.md", COMMANDS)
    write(tmp_path, ".ci/run", COMMANDS)
    write(tmp_path, ".github/workflows/ci.yml", "on: push\n")
    write(tmp_path, "tools/x.py", HEADER)
    for name, imported, needs in (
        ("torchworks-core", "torchworks_core", "numpy"),
        ("mol-fusion", "mol", "torchworks-core>=0.1,<1"),
    ):
        home = f"packages/{name}"
        pyproject = PYPROJECT.format(name=name, dependencies=f'"{needs}"')
        write(tmp_path, f"{home}/pyproject.toml", pyproject)
        write(tmp_path, f"{home}/README.md", "text\n")
        write(tmp_path, f"{home}/CHANGELOG.md", "## [0.1.0] - 2026-01-31\n")
        write(tmp_path, f"{home}/LICENSE", "Apache License\n")
        write(tmp_path, f"{home}/tests/test_x.py", HEADER)
        write(tmp_path, f"{home}/src/{imported}/py.typed", "")
        needed = requirement_name(needs).replace("-", "_")
        code = f"{HEADER}import {needed}\n"
        write(tmp_path, f"{home}/src/{imported}/__init__.py", code)
    return tmp_path


@pytest.mark.critical
@pytest.mark.parametrize("name", checks.CHECKS)
def test_this_repository_keeps_the_rule(name):
    assert checks.CHECKS[name](ROOT) == []


@pytest.mark.parametrize("name", checks.CHECKS)
def test_a_clean_tree_passes(tree, name):
    assert checks.CHECKS[name](tree) == []


MOL, CORE = "packages/mol-fusion", "packages/torchworks-core"
SOURCE = f"{MOL}/src/mol/x.py"
CORE_SOURCE = f"{CORE}/src/torchworks_core/x.py"
PLANTED = {
    "stray file": ("top_level", "notes.txt", "x\n"),
    "stray folder": ("top_level", "scripts/x.py", HEADER),
    "stray workflow": ("top_level", ".github/workflows/other.yml", "on: push\n"),
    "stray in package": ("package_folders", f"{MOL}/docs/x.md", "x\n"),
    "501 lines": ("file_length", SOURCE, HEADER + "x = 1\n" * 500),
    "501 lines of C": ("file_length", "csrc/x/x.c", "int x;\n" * 501),
    "a large file": ("file_length", f"{MOL}/tests/x.bin", "x" * 3_000_001),
    "no header": ("licence_headers", SOURCE, "x = 1\n"),
    "no header in tests": ("licence_headers", f"{MOL}/tests/test_y.py", "x = 1\n"),
    "another licence": ("licence_headers", SOURCE, HEADER.replace("Apache", "BSD")),
    "late header": ("licence_headers", SOURCE, "x = 1\n" * 3 + HEADER),
    "lock file": ("package_addresses", "uv.lo" + "ck", "x\n"),
    "index": ("package_addresses", "constraints.txt", "--ind" + "ex-url x\n"),
    "extra index": ("package_addresses", "noxfile.py", "'--extra-ind" + "ex-url'\n"),
    "index option": ("package_addresses", ".ci/run", "uv --ind" + "ex x\n"),
    "registry": ("package_addresses", "README.md", "see https://py" + "pi.org/p\n"),
    "torch's wheels": ("package_addresses", "README.md", "download.pytor" + "ch.org\n"),
    "a mirror": ("package_addresses", "tools/x.py", "# http://m.net/sim" + "ple/ x\n"),
    "files": ("package_addresses", "pyproject.toml", "# files.python" + "hosted.org\n"),
    "default index": ("package_addresses", ".ci/run", "uv --default-ind" + "ex x\n"),
    "uv's table": ("package_addresses", "pyproject.toml", "[[tool.uv.ind" + "ex]]\n"),
    "uv's file": ("package_addresses", "tools/uv.toml", "[[ind" + "ex]]\n"),
    "uv's variable": ("package_addresses", ".ci/run", "UV_IND" + "EX_URL=x\n"),
    "uv's default": ("package_addresses", ".ci/run", "UV_DEFAULT_IND" + "EX=x\n"),
    "pip's variable": ("package_addresses", ".ci/run", "PIP_IND" + "EX_URL=x\n"),
    "pip's settings": ("package_addresses", "tools/pip.ini", "ind" + "ex-url = x\n"),
    "links": ("package_addresses", ".ci/run", "pip --find-" + "links https://m.net\n"),
    "link": ("package_addresses", "constraints.txt", "pkg[x] @ " + "https://m.net/x\n"),
    "wheel": ("package_addresses", ".ci/run", "pip install https://m.net/x.wh" + "l\n"),
    "root": ("machine_paths", "README.md", "see /ro" + "ot/x\n"),
    "work": ("machine_paths", SOURCE, f"{HEADER}x = '/wo" + "rk/x'\n"),
    "opt at the start": ("machine_paths", "README.md", "/op" + "t/wheels\n"),
    "home": ("machine_paths", f"{MOL}/README.md", "(/ho" + "me/me/x)\n"),
    "to-do": ("leftovers", SOURCE, f"{HEADER}# TO" + "DO x\n"),
    "bare handler": ("leftovers", SOURCE, "exc" + "ept:\n"),
    "hidden failure": ("leftovers", ".ci/run", "x || tr" + "ue\n"),
    "failure that is fine": ("leftovers", ".ci/run", "x |" + "| :\n"),
    "failures that go on": ("leftovers", ".ci/run", "set " + "+e\n"),
    "no errexit": ("leftovers", ".ci/run", "set " + "+o errexit\n"),
    "swallowed": ("leftovers", SOURCE, "exc" + "ept Exception as e:\n  # x\n  pass\n"),
    "swallowed, too": ("leftovers", SOURCE, "exc" + "ept (OSError, Exception): ...\n"),
    "suppressed": ("leftovers", SOURCE, "with contextlib.supp" + "ress(Exception):\n"),
    "no reason": ("leftovers", SOURCE, "@pytest.mark.xf" + "ail\n"),
    "no reason given": ("leftovers", SOURCE, "@pytest.mark.xf" + "ail(raises=f(x))\n"),
    "not strict": (
        "leftovers",
        SOURCE,
        "pytest.mark.xf" + "ail(reason='x', strict=False)",
    ),
    "hidden job": (
        "leftovers",
        ".github/workflows/ci.yml",
        "continue-" + "on-error: 1",
    ),
    "long README": ("readme", "README.md", COMMANDS + "word " * 1_200),
    "code that nobody runs": ("readme", "README.md", COMMANDS + "```python\n"),
    "no command": ("readme", "README.md", COMMANDS.split("\n")[0]),
    "other command": ("readme", ".ci/run", COMMANDS.replace("s tour", "s tour -- -x")),
    "import": ("sibling_imports", SOURCE, "import loraven\n"),
    "from": ("sibling_imports", SOURCE, "from diode.model import x\n"),
    "in a function": ("sibling_imports", SOURCE, "def f():\n    import loraven\n"),
    "by a call": ("sibling_imports", SOURCE, "import_module('loraven')\n"),
    "by __import__": ("sibling_imports", SOURCE, "__import__('mycelya_torch')\n"),
    "by a dotted name": ("sibling_imports", SOURCE, "x = {'a': 'diode.model'}\n"),
    "by code in text": ("sibling_imports", SOURCE, "exec('x = 1; import diode')\n"),
    "by a name": ("sibling_imports", SOURCE, "x = 'loraven'\n"),
    "by a keyword": ("sibling_imports", SOURCE, "import_module(name='loraven')\n"),
    "for a program": ("sibling_imports", SOURCE, "run([x, '-m', 'loraven'])\n"),
    "in a command": ("sibling_imports", SOURCE, "system('python -m loraven')\n"),
    "by an object's name": ("sibling_imports", SOURCE, "resolve('diode:model')\n"),
    "by the start of a name": ("sibling_imports", SOURCE, "f(f'diode.{x}')\n"),
    "in sys.modules": ("sibling_imports", SOURCE, "sys.modules['loraven']\n"),
    "a word, by a call": ("sibling_imports", CORE_SOURCE, "import_module('mol')\n"),
    "a word, by a keyword": ("sibling_imports", CORE_SOURCE, "find_spec(name='mol')\n"),
    "a word, by another name": (
        "sibling_imports",
        CORE_SOURCE,
        "from importlib import import_module as im\nim('mol')\n",
    ),
    "a word, as an object": ("sibling_imports", CORE_SOURCE, "resolve_name('mol:x')\n"),
    "a word, resolved": ("sibling_imports", CORE_SOURCE, "resolve_name('mol')\n"),
    "a word, as a program": ("sibling_imports", CORE_SOURCE, "f([x, '-m', 'mol'])\n"),
    "a word, as an argument": ("sibling_imports", CORE_SOURCE, "f('-m', 'mol')\n"),
    "a word, loaded": ("sibling_imports", CORE_SOURCE, "x = sys.modules['mol']\n"),
    "a word, got": ("sibling_imports", CORE_SOURCE, "x = sys.modules.get('mol')\n"),
    "in a test": ("sibling_imports", f"{MOL}/tests/test_y.py", "import loraven\n"),
    "in an example": ("sibling_imports", f"{MOL}/examples/x.py", "import loraven\n"),
    "core uses mol": ("sibling_imports", f"{CORE}/tests/test_y.py", "import mol\n"),
    "undeclared": ("undeclared_imports", SOURCE, "import scipy.linalg\n"),
    "undeclared, lazily": ("undeclared_imports", SOURCE, "def f():\n  import yaml\n"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(tree, fault):
    name, path, text = PLANTED[fault]
    write(tree, path, text)
    if path == ".gitignore" or path.endswith(".lock"):
        write(tree, ".gitignore", "")
    problems = checks.CHECKS[name](tree)
    assert any(problem.split(":")[0] in path for problem in problems), problems


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ('"torchworks-core>=0.1,<1"', '"torchworks-core"', "sibling_requirements"),
        ('"torchworks-core>=0.1,<1"', "", "sibling_requirements"),
        ("dependencies = [", 'dependencies = ["loraven",', "sibling_requirements"),
        (
            "dependencies = [",
            'dependencies = ["Torch_Diode>1",',
            "sibling_requirements",
        ),
        ('tests = ["pytest"', 'tests = ["torch-diode"', "sibling_requirements"),
        ('requires = ["h', 'requires = ["loraven", "h', "sibling_requirements"),
        ("dependencies = [", 'dependencies = ["scipy",', "undeclared_imports"),
        ('version = "0.1.0"', 'version = "0.1"', "metadata"),
        ('version = "0.1.0"', 'version = "0.2.0"', "changelog"),
        ('license = "Apache-2.0"', 'license = "MIT"', "metadata"),
        ('">=3.11"', '">=3.9"', "metadata"),
        ("[dependency-groups]\ntests", "[dependency-groups]\nother", "metadata"),
    ],
)
def test_a_fault_in_a_pyproject_is_found(tree, old, new, name):
    file = tree / MOL / "pyproject.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert any(MOL in problem for problem in checks.CHECKS[name](tree))


@pytest.mark.parametrize("lost", ["README.md", "noxfile.py", "constraints.txt"])
def test_a_missing_file_is_found(tree, lost):
    (tree / lost).unlink()
    assert any(lost in problem for problem in checks.top_level(tree))


def test_what_may_be_said_about_siblings(tree):
    harmless = '"""Unlike loraven: import loraven is not needed."""\n'
    harmless += 'x = "a diode", "loraven: no", "Loraven. No"\nimport torchworks_core\n'
    write(tree, SOURCE, HEADER + harmless + "import mol.y\n")
    write(tree, CORE_SOURCE, HEADER + '"""mol.x"""\nx = f("mol", "mol: 1", y="mol")\n')
    assert checks.CHECKS["sibling_imports"](tree) == []


def test_what_neither_hides_a_failure_nor_names_a_registry(tree):
    code = (
        "try:\n  f()\nexcept Exception as e:\n  raise X from e\nexcept OSError: pass\n"
    )
    code += "with suppress(OSError): f()\n@pytest.mark.xfail(\n  not f(), reason='x')\n"
    write(tree, SOURCE, HEADER + code)
    write(tree, ".ci/run", "uv --no-emit-index-url --find-links folder || ::x\n")
    assert checks.leftovers(tree) == checks.package_addresses(tree) == []


def test_a_problem_names_its_line(tree):
    write(tree, SOURCE, "x = 1\n\nexc" + "ept Exception:\n  pass\n# TO" + "DO\n")
    write(tree, "README.md", "x\n/ro" + "ot/x\n")
    found = checks.leftovers(tree) + checks.machine_paths(tree)
    assert [":".join(p.split(":")[:2]) for p in found] == [
        *(f"{SOURCE}:3", f"{SOURCE}:5", "README.md:2")
    ]


def test_a_link_to_an_absolute_path_is_found(tree):
    os.symlink(tree / "README.md", tree / "tests/link")
    assert any("tests/link" in problem for problem in checks.machine_paths(tree))


def test_ignored_files_do_not_count_but_new_ones_do(tree):
    write(tree, ".gitignore", "*.tmp\n")
    write(tree, "x.tmp", "x")
    write(tree, "x.new", "x")
    names = [path.name for path in files(tree)]
    assert "x.new" in names
    assert "x.tmp" not in names


def test_missing_licence_lines_are_inserted_below_the_first_line_of_a_script(tree):
    write(tree, "tools/script.py", "#!/usr/bin/env python\nx = 1\n")
    write(tree, SOURCE, '"""Doc."""\n')
    assert checks.add_licence_headers(tree) == [SOURCE, "tools/script.py"]
    script = (tree / "tools/script.py").read_text()
    assert script == f"#!/usr/bin/env python\n{HEADER}x = 1\n"
    assert (tree / SOURCE).read_text() == f'{HEADER}"""Doc."""\n'
    assert checks.licence_headers(tree) == []


def test_native_sources_carry_the_licence_of_the_package_that_links_to_them(tree):
    write(tree, "csrc/x/x.cpp", "// SPDX-" + "License-Identifier: Apache-2.0\n")
    assert checks.licence_headers(tree) == []
    os.symlink("../../csrc/x", tree / MOL / "csrc")
    file = tree / MOL / "pyproject.toml"
    text = file.read_text()
    file.write_text(text.replace('"Apache-2.0"', '"AGPL-3.0-or-later"'))
    assert any("csrc/x/x.cpp" in problem for problem in checks.licence_headers(tree))


def test_a_file_under_the_agpl_also_says_whose_it_is(tree):
    file = tree / MOL / "pyproject.toml"
    file.write_text(file.read_text().replace('"Apache-2.0"', '"AGPL-3.0-or-later"'))
    line = HEADER.replace("Apache-2.0", "AGPL-3.0-or-later")
    notice = "# Copyright (C) 2025 alyxya\n"
    write(tree, f"{MOL}/src/mol/__init__.py", f"{notice}{line}")
    write(tree, f"{MOL}/tests/test_x.py", line)
    assert checks.licence_headers(tree) == [
        f"{MOL}/tests/test_x.py: lacks the line {notice.strip()!r}"
    ]
    write(tree, f"{MOL}/tests/test_x.py", "x = 1\n")
    assert checks.add_licence_headers(tree) == [f"{MOL}/tests/test_x.py"]
    assert (tree / MOL / "tests/test_x.py").read_text() == f"{notice}{line}x = 1\n"
    assert checks.licence_headers(tree) == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [("other", {}), ("loraven", {"folder": "elsewhere"})],
    ids=["a name nobody knows", "a folder of another name"],
)
def test_a_package_must_be_known_and_stand_in_its_folder(tree, name, changes):
    folder = changes.get("folder", name)
    text = PYPROJECT.format(name=name, dependencies="")
    write(tree, f"packages/{folder}/pyproject.toml", text)
    with pytest.raises(ValueError, match=folder):
        packages(tree)


def test_an_unknown_package_is_named_with_those_that_exist():
    there = ", ".join(p.name for p in packages())
    assert there.startswith("torchworks-core, ")
    with pytest.raises(ValueError, match=re.escape(f"'mol'; there are: {there}")):
        package("mol")


@pytest.mark.parametrize("name", ["ci", "release"])
def test_workflows_are_yaml_and_pin_every_action_by_commit(name):
    text = (ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    used = [s["uses"] for job in jobs.values() for s in job["steps"] if "uses" in s]
    assert used
    for action in used:
        assert len(action.partition("@")[2]) == 40, action


def test_publishing_is_a_job_of_its_own_with_the_only_right_to_do_so():
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]
    assert "permissions" not in build
    assert workflow["permissions"] == {"contents": "read"}
    assert any("--dry-run --tag" in step.get("run", "") for step in build["steps"])
    assert not any("checkout" in step.get("uses", "") for step in publish["steps"])


def test_only_what_is_on_main_is_published_and_no_run_on_main_is_cancelled():
    text = (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    steps = yaml.safe_load(text)["jobs"]["build"]["steps"]
    assert steps[0]["with"]["fetch-depth"] == 0
    runs = [step["run"] for step in steps if "run" in step]
    assert runs[0] == "git merge-base --is-ancestor HEAD origin/main"
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    concurrency = yaml.safe_load(text)["concurrency"]
    assert "github.run_id" in concurrency["group"]
    assert "== 'pull_request'" in concurrency["cancel-in-progress"]


def test_all_hooks_are_installed():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    (repo,) = config["repos"]
    stages = {stage for hook in repo["hooks"] for stage in hook["stages"]}
    assert stages == set(config["default_install_hook_types"])


def test_ci_is_one_script_and_stops_at_the_first_failure():
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    runs = [
        s["run"] for s in yaml.safe_load(text)["jobs"]["all"]["steps"] if "run" in s
    ]
    assert runs == ["bash .ci/run"]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    for session in ("lint", "types", "tests", "tour", "release"):
        assert f"nox -s {session}" in script


def test_the_noxfile_has_the_sessions_of_the_house():
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    decorated = (
        (node.name, [ast.unparse(d) for d in node.decorator_list])
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    )
    sessions = {name for name, decorators in decorated if "nox.session" in decorators}
    assert sessions == {
        *("bench", "lint", "lock", "release", "tests", "tests_alone", "tour", "types")
    }


def test_the_readme_says_which_packages_are_here():
    rows = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    here = {
        row.split("`")[1] for row in rows if row.startswith("| `") and "| yes" in row
    }
    assert here == {p.name for p in packages()}
