# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every limit that the worker checks, from both sides: the last that fits, and on."""

import re
import struct
import sys
from pathlib import Path

import pytest
import torch

import mycelya_torch  # noqa: F401 - loads the library

sys.path.insert(0, str(Path(__file__).parent))
import wire_codec as wire
from wire_peers import PythonClient, contiguous, data_of, ops

pytestmark = pytest.mark.fast

F32 = torch.float32
FOUR = contiguous(F32, 4)  # the whole of storage 1
V = ("T", FOUR)
SIZES = [2**62, 4], [2**31, 2**31, 2**31], [2**63 - 1]


def define(op, *values, overload="", results=(None,), number=1):
    call = wire.Call(op if "::" in op else "aten::" + op, overload, values)
    return [("define", number, call, list(results))]


ADD = define("add", V, V, ("J",), overload="Tensor", results=[FOUR])
MUL = wire.Call("aten::mul", "Tensor", (V, V))


def resized(**others):
    return FOUR._replace(**others)


BAD_VIEWS = {
    "unknown dtype: -1": resized(dtype=-1),
    "unknown dtype: QInt8": resized(dtype=12),
    "unknown dtype: 127": resized(dtype=127),
    "unknown bits": resized(bits=4),
    "only complex views are conjugated": resized(bits=1),
    "65 dimensions": resized(sizes=(1,) * 65, strides=(1,) * 65),
    "a negative offset": resized(offset=-1),
    "a negative size or stride: size": resized(sizes=(-1,)),
    "a negative size or stride: stride": resized(strides=(-1,)),
    "reaches outside: size": resized(sizes=(5,)),
    "reaches outside: stride": resized(strides=(2,)),
    "reaches outside: offset": resized(offset=1),
    "reaches outside: 15 bytes": resized(nbytes=15),
    "reaches outside: wide dtype": resized(dtype=4),
    "storage of 274877906945 bytes": resized(nbytes=2**38 + 1),
    "has 16 bytes, not 17": resized(nbytes=17),
    **{
        f"a view too large: {n}": resized(sizes=tuple(s), strides=(1,) * len(s))
        for n, s in enumerate(SIZES)
    },
    "a view of too many elements": resized(sizes=(2**36 + 1,), strides=(0,)),
    "a view too large: stride": resized(sizes=(3,), strides=(2**62,)),
    "a view too large: offset": resized(offset=2**63 - 1),
}
GOOD_VIEWS = [
    FOUR,
    resized(bits=2),
    resized(dtype=9, sizes=(2,), bits=3),
    resized(sizes=(1,) * 64, strides=(2**62,) * 64),
    resized(sizes=(0, 2**40), strides=(2**40, 1), offset=4),
    resized(offset=3, sizes=(), strides=()),
    resized(sizes=(3, 2), strides=(1, 1)),
    resized(dtype=11, sizes=(16,)),
    resized(nbytes=7, sizes=(1,)),
]

