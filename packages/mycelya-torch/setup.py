# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Builds the native library against the torch that is installed.

Decisions:
- The file is `mycelya_torch/_C.so`, without a tag: it uses nothing of Python's ABI, so
  one library serves every Python. It does depend on torch's minor version, which is
  written beside it, into `_C.torch`.
- torch is looked up, not required for the build: an isolated build would get the
  newest torch, and make a library that the user's own torch can't load.
- The sources are compiled as two units, side by side: torch's headers take several
  seconds for each file that includes them, more than our code. So a name in an
  anonymous namespace must be the only one of its kind in its unit. MAX_JOBS=1 in the
  environment compiles one after the other.
"""

import importlib.util
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# The optimisation and the debug level come after Python's own flags, and win.
FLAGS = ["-std=c++20", "-O2", "-g0", "-fvisibility=hidden"]
# Sources whose name comes before this one are the first unit.
SECOND_UNIT = "MycelyaS"


def sources() -> Path:
    """Find the C++ sources: behind a link in a checkout, in a real folder elsewhere.

    Relative where possible: the compiler writes the names into error messages.
    """
    beside = Path(__file__).resolve().parents[2] / "csrc/mycelya"
    # A checkout may have turned the link into a text file.
    for folder in (Path("csrc"), beside):
        if folder.is_dir():
            return folder
    raise SystemExit("mycelya-torch: the folder csrc with the C++ sources is missing")


def torch_folder() -> Path:
    """Find the installed torch without importing it."""
    found = importlib.util.find_spec("torch")
    folder = Path(found.origin).parent if found and found.origin else Path()
    if not (folder / "include/ATen").is_dir():
        raise SystemExit(
            "mycelya-torch is compiled against the torch that it will run with, and "
            "there is none here. Install torch and setuptools first, then this package "
            "with --no-build-isolation."
        )
    return folder


def minor_version(torch: Path) -> str:
    """Read the version of torch's headers, such as ``2.13``."""
    text = (torch / "include/torch/headeronly/version.h").read_text(encoding="utf-8")
    return ".".join(re.findall(r"#define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", text))


class BuildLibrary(build_ext):
    """Compiles side by side, and notes torch's version beside the library."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file without a tag for Python's version."""
        return os.path.join(*fullname.split(".")) + ".so"

    def marker(self) -> Path:
        """Return the file that says for which torch the library was built."""
        (library,) = self.extensions
        return Path(self.get_ext_fullpath(library.name)).with_suffix(".torch")

    def run(self) -> None:
        """Fill in what needs torch, and build."""
        if sys.platform == "win32":
            raise SystemExit("mycelya-torch has no Windows build: use Linux, or WSL")
        torch, folder = torch_folder(), sources()
        # What an earlier build left may be for another torch.
        self.force = True
        here = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
        # Beside torch in site-packages; in an editable install, where torch is now.
        places = [f"{here}/../torch/lib", *([str(torch / "lib")] * self.inplace)]
        (library,) = self.extensions
        library.sources = self.write_units(folder)
        library.include_dirs = [str(torch / "include"), "."]
        library.library_dirs = [str(torch / "lib")]
        library.extra_link_args = [f"-Wl,-rpath,{place}" for place in places]
        super().run()

    def write_units(self, folder: Path) -> list[str]:
        """Write two files that include all sources; return their names."""
        found: dict[bool, list[Path]] = {False: [], True: []}
        for file in sorted(folder.glob("*.cpp")):
            found[file.name >= SECOND_UNIT].append(file)
        os.makedirs(self.build_temp, exist_ok=True)
        units = []
        for number, files in enumerate(found.values()):
            unit = Path(self.build_temp, f"unit{number}.cpp")
            text = "".join(f'#include "{file.as_posix()}"\n' for file in files)
            unit.write_text(text, encoding="utf-8")
            units.append(str(unit))
        return units

    def build_extensions(self) -> None:
        """Compile the units, link them, and write the marker."""
        compile_all = self.compiler.compile
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

        def side_by_side(names: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(jobs) as pool:
                done = pool.map(lambda name: compile_all([name], **options), names)
                return [compiled for part in done for compiled in part]

        self.compiler.compile = side_by_side
        super().build_extensions()
        self.marker().write_text(minor_version(torch_folder()), encoding="utf-8")

    def copy_extensions_to_source(self) -> None:
        """Copy library and marker to where an editable install finds them."""
        super().copy_extensions_to_source()
        for built, copied in self.get_output_mapping().items():
            marker = Path(built).with_suffix(".torch")
            self.copy_file(str(marker), str(Path(copied).with_suffix(".torch")))


class TagWheel(bdist_wheel):
    """Tags the wheel for the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """Say that any Python 3 can load the library."""
        return "py3", "none", super().get_tag()[2]


library = Extension(
    "mycelya_torch._C",
    sources=[],  # found when it is built
    language="c++",
    libraries=["torch_cpu", "torch", "c10"],
    extra_compile_args=FLAGS,
)
commands = {"build_ext": BuildLibrary, "bdist_wheel": TagWheel}
setup(ext_modules=[library], cmdclass=commands)
