# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Mutated frames, both ways: no crash, no hang, clean errors, and it goes on."""

import sys
from pathlib import Path

import msgpack
import pytest

import mycelya_torch  # noqa: F401 - loads the library

sys.path.insert(0, str(Path(__file__).parent))
import fuzz
import wire_codec as wire

AMOUNTS = [
    pytest.param(2000, marks=pytest.mark.fast),
    pytest.param(10_000, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("amount", AMOUNTS)
def test_worker_survives_mutated_frames(amount):
    counts, problems = fuzz.worker_problems(amount, seed=amount + 1)
    print(counts)
    assert problems == []
    assert counts["frames"] >= amount


@pytest.mark.parametrize("amount", AMOUNTS)
def test_client_survives_mutated_frames(amount):
    counts, problems = fuzz.client_problems(amount, seed=amount + 2)
    print(counts)
    assert problems == []


@pytest.mark.fast
def test_mutated_hellos_are_refused_and_the_worker_goes_on():
    """Before the frames: the hello, whole, cut, or of another kind."""
    from mycelya_torch import _handshake

    def changed(**others):
        return _handshake.pack({**fuzz.HELLO, **others})

    hellos = [b"", b"\0", b"\0\0\0\0", b"\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"]
    hellos += [b"\1\0\1\0" + b"\0" * 65537, _handshake.pack({}), changed(version=2)]
    hellos += [changed(torch="1.0"), changed(device="cuda:99"), changed(device="x")]
    hellos += [changed(timeout=float("nan"))]
    hellos += [changed(received=2**64 - 1), changed(session=b"x" * 100)]
    hellos += [b"\4\0\0\0\x91\x91\x91\x91", b"\1\0\0\0\xc1", changed(timeout=-1e300)]
    worker = fuzz.FuzzedWorker()
    try:
        for hello in hellos:
            got = worker.session([], hello)
            if got:
                assert _handshake.unpack(got[4:])
        assert _handshake.check_worker(_handshake.unpack(worker.session([])[4:]))
    finally:
        worker.close()


@pytest.fixture
def worker():
    started = fuzz.FuzzedWorker()
    started.session([])
    yield started
    started.close()


def ops(*records):
    return wire.frame(wire.OPS, wire.Records().encode(*records))


@pytest.mark.fast
def test_worker_ends_when_its_client_leaves_a_long_computation(worker):
    many = wire.View(6, (2**36,), (0,), 4)  # takes a minute or more
    fill = wire.Call("aten::zero_", "", (("T", many),))
    records = ("define", 1, fill, [None]), ("exec", 1, [1], (), [])
    with pytest.raises(TimeoutError):
        worker.session([ops(("alloc", 1, 4), *records)], patience=1)
    assert worker.ended() == 0


@pytest.mark.fast
def test_full_worker_answers_requests(worker):
    request = wire.frame(wire.CONTROL, msgpack.packb({"do": "memory"}), 7)
    records = wire.Records()  # one, as ids are told by their distances
    full, empty = records.encode(("alloc", 1, 256 << 20)), records.encode(("free", [1]))
    frames = [wire.frame(wire.OPS, full), request, wire.frame(wire.OPS, empty), request]
    data = worker.session(frames)
    get = wire.Get(data)
    get.bytes(get.one("I"))
    kinds = []
    while get.left():
        length, kind, *_ = get.all("IBBHQ")
        kinds += [kind] if kind != wire.PONG else []
        get.bytes(length)
    assert kinds == [wire.REPLY] * 2