# Each list of records or frame, and what the worker says about it.
BAD_RECORDS = {
    "unknown record 0": b"\0",
    "unknown record 10": b"\x0a",
    "unknown record 16": b"\x10",
    "unknown record 17": b"\x11",
    "unknown record 255": b"\xff",
    "no storage 99": [("free", [99])],
    "no storage 98": [("resize", 98, 4)],
    "no storage 1": [("free", [1, 1])],
    "storage 1 exists already": [("alloc", 1, 4)],
    "impossible id": b"\1\2\4",
    "impossible id: 2**62": [("alloc", 2**62, 4)],
    "a storage of 274877906945 bytes": [("alloc", 2, 2**38 + 1)],
    "a storage of 274877906945 bytes: resize": [("resize", 1, 2**38 + 1)],
    "no signature 7": [("drop", [7])],
    "no signature 8": b"\5\x08",
    "no signature: the largest": b"\5" + wire.var(2**64 - 1),
    "signature 1 exists already": [*ADD, *ADD],
    "signature 18446744073709551615 exists": define("relu", V, number=2**64 - 1),
    "too short: alloc": b"\1",
    "too short: dyn": wire.Records().encode(*ADD) + b"\5\1\0\0\0\0",
    "too short: seed": b"\6\0abc",
    "a number over 64 bits": b"\1\0" + b"\xff" * 10,
    "a number over 64 bits: 2": b"\1\0" + b"\xff" * 9 + b"\2",
    "no such default dtype": [("default", 4)],
    "unknown operator": define("no_such_op", V),
    "unknown operator aten::add.Tenso": define("add", V, V, ("J",), overload="Tenso"),
    "operator's name is too long": define("a" * 256, V),
    "takes 1 arguments, not 2": define("relu", V, V),
    "of kind 'I', the schema says Tensor": define("relu", ("I", 1)),
    "of kind 'L', the schema says Tensor": define("relu", ("L", (V,))),
    "of kind 'E', the schema says int": define("cat", ("L", (V,)), ("E", 1.0)),
    "of kind 'N', the schema says Tensor": define("relu", ("N",)),
    "of kind 'G'": define("relu", ("G",)),
    "of kind 'O'": define("cat", ("O", (V,)), ("I", 0)),
    "of kind 'S'": define("cat", ("L", (V,)), ("S", "0")),
    "of kind 'd'": define("view", V, ("d", (1.0,))),
    "of kind '~'": wire.Records().encode(*define("relu", ("N",))).replace(b"N", b"~"),
    "1 bytes too many: values": b"values",
    "a list of 1048577 items": b"list",
    "a bad scalar tensor": define("mul", V, ("W", 12, False), overload="Tensor"),
    "argument dtype of aten::sum is 12": define("sum", V, ("I", 12)),
    "with 1 results, not 2": define("relu", V, results=[None, None]),
    "fresh storages are counted": define("relu", V, results=[resized(storage=1)]),
    "storages of a call are counted": define("relu", ("T", resized(storage=1))),
    "a storage is made twice": [
        *define("aminmax", V, ("N",), ("B", False), results=[
            contiguous(F32), contiguous(F32, storage=1)]),
        ("exec", 1, [1], (), [5, 5]),
    ],
    "storage 1 exists already: result": [*ADD, ("exec", 1, [1], (1,), [1])],
    "no storage 33": [*ADD, ("exec", 1, [33], (1,), [2])],
    "storage 2 has 15 bytes, not 16": [
        ("alloc", 2, 15), *ADD, ("exec", 1, [2], (1,), [3]),
    ],
}  # fmt: skip
# What the arguments of an operator can be: plain data; words that choose a way to
# compute, or stand in a message; and what the wire has no values for.
PLAIN = {"Tensor", "int", "bool", "float", "number", "Device", "Generator", "str"}
WORDS = """
    UPLO a activation algorithm api_name approximate assert_msg b driver equation
    indexing interpolation mode norm ord p pad_mode padding padding_side reduce
    rounding_mode side
"""
OBJECTS = {"Storage", "Stream", "__torch__.torch.classes.rnn.CellParamsBase"}
FORBIDDEN = {
    "aten::from_file": "S",
    "aten::_pin_memory": "T",
    "aten::pin_memory": "T",
    "aten::set_data": "T",
    "aten::record_stream": "T",
    "aten::_print": "S",
    "aten::_assert_async": "T",
    "aten::requires_grad_": "T",
    "mycelya::stop": "I",
    "mycelya::open": "I",
    "prim::is_cuda": "T",
    "profiler::_record_function_enter": "S",
    "inductor::_alloc_from_pool": "T",
    "_c10d_functional::wait_tensor": "T",
}


def refusal(kind, payload=b"", correlation=0, **header):
    """Send one frame, or records; return the worker's last words."""
    with PythonClient(max_bytes=1 << 20) as client:
        client.do(("alloc", 1, 16))
        client.sync()
        if isinstance(payload, list):
            payload = client.records.encode(*payload)
        client.send(kind, payload, correlation, **header)
        text = client.farewell()
    assert client.served == ((3, text) if text else (1, ""))
    return text


def refused(text, name):
    """Check what the worker said; after ": " a name tells the case."""
    assert text.startswith("protocol violation: ")
    expected = name if "aten::" in name else name.partition(":")[0]
    assert any(part in text for part in expected.split("|")), text


