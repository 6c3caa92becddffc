# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Weights that the worker reads: folders, shards, ties, and what is refused."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file, save_model

import mycelya_torch
from mycelya_torch import RemoteExecutionError, RemoteMachine, get_storage_id
from mycelya_torch import load_huggingface_state_dicts as load
from mycelya_torch._weights import find_files, tie_head
from torchworks_core.testing import tiny_model

pytestmark = pytest.mark.fast


def equal(remote, local):
    assert set(remote) == set(local)
    for name, value in local.items():
        assert remote[name].dtype == value.dtype
        assert remote[name].shape == value.shape
        assert torch.equal(remote[name].cpu(), value), name


@pytest.fixture
def repository(tmp_path):
    """A root file and two folders, one of them with shards and an index."""
    contents = {
        "": {"a": torch.randn(3, 4), "b": torch.arange(5)},
        "part": {"c": torch.randn(2, 2).bfloat16(), "d": torch.tensor(2.5)},
        "deep/er": {"e": torch.ones(0, 3), "f": torch.tensor([True, False])},
    }
    (tmp_path / "part").mkdir()
    (tmp_path / "deep/er").mkdir(parents=True)
    save_file(contents[""], tmp_path / "model.safetensors")
    save_file(contents["deep/er"], tmp_path / "deep/er/x.safetensors")
    shards = {"c": "model-1.safetensors", "d": "model-2.safetensors"}
    for name, file in shards.items():
        save_file({name: contents["part"][name]}, tmp_path / "part" / file)
    index = tmp_path / "part/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    save_file({"z": torch.ones(1)}, tmp_path / "part/consolidated.safetensors")
    return tmp_path, contents


@pytest.mark.critical
def test_folders_are_keys(both, repository):
    folder, contents = repository
    progress = []
    found = load(
        str(folder), both.device(), progress=lambda *done: progress.append(done)
    )
    assert set(found) == set(contents)
    for where, values in contents.items():
        equal(found[where], values)
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.critical
def test_weights_do_not_pass_through_the_client(both, tmp_path):
    save_file({"a": torch.randn(1 << 18)}, tmp_path / "x.safetensors")
    both.synchronize()
    both.reset_stats()
    found = load(str(tmp_path), both.device())[""]
    stats = both.stats()
    assert stats.bytes_sent < 4096
    assert stats.bytes_received < 4096
    assert {point.reason for point in stats.sync_points} == {"load"}
    assert found["a"].sum().item() == pytest.approx(found["a"].cpu().sum().item())


def test_path_chooses_a_folder(both, repository):
    folder, contents = repository
    found = load(str(folder), both.device(), path="deep")
    assert set(found) == {"er"}
    equal(found["er"], contents["deep/er"])
    equal(load(str(folder), both.device(), path="part")[""], contents["part"])


@pytest.mark.parametrize("path", ["..", "part/../..", "/etc", "a\\..\\b"])
def test_path_must_not_lead_out(both, repository, path):
    with pytest.raises(ValueError, match="leads out"):
        load(str(repository[0]), both.device(), path=path)


def test_links_must_not_lead_out(both, tmp_path):
    secret = tmp_path / "elsewhere"
    secret.mkdir()
    save_file({"a": torch.ones(1)}, secret / "x.safetensors")
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "x.safetensors").symlink_to(secret / "x.safetensors")
    with pytest.raises(RemoteExecutionError, match="leads out"):
        load(str(folder), both.device())
    (folder / "x.safetensors").unlink()
    (folder / "sub").symlink_to(secret)
    with pytest.raises(RemoteExecutionError, match="leads out"):
        load(str(folder), both.device(), path="sub")


