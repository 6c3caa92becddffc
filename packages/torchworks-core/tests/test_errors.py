# SPDX-License-Identifier: Apache-2.0
"""Errors keep their parts, read plainly, and are what users catch."""

import copy
import pickle
import subprocess
import sys

import pytest

from torchworks_core import errors

KINDS = {
    errors.InvalidValue: ValueError,
    errors.MissingFile: FileNotFoundError,
    errors.NotReady: RuntimeError,
    errors.OutOfMemory: MemoryError,
    errors.CorruptFile: ValueError,
    errors.MissingExtra: ImportError,
    errors.TorchworksError: Exception,
}


@pytest.mark.parametrize(("kind", "builtin"), KINDS.items())
def test_kind_is_caught_as_its_builtin_and_reads_plainly(kind, builtin):
    with pytest.raises(builtin) as caught:
        raise kind("what=3", "because", "Do this")
    assert isinstance(caught.value, errors.TorchworksError)
    assert str(caught.value) == "what=3: because. Do this."
    assert caught.value.args == ("what=3: because. Do this.",)
    parts = caught.value.what, caught.value.why, caught.value.do
    assert parts == ("what=3", "because", "Do this")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_and_copy_keep_everything(kind, protocol):
    error = kind("a", "b", "c")
    error.extra = 7
    error.add_note("a note")
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert (again.what, again.why, again.do, again.extra) == ("a", "b", "c", 7)
        assert again.__notes__ == ["a note"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("a",), "a."),
        (("a", "b"), "a: b."),
        (("a", "", "Do"), "a. Do."),
        (("a", "b", "Did you mean 'c'?"), "a: b. Did you mean 'c'?"),
    ],
)
def test_message_of_fewer_parts(parts, message):
    assert str(errors.MissingFile(*parts)) == message


def test_nearest():
    assert errors.nearest("llma", ["gpt2", "llama"]) == "llama"
    assert errors.nearest("zzz", iter(["gpt2"])) is None


@pytest.mark.critical
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("torchworks_core", "torch numpy safetensors logging importlib.metadata"),
        ("torchworks_core.errors", "torch numpy safetensors"),
        ("torchworks_core.logs", "torch numpy safetensors"),
        ("torchworks_core.checkpoint", "transformers huggingface_hub pytest"),
        ("torchworks_core.hub", "torch huggingface_hub"),
        ("torchworks_core.testing", "torch numpy transformers hypothesis"),
    ],
)
def test_import_brings_nothing_heavy(module, absent):
    # A plain interpreter start may already hold importlib.metadata (editable
    # installs), so only what the import itself adds is looked at.
    code = (
        "import sys; before = set(sys.modules)\n"
        f"import {module}\n"
        f"print([m for m in {absent.split()} if m in set(sys.modules) - before])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_unknown_attribute_of_the_package():
    import torchworks_core

    with pytest.raises(AttributeError, match="nothing_here"):
        _ = torchworks_core.nothing_here