@pytest.mark.parametrize("name", BAD_VIEWS)
@pytest.mark.parametrize("place", ["read", "upload", "define", "run"])
def test_worker_refuses_views(name, place):
    view = BAD_VIEWS[name]
    if place == "read":
        text = refusal(wire.ASK, wire.read(1, view), 1)
    elif place == "upload":
        size = {12: 1, 4: 8}.get(view.dtype, 4)
        total = size * max(0, torch.Size(view.sizes).numel()) % 2**64
        if name.startswith("a view too large"):
            total = 2**64 - 1
        text = refusal(wire.UPLOAD, wire.upload(1, view, b"", total))
    elif place == "define":
        relu = define("relu", ("T", view), results=[FOUR])
        records = [*relu, ("exec", 1, [1], (), [2])]
        text = refusal(wire.OPS, records)
    else:
        call = wire.Call("aten::relu", "", (("T", view),))
        text = refusal(wire.ASK, wire.run(call, [1], (), 2, 1), 1)
    refused(text, name)


@pytest.mark.parametrize("name", sorted({*BAD_VIEWS} - {"has 16 bytes, not 17"}))
def test_worker_refuses_promised_views(name):
    relu = define("relu", V, results=[BAD_VIEWS[name]])
    refused(refusal(wire.OPS, relu), name)


def test_worker_takes_a_promise_of_more_bytes_than_the_result_needs():
    assert refusal(wire.OPS, define("relu", V, results=[resized(nbytes=17)])) == ""


def test_worker_takes_views_at_the_limits():
    with PythonClient() as client:
        client.do(("alloc", 1, 16), ("alloc", 2**62 - 1, 16), ("free", [2**62 - 1]))
        for view in GOOD_VIEWS:
            size = 8 if view.dtype == 9 else 1 if view.dtype == 11 else 4
            n = size * torch.Size(view.sizes).numel()
            assert len(client.read(1, view)) == n
            client.send(wire.UPLOAD, wire.upload(1, view, b"\0" * n))
        many = "T", resized(sizes=(2**36,), strides=(0,))
        client.do(*define("relu", many))
        client.sync()
        # What overlaps itself can't be written; that is an error of the storage.
        assert client.farewell() == ""
    assert client.served[0] == 1


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_worker_refuses_records(name):
    records = BAD_RECORDS[name]
    if records == b"list":
        values = V, ("i", (0,)), ("B", False), ("N",)
        records = define("sum", *values, overload="dim_IntList")
        body = wire.Records().encode(*records)
        records = body.replace(b"i\1\0\0\0", b"i" + struct.pack("<I", 2**20 + 1))
    if records == b"values":
        ((_, _, call, _),) = define("relu", V)
        body = wire.call(call)
        n = struct.pack("<I", len(wire.value(V)))
        more = struct.pack("<I", len(wire.value(V)) + 1)
        body = body.replace(n, more) + b"N\0\0"
        records = b"\4\1" + struct.pack("<I", len(body)) + body
    refused(refusal(wire.OPS, records), name)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_worker_refuses_operators(name):
    value = {"S": ("S", "x"), "T": V, "I": ("I", 0)}[FORBIDDEN[name]]
    found = torch._C._jit_get_schemas_for_operator(name)
    overload = found[0].overload_name if found else ""
    n = len(found[0].arguments) if found else 1
    record = define(name, *[value] * n, overload=overload)
    text = refusal(wire.OPS, record)
    refused(text, "is not allowed|unknown operator")
    if name.startswith("aten"):
        assert "is not allowed" in text


def nature(argument):
    """Return what a schema's argument is, in a list or not, optional or not."""
    return re.findall(r"[\w.]+", str(argument.type))[-1]


def every_operator():
    for full in torch._C._dispatch_get_all_op_names():
        name, _, overload = full.partition(".")
        yield name, overload, torch._C._get_schema(name, overload).arguments


