# SPDX-License-Identifier: Apache-2.0
"""What an import really loads and changes, seen in a fresh process.

The rule's other two halves, code and metadata, are in ``tools/dependencies.py`` and
tested in ``test_repository.py``; import-linter's contracts are tested here.
"""

import functools
import json
import subprocess
import sys

import pytest

from tools import dependencies
from tools.workspace import ROOT, packages, settings

NAMES = [p.name for p in packages()]
# Loaded only when asked for; some of them come with torch in some environments.
HEAVY = {"matplotlib", "modal", "peft", "transformers", "triton"}
# The one import that may change torch: it registers its device.
MAY_CHANGE_TORCH = {"mycelya_torch"}
PROBE = """
import json, sys
{statement}
loaded = sorted({{name.partition(".")[0] for name in sys.modules}})
import torch
state = {{
    "dtype": str(torch.get_default_dtype()),
    "device": str(torch.get_default_device()),
    "grad": torch.is_grad_enabled(),
    "threads": torch.get_num_threads(),
    "deterministic": torch.are_deterministic_algorithms_enabled(),
    "matmul": torch.get_float32_matmul_precision(),
    "private backend": torch._C._get_privateuse1_backend_name(),
    "seed": torch.initial_seed(),
    "print": str(torch._tensor_str.PRINT_OPTS),
    "mkldnn": torch.backends.mkldnn.enabled,
    "patched": sorted(
        f"{{space.__name__}}.{{name}}"
        for space in (torch, torch.Tensor, torch.nn.Module, torch.nn.functional)
        for name, thing in vars(space).items()
        if getattr(thing, "__module__", None)
        and str(thing.__module__).partition(".")[0] in {ours}
    ),
}}
print(json.dumps([loaded, state]))
"""


@functools.cache
def probe(statement: str) -> tuple[set[str], dict]:
    """Run a statement in a fresh process: top-level modules loaded, torch's state."""
    ours = set(settings()["imports"].values())
    code = PROBE.format(statement=statement, ours=ours)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    loaded, state = json.loads(done.stdout)
    return set(loaded), state


@pytest.mark.critical
@pytest.mark.parametrize("name", NAMES)
def test_an_import_loads_no_sibling_and_nothing_heavy(name):
    (package,) = [p for p in packages() if p.name == name]
    loaded, _ = probe(f"import {package.import_name}")
    with_torch, _ = probe("import torch")
    assert package.import_name in loaded
    assert not loaded & set(dependencies.forbidden(package).values())
    assert not (loaded - with_torch) & HEAVY


@pytest.mark.parametrize("name", NAMES)
def test_an_import_changes_nothing_in_torch(name):
    (package,) = [p for p in packages() if p.name == name]
    _, state = probe(f"import {package.import_name}")
    _, untouched = probe("import torch")
    if package.import_name in MAY_CHANGE_TORCH:
        assert state["private backend"] != untouched["private backend"]
    else:
        assert state | {"seed": 0} == untouched | {"seed": 0}


@pytest.mark.parametrize("name", NAMES)
def test_every_module_can_be_imported_and_loads_no_sibling(name):
    (package,) = [p for p in packages() if p.name == name]
    source = package.folder / "src"
    modules = [
        ".".join(path.relative_to(source).with_suffix("").parts)
        for path in sorted((source / package.import_name).rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]
    loaded, _ = probe("import " + ", ".join(modules))
    assert not loaded & set(dependencies.forbidden(package).values())


def test_the_probe_sees_what_it_is_there_for():
    statement = (
        "import sys, types; sys.modules['loraven'] = types.ModuleType('loraven'); "
        "import torch, torchworks_core.errors as e; "
        "torch.set_default_dtype(torch.float64); torch.Tensor.f = e.nearest"
    )
    loaded, state = probe(statement)
    assert "loraven" in loaded
    assert state["dtype"] == "torch.float64"
    assert state["patched"] == ["Tensor.f"]


def lint_imports(folder, contracts: str) -> subprocess.CompletedProcess:
    file = folder / "contracts.ini"
    file.write_text(contracts, encoding="utf-8")
    code = "import sys; from importlinter.cli import lint_imports_command as c; c()"
    command = [sys.executable, "-c", code, "--no-cache", "--config", str(file)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_contracts_cover_every_package_that_exists_and_every_name(tmp_path):
    contracts = dependencies.import_contracts(ROOT)
    done = lint_imports(tmp_path, contracts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Contracts: {len(NAMES)} kept, 0 broken" in done.stdout
    for package in packages():
        rules = contracts.partition(f":{package.import_name}]")[2].partition("[")[0]
        for other in dependencies.forbidden(package).values():
            assert f"    {other}\n" in rules


def test_a_contract_notices_a_sibling_inside_a_function(tmp_path, monkeypatch):
    for name, code in (
        ("torchworks_core", ""),
        ("mol", "def f():\n    import loraven.layers\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = lint_imports(tmp_path, dependencies.import_contracts(ROOT))
    assert done.returncode == 1
    assert "mol-fusion uses no sibling BROKEN" in done.stdout
