# SPDX-License-Identifier: Apache-2.0
"""The repository's own rules, each a function that returns what breaks it.

``python -m tools.checks`` runs them all (that is part of ``nox -s lint``), and the
tests in ``tests/`` run each on this tree and on trees with a planted fault.
``python -m tools.checks --fix`` first inserts missing licence lines.

Patterns are put together from pieces, so that this file does not break its rules.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tools import dependencies, releases
from tools.workspace import ROOT, files, packages

LONGEST_FILE = 500
LARGEST_FILE = 3_000_000
README_WORDS = 1_200
TOP_LEVEL_REQUIRED = {
    ".ci", ".github", ".gitignore", ".pre-commit-config.yaml", "CONTRIBUTING.md",
    "LICENSE", "README.md", "constraints.txt", "noxfile.py", "packages",
    "pyproject.toml", "tests", "tools",
}  # fmt: skip
TOP_LEVEL_LATER = {"csrc", "trained_models"}
HIDDEN_FILES = {
    ".ci/run",
    ".github/workflows/ci.yml",
    ".github/workflows/release.yml",
    ".gitignore",
    ".pre-commit-config.yaml",
}
PACKAGE_ENTRIES = {
    "CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "csrc", "examples",
    "conftest.py", "hatch_build.py", "pyproject.toml", "setup.py", "src", "tests",
}  # fmt: skip
SOURCE_SUFFIXES = {".py", ".c", ".cc", ".cpp", ".cu", ".h", ".hpp"}
COMMAND = re.compile(r"pip install 'nox\[uv\]' && nox -s \w+(?: -- [^`\"#\n]+)?")

_SPDX = "SPDX-" + "License-Identifier:"
# What stands above that line in a package under this licence.
_NOTICES = {"AGPL-3.0-or-later": ["Copyright (C) 2025 alyxya"]}
_HOSTS = r"\.|".join(["py" + "pi", "python" + "hosted", "download.py" + "torch"])
_INDEX = "ind" + "ex"
_ADDRESS = re.compile(
    "|".join(
        [
            rf"(?:{_HOSTS}\.)(?:org|io)", r"https?://\S*/sim" + r"ple\b",
            r"https?://\S+\." + r"whl\b", r"\w\]?\s*@\s*" + r"https?://",
            r"find[-_]" + r"links[\s='\":,\[]*https?:",
            rf"--(?:extra-|default-)?{_INDEX}\b", rf"(?<!no-emit-){_INDEX}[-_]url\b",
            rf"UV_(?:\w+_)?{_INDEX}\b", rf"\[(?:tool\.uv\.)?{_INDEX}\]\]",
        ]
    ),
    re.IGNORECASE,
)  # fmt: skip
_LOCK_FILE = re.compile(r"uv\.lock|pylock.*\.toml|package-lock\.json|.*\.lock")
_MACHINE_PATH = re.compile(
    r"(?:^|[^A-Za-z0-9_.])/(?:" + "|".join(["work", "farm", "root", "opt"]) + ")/"
    r"|(?:^|[^A-Za-z0-9_./:-])/(?:" + "|".join(["home", "Users"]) + r")/\w",
    re.MULTILINE,
)
_BROAD = r"\b(?:Base)?Exception\b"
_ARGUMENTS = r"\((?:[^()]|\([^()]*\))*?"
_LEFTOVER = re.compile(
    "|".join(
        [
            "TO" + "DO", "FIX" + "ME", "XX" + "X", r"exc" + r"ept\s*:",
            "assert " + "True", r"pytest\.skip" + r"\(\)",
            r"\|\| *" + r"(?:true\b|:(?![:\w]))", r"\bset \+" + r"(?:\w*e|o err)",
            "continue-" + "on-error", "--re" + "runs",
            r"exc" + rf"ept\b[^:\n]*{_BROAD}[^:\n]*:\s*(?:#.*\s+)*(?:pass\b|\.\.\.)",
            r"supp" + rf"ress\([^)]*{_BROAD}",
            # Expected failures are strict by the root pyproject, and say why.
            r"mark\.xf" + rf"ail\b(?!{_ARGUMENTS}\breason\s*=)",
            r"mark\.xf" + rf"ail{_ARGUMENTS}\bstrict\s*=\s*False",
        ]
    )
)  # fmt: skip


def top_level(root: Path = ROOT) -> list[str]:
    """Only what the house has a place for stands at the top, and all of it does."""
    present = {path.relative_to(root).parts[0] for path in files(root)}
    lost = sorted(TOP_LEVEL_REQUIRED - present)
    extra = sorted(present - TOP_LEVEL_REQUIRED - TOP_LEVEL_LATER)
    problems = [f"{name}: missing at the top level" for name in lost]
    problems += [f"{name}: nothing of that name may stand here" for name in extra]
    for path in files(root):
        name = path.relative_to(root).as_posix()
        if name.startswith((".ci/", ".github/")) and name not in HIDDEN_FILES:
            problems.append(f"{name}: a hidden folder holds only what the house names")
    return problems


def package_folders(root: Path = ROOT) -> list[str]:
    """A package's folder holds the same few entries in every package."""
    problems = []
    for path in files(root):
        parts = path.relative_to(root).parts
        if parts[0] == "packages" and parts[2] not in PACKAGE_ENTRIES:
            problems.append(f"{'/'.join(parts[:3])}: no place for this in a package")
    for package in packages(root):
        for name in ("README.md", "CHANGELOG.md", "LICENSE", "src", "tests"):
            if not (package.folder / name).exists():
                problems.append(f"packages/{package.name}/{name}: missing")
        if not (package.folder / "src" / package.import_name / "py.typed").exists():
            problems.append(f"packages/{package.name}: its source lacks py.typed")
    return sorted(set(problems))


