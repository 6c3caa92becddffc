# SPDX-License-Identifier: Apache-2.0
"""What a release must satisfy: metadata, version, changelog, tag, lowest core.

`metadata`, `changelog` and `unreleased_entry` are repository checks; the rest serves
the nox session ``release``.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from tools.workspace import (
    ROOT,
    Package,
    git,
    package,
    packages,
    requirement_name,
    versions_in_changelog,
)

UNRELEASED = "Unreleased"
_VERSION = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}")
_DATE = re.compile(r"- \d{4}-\d{2}-\d{2}")
_LICENCE_TITLES = {
    "Apache-2.0": "Apache License",
    "AGPL-3.0-or-later": "GNU AFFERO GENERAL PUBLIC LICENSE",
}


def metadata(root: Path = ROOT) -> list[str]:
    """Each pyproject has a static version, and its licence is the one beside it."""
    problems = []
    for p in packages(root):
        where, project = f"packages/{p.name}/pyproject.toml", p.pyproject["project"]
        if "dynamic" in project or not _VERSION.fullmatch(project.get("version", "")):
            problems.append(f"{where}: needs a static version such as 1.2.3")
        if project.get("requires-python") != ">=3.11":
            problems.append(f"{where}: requires-python must be '>=3.11'")
        for key in ("description", "readme", "license", "license-files", "authors"):
            if not project.get(key):
                problems.append(f"{where}: lacks {key}")
        if "tests" not in p.groups:
            problems.append(f"{where}: lacks the dependency group 'tests'")
        title = _LICENCE_TITLES.get(project.get("license", ""))
        text = _text(p.folder / "LICENSE")
        if title is None or title not in text[:200]:
            problems.append(f"{where}: LICENSE is not {project.get('license')!r}")
        elif p.licence == "Apache-2.0" and text != _text(root / "LICENSE"):
            problems.append(f"packages/{p.name}/LICENSE: differs from LICENSE")
    return problems


def changelog(root: Path = ROOT) -> list[str]:
    """The first versioned heading of each changelog is the package's version."""
    return [problem for p in packages(root) for problem in changelog_problems(p)]


def changelog_problems(p: Package, tag: str | None = None) -> list[str]:
    """Compare version and changelog of one package and, at a release, the tag."""
    where, headings = f"packages/{p.name}/CHANGELOG.md", versions_in_changelog(p)
    problems = []
    names = [name for name, _ in headings]
    versioned = [(name, rest) for name, rest in headings if name != UNRELEASED]
    if UNRELEASED in names[1:]:
        problems.append(f"{where}: {UNRELEASED} must be the first heading")
    if not versioned or versioned[0][0] != p.version:
        found = versioned[0][0] if versioned else "none"
        problems.append(f"{where}: first version is {found}, pyproject has {p.version}")
    for name, rest in versioned:
        if not _DATE.fullmatch(rest):
            problems.append(f"{where}: {name} needs a date: ## [{name}] - YYYY-MM-DD")
    if len(set(names)) != len(names):
        problems.append(f"{where}: a version stands twice")
    if tag is not None:
        if tag != f"{p.name}-v{p.version}":
            problems.append(f"tag {tag!r} is not {p.name}-v{p.version}")
        if UNRELEASED in names:
            problems.append(f"{where}: at a tag nothing may be {UNRELEASED}")
    return problems


def publish_problems(p: Package, root: Path = ROOT) -> list[str]:
    """Publishing is refused from anything but the clean, tagged commit."""
    tag = f"{p.name}-v{p.version}"
    problems = []
    if tag not in git(root, "tag", "--points-at", "HEAD").split():
        problems.append(f"this commit has no tag {tag}; add it, or give --dry-run")
    if git(root, "status", "--porcelain"):
        problems.append("there are uncommitted changes; commit them, or give --dry-run")
    return problems


def unreleased_entry(root: Path = ROOT) -> list[str]:
    """A package that changed since its tag says so under Unreleased."""
    problems = []
    for p in packages(root):
        tag = f"{p.name}-v{p.version}"
        if not git(root, "tag", "--list", tag):
            continue
        changed = git(root, "diff", "--name-only", tag, "--", f"packages/{p.name}/src")
        names = [name for name, _ in versions_in_changelog(p)]
        if changed and UNRELEASED not in names:
            problems.append(
                f"packages/{p.name}/CHANGELOG.md: its source changed since {tag}, "
                f"but there is no heading [{UNRELEASED}]"
            )
    return problems


def compared_with_tags(root: Path = ROOT) -> list[str]:
    """Name the packages whose tag is here, so that `unreleased_entry` can compare."""
    tags = set(git(root, "tag", "--list").split())
    return [p.name for p in packages(root) if f"{p.name}-v{p.version}" in tags]


def arguments(given: Sequence[str], root: Path = ROOT) -> argparse.Namespace:
    """Parse what follows ``nox -s release --``; ``package`` becomes a `Package`.

    Raises:
        SystemExit: with a usage message, for a package that does not exist, none
            at all, or an unknown option.
    """
    names = ", ".join(p.name for p in packages(root))
    parser = argparse.ArgumentParser(
        prog="nox -s release --",
        description=f"PACKAGE is one of: {names}",
        allow_abbrev=False,
    )
    parser.add_argument("package", metavar="PACKAGE")
    parser.add_argument("--dry-run", action="store_true", help="do not publish")
    parser.add_argument("--tag", help="the tag to check the version against")
    known = parser.parse_args(given)
    try:
        known.package = package(known.package, root)
    except ValueError as error:
        parser.error(str(error))
    return known


def drop_native_wheels(dist: Path) -> list[str]:
    """Remove the wheels that hold compiled code; return their names.

    Such a wheel fits one minor version of torch, which its tags can't say.
    """
    wheels = [w for w in sorted(dist.glob("*.whl")) if not w.stem.endswith("-any")]
    for wheel in wheels:
        wheel.unlink()
    return [wheel.name for wheel in wheels]


def lowest_core_tag(p: Package, core: str, root: Path = ROOT) -> str | None:
    """Return the tag of the lowest core version that ``p`` declares, if it exists."""
    requirement = next(d for d in p.dependencies if requirement_name(d) == core)
    match = re.search(r">=\s*([\d.]+)", requirement)
    if match is None:
        raise ValueError(f"{p.name}: no lowest version in {requirement!r}")
    numbers = [*match[1].split("."), "0", "0"][:3]
    tag = f"{core}-v{'.'.join(numbers)}"
    return tag if git(root, "tag", "--list", tag) else None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