def test_worker_forbids_every_operator_that_reaches_beyond_tensors():
    """An operator is refused by its name, or its arguments are plain data."""
    forbidden, allowed = set(), set()
    for name, overload, arguments in every_operator():
        body = wire.call(wire.Call(name, overload, ()))
        text = refusal(wire.OPS, b"\4\1" + struct.pack("<I", len(body)) + body)
        if "is not allowed" in text:
            forbidden.add(name)
            continue
        refused(text, "arguments, not 0|too short")
        allowed.add(name)
        assert name.partition("::")[0] in ("aten", "prims", "torchvision")
        words = {one.name for one in arguments if nature(one) == "str"}
        assert words <= {*WORDS.split()}, (name, overload)
        natures = {nature(one) for one in arguments}
        assert natures <= PLAIN | OBJECTS, (name, overload)
    assert {name for name in FORBIDDEN if name.startswith("aten")} <= forbidden
    assert {"aten::add", "prims::sum"} <= allowed
    assert not forbidden & allowed


def test_worker_has_no_values_for_objects():
    """Storages, streams and objects of C++ classes: whatever is given for them."""
    before = {"Tensor": V, "List[Tensor]": ("L", (V,))}
    values = (
        V,
        ("I", 1),
        ("S", "x"),
        ("N",),
        ("U",),
        ("V",),
        ("G",),
        ("L", ()),
        ("L", (V,)),
    )
    tried = set()
    for name, overload, arguments in every_operator():
        place = next((n for n, a in enumerate(arguments) if nature(a) in OBJECTS), None)
        if place is None or not name.startswith(("aten::", "prims::")):
            continue
        tried.add(nature(arguments[place]))
        for value in values:
            given = [before[str(one.type)] for one in arguments[:place]]
            given += [value] * (len(arguments) - place)
            text = refusal(wire.OPS, define(name, *given, overload=overload))
            refused(text, f"argument {arguments[place].name} of {name}|is not allowed")
    assert tried == OBJECTS


@pytest.mark.parametrize(
    "name", ["_reshape_alias", "_reshape_alias_copy", "as_strided", "as_strided_copy"]
)
def test_worker_reads_nothing_outside_a_storage(name):
    """Operators that make views by themselves are no way around the checks."""
    schema = torch._C._get_schema("aten::" + name, "")
    values = V, ("i", (64,)), ("i", (1,)), ("N",)
    call = wire.Call("aten::" + name, "", values[: len(schema.arguments)])
    promise = contiguous(F32, 64)
    with PythonClient() as client:
        client.do(("alloc", 1, 16), ("define", 1, call, [promise]))
        client.do(("exec", 1, [1], (), [2]))
        client.send(wire.ASK, wire.read(2, promise), 1)
        kinds = {}
        while (got := client.receive()) is not None:
            kinds[got[0]] = got[2]
            if got[0] == wire.REPLY:
                break
    if wire.REPLY in kinds:
        assert kinds[wire.REPLY][0] == 1, "the worker's memory came"
    assert wire.EVENT in kinds