def file_length(root: Path = ROOT) -> list[str]:
    """No source file is over 500 lines, no tracked file over 3 MB."""
    problems = []
    for path in _regular_files(root):
        name = path.relative_to(root).as_posix()
        if path.stat().st_size > LARGEST_FILE:
            problems.append(f"{name}: {path.stat().st_size} bytes, over {LARGEST_FILE}")
        elif path.suffix in SOURCE_SUFFIXES:
            lines = len(path.read_bytes().splitlines())
            if lines > LONGEST_FILE:
                problems.append(f"{name}: {lines} lines, over {LONGEST_FILE}")
    return problems


def licence_headers(root: Path = ROOT) -> list[str]:
    """Each source file names the licence of its package in its first three lines."""
    return [
        f"{path.relative_to(root).as_posix()}: lacks the line {line!r}"
        for path, lines in _without_header(root)
        for line in lines
    ]


def add_licence_headers(root: Path = ROOT) -> list[str]:
    """Insert the missing licence lines; return the names of the files changed."""
    changed = []
    for path, lines in _without_header(root):
        text = path.read_text(encoding="utf-8")
        first, rest = ("", text)
        if text.startswith("#!"):
            first, _, rest = text.partition("\n")
            first += "\n"
        path.write_text(first + "\n".join([*lines, rest]), encoding="utf-8")
        changed.append(path.relative_to(root).as_posix())
    return changed


def package_addresses(root: Path = ROOT) -> list[str]:
    """No lock file, and no address of a package registry in any file."""
    problems = [
        f"{path.relative_to(root).as_posix()}: a lock file names a registry"
        for path in files(root)
        if _LOCK_FILE.fullmatch(path.name)
    ]
    return problems + _matches(root, _ADDRESS, "the address of a package registry")


def machine_paths(root: Path = ROOT) -> list[str]:
    """No file holds an absolute path of somebody's machine, nor links to one."""
    problems = [
        f"{path.relative_to(root).as_posix()}: links to an absolute path"
        for path in files(root)
        if path.is_symlink() and os.path.isabs(os.readlink(path))
    ]
    return problems + _matches(root, _MACHINE_PATH, "an absolute path of a machine")


