# SPDX-License-Identifier: Apache-2.0
"""Build hook: compile the C kernel into the wheel, or say why there is none.

Decisions:

- A build never fails for want of a compiler: the wheel is then pure, and its
  ``_native/build.json`` holds the reason, which ``native_status()`` shows.
- The library has no Python ABI, so one wheel fits every Python 3 on a platform.
- Never ``-ffast-math``: it breaks -inf and NaN, and older gcc link start-up code into
  the library that switches subnormal numbers off for the whole process.
- ``build.json`` holds the library's SHA-256; the loader refuses another file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "kernel_pytorch"
FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-g0"]
ISA_FLAGS = {"avx2.c": ["-mavx2", "-mfma"], "avx512.c": ["-mavx512f", "-mfma"]}
X86 = ("x86_64", "AMD64")


class CustomBuildHook(BuildHookInterface):
    """Hatchling calls it before a wheel or an editable install is put together."""

    def initialize(self, version: str, build_data: dict) -> None:
        """Compile, and add the result to the wheel."""
        if self.target_name != "wheel":
            return
        editable = version == "editable"
        if editable:
            folder = Path(self.root, "src", PACKAGE, "_native")
        else:
            folder = Path(tempfile.mkdtemp(prefix="kernel_pytorch_build_"))
            self._scratch = folder
        record = compile_library(sources(Path(self.root)), folder)
        if record["reason"]:
            self.app.display_warning(f"no native kernel: {record['reason']}")
        else:
            platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag}"
        if not editable:
            for file in sorted(folder.iterdir()):
                target = f"{PACKAGE}/_native/{file.name}"
                build_data["force_include"][str(file)] = target

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        """Remove what was compiled outside the tree."""
        if scratch := getattr(self, "_scratch", None):
            shutil.rmtree(scratch, ignore_errors=True)


def sources(root: Path) -> Path:
    """Return the folder of the C files, also where the link became a text file."""
    linked = root / "csrc"
    return linked if linked.is_dir() else root.parent.parent / "csrc" / PACKAGE


def compile_library(source: Path, folder: Path, extra: tuple[str, ...] = ()) -> dict:
    """Compile ``source`` into ``folder/libkp.so`` and write ``folder/build.json``.

    Args:
        source: Folder of the C files.
        folder: Made if it is missing; an older library in it is removed.
        extra: More compiler flags.

    Returns:
        The record: ``reason`` ("" if it worked), ``compiler``, ``openmp``, ``sha256``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libkp.so"
    library.unlink(missing_ok=True)
    compiler = find_compiler()
    record = {"reason": "", "compiler": shlex.join(compiler), "openmp": True}
    if not compiler:
        record["reason"] = "no C compiler was found (CC, cc, gcc, clang)"
    elif not list(source.glob("*.c")):
        record["reason"] = f"no C files were found in {source.name}"
    else:
        problem = _compile(compiler, source, library, ["-fopenmp", *extra])
        if problem:
            # Some compilers come without OpenMP; one thread is better than none.
            record["openmp"] = False
            if _compile(compiler, source, library, list(extra)):
                record["reason"] = problem
    if not record["reason"]:
        record["sha256"] = hashlib.sha256(library.read_bytes()).hexdigest()
    text = json.dumps(record, indent=1) + "\n"
    (folder / "build.json").write_text(text, encoding="utf-8")
    return record


def find_compiler() -> list[str]:
    """Return the command of ``CC``, else of cc, gcc or clang, else []."""
    if given := os.environ.get("CC"):
        return shlex.split(given)
    found = (shutil.which(name) for name in ("cc", "gcc", "clang"))
    return next(([path] for path in found if path), [])


def _compile(compiler: list[str], source: Path, library: Path, flags: list[str]) -> str:
    """Return what went wrong, or ""."""
    x86 = platform.machine() in X86
    commands, objects = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for file in sorted(source.glob("*.c")):
            target = str(Path(scratch, f"{file.stem}.o"))
            own = ISA_FLAGS.get(file.name, []) if x86 else []
            commands.append([*compiler, *FLAGS, *own, *flags, "-c", file, "-o", target])
            objects.append(target)
        problem = _run(commands)
        # Linked aside and moved, so that a process that has the old one keeps it.
        new = str(Path(scratch, library.name))
        link = [*compiler, "-shared", *flags, *objects, "-lm", "-o", new]
        problem = problem or _run([link])
        if not problem:
            shutil.move(new, library)
    return problem


def _run(commands: list[list]) -> str:
    """Run commands side by side; return the first failure's first lines, or ""."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        running = [subprocess.Popen(command, **pipes) for command in commands]
    except OSError as error:
        return f"{commands[0][0]} can't be run: {error.strerror}"
    outputs = [process.communicate()[0] for process in running]
    for process, output in zip(running, outputs, strict=True):
        if process.returncode:
            lines = " / ".join(output.strip().splitlines()[:3]) or "no message"
            return f"{process.args[0]} ended with {process.returncode}: {lines}"
    return ""