DATA = data_of(torch.zeros(4))
UPLOAD = wire.upload(1, FOUR, DATA[:8], 16)
OTHER = {
    "unknown frame 0": (0,),
    "unknown frame 9": (9,),
    "unknown frame 16": (16,),
    "unknown frame 255": (255,),
    "a frame has reserved bits set: flags": (wire.OPS, b"", 0, 1),
    "a frame has reserved bits set: zero": (wire.OPS, b"", 0, 0, 1),
    "a frame of 16777217 bytes": (wire.OPS, b"", 0, 0, 0, wire.MAX_PAYLOAD + 1),
    "a frame of 4294967295 bytes": (wire.OPS, b"", 0, 0, 0, 2**32 - 1),
    "a wrong correlation number: 1": (wire.ASK, b"\3"),
    "a wrong correlation number: 2": (wire.CONTROL, b"\x80"),
    "a wrong correlation number: 3": (wire.OPS, b"", 1),
    "a wrong correlation number: 4": (wire.BYE, b"", 1),
    "unknown question 0": (wire.ASK, b"\0", 1),
    "unknown question 5": (wire.ASK, b"\5", 1),
    "too short: question": (wire.ASK, b"", 1),
    "1 bytes too many: sync": (wire.ASK, b"\3\0", 1),
    "1 bytes too many: read": (wire.ASK, wire.read(1, FOUR) + b"\0", 1),
    "1 bytes too many: state": (wire.ASK, b"\4" + b"\0" * 9, 1),
    "1 bytes too many: run": (wire.ASK, wire.run(MUL, [1], (), 9, 9) + b"\0", 1),
    "no storage 5": (wire.ASK, wire.read(5, FOUR), 1),
    "no storage 6": (wire.UPLOAD, wire.upload(6, FOUR, DATA)),
    "no storage 7": (wire.ASK, wire.run(MUL, [7], (), 9, 9), 1),
    "with 1 storages, not 2": (wire.ASK, wire.run(MUL, [1, 1], (), 9, 9), 1),
    "impossible ids: 0": (wire.ASK, wire.run(MUL, [1], (), 0, 9), 1),
    "impossible ids: last": (wire.ASK, wire.run(MUL, [1], (), 2**62, 9), 1),
    "impossible ids: count": (wire.ASK, wire.run(MUL, [1], (), 9, 2**24 + 1), 1),
    "storage 1 exists already": (wire.ASK, wire.run(MUL, [1], (), 1, 1), 1),
    "1 bytes too many: bye": (wire.BYE, b"\0"),
    "1 bytes too many: ping": (wire.PING, b"\0"),
    "too short: ack": (wire.ACK, b"\0" * 7),
    "1 bytes too many: ack": (wire.ACK, b"\0" * 9),
    "acknowledged that were not sent": (wire.ACK, struct.pack("<Q", 2)),
    "an upload of 12 bytes into 16": (wire.UPLOAD, wire.upload(1, FOUR, DATA[:12])),
    "an upload has more data": (wire.UPLOAD, wire.upload(1, FOUR, DATA + b"\0", 16)),
    "data without an upload": (wire.DATA, b"\0"),
    "too short: upload": (wire.UPLOAD, b"\1"),
}


@pytest.mark.parametrize("name", OTHER)
def test_worker_refuses_frames(name):
    frame = OTHER[name]
    header = dict(zip(("flags", "zero", "length"), frame[3:], strict=False))
    refused(refusal(*frame[:3], **header), name)


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ((wire.OPS, b""), "the rest of an upload is missing"),
        ((wire.ASK, b"\3", 1), "the rest of an upload is missing"),
        ((wire.BYE,), "the rest of an upload is missing"),
        ((wire.UPLOAD, UPLOAD), "the rest of an upload is missing"),
        ((wire.DATA, b""), "empty data"),
        ((wire.DATA, b"\0" * 9), "more data than it said"),
    ],
)
def test_worker_refuses_what_interrupts_an_upload(frame, expected):
    with PythonClient() as client:
        client.do(("alloc", 1, 16))
        client.send(wire.UPLOAD, UPLOAD)
        client.send(wire.PING)
        client.send(*frame)
        refused(client.farewell(), expected)


def test_worker_takes_a_frame_of_the_largest_size():
    fixed = len(wire.upload(1, FOUR, b""))
    n = wire.MAX_PAYLOAD - fixed
    with PythonClient() as client:
        client.do(("alloc", 1, n))
        view = wire.View(0, (n,), (1,), n)
        client.send(wire.UPLOAD, wire.upload(1, view, b"\7" * n))
        assert client.read(1, view) == b"\7" * n
        client.send(wire.OPS, b"\2\0" * (wire.MAX_PAYLOAD // 2))
        client.sync()


def test_worker_stays_below_its_limit():
    with PythonClient(max_bytes=1000) as client:
        client.do(("alloc", 1, 1000), ("alloc", 2, 1), ("alloc", 3, 2**38))
        client.sync()
        assert [event.kind for event in client.events] == [6, 6]
        assert list(ops.worker_memory(client.handle))[:2] == [3, 1000]
        client.do(("free", [1]), ("resize", 3, 2**38))
        client.sync()
        assert list(ops.worker_memory(client.handle))[:2] == [2, 0]
