# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest

import mol


def _modules_after(code):
    script = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.critical
def test_import_loads_neither_torch_nor_transformers():
    heavy = {"torch", "transformers", "numpy", "safetensors"}
    assert not heavy & _modules_after("import mol; mol.MoLConfig(['a'])")


def test_first_use_of_the_runtime_loads_transformers():
    assert "transformers" in _modules_after("import mol; mol.MoLRuntime")


def test_every_public_name_resolves():
    for name in mol.__all__:
        assert getattr(mol, name) is not None
    assert set(mol.__all__) <= set(dir(mol))
    assert mol.__version__.count(".") == 2
    with pytest.raises(NotImplementedError, match="BottleneckAdapter"):
        mol.BottleneckAdapter  # noqa: B018
    with pytest.raises(AttributeError, match="Nothing"):
        mol.Nothing  # noqa: B018
