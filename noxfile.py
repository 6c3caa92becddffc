# SPDX-License-Identifier: Apache-2.0
"""All commands of this repository; ``nox --list`` shows them.

Decisions:
- tour, tests, lint, types and bench share one environment, ``.nox/dev``: it is made
  once, by the first of them. A stamp in it says when it must be made anew.
- Nox itself makes no environments here, because it has no shared ones.
- What a session needs to know about the packages is read from the tree.
"""

import os
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from tools import dependencies, environment, releases, workspace  # noqa: E402

ENVIRONMENTS = Path(".nox")
PACKAGES = workspace.packages(ROOT)
CORE = workspace.settings(ROOT)["core"]
C_FILES = {".c", ".cpp", ".cu", ".h", ".hpp"}

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests", "tour"]
nox.options.error_on_external_run = False


@nox.session
def tour(session: nox.Session) -> None:
    """Run the main job; fails when a promised inequality does."""
    run(session, dev(session), "python", "-m", "tools.tour", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests; what follows ``--`` is passed on to pytest."""
    pytest(session, dev(session), *session.posargs)


@nox.session
@nox.parametrize("package", [p.name for p in PACKAGES], ids=[p.name for p in PACKAGES])
def tests_alone(session: nox.Session, package: str) -> None:
    """Run one package's tests with only itself and the core installed."""
    p = workspace.package(package, ROOT)
    # The core comes without its extras: what the tests need, their group says.
    env = make(session, f"alone-{package}", ["-e", f"packages/{CORE}"], [p])
    folders = [f"packages/{package}/src", f"packages/{package}/tests"]
    pytest(session, env, *folders, *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, imports between packages, and the repository's own rules."""
    env = dev(session)
    run(session, env, "ruff", "check", ".")
    run(session, env, "ruff", "format", "--check", ".")
    contracts = env / "import-contracts.ini"
    contracts.write_text(dependencies.import_contracts(ROOT), encoding="utf-8")
    run(session, env, "lint-imports", "--no-cache", "--config", str(contracts))
    native = [str(p) for p in sorted(Path("csrc").glob("*/*")) if p.suffix in C_FILES]
    if native:
        options = ("--dry-run", "-Werror", "--style=file", "--fallback-style=Google")
        run(session, env, "clang-format", *options, *native)
    run(session, env, "python", "-m", "tools.checks", *session.posargs)


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of every package."""
    env = dev(session)
    interpreter = ("--python-interpreter-path", str(environment.python(env)))
    run(session, env, "pyrefly", "check", *interpreter, *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run a package's benchmarks: ``nox -s bench -- PACKAGE [--render]``."""
    render = "--render" in session.posargs
    found = {} if render else {"PYTHONPATH": str(bench_data(session).absolute())}
    run(
        session, dev(session), "python", "tools/bench/run.py", *session.posargs, **found
    )


@nox.session
def release(session: nox.Session) -> None:
    """Build, check, publish: ``nox -s release -- PACKAGE [--dry-run] [--tag TAG]``."""
    given = releases.arguments(session.posargs, ROOT)
    package: workspace.Package = given.package
    problems = releases.metadata(ROOT) + dependencies.sibling_requirements(ROOT)
    problems += releases.changelog_problems(package, given.tag)
    if not given.dry_run:
        problems += releases.publish_problems(package, ROOT)
    if problems:
        session.error("\n".join(["the metadata is not ready:", *problems]))
    env = dev(session)
    dist = Path("dist") / package.name
    shutil.rmtree(dist, ignore_errors=True)
    build(session, env, package.folder, dist)
    built = sorted(str(file) for file in dist.iterdir())
    run(session, env, "twine", "check", "--strict", *built)
    wheels = [name for name in built if name.endswith(".whl")]
    run(session, env, "check-wheel-contents", *wheels)
    with tempfile.TemporaryDirectory() as scratch:
        wheel_alone(session, env, package, dist, Path(scratch))
    for name in releases.drop_native_wheels(dist):
        session.log(f"{name} fits one torch and one platform: only the sdist stays")
    built = sorted(str(file) for file in dist.iterdir())
    if given.dry_run:
        session.log(f"not published (--dry-run): {', '.join(built)}")
    else:
        uv(session, "publish", *built)


@nox.session
def lock(session: nox.Session) -> None:
    """Rewrite constraints.txt; ``-- 2.14.0`` moves torch, else it stays as pinned."""
    target = Path("constraints.txt")
    pinned = re.search(r"(?m)^torch==(\S+)", target.read_text())
    torch = session.posargs[0] if session.posargs else pinned and pinned[1]
    if not torch:
        session.error("constraints.txt pins no torch; give one: nox -s lock -- 2.13.0")
    sources = [f"packages/{p.name}/pyproject.toml" for p in PACKAGES]
    groups = ["pyproject.toml:dev", *(group(p)[1] for p in PACKAGES)]
    ours = [*workspace.settings(ROOT)["imports"], "triton"]
    with tempfile.TemporaryDirectory() as scratch:
        fixed = Path(scratch, "torch.txt")
        fixed.write_text(f"torch=={torch}\n")
        command = ["pip", "compile", "--universal", "--upgrade", "--quiet"]
        command += ["--python-version=3.11", "--all-extras", "--no-emit-index-url"]
        command += ["--no-header", "--no-annotate", "--constraint", str(fixed)]
        command += [part for name in ours for part in ("--no-emit-package", name)]
        command += [part for name in groups for part in ("--group", name)]
        unset = {"UV_CONSTRAINT": None, "UV_FIND_LINKS": None, "UV_TORCH_BACKEND": None}
        uv(session, *command, "-o", str(target), *sources, env=unset)


def dev(session: nox.Session) -> Path:
    """Make the shared environment: every package with every extra, and all tools."""
    return make(session, "dev", ["--group", "dev"], PACKAGES)


def group(package: workspace.Package) -> list[str]:
    """Return the options that install what a package's tests need."""
    return ["--group", f"packages/{package.name}/pyproject.toml:tests"]


def make(
    session: nox.Session,
    name: str,
    install: list[str],
    packages: list[workspace.Package],
) -> Path:
    """Make an environment unless its stamps say that it is up to date.

    Native packages come last: they are compiled against the torch that came before.
    """
    folder, late = ENVIRONMENTS / name, [p for p in packages if p.native]
    for package in packages:
        first = package.build_requires if package.native else editable(package)
        install = [*install, *first, *group(package)]
    native = [part for package in late for part in editable(package)]
    if environment.is_current(folder, [*install, *native], ROOT, late):
        session.log(f"{folder} is up to date")
        return folder
    uv(session, "venv", "--quiet", "--clear", "-p", sys.executable, str(folder))
    uv(session, "pip", "install", "--python", str(folder), *install)
    if native:
        uv(session, "pip", "install", "--python", str(folder), *native)
    environment.write_stamp(folder, [*install, *native], ROOT, late)
    return folder


def bench_data(session: nox.Session) -> Path:
    """Unpack what a package's group `bench` names: data, without what it depends on."""
    chosen = [p for p in PACKAGES if p.name in session.posargs]
    named = [line for p in chosen for line in p.groups.get("bench", [])]
    folder = ENVIRONMENTS / "bench-data"
    stamp, wanted = folder / "stamp.txt", "\n".join(named)
    if named and not (stamp.is_file() and stamp.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        place = ("--no-deps", "--target", str(folder))
        uv(session, "pip", "install", "-p", sys.executable, *place, *named)
        stamp.write_text(wanted)
    return folder


def editable(package: workspace.Package) -> list[str]:
    """Return the options that install a package with its extras, in place."""
    return ["-e", package.with_extras]


def uv(session: nox.Session, *command: str, env: dict | None = None) -> None:
    """Run uv with the constraints and the machine's local wheel folders."""
    variables = environment.variables() | (env or {})
    session.run(environment.uv_binary(), *command, env=variables)


def run(session: nox.Session, folder: Path, *command: str, **options: str) -> None:
    """Run a program of an environment, with that environment activated."""
    programs = environment.python(folder).parent.absolute()
    variables = environment.variables() | options
    variables["VIRTUAL_ENV"] = str(folder.absolute())
    variables["PATH"] = os.pathsep.join([str(programs), os.environ["PATH"]])
    session.run(str(programs / command[0]), *command[1:], env=variables)


def pytest(session: nox.Session, folder: Path, *arguments: str) -> None:
    """Run pytest on two processes of one thread each."""
    command = ("python", "-m", "pytest", "-n", "2", *arguments)
    run(session, folder, *command, OMP_NUM_THREADS="1")


def build(session: nox.Session, env: Path, source: Path, out: Path) -> None:
    """Build the sdist, and the wheel from it, with the tools of the environment.

    Without isolation: an isolated build of a native package would take the newest
    CUDA build of torch.
    """
    python = str(environment.python(env).absolute())
    where = (
        "--python",
        python,
        "--out-dir",
        str(out.absolute()),
        "--no-create-gitignore",
    )
    uv(session, "build", "--quiet", "--no-build-isolation", *where, str(source))


def wheel_alone(
    session: nox.Session, env: Path, package: workspace.Package, dist: Path, at: Path
) -> None:
    """Run a package's tests from its sdist against its wheel in a clean environment."""
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    install = [str(wheel)]
    if package.name != CORE:
        install.append(str(lowest_core(session, env, package, at)))
    clean = at / "environment"
    uv(session, "venv", "--quiet", "-p", sys.executable, str(clean))
    uv(session, "pip", "install", "--python", str(clean), *install, *group(package))
    uv(session, "pip", "check", "--python", str(clean))
    with tarfile.open(sdist) as archive:
        archive.extractall(at / "unpacked", filter="data")
    (unpacked,) = (at / "unpacked").iterdir()
    # Without the source beside them, the tests can only import the wheel.
    shutil.rmtree(unpacked / "src")
    settings = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(unpacked))
    with session.chdir(unpacked):
        options = ("-o", "pythonpath=", "-p", "no:cacheprovider", "-m", "not slow")
        pytest(session, clean, *settings, *options, "tests")


def lowest_core(
    session: nox.Session, env: Path, package: workspace.Package, at: Path
) -> Path:
    """Build the lowest core version that a package declares, from its tag if any."""
    tag = releases.lowest_core_tag(package, CORE, ROOT)
    source = workspace.package(CORE, ROOT).folder
    if tag is None:
        session.log(f"no tag for the lowest {CORE}: built from the tree")
    else:
        session.log(f"the lowest {CORE} is built from {tag}")
        archive = at / "core.tar"
        place = f"packages/{CORE}"
        session.run("git", "archive", "-o", str(archive), tag, place)
        with tarfile.open(archive) as files:
            files.extractall(at / "tag", filter="data")
        source = at / "tag" / place
    build(session, env, source, at / "core")
    (wheel,) = (at / "core").glob("*.whl")
    return wheel
