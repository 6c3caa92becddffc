# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the other side may say to the Python halves, and what it may not."""

import os
import socket
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from mycelya_torch import (
    ProtocolError,
    RemoteExecutionError,
    _errors,
    _handshake,
    _state_dict,
    _worker,
)
from mycelya_torch import load_huggingface_state_dicts as load

pytestmark = pytest.mark.fast

HUGE = 2**63


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "abc",
        [0, "float32"],
        [0, "float32", [2], 1],
        [0, "nn", [2]],
        [0, "__name__", [2]],
        [0, "_dynamo", [2]],
        [0, "quint8", [8]],
        [0, ["float32"], [2]],
        [-1, "float32", [2]],
        [1, "float32", [2]],
        [True, "float32", [2]],
        [0.0, "float32", [2]],
        [0, "float32", "2"],
        [0, "float32", [2.0]],
        [0, "float32", [-2, -1]],
        [0, "float32", [1]],
        [0, "float32", ["a"]],
        [0, "float32", [1] * 65],
        [0, "float32", [HUGE, HUGE]],
    ],
    ids=lambda entry: str(entry)[:30],
)
def test_impossible_tensors_are_refused(entry):
    whole = [torch.zeros(8, dtype=torch.uint8)]
    with pytest.raises(ProtocolError, match="impossible"):
        _state_dict._tensor(whole, entry)
    assert _state_dict._tensor(whole, [0, "float32", [2, 1]]).shape == (2, 1)


@pytest.mark.parametrize("shape", [[0, HUGE], [0, 2**32, 2**32], [2**64, 0]])
def test_empty_tensors_have_bounds_too(shape):
    with pytest.raises(ProtocolError, match="impossible"):
        _state_dict._tensor([torch.zeros(0, dtype=torch.uint8)], [0, "int64", shape])


GOOD = {
    "list": {"token": 1, "files": 1},
    "load": None,
    "describe": {"storages": [8], "dicts": {"": {"a": [0, "float32", [2]]}}},
    "adopt": None,
    "forget": False,
}


@pytest.mark.parametrize(
    ("do", "answer"),
    [
        ("list", None),
        ("list", [1]),
        ("list", {"token": 1}),
        ("list", {"token": "1", "files": 1}),
        ("list", {"token": 1, "files": True}),
        ("list", {"token": 1, "files": -1}),
        ("list", {"token": 1, "files": 2**60}),
        ("describe", 7),
        ("describe", {"storages": {}, "dicts": {}}),
        ("describe", {"storages": [2**62], "dicts": {}}),
        ("describe", {"storages": ["8"], "dicts": {}}),
        ("describe", {"storages": [], "dicts": {"": []}}),
        ("describe", {"storages": [], "dicts": {b"": {}}}),
        ("describe", {"storages": [], "dicts": {"": {b"a": [0, "int8", [8]]}}}),
        ("describe", {"storages": [8], "dicts": {"": {"a": [0, "sys", [8]]}}}),
    ],
    ids=str,
)
def test_hostile_answers_to_a_load(both, monkeypatch, do, answer):
    answers = {**GOOD, do: answer}
    asked = []

    def request(message, reason):
        asked.append(message["do"])
        return answers[message["do"]]

    monkeypatch.setattr(both._life, "request", request)
    with pytest.raises(ProtocolError):
        load("anything", both.device())
    assert "adopt" not in asked
    monkeypatch.undo()
    both.synchronize()


@pytest.mark.parametrize("answer", [None, [], {}, {"allocated": "8"}, {"name": 3}])
def test_hostile_answers_of_the_device_module(both, monkeypatch, answer):
    monkeypatch.setattr(both._life, "request", lambda message, reason: answer)
    for ask in (
        torch.mycelya.memory_allocated,
        torch.mycelya.mem_get_info,
        torch.mycelya.memory_stats,
        torch.mycelya.get_device_properties,
        torch.mycelya.get_device_name,
    ):
        with pytest.raises(ProtocolError, match="no usable"):
            ask(both.device())


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x92\x01", b"\x91" * 3000, b"\xa1\xff"]
)
def test_no_msgpack_is_a_protocol_error(data):
    with pytest.raises(ProtocolError, match="no msgpack"):
        _handshake.decode(data)


LISTED = "a failed on b: c [arguments "
TAIL = "; op 1; set MYCELYA_BLOCKING=1 to raise at the calling line]"


