# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is saved is loaded, and a kill leaves the old or the new."""

import json
import os
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from torchworks_core import checkpoint
from torchworks_core.errors import CorruptFile, InvalidValue, MissingFile

# Both import torch once and fork, so that a kill costs no new start.
CHILD = """
import builtins, os, pathlib, random, signal, sys, time
import torch
from torchworks_core import _files, checkpoint

root, most = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)

def save(folder, version, size):
    tensors = {n: torch.full((size,), float(version)) for n in "abc"}
    checkpoint.save(folder, tensors, {"version": version}, max_shard_bytes=size * 5)
"""
AT_EVERY_STEP = (
    CHILD
    + """
left = 0

def counted(owner, name):
    original = getattr(owner, name)

    def call(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return original(*args, **kwargs)

    setattr(owner, name, call)

for number in range(most):
    folder = os.path.join(root, str(number))
    save(folder, 1, 50)
    child = os.fork()
    if child == 0:
        for name in ("fsync", "replace", "open"):
            counted(os, name)
        counted(builtins, "open")
        counted(pathlib.Path, "unlink")
        counted(_files._Hashing, "write")
        left = number
        save(folder, 2, 50)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(number, os.WTERMSIG(status), flush=True)
    if not os.WIFSIGNALED(status):
        break
"""
)
AT_RANDOM = (
    CHILD
    + """
for number in range(most):
    folder = os.path.join(root, str(number))
    save(folder, 1, 50)
    child = os.fork()
    version = 1
    while child == 0:
        version += 1
        save(folder, version, 100_000)
    time.sleep(random.uniform(0.01, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(number, signal.SIGKILL.value)
"""
)


def example():
    base = torch.arange(24.0).reshape(4, 6)
    return {
        "transposed": base.T,
        "view": base[1:3],
        "same": base[1:3],
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 5),
        "conj": torch.tensor([1 + 2j, 3j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
        "bool": torch.tensor([True, False, True]),
        "bf16": torch.randn(7).to(torch.bfloat16),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "expanded": torch.ones(1, 3).expand(5, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "f8": torch.randn(3).to(torch.float8_e4m3fn),
        "\u00e9 / \U0001f600": torch.ones(1, dtype=torch.uint8),
    }


def same(a, b):
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.itemsize == 1:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=a.is_floating_point())


def weight_files(folder):
    return sorted(n for n in os.listdir(folder) if n.endswith(".safetensors"))


@pytest.mark.critical
@pytest.mark.parametrize("limit", [4 << 30, 100, 1])
def test_round_trip(tmp_path, limit):
    tensors = example()
    checkpoint.save(
        tmp_path / "new" / "deep", tensors, {"x": [1]}, max_shard_bytes=limit
    )
    found, document = checkpoint.load(tmp_path / "new" / "deep")
    assert list(found) == list(tensors)
    assert all(same(found[name], tensors[name].detach()) for name in tensors)
    assert document["x"] == [1]
    assert document == checkpoint.load_document(tmp_path / "new" / "deep")
    files = weight_files(tmp_path / "new" / "deep")
    assert sorted(document["torchworks"]["sha256"]) == files
    if limit == 1:
        assert len(files) == sum(1 for t in tensors.values()) or len(files) > 5
        assert all(f"-of-{len(files):05d}." in file for file in files)
    storages = [t.untyped_storage().data_ptr() for t in found.values() if t.numel()]
    assert len(set(storages)) == len(storages)
    for file in files:
        assert safetensors.torch.load_file(tmp_path / "new" / "deep" / file)


def test_every_dtype_is_what_the_library_calls_it(tmp_path):
    names = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16"
    names += " float32 float64 complex64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz"
    names += " float8_e5m2fnuz float8_e8m0fnu"
    dtypes = {name: getattr(torch, name) for name in names.split()}
    tensors = {name: torch.ones(3, dtype=dtype) for name, dtype in dtypes.items()}
    checkpoint.save(tmp_path, tensors, {})
    safetensors.torch.save_file(tensors, tmp_path / "peer.safetensors")
    (file,) = set(weight_files(tmp_path)) - {"peer.safetensors"}
    found = safetensors.torch.load_file(tmp_path / file)
    assert {name: tensor.dtype for name, tensor in found.items()} == dtypes
    ours = checkpoint.read_header(tmp_path / file)
    theirs = checkpoint.read_header(tmp_path / "peer.safetensors")
    assert {n: e.dtype for n, e in ours.items()} == {
        n: e.dtype for n, e in theirs.items()
    }


def test_document_is_saved_again_as_it_was_loaded(tmp_path):
    checkpoint.save(tmp_path, {"a": torch.ones(1)}, {"x": 1})
    tensors, document = checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, tensors, document)
    assert checkpoint.load_document(tmp_path) == document