def leftovers(root: Path = ROOT) -> list[str]:
    """No unfinished business, and nothing that hides a failure."""
    places = (".py", ".sh", ".yml", ".yaml", ".c", ".cpp", ".h")
    return _matches(root, _LEFTOVER, "unfinished, or hides a failure", places)


def readme(root: Path = ROOT) -> list[str]:
    """The README is short, and its commands are the ones that CI runs."""
    text = (root / "README.md").read_text(encoding="utf-8")
    script = (root / ".ci/run").read_text(encoding="utf-8")
    problems = []
    if len(text.split()) > README_WORDS:
        problems.append(f"README.md: {len(text.split())} words, over {README_WORDS}")
    if "```py" in text:
        problems.append("README.md: a block of Python here is run by no test")
    promised, run = set(COMMAND.findall(text)), set(COMMAND.findall(script))
    for session in ("tour", "tests"):
        if f"pip install 'nox[uv]' && nox -s {session}" not in promised:
            problems.append(f"README.md: lacks the command for {session}")
    problems += [f"README.md: CI does not run: {c}" for c in sorted(promised - run)]
    problems += [f".ci/run: the README lacks: {c}" for c in sorted(run - promised)]
    return problems


CHECKS: dict[str, Callable[[Path], list[str]]] = {
    check.__name__: check
    for check in (
        top_level,
        package_folders,
        file_length,
        licence_headers,
        package_addresses,
        machine_paths,
        leftovers,
        readme,
        dependencies.sibling_imports,
        dependencies.sibling_requirements,
        dependencies.undeclared_imports,
        releases.metadata,
        releases.changelog,
        releases.unreleased_entry,
    )
}


def run(root: Path = ROOT) -> list[str]:
    """Run every check; return all problems, each with the name of its check."""
    return [f"[{name}] {p}" for name, check in CHECKS.items() for p in check(root)]


def _regular_files(root: Path) -> list[Path]:
    return [path for path in files(root) if not path.is_symlink()]


def _matches(
    root: Path, pattern: re.Pattern[str], what: str, suffixes: tuple[str, ...] = ()
) -> list[str]:
    """List what matches in text files; files without a suffix always count."""
    problems = []
    for path in _regular_files(root):
        if suffixes and path.suffix and path.suffix not in suffixes:
            continue
        content = path.read_bytes()
        if b"\0" in content[:8192]:
            continue
        text = content.decode("utf-8", errors="replace")
        name = path.relative_to(root).as_posix()
        for found in pattern.finditer(text):
            number = text.count("\n", 0, found.end() - len(found[0].lstrip())) + 1
            problems.append(f"{name}:{number}: {what}: {found[0].strip()!r}")
    return problems


def _without_header(root: Path) -> Iterator[tuple[Path, list[str]]]:
    native = {(p.folder / "csrc").resolve(): p.licence for p in packages(root)}
    native |= {p.folder.resolve(): p.licence for p in packages(root)}
    for path in _regular_files(root):
        if path.suffix not in SOURCE_SUFFIXES or not path.stat().st_size:
            continue
        owners = (native[p] for p in path.resolve().parents if p in native)
        licence = next(owners, "Apache-2.0")
        mark = "#" if path.suffix == ".py" else "//"
        said = [*_NOTICES.get(licence, []), f"{_SPDX} {licence}"]
        head = path.read_text(encoding="utf-8").splitlines()[:3]
        if lost := [line for text in said if (line := f"{mark} {text}") not in head]:
            yield path, lost


def main() -> int:
    """Run every check and print what it finds; 1 if there is anything."""
    if "--fix" in sys.argv[1:]:
        for name in add_licence_headers():
            print(f"added the licence line: {name}")
    problems = run()
    print("\n".join(problems) or f"{len(CHECKS)} repository checks hold")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
