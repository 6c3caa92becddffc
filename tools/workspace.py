# SPDX-License-Identifier: Apache-2.0
"""What stands in this repository: its files, its packages and what they declare.

Everything is read from the tree, so adding a package needs no edit here. Only the
standard library is imported: the noxfile uses this module before anything else is
installed.
"""

import re
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_HEADING = re.compile(r"^## \[(?P<name>[^\]]+)\](?P<rest>.*)$", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Package:
    """A distribution under ``packages/``: its names, folder and pyproject."""

    name: str
    import_name: str
    folder: Path
    pyproject: dict[str, Any]

    @property
    def version(self) -> str:
        """The static version in its pyproject."""
        return self.pyproject["project"]["version"]

    @property
    def licence(self) -> str:
        """The SPDX expression in its pyproject."""
        return self.pyproject["project"]["license"]

    @property
    def dependencies(self) -> list[str]:
        """The requirements that every user installs."""
        return self.pyproject["project"].get("dependencies", [])

    @property
    def extras(self) -> dict[str, list[str]]:
        """The optional requirements by extra."""
        return self.pyproject["project"].get("optional-dependencies", {})

    @property
    def groups(self) -> dict[str, list[Any]]:
        """The dependency groups, for work on the package itself."""
        return self.pyproject.get("dependency-groups", {})

    @property
    def native(self) -> bool:
        """Whether it compiles something: then its installed torch must come first."""
        return (self.folder / "setup.py").is_file()

    @property
    def build_requires(self) -> list[str]:
        """What its build back end needs, for builds without isolation."""
        return self.pyproject["build-system"]["requires"]

    @property
    def with_extras(self) -> str:
        """The folder with every extra, relative to the root, as an installer takes it.

        Relative, because a path with a space would be split by some tools.
        """
        extras = f"[{','.join(sorted(self.extras))}]" if self.extras else ""
        return f"packages/{self.name}{extras}"


def settings(root: Path = ROOT) -> dict[str, Any]:
    """Read the table ``tool.torchworks`` of the root pyproject."""
    return _toml(root / "pyproject.toml")["tool"]["torchworks"]


def packages(root: Path = ROOT) -> list[Package]:
    """List the packages that exist, the core first, then by name."""
    found, table = [], settings(root)
    for file in sorted((root / "packages").glob("*/pyproject.toml")):
        pyproject = _toml(file)
        name = pyproject["project"]["name"]
        if name != file.parent.name or name not in table["imports"]:
            raise ValueError(
                f"{file.relative_to(root)}: the name {name!r} must be its folder's "
                "and stand in tool.torchworks.imports of the root pyproject.toml"
            )
        found.append(Package(name, table["imports"][name], file.parent, pyproject))
    return sorted(found, key=lambda p: (p.name != table["core"], p.name))


def package(name: str, root: Path = ROOT) -> Package:
    """Return one package.

    Raises:
        ValueError: there is none of that name; the message lists those that exist.
    """
    known = {p.name: p for p in packages(root)}
    if name not in known:
        raise ValueError(f"no package {name!r}; there are: {', '.join(known)}")
    return known[name]


def files(root: Path = ROOT) -> list[Path]:
    """List every file that git tracks or would add, as absolute paths.

    A file that isn't committed yet counts: it is what the next commit will hold.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
    paths = {root / name for name in listing.decode().split("\0") if name}
    return sorted(path for path in paths if path.is_file() or path.is_symlink())


def versions_in_changelog(package: Package) -> list[tuple[str, str]]:
    """Return (version, rest of the line) for each heading of its changelog, in order.

    A heading reads ``## [1.2.3] - 2026-01-31`` or ``## [Unreleased]``.
    """
    text = (package.folder / "CHANGELOG.md").read_text(encoding="utf-8")
    return [(m["name"], m["rest"].strip()) for m in _HEADING.finditer(text)]


def requirement_name(requirement: str) -> str:
    """Return the normalised distribution name of a requirement.

    Example:
        >>> requirement_name("Huggingface_Hub[cli]>=1.5,<3; python_version > '3'")
        'huggingface-hub'
    """
    match = _NAME.match(requirement.strip())
    if match is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def git(root: Path, *arguments: str) -> str:
    """Run a git command that only reads, and return what it prints."""
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _toml(file: Path) -> dict[str, Any]:
    return tomllib.loads(file.read_text(encoding="utf-8"))
