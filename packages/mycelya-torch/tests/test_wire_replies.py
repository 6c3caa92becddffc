# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every limit that the client checks: replies that no worker would send."""

import struct
import sys
from pathlib import Path

import pytest
import torch

from mycelya_torch import ProtocolError, RemoteError

sys.path.insert(0, str(Path(__file__).parent))
import wire_codec as wire
from test_wire_limits import BAD_VIEWS, resized
from wire_peers import SLOT, contiguous, native_client, ops

pytestmark = pytest.mark.fast


def change(kind, new):
    """Return a `mangle` that replaces the payload of the first frame of a kind."""
    state = [new]

    def mangle(data):
        length, what, *_, correlation = wire.HEADER.unpack(data[:16])
        if what != kind or not state or length < 9:
            return data
        new = state.pop()
        new = new(data[16:], correlation) if callable(new) else new
        return new if isinstance(new, bytes) else wire.frame(kind, *new)

    return mangle


def reply(data=b"", status=0, total=None, kind=wire.REPLY, shift=0):
    """Return a function for `change`: another REPLY."""
    total = len(data) if total is None else total

    def make(payload, correlation):
        body = struct.pack("<BQ", status, total) + data
        return wire.frame(kind, body, correlation + shift)

    return make


def rows(*results, changed=(), more=b""):
    return reply(wire.answer(results, changed) + more)


def offered(view, shift=0):
    """Return a RUN answer like the real one, with another view or id."""

    def make(payload, correlation):
        results, _ = wire.Get(payload[9:]).answer()
        answer = wire.answer([(1, results[0][1] + shift, view)])
        return reply(answer)(payload, correlation)

    return make


ERROR = wire.error(wire.Error(1, 1, 0, "aten::op", "", "text"))
NO_TEXT = ERROR[:-4] + b"t\xcbxt"  # no UTF-8
BAD_REPLIES = {
    "unknown type": lambda p, c: wire.frame(21),
    "client's type": lambda p, c: wire.frame(wire.ASK, b"\3", c),
    "flags": lambda p, c: wire.frame(wire.REPLY, p, c, flags=1),
    "zero": lambda p, c: wire.frame(wire.REPLY, p, c, zero=1),
    "16 MiB + 1": lambda p, c: wire.frame(wire.REPLY, p, c, length=2**24 + 1),
    "4 GiB": lambda p, c: wire.frame(wire.REPLY, p, c, length=2**32 - 1),
    "8 bytes": lambda p, c: wire.frame(wire.REPLY, p[:8], c),
    "status 2": reply(b"\0" * 4, 2),
    "3 bytes": reply(b"\0" * 3),
    "5 bytes": reply(b"\0" * 5),
    "2**63 bytes": reply(b"\0" * 4, total=2**63),
    "2**64 - 1 bytes": reply(b"\0" * 4, total=2**64 - 1),
    "more than it says": reply(b"\0" * 5, total=4),
    "another question": reply(b"\0" * 4, shift=1),
    "no question": lambda p, c: wire.frame(wire.REPLY, p, 0),
    "data first": reply(b"\0" * 4, kind=wire.REPLY_DATA),
    "empty data": lambda p, c: (
        reply(b"\0\0", total=4)(p, c) + wire.frame(wire.REPLY_DATA, b"", c)
    ),
    "too much data": lambda p, c: (
        reply(b"\0\0", total=4)(p, c) + wire.frame(wire.REPLY_DATA, b"\0" * 3, c)
    ),
    "twice": lambda p, c: wire.frame(wire.REPLY, p, c) * 2,
    "begun twice": lambda p, c: reply(b"\0\0", total=4)(p, c) * 2,
    "error too long": reply(ERROR, 1, 2**17 + 1),
    "error cut": reply(ERROR[:-1], 1),
    "error and more": reply(ERROR + b"\0", 1),
    "error of kind 7": reply(ERROR[:16] + b"\7" + ERROR[17:], 1),
    "event cut": lambda p, c: wire.frame(wire.EVENT, ERROR[:-1]),
    "event and more": lambda p, c: wire.frame(wire.EVENT, ERROR + b"\0"),
    "event too long": lambda p, c: wire.frame(wire.EVENT, b"", length=2**17 + 1),
    "event of kind 255": lambda p, c: wire.frame(
        wire.EVENT, ERROR[:16] + b"\xff" + ERROR[17:]
    ),
    "event no text": lambda p, c: (
        wire.frame(wire.EVENT, NO_TEXT) + wire.frame(wire.REPLY, p, c)
    ),
    "error no text": reply(NO_TEXT, 1),
    "ack of 7 bytes": lambda p, c: wire.frame(wire.WORKER_ACK, b"\0" * 7),
    "ack of 9 bytes": lambda p, c: wire.frame(wire.WORKER_ACK, b"\0" * 9),
    "ack of more": lambda p, c: wire.frame(wire.WORKER_ACK, b"\xff" * 8),
    "pong of 1 byte": lambda p, c: wire.frame(wire.PONG, b"\0"),
}
I64 = contiguous(torch.int64, 3, 1)
BAD_ANSWERS = {
    "nothing": reply(b""),
    "no result": rows(),
    "two results": rows((0,), (0,)),
    "unknown kind": reply(b"\1\0\x08\0\0"),
    "cut": reply(b"\1\0\1"),
    "more": rows((0,), more=b"\0"),
    "id of nobody": offered(I64, 10**6),
    "id before": offered(I64, -1),
    "argument 9": rows((7, 9)),
    "list too long": reply(b"\1\0\2\xff\xff\xff\xff"),
    "list of numbers": reply(b"\1\0\2\1\0\0\0\3" + b"\0" * 10),
    "a list": rows((2, [(0,)])),
    "a number": rows((3, 5)),
    "a bool": rows((4, True)),
    "a complex": rows((6, 1.0, 2.0)),
    "changed 9": rows((0,), changed=[(9, I64)]),
    "changed dtype": rows((0,), changed=[(0, I64)]),
    **{name: offered(view) for name, view in BAD_VIEWS.items()},
}
del BAD_ANSWERS["has 16 bytes, not 17"], BAD_ANSWERS["reaches outside: wide dtype"]
BAD_ANSWERS["reaches outside: wide dtype"] = offered(resized(dtype=4))


