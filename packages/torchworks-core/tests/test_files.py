# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, JSON with limits, and names that stay in their folder."""

import hashlib
import json
import os
import stat

import pytest
import torch

from torchworks_core import checkpoint
from torchworks_core.errors import CorruptFile, InvalidValue, MissingFile


@pytest.mark.critical
@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/../../b",
        "a/..",
        "/etc/passwd",
        "a\x00b",
        "a\\b",
        "./",
        "C:evil",
        "C:/evil",
        "\\\\server\\share",
        "//server/share",
        "..\\a",
        None,
        3,
    ],
)
def test_names_that_lead_out(tmp_path, name):
    with pytest.raises(InvalidValue, match="relative name"):
        checkpoint.resolve_inside(tmp_path, name)


def test_names_that_stay(tmp_path, monkeypatch):
    for name in ("a", "a/b.safetensors", "..a", "a..b", "-x", "\u00e9"):
        assert checkpoint.resolve_inside(tmp_path, name) == tmp_path / name
    monkeypatch.chdir(tmp_path)
    assert str(checkpoint.resolve_inside(".", "a")) == "a"


def test_links(tmp_path):
    folder, outside = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("x")
    (folder / "link").symlink_to(outside / "secret")
    (folder / "up").symlink_to(outside)
    (folder / "self").symlink_to(folder)
    (folder / "real").write_text("x")
    (folder / "near").symlink_to("real")
    for name in ("link", "up/secret", "up/new", "self"):
        with pytest.raises(InvalidValue):
            checkpoint.resolve_inside(folder, name)
    assert checkpoint.resolve_inside(folder, "near").read_text() == "x"
    # As in the hub's cache: snapshots/<commit>/file -> ../../blobs/<hash>.
    assert checkpoint.resolve_inside(folder, "link", root=tmp_path)
    with pytest.raises(InvalidValue):
        checkpoint.resolve_inside(folder, "link", root=tmp_path / "elsewhere")
    (tmp_path / "alias").symlink_to(folder)
    assert checkpoint.resolve_inside(tmp_path / "alias", "real").is_file()


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_failed_write_changes_nothing(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")

    def write(file):
        file.write(b"half of the ne")
        raise error

    with pytest.raises(error):
        checkpoint.write_atomic(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_failed_rename_leaves_no_temporary(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="directory"):
        checkpoint.write_atomic(tmp_path / "a", lambda file: file.write(b"x"))
    assert os.listdir(tmp_path) == ["a"]


def test_content_is_synced_before_the_rename_and_the_folder_after(
    tmp_path, monkeypatch
):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def call(*args, original=original, name=name):
            mode = os.fstat(args[0]).st_mode if name == "fsync" else 0
            calls.append("folder" if stat.S_ISDIR(mode) else name)
            return original(*args)

        monkeypatch.setattr(os, name, call)
    checkpoint.write_atomic(tmp_path / "a", lambda file: file.write(b"x"))
    assert calls == ["fsync", "replace", "folder"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        checkpoint.write_atomic(tmp_path / "a", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_json_round_trip(tmp_path):
    document = {"z": 1, "a": [1.5, None, True, "\u00e9\U0001f600"], "m": {}}
    checkpoint.write_json(tmp_path / "a.json", document)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert list(json.loads(text)) == ["z", "a", "m"]
    assert checkpoint.read_json(tmp_path / "a.json") == document


@pytest.mark.parametrize(
    "document",
    [
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": object()},
        {"a": chr(0xD800)},
        [1],
        {"a": "x" * (17 << 20)},
    ],
)
def test_json_that_could_not_be_read_back(tmp_path, document):
    with pytest.raises(InvalidValue):
        checkpoint.write_json(tmp_path / "a.json", document)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[1]",
        b"1",
        b"{",
        b"\xff",
        b'{"a": NaN}',
        b'{"a": 1, "a": 1}',
        b'{"b": {"a": 1, "a": 1}}',
        b"[" * 10**5,
        b'{"a": -Infinity}',
    ],
)
def test_json_that_is_refused(tmp_path, raw):
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(CorruptFile, match=r"a\.json"):
        checkpoint.read_json(tmp_path / "a.json")


def test_json_limit_and_missing(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert checkpoint.read_json(tmp_path / "a.json", max_bytes=8) == {"a": 1}
    with pytest.raises(CorruptFile, match="more than 7 bytes"):
        checkpoint.read_json(tmp_path / "a.json", max_bytes=7)
    with pytest.raises(MissingFile, match=r"b\.json"):
        checkpoint.read_json(tmp_path / "b.json")


def test_write_hashed_takes_torch_save(tmp_path):
    def write(file):
        torch.save({"w": torch.arange(5)}, file)

    name, digest = checkpoint.write_hashed(tmp_path, "model", ".pt", write)
    raw = (tmp_path / name).read_bytes()
    assert digest == hashlib.sha256(raw).hexdigest()
    assert name == f"model-{digest[:12]}.pt"
    again = torch.load(tmp_path / name, weights_only=True)
    assert torch.equal(again["w"], torch.arange(5))
