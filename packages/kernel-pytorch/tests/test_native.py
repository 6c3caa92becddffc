# SPDX-License-Identifier: Apache-2.0
"""Loading the native library: what is refused, and with which reason."""

import _ctypes
import hashlib
import json
import os
import resource
import shlex
import shutil
import subprocess

import pytest
import torch

from kernel_pytorch.attention import native
from torchworks_core.errors import OutOfMemory

needs_library = pytest.mark.skipif(
    not native.native_status().available, reason=native.native_status().reason
)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    return tmp_path


def place(folder, data, **record):
    (folder / "libkp.so").write_bytes(data)
    record = {"reason": "", "sha256": hashlib.sha256(data).hexdigest()} | record
    (folder / "build.json").write_text(json.dumps(record))


def elf(machine):
    """The head of a library for another processor."""
    head = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    return head + (3).to_bytes(2, "little") + machine.to_bytes(2, "little") + bytes(200)


@pytest.mark.critical
def test_where_a_compiler_works_there_is_a_library(tmp_path):
    """So that no failed build hides behind what other tests skip."""
    given = os.environ.get("CC")
    found = map(shutil.which, ("cc", "gcc", "clang"))
    compiler = shlex.split(given) if given else [next(filter(None, found), "")]
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }\n")
    try:
        command = [
            *compiler,
            "-shared",
            "-fPIC",
            str(source),
            "-o",
            str(tmp_path / "o"),
        ]
        works = (
            subprocess.run(command, capture_output=True, check=False).returncode == 0
        )
    except OSError:
        works = False
    status = native.native_status()
    assert status.available or not works, status.reason


@pytest.mark.critical
@needs_library
def test_status():
    status = native.native_status()
    assert status.isa in native.ISAS
    assert status.threads == torch.get_num_threads()
    assert status.path.endswith("libkp.so")
    assert status.reason == ""


@pytest.mark.fast
def test_missing(folder):
    status = native.native_status()
    assert not status.available
    assert (status.isa, status.reason) == (
        "",
        "build.json is missing: the kernel was not built",
    )


@pytest.mark.fast
def test_missing_library(folder):
    place(folder, b"")
    (folder / "libkp.so").unlink()
    assert "libkp.so is missing" in native.native_status().reason


@pytest.mark.fast
def test_the_builds_reason_is_told(folder):
    place(folder, b"", reason="no C compiler was found")
    assert native.native_status().reason == "no C compiler was found"


@pytest.mark.fast
@needs_library
@pytest.mark.parametrize("keep", [0, 100, 20_000])
def test_truncated(folder, monkeypatch, keep):
    monkeypatch.undo()
    whole = (native.FOLDER / "libkp.so").read_bytes()
    monkeypatch.setattr(native, "FOLDER", folder)
    place(folder, whole)
    (folder / "libkp.so").write_bytes(whole[:keep])
    assert "corrupt" in native.native_status().reason


@pytest.mark.fast
@pytest.mark.parametrize("data", [b"not a library", elf(8), b""])
def test_wrong_machine_or_format(folder, data):
    place(folder, data)
    status = native.native_status()
    assert not status.available
    assert "can't be loaded" in status.reason


@pytest.mark.fast
@pytest.mark.skipif(not hasattr(_ctypes, "__file__"), reason="no library to copy")
def test_another_library(folder):
    with open(_ctypes.__file__, "rb") as file:
        place(folder, file.read())
    assert "can't be loaded" in native.native_status().reason


@pytest.mark.fast
def test_build_record_that_is_no_json(folder):
    place(folder, b"")
    (folder / "build.json").write_text("{")
    assert "can't be loaded" in native.native_status().reason


@pytest.mark.fast
@needs_library
def test_another_abi(folder, monkeypatch):
    data = (
        native.Path(native.__file__).parent.parent / "_native/libkp.so"
    ).read_bytes()
    place(folder, data)
    monkeypatch.setattr(native, "ABI", 99)
    assert "another version" in native.native_status().reason


@pytest.mark.fast
@needs_library
def test_isa_by_environment(monkeypatch):
    monkeypatch.setenv("KP_ISA", "generic")
    assert native.native_status().isa == "generic"
    monkeypatch.setenv("KP_ISA", "mmx")
    status = native.native_status()
    assert not status.available
    assert "KP_ISA=mmx" in status.reason