def test_nothing_to_save(tmp_path):
    checkpoint.save(tmp_path, {}, {})
    assert checkpoint.load(tmp_path)[0] == {}
    assert os.listdir(tmp_path) == ["checkpoint.json"]


def test_old_weights_and_leftovers_go_others_stay(tmp_path):
    keep = ["readme.txt", "model.safetensors", "model-x.safetensors", ".x.tmp"]
    keep += ["other-0123456789ab.safetensors"]
    for name in [*keep, ".torchworks-0123456789abcdef.tmp"]:
        (tmp_path / name).write_text("x")
    checkpoint.save(tmp_path, {"a": torch.ones(9), "b": torch.ones(9)}, {})
    old = set(os.listdir(tmp_path)) - set(keep)
    checkpoint.save(
        tmp_path, {"a": torch.zeros(9), "b": torch.ones(9)}, {}, max_shard_bytes=40
    )
    new = set(os.listdir(tmp_path)) - set(keep)
    assert old & new == {"checkpoint.json"}
    assert len(new) == 3
    assert set(keep) <= set(os.listdir(tmp_path))


def test_other_stem_and_document(tmp_path):
    checkpoint.save(tmp_path, {"a": torch.ones(1)}, {})
    options = {"document_name": "optimizer.json"}
    checkpoint.save(tmp_path, {"b": torch.ones(1)}, {}, stem="optimizer", **options)
    assert list(checkpoint.load(tmp_path)[0]) == ["a"]
    assert list(checkpoint.load(tmp_path, **options)[0]) == ["b"]


@pytest.mark.critical
def test_loaded_tensors_outlive_their_file(tmp_path):
    checkpoint.save(tmp_path, {"a": torch.arange(300_000)}, {})
    (old,) = weight_files(tmp_path)
    found, _ = checkpoint.load(tmp_path)
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            assert old not in maps.read()
    with open(tmp_path / old, "r+b") as file:
        file.truncate(100)
    checkpoint.save(tmp_path, {"a": torch.zeros(300_000)}, {})
    assert old not in weight_files(tmp_path)
    assert torch.equal(found["a"], torch.arange(300_000))
    checkpoint.save(tmp_path, found, {})
    assert torch.equal(checkpoint.load(tmp_path)[0]["a"], torch.arange(300_000))


def refused():
    sparse = torch.eye(2).to_sparse()
    return [
        {"a": sparse},
        {"a": torch.ones(1, device="meta")},
        {"a": torch.ones(1, dtype=torch.complex128)},
        {"a": [1.0]},
        {"": torch.ones(1)},
        {"__metadata__": torch.ones(1)},
        {3: torch.ones(1)},
        {"\ud800": torch.ones(1)},
    ]


@pytest.mark.parametrize("number", range(8))
def test_refused_tensors_change_nothing(tmp_path, number):
    checkpoint.save(tmp_path, {"a": torch.ones(1)}, {"version": 1})
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InvalidValue, match="tensor"):
        checkpoint.save(tmp_path, refused()[number], {"version": 2})
    assert sorted(os.listdir(tmp_path)) == before
    assert checkpoint.load(tmp_path)[1]["version"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"stem": "../x"},
        {"stem": ""},
        {"max_shard_bytes": 0},
        {"document": {"a": 1j}},
        {"document_name": "../x.json"},
    ],
)
def test_refused_options(tmp_path, options):
    options = {"document": {}, **options}
    with pytest.raises(InvalidValue):
        checkpoint.save(tmp_path / "in", {"a": torch.ones(1)}, **options)
    assert sorted(os.listdir(tmp_path)) in ([], ["in"])


def damage_document(folder, change):
    path = folder / "checkpoint.json"
    document = json.loads(path.read_text())
    change(document, document["torchworks"])
    path.write_text(json.dumps(document))