def test_cache_of_the_hub_is_read_through_its_links(both, tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/123"
    blobs = tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": torch.ones(2)}, blobs / "abc")
    (snapshot / "model.safetensors").symlink_to(blobs / "abc")
    equal(load(str(snapshot), both.device())[""], {"a": torch.ones(2)})


def test_one_bad_file_loads_nothing(both, repository):
    folder, _ = repository
    (folder / "part/model-2.safetensors").write_bytes(b"\x10" + bytes(7) + b"{broken")
    both.synchronize()
    before = both.stats().storages_live
    memory = torch.mycelya.memory_allocated(both.device())
    with pytest.raises(RemoteExecutionError, match=r"model-2\.safetensors"):
        load(str(folder), both.device())
    assert both.stats().storages_live == before
    assert torch.mycelya.memory_allocated(both.device()) == memory
    assert torch.ones(2, device=both.device()).sum().item() == 2


def test_pickles_are_refused_with_the_way_out(both, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RemoteExecutionError, match=r"(?s)pickles.*revision="):
        load(str(tmp_path), both.device())


def test_double_names_and_broken_indexes(both, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(RemoteExecutionError, match="another file"):
        load(str(tmp_path), both.device())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(RemoteExecutionError, match="secret"):
        load(str(tmp_path), both.device())
    index.write_text("[]")
    with pytest.raises(RemoteExecutionError, match="no JSON object"):
        load(str(tmp_path), both.device())


def test_device_must_be_a_machine(both, repository):
    with pytest.raises(RuntimeError, match="machine"):
        load(str(repository[0]), "cpu")
    with pytest.raises(RuntimeError, match=r"no machine|is stopped"):
        load(str(repository[0]), torch.device("mycelya", 31))
    with pytest.raises(ValueError, match="repo_id"):
        load("", both.device())


def test_shared_entries_keep_sharing(both, tmp_path):
    """``save_model`` names what it left out in the file's metadata."""
    first = torch.nn.Linear(4, 4, bias=False)
    second = torch.nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    save_model(model, str(tmp_path / "model.safetensors"))
    found = load(str(tmp_path), both.device())[""]
    equal(found, model.state_dict())
    assert get_storage_id(found["0.weight"]) == get_storage_id(found["1.weight"])


def test_tensors_are_ordinary_ones(both, repository):
    found = load(str(repository[0]), both.device())[""]["a"]
    assert found._base is None
    assert found.is_leaf
    assert found.is_contiguous()
    assert found.storage_offset() == 0
    assert not found.requires_grad
    assert found.untyped_storage().nbytes() == found.nbytes
    found.add_(1)
    parameter = torch.nn.Parameter(found)
    parameter.sum().backward()
    assert parameter.grad.sum().item() == 12


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_fits_strictly(both, tmp_path, family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    found = load(str(tmp_path), both.device())[""]
    equal(found, model.state_dict())
    shares = len({get_storage_id(tensor) for tensor in found.values()})
    assert shares == len(found) - tied
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.load_state_dict(found, strict=True, assign=True)
    if tied:
        empty.tie_weights()
    for parameter in empty.parameters():
        assert parameter.device == both.device()
    model.load_state_dict(found, strict=True)  # values come down into CPU parameters
    moved = tiny_model(family, seed=1, tie_word_embeddings=tied).to(both.device())
    moved.load_state_dict(found, strict=True)
    equal(moved.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        (["wte.weight"], {"architectures": ["GPT2LMHeadModel"]}, "wte.weight"),
        (["m.embed_tokens.weight"], {"architectures": ["XForCausalLM"]}, "m."),
        (
            ["wte.weight"],
            {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": False},
            None,
        ),
        (["wte.weight"], {"architectures": ["GPT2Model"]}, None),
        (["wte.weight"], {}, None),
        (["wte.weight", "lm_head.weight"], {"architectures": ["XForCausalLM"]}, None),
        (["embed_in.weight", "embed_out.weight"], {"architectures": ["A"]}, None),
        (
            ["a.wte.weight", "b.wte.weight"],
            {"architectures": ["XForCausalLM"]},
            None,
        ),
        (["other.weight"], {"architectures": ["XForCausalLM"]}, None),
    ],
)
def test_rule_for_a_tied_head(tmp_path, names, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    entries = {name: torch.ones(1) for name in names}
    before = dict(entries)
    tie_head(entries, tmp_path / "config.json")
    head = entries.pop("lm_head.weight", None)
    before_head = before.pop("lm_head.weight", None)
    assert entries == before
    if expected is None:
        assert head is before_head
    else:
        (name,) = [name for name in entries if name.startswith(expected)]
        assert head is entries[name]


def test_hidden_folders_do_not_count(tmp_path):
    (tmp_path / ".cache").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / ".cache/x.safetensors")
    assert find_files(tmp_path, tmp_path) == []


# ---- what a server allows ----


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("shelf")
    (root / "inside").mkdir()
    save_file({"a": torch.ones(3)}, root / "inside/x.safetensors")
    return root


def test_server_allows_folders_below_its_root_only(serve, token, shelf, tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    server = serve("--hub-root", str(shelf), "--device", "cpu")
    with RemoteMachine("tcp", address=server.address, token=token) as machine:
        for name in ("inside", str(shelf / "inside")):
            equal(load(name, machine.device())[""], {"a": torch.ones(3)})
        for name in (str(tmp_path), "../" + tmp_path.name, "inside/../../x"):
            with pytest.raises(RemoteExecutionError, match="not below"):
                load(name, machine.device())
        with pytest.raises(RemoteExecutionError, match="--allow-hub"):
            load("somebody/something", machine.device())
        os.symlink(tmp_path, shelf / "link")
        with pytest.raises(RemoteExecutionError, match="not below"):
            load("link", machine.device())


def test_server_allows_nothing_by_default(serve, token, shelf):
    server = serve("--device", "cpu", "--max-memory", "1000000")
    with RemoteMachine("tcp", address=server.address, token=token) as machine:
        for name in (str(shelf / "inside"), "somebody/something"):
            with pytest.raises(RemoteExecutionError, match="--allow-hub"):
                load(name, machine.device())
        x = torch.empty(1_000_000, device=machine.device())
        with pytest.raises(torch.OutOfMemoryError):
            machine.synchronize()
        del x
        assert torch.ones(3, device=machine.device()).sum().item() == 3
        assert torch.mycelya.mem_get_info(machine.device())[1] == 1_000_000


def test_weights_beyond_the_memory_limit(serve, token, tmp_path):
    save_file({"a": torch.ones(100_000)}, tmp_path / "x.safetensors")
    server = serve("--hub-root", str(tmp_path), "--max-memory", "200000")
    with RemoteMachine("tcp", address=server.address, token=token) as machine:
        with pytest.raises(torch.OutOfMemoryError):
            load(".", machine.device())
        assert torch.ones(3, device=machine.device()).sum().item() == 3


def test_hub_is_asked_with_the_patterns_of_safetensors(tmp_path, monkeypatch):
    import huggingface_hub

    snapshot = tmp_path / "models--a--b/snapshots/1"
    (snapshot / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, snapshot / "sub/x.safetensors")
    asked = []

    def download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with RemoteMachine("mock") as machine:
        found = load("some/repository", machine.device(), path="sub", revision="v1")
        equal(found[""], {"a": torch.ones(2)})
    ((repo_id, revision, patterns),) = asked
    assert (repo_id, revision) == ("some/repository", "v1")
    assert all(pattern.startswith("sub/") for pattern in patterns)
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in patterns)


def test_no_round_trip_is_forbidden_silently(both, repository):
    with (
        pytest.raises(mycelya_torch.SyncForbiddenError),
        mycelya_torch.forbid_sync(),
    ):
        load(str(repository[0]), both.device())