@pytest.mark.fast
@needs_library
def test_null_arguments_and_huge_sizes_are_refused():
    assert not native.call("forward", {})
    x = torch.zeros(1, 1, 16, 16)
    counts, blocks = (torch.zeros(1, dtype=torch.int32) for _ in range(2))
    tensors = {"q": x, "k": x, "v": x, "out": x.clone(), "lse": x[..., 0].clone()}
    tensors |= {"counts": counts, "blocks": blocks}
    sizes = dict.fromkeys(("index_batch", "width", "batch", "heads", "kv_heads"), 1)
    sizes |= {"block": 16, "q_len": 16, "kv_len": 16, "dim": 16, "scale": 1.0}
    assert native.call("forward", tensors, **sizes)
    assert not native.call("backward", tensors, **sizes)
    for name, value in [
        ("dim", 257),
        ("dim", 0),
        ("block", 24),
        ("block", 272),
        ("heads", 2**40),
        ("kv_heads", 3),
        ("q_len", -1),
        ("kv_len", 2**62),
        ("width", -1),
        ("index_batch", 2),
        ("dtype", 7),
        ("window", -1),
        ("scale", float("nan")),
    ]:
        assert not native.call("forward", tensors, **sizes | {name: value}), name


@pytest.mark.fast
@needs_library
def test_choosing_refuses_bad_arguments():
    x = torch.randn(1, 1, 40, 16)
    counts = torch.zeros(1, 1, 3, dtype=torch.int32)
    blocks, missed = torch.zeros(1, 1, 3, 2, dtype=torch.int32), torch.zeros(1, 1, 3)
    results = {"counts": counts, "blocks": blocks, "missed": missed}
    how = {"keep": 0.5, "coverage": 0.0, "remainder": 0}
    sizes = dict.fromkeys(("index_batch", "batch", "heads", "kv_heads"), 1)
    sizes |= {"block": 16, "q_len": 40, "kv_len": 40, "dim": 16, "scale": 1.0}
    sizes |= {"width": 2}
    tensors = {"q": x, "k": x}
    assert native.select(tensors, results, how, **sizes)
    assert counts.tolist() == [[[2, 2, 2]]]
    for name in tensors:
        assert not native.select(tensors | {name: None}, results, how, **sizes), name
    for name in results:
        assert not native.select(tensors, results | {name: None}, how, **sizes), name
    for name, value in [
        ("keep", -0.1),
        ("keep", 1.1),
        ("keep", 1.0),
        ("keep", float("nan")),
        ("coverage", 0.5),
        ("coverage", 1.5),
        ("coverage", float("nan")),
    ]:
        assert not native.select(tensors, results, how | {name: value}, **sizes), name
    for name, value in [("width", 1), ("index_batch", 2), ("dim", 257), ("block", 24)]:
        assert not native.select(tensors, results, how, **sizes | {name: value}), name
    extra = tensors | {"extra_k": x}
    assert not native.select(extra, results, how, **sizes)


@pytest.mark.fast
@needs_library
def test_choosing_tells_of_no_memory():
    q = torch.zeros(1, 1, 1, 1)
    results = {"counts": torch.zeros(1, dtype=torch.int32), "missed": torch.zeros(1)}
    results |= {"blocks": torch.zeros(1, dtype=torch.int32)}
    how = {"keep": 0.0, "coverage": 0.0, "remainder": 0}
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "q_len": 1, "kv_len": 2**30}
    sizes |= {"dim": 256, "block": 16, "index_batch": 1, "width": 1, "scale": 1.0}
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, before[1]))
    try:
        with pytest.raises(OutOfMemory, match="build_block_index"):
            native.select({"q": q, "k": q}, results, how, **sizes)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.fast
@needs_library
def test_out_of_memory_is_told():
    """A number of keys that is legal and needs a TiB; none of them is attended to."""
    q = torch.zeros(1, 1, 1, 1)
    counts = torch.zeros(1, dtype=torch.int32)
    tensors = {"q": q, "k": q, "v": q, "out": q, "lse": q, "counts": counts}
    sizes = {"batch": 1, "heads": 1, "kv_heads": 1, "q_len": 1, "kv_len": 2**30}
    sizes |= {"dim": 256, "block": 16, "index_batch": 1, "width": 0, "scale": 1.0}
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, before[1]))
    try:
        with pytest.raises(OutOfMemory, match="found no room"):
            native.call("forward", tensors, **sizes)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.fast
@needs_library
def test_subnormal_numbers_survive_loading():
    native.native_status()
    assert (torch.tensor([1e-40]) * 1).item() > 0
