# SPDX-License-Identifier: Apache-2.0
"""The dependency rule: a package uses the core and third parties, never a sibling.

Here are its two halves that read the tree, code and metadata; what an import
really loads is tested in ``tests/test_dependency_rule.py``. The contracts for
import-linter are made here, too, for the packages that exist: a root package that
can't be found is an error there, an external name is not.
"""

import ast
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.workspace import (
    ROOT,
    Package,
    files,
    packages,
    requirement_name,
    settings,
)

# Import names that differ from the normalised name of their distribution.
_DISTRIBUTION = {
    "pynvml": "nvidia-ml-py",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
_IMPORTERS = {
    "__import__", "find_spec", "import_module", "importorskip", "resolve_name",
    "run_module",
}  # fmt: skip
# Import names that are ordinary words, too.
_WORDS = {"mol"}


def forbidden(package: Package, root: Path = ROOT) -> dict[str, str]:
    """Map distribution to import name for all that ``package`` may not use."""
    table = settings(root)
    allowed = {package.name, table["core"]}
    return {name: imp for name, imp in table["imports"].items() if name not in allowed}


def sibling_imports(root: Path = ROOT) -> list[str]:
    """No file of a package imports a sibling: at the top, in a function, by a string.

    Tests and examples of the package count: packages meet in the top-level ``tests``
    and in ``tools/tour`` only.
    """
    problems = []
    for package, path, tree in _trees(root):
        banned = set(forbidden(package, root).values())
        for line, name in _named_modules(tree, banned):
            if name.split(".")[0] in banned:
                where = f"{path.relative_to(root).as_posix()}:{line}"
                problems.append(f"{where}: {package.name} may not use {name}")
    return problems


def sibling_requirements(root: Path = ROOT) -> list[str]:
    """No pyproject asks for a sibling, and all others ask for one range of the core."""
    problems, core = [], settings(root)["core"]
    for package in packages(root):
        where, banned = f"packages/{package.name}/pyproject.toml", forbidden(package)
        for requirement in _all_requirements(package):
            if requirement_name(requirement) in banned:
                problems.append(f"{where}: may not require {requirement!r}")
        if package.name == core:
            continue
        asked = [d for d in package.dependencies if requirement_name(d) == core]
        if len(asked) != 1 or not re.fullmatch(rf"{core}>=[\d.]+,<\d+", asked[0]):
            problems.append(f"{where}: must require {core}>=X.Y,<Z once, has {asked}")
    return problems


def undeclared_imports(root: Path = ROOT) -> list[str]:
    """A package declares what its source imports, and imports what it requires."""
    problems = []
    declared = {
        p.name: {requirement_name(r) for r in _all_requirements(p, groups=False)}
        for p in packages(root)
    }
    imported: dict[str, set[str]] = {name: set() for name in declared}
    for package, path, tree in _trees(root, "src"):
        for line, module in _imports(tree):
            top = module.split(".")[0]
            if top == package.import_name or top in sys.stdlib_module_names:
                continue
            name = _DISTRIBUTION.get(top, requirement_name(top))
            imported[package.name].add(name)
            if name not in declared[package.name]:
                where = f"{path.relative_to(root).as_posix()}:{line}"
                problems.append(f"{where}: imports {top}, but {name} is not declared")
    for package in packages(root):
        required = {requirement_name(r) for r in package.dependencies}
        for name in sorted(required - imported[package.name]):
            where = f"packages/{package.name}/pyproject.toml"
            problems.append(f"{where}: requires {name}, but no source imports it")
    return problems


def import_contracts(root: Path = ROOT) -> str:
    """Write import-linter's settings: one contract for each package that exists."""
    present = packages(root)
    roots = [p.import_name for p in present]
    text = ["[importlinter]", "include_external_packages = True", "root_packages ="]
    text += [f"    {name}" for name in roots]
    for package in present:
        text += [
            "",
            f"[importlinter:contract:{package.import_name}]",
            f"name = {package.name} uses no sibling",
            "type = forbidden",
            f"source_modules = {package.import_name}",
            "forbidden_modules =",
            *(f"    {name}" for name in forbidden(package, root).values()),
        ]
    return "\n".join(text) + "\n"


def _trees(root: Path, part: str = "") -> Iterator[tuple[Package, Path, ast.Module]]:
    """Parse the Python files of every package, or of one part of its folder."""
    tracked = files(root)
    for package in packages(root):
        for path in tracked:
            if path.suffix == ".py" and path.is_relative_to(package.folder / part):
                yield package, path, ast.parse(path.read_bytes())


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module


def _named_modules(tree: ast.Module, banned: set[str]) -> Iterator[tuple[int, str]]:
    """List modules named in import statements and in strings other than docstrings.

    A string counts when it is a name, begins like a dotted one (also ``name:``), or
    holds an import statement or ``-m``; an ordinary word only where a module is asked
    for: in a call that imports, after ``"-m"``, in ``sys.modules``.
    """
    yield from _imports(tree)
    names = "|".join(sorted(banned))
    says = re.compile(
        rf"\A({names})(?:[.:](?!\s)|\Z)"
        rf"|(?:(?:^|;)\s*(?:import|from)\s+|(?:^|\s)-m\s*)({names})\b",
        re.MULTILINE,
    )
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    asked = {id(node) for node in _module_places(tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            continue
        if id(node) in asked:
            yield node.lineno, re.split("[.:]", node.value)[0]
        elif id(node) in prose or node.value in _WORDS:
            continue
        elif found := says.search(node.value):
            yield node.lineno, found[1] or found[2]


def _module_places(tree: ast.Module) -> Iterator[ast.AST]:
    """List what stands where a module is asked for by its name."""
    importers = set(_IMPORTERS)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            known = [name for name in node.names if name.name in _IMPORTERS]
            importers |= {name.asname or name.name for name in known}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            owner = getattr(node.func, "value", None)
            if _last_name(node.func) in importers or _last_name(owner) == "modules":
                yield from (*node.args, *(k.value for k in node.keywords))
        elif isinstance(node, ast.Subscript) and _last_name(node.value) == "modules":
            yield node.slice
        given = getattr(node, "elts", getattr(node, "args", None))
        for flag, value in itertools.pairwise(given if isinstance(given, list) else ()):
            if isinstance(flag, ast.Constant) and flag.value == "-m":
                yield value


def _last_name(node: ast.AST | None) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _all_requirements(package: Package, groups: bool = True) -> Iterator[str]:
    yield from package.dependencies
    for extra in package.extras.values():
        yield from extra
    if groups:
        entries: list[Any] = [e for group in package.groups.values() for e in group]
        yield from (entry for entry in entries if isinstance(entry, str))
        yield from package.pyproject["build-system"]["requires"]
