# SPDX-License-Identifier: Apache-2.0
"""The virtual environments of the nox sessions, and when they must be made anew.

`uv pip install -e` asks the index and builds every editable package at each call,
also when nothing changed. So each environment holds a stamp of all that went into
it, and an install is skipped while the stamp is equal: that makes a second run
quick, and possible without a network.

The library of a native package lies in the tree, where all environments share it and
a clean-up may take it: a second stamp, beside the environments, says from which
sources it was built last.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.workspace import ROOT, Package

STAMP = "torchworks.stamp"
_NATIVE = ("constraints.txt", "packages/*/setup.py", "csrc/**/*")
_INPUTS = (
    *_NATIVE,
    "pyproject.toml",
    "packages/*/pyproject.toml",
    "packages/*/hatch_build.py",
    "packages/*/MANIFEST.in",
)


def uv_binary() -> str:
    """Find the uv that came with ``nox[uv]``, or one on the PATH."""
    try:
        from uv import find_uv_bin

        return os.fspath(find_uv_bin())
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
    if found is None:
        raise RuntimeError("uv is missing; install it with: pip install 'nox[uv]'")
    return found


def find_links() -> str:
    """Return pip's local wheel folders in the form uv takes, or an empty string.

    pip separates them by white space, uv by commas. pip's own settings are asked
    only when the variable is unset.
    """
    places = os.environ.get("PIP_FIND_LINKS")
    if places is None:
        command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
        # It exits with 1 when nothing is set, and when there is no pip at all.
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        places = done.stdout if done.returncode == 0 else ""
    return ",".join(re.split(r"[\s,]+", places.strip()))


def variables() -> dict[str, str]:
    """Return the environment variables that every command of a session gets."""
    env = {
        # Relative, because uv splits the variable at spaces.
        "UV_CONSTRAINT": "constraints.txt",
        "UV_PYTHON_DOWNLOADS": "never",
        # A machine may forbid bytecode. In these environments that would make every
        # process compile torch anew: 5 s for each import instead of 1.5 s.
        "PYTHONDONTWRITEBYTECODE": "",
    }
    if "UV_FIND_LINKS" not in os.environ and (links := find_links()):
        env["UV_FIND_LINKS"] = links
    return env


def fingerprint(install: Sequence[str], root: Path = ROOT) -> str:
    """Hash all that decides what an environment holds.

    That is: the install command, the Python version, the place of the checkout
    (editable installs point to it), and the contents of pyprojects, constraints,
    build scripts and native sources.
    """
    return _digest((*install, sys.version, os.fspath(root)), _INPUTS, root)


def is_current(
    folder: Path,
    install: Sequence[str],
    root: Path = ROOT,
    native: Sequence[Package] = (),
) -> bool:
    """Whether the environment in ``folder`` holds what ``install`` would put there.

    So it does only while the libraries of the ``native`` packages in it are there, too,
    as they were built from the present sources.
    """
    stamps = {folder / STAMP: fingerprint(install, root)}
    if native:
        stamps[_native_stamp(folder)] = _digest((), _NATIVE, root)
    same = all(file.is_file() and file.read_text() == s for file, s in stamps.items())
    return same and all(any((p.folder / "src").rglob("_C.so")) for p in native)


def write_stamp(
    folder: Path,
    install: Sequence[str],
    root: Path = ROOT,
    native: Sequence[Package] = (),
) -> None:
    """Record, after a complete install, what the environment was made from."""
    (folder / STAMP).write_text(fingerprint(install, root))
    if native:
        _native_stamp(folder).write_text(_digest((), _NATIVE, root))


def _native_stamp(folder: Path) -> Path:
    return folder.parent / f"native-{STAMP}"


def _digest(parts: Sequence[str], patterns: Sequence[str], root: Path) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    for file in sorted({f for pattern in patterns for f in root.glob(pattern)}):
        if file.is_file():
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def python(folder: Path) -> Path:
    """Return the interpreter of the environment in ``folder``."""
    where = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return folder.joinpath(*where)