def rename_file(name):
    def change(document, entry):
        (old,) = entry["sha256"]
        entry["sha256"] = {name: entry["sha256"][old]}
        entry["weights"] = dict.fromkeys(entry["weights"], name)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, e: d.pop("torchworks"), "schema version"),
        (lambda d, e: d.update(torchworks=[1]), "schema version"),
        (lambda d, e: e.update(schema="1"), "schema version"),
        (lambda d, e: e.update(schema=True), "schema version"),
        (lambda d, e: e.update(schema=2), "schema 2"),
        (lambda d, e: e.pop("weights"), "weights and sha256"),
        (lambda d, e: e.update(sha256=["x"]), "weights and sha256"),
        (lambda d, e: e["weights"].update(a=3), "weights and sha256"),
        (lambda d, e: e["weights"].update(c="other"), "same files"),
        (lambda d, e: e["weights"].pop("b"), "'b'"),
        (lambda d, e: e["weights"].update(c=e["weights"]["a"]), "'c'"),
        (lambda d, e: e["sha256"].update(dict.fromkeys(e["sha256"], "0" * 64)), "sha"),
        (rename_file("../../etc/passwd"), "relative name"),
        (rename_file("/etc/passwd"), "relative name"),
    ],
)
def test_damaged_document(tmp_path, change, message):
    checkpoint.save(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, {})
    damage_document(tmp_path, change)
    with pytest.raises(CorruptFile, match=message):
        checkpoint.load(tmp_path)


def test_link_out_of_the_folder_is_not_opened(tmp_path):
    checkpoint.save(tmp_path / "in", {"a": torch.ones(2)}, {})
    (file,) = weight_files(tmp_path / "in")
    os.rename(tmp_path / "in" / file, tmp_path / "moved")
    os.symlink(tmp_path / "moved", tmp_path / "in" / file)
    with pytest.raises(CorruptFile, match=file):
        checkpoint.load(tmp_path / "in")


def test_damaged_weights(tmp_path):
    checkpoint.save(tmp_path, {"a": torch.ones(20)}, {})
    (file,) = weight_files(tmp_path)
    raw = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(raw[:-1] + b"\x7f")
    with pytest.raises(CorruptFile, match=f"{file}.*sha256"):
        checkpoint.load(tmp_path)
    assert checkpoint.load(tmp_path, verify=False)[0]["a"][-1] != 1
    (tmp_path / file).write_bytes(raw[:-1])
    with pytest.raises(CorruptFile, match=file):
        checkpoint.load(tmp_path, verify=False)
    os.remove(tmp_path / file)
    with pytest.raises(MissingFile, match=file):
        checkpoint.load(tmp_path)


def test_missing_checkpoint(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(MissingFile, match=r"checkpoint\.json"):
            checkpoint.load(folder)


def test_commit_of_another_format(tmp_path):
    def write(number):
        def torch_save(file):
            torch.save({"w": torch.tensor(number)}, file)

        name, _ = checkpoint.write_hashed(tmp_path, "model", ".pt", torch_save)
        checkpoint.commit(
            tmp_path, {"file": name}, keep=[name], pattern=r"model-\w{12}\.pt"
        )

    write(1)
    write(2)
    files = sorted(os.listdir(tmp_path))
    name = checkpoint.read_json(tmp_path / "checkpoint.json")["file"]
    assert files == ["checkpoint.json", name]
    with pytest.raises(MissingFile, match="gone"):
        checkpoint.commit(tmp_path, {}, keep=["gone"], pattern=".*")
    assert sorted(os.listdir(tmp_path)) == files


@pytest.mark.gpu
def test_cuda_tensors(tmp_path):
    checkpoint.save(tmp_path, {"a": torch.arange(5, device="cuda")}, {})
    found, _ = checkpoint.load(tmp_path, device="cuda")
    assert found["a"].device.type == "cuda"
    assert found["a"].tolist() == [0, 1, 2, 3, 4]


def check_whole(folder):
    """The tensors all belong to the version that the document names."""
    tensors, document = checkpoint.load(folder)
    for tensor in tensors.values():
        assert tensor.unique().tolist() == [document["version"]]
    assert len(tensors) == 3
    return document["version"]


def run_killed(code, folder, most):
    done = subprocess.run(
        [sys.executable, "-c", code, folder, str(most)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


@pytest.mark.critical
def test_kill_at_every_step_of_a_save(tmp_path):
    ends = run_killed(AT_EVERY_STEP, tmp_path, 200)
    assert ends[-1][1] == 0, "a save has more steps than the test tried"
    assert all(code == signal.SIGKILL for _, code in ends[:-1])
    versions = [check_whole(tmp_path / str(number)) for number, _ in ends]
    # The old one before the commit, the new one after it, and never back.
    assert versions == sorted(versions)
    assert versions[0] == 1
    assert versions[-1] == 2
    assert versions.count(1) > 10
    assert versions.count(2) > 3
    for number, _ in ends:
        checkpoint.save(tmp_path / str(number), {"a": torch.ones(1)}, {})
        assert len(os.listdir(tmp_path / str(number))) == 2


def test_kill_at_a_random_moment(tmp_path):
    ends = run_killed(AT_RANDOM, tmp_path, 10)
    versions = [check_whole(tmp_path / str(number)) for number, _ in ends]
    assert len(versions) == 10
    assert max(versions) > 1