def read_often(x, times=100):
    for _ in range(times):  # what comes after an answer is noticed at the next
        (x + 1).sum().item()


def meet(mangle, use, slot=SLOT - 2):
    with native_client(mangle, slot=slot):
        x = torch.ones(3, device=f"mycelya:{slot}")
        with pytest.raises(ProtocolError) as caught:
            use(x)
        with pytest.raises(RemoteError):
            read_often(x)
        assert ops.state(slot) == "dead"
    return str(caught.value)


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_client_refuses_replies(name):
    text = meet(change(wire.REPLY, BAD_REPLIES[name]), read_often)
    assert "protocol violation" in text


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_client_refuses_answers_of_run(name):
    meet(change(wire.REPLY, BAD_ANSWERS[name]), torch.nonzero)


@pytest.mark.parametrize("answer", [(0,), (3, 1), (5, 1.0), (2, []), (7, 0)], ids=str)
def test_client_refuses_a_result_that_is_no_bool(answer):
    meet(change(wire.REPLY, rows(answer)), lambda x: x.equal(x))


def test_client_takes_replies_in_pieces_and_errors_at_the_limit():
    slot = SLOT - 2
    text = "x" * 65536
    error = wire.error(wire.Error(2**64 - 1, 2**64 - 1, 6, "a" * 255, "b" * 4096, text))
    one = struct.pack("<f", 7.0)

    def pieces(payload, correlation):
        data = (
            wire.frame(wire.REPLY_DATA, one[i : i + 1], correlation) for i in (1, 2, 3)
        )
        pong = wire.frame(wire.PONG)
        return reply(one[:1], total=4)(payload, correlation) + pong.join(data)

    for new, expected in ((pieces, None), (reply(error, 1), text)):
        with native_client(change(wire.REPLY, new), slot=slot):
            x = torch.ones((), device=f"mycelya:{slot}")
            if expected is None:
                assert x.item() == 7
            else:
                with pytest.raises(torch.OutOfMemoryError, match="x" * 100):
                    x.item()
            assert x.item() == 1
            del x  # before the slot has another machine