@pytest.mark.parametrize(
    "text",
    [
        "a" * 65536,
        "a failed on b: " + "a" * 65536,
        "a failed on b: " + "[arguments " * 6000,
        LISTED + "; op 1; set MYCELYA_BLOCKING=1" * 2000,
        LISTED + "a" * 65536 + TAIL,
        LISTED + "a[" * 30000 + TAIL,
        LISTED + "x[" + "9" * 60000 + "]" + TAIL,
        LISTED + "x[" + "9" * 1000 + "]" + TAIL,
        LISTED + "a[1," * 20000 + TAIL,
    ],
    ids=range(9),
)
def test_texts_of_errors_are_read_in_no_time(text):
    begin = time.monotonic()
    assert str(RemoteExecutionError(text)) == text
    assert time.monotonic() - begin < 0.5


def test_kinds_of_errors_stay_in_step_with_the_library():
    assert len(_errors.BY_KIND) == 11


@pytest.mark.skipif(sys.platform != "linux", reason="file names must be UTF-8 there")
def test_file_name_that_is_no_text(both, tmp_path):
    """Its error has to reach the client, and the worker to go on."""
    broken = os.path.join(os.fsencode(tmp_path), b"\xff.safetensors")
    with open(broken, "wb") as opened:
        opened.write(b"\x10" + bytes(7) + b"{broken")
    with pytest.raises(RemoteExecutionError, match="can't be read"):
        load(str(tmp_path), both.device())
    assert torch.ones(2, device=both.device()).sum().item() == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"repo_id": "a\udcff"},
        {"repo_id": 3},
        {"revision": "a\udcff"},
        {"revision": 3},
        {"path": "a\udcff"},
        {"path": 3},
        {"path": None},
    ],
    ids=ascii,
)
def test_what_is_no_text_is_refused_before_it_is_sent(both, arguments):
    with pytest.raises(ValueError, match="text"):
        load(**{"repo_id": "a", "device": both.device(), **arguments})


@pytest.mark.parametrize("index", [-1, 32, 2**40])
def test_device_index_that_is_none(index):
    for use in (torch.mycelya.get_rng_state, torch.mycelya.synchronize):
        with pytest.raises(ValueError, match="0 to 31"):
            use(index)


def test_new_state_is_named_as_elsewhere(both):
    state = torch.mycelya.get_rng_state(device=both.device())
    torch.mycelya.set_rng_state(new_state=state, device=both.device())
    index = both.device().index
    torch.mycelya.default_generators[index].set_state(new_state=state)


@pytest.mark.parametrize("do", ["load", "describe", "adopt"])
def test_interrupted_load_leaves_nothing_on_the_worker(both, monkeypatch, tmp_path, do):
    """The answer comes, but a Ctrl-C comes first."""
    save_file({"a": torch.ones(1 << 20)}, tmp_path / "x.safetensors")
    both.synchronize()
    before = torch.mycelya.memory_allocated(both.device())
    live = both.stats().storages_live
    real = both._life.request

    def request(message, reason):
        answer = real(message, reason)
        if message["do"] == do:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(both._life, "request", request)
    with pytest.raises(KeyboardInterrupt):
        load(str(tmp_path), both.device())
    monkeypatch.undo()
    begin = time.monotonic()
    while any(t.name.startswith("mycelya-forget") for t in threading.enumerate()):
        assert time.monotonic() - begin < 10
        time.sleep(0.01)
    both.synchronize()  # takes the storages along that are to be freed
    torch.ones(1, device=both.device()).item()
    assert torch.mycelya.memory_allocated(both.device()) - before < 1 << 20
    assert both.stats().storages_live <= live
    token = both._life.request(
        {"do": "list", "repo_id": str(tmp_path), "path": "", "revision": None}, "load"
    )["token"]
    with pytest.raises(RemoteExecutionError, match="not listed"):
        both._life.request({"do": "describe", "token": token - 1}, "load")
    assert torch.equal(
        load(str(tmp_path), both.device())[""]["a"].cpu(), torch.ones(1 << 20)
    )


def test_session_that_ends_by_the_client_s_fault_leaves_no_traceback(capfd):
    class Broken(_worker.Session):
        def _begin(self, sock, hello):
            pass

        def _serve(self):
            raise RuntimeError("mycelya: frames are acknowledged that were not sent")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        hello = {"version": 1, "torch": "2", "device": None, "threads": 0}
        hello |= {"timeout": 1, "session": b"", "received": 0}
        Broken(_worker.Options()).run(theirs, hello)
    assert "frames are acknowledged" in capfd.readouterr().err
