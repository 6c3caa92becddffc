# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The wire format against an independent codec: what each side must accept.

What each side must refuse stands in test_wire_limits.py.
"""

import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mycelya_torch  # noqa: F401 - loads the library

sys.path.insert(0, str(Path(__file__).parent))
import wire_codec as wire
from wire_peers import (
    SLOT,
    PythonClient,
    contiguous,
    data_of,
    native_client,
    ops,
    tensor_on,
    view_of,
)

pytestmark = pytest.mark.fast
F32, I64 = torch.float32, torch.int64

# ---- the codec itself ----
u64 = st.integers(0, 2**64 - 1)
i64 = st.integers(-(2**63), 2**63 - 1)
ids = st.integers(1, 2**62 - 1)
f64 = st.floats(allow_nan=False)
dims = st.integers(0, 5).flatmap(
    lambda n: st.tuples(*[st.lists(i64, min_size=n, max_size=n).map(tuple)] * 2)
)
views = st.builds(
    lambda shape, rest: wire.View(rest[0], *shape, *rest[1:]),
    dims,
    st.tuples(st.integers(-128, 127), u64, i64, st.just(0), st.integers(0, 3)),
)
tensors = st.one_of(
    st.tuples(st.just("T"), views),
    st.just(("U",)),
    st.tuples(st.just("W"), st.integers(-128, 127), st.booleans()),
)
scalars = st.one_of(
    st.tuples(st.just("I"), i64),
    st.tuples(st.just("E"), f64),
    st.tuples(st.just("B"), st.booleans()),
    st.tuples(st.just("C"), f64, f64),
    st.sampled_from([("J",), ("D",)]),
)
values = st.one_of(
    tensors,
    scalars,
    st.sampled_from([("N",), ("V",), ("G",)]),
    st.tuples(st.just("S"), st.text(max_size=9)),
    st.tuples(st.just("i"), st.lists(i64, max_size=4).map(tuple)),
    st.tuples(st.just("d"), st.lists(f64, max_size=4).map(tuple)),
    st.tuples(st.just("b"), st.lists(st.booleans(), max_size=4).map(tuple)),
    st.tuples(st.just("L"), st.lists(tensors, max_size=3).map(tuple)),
    st.tuples(st.just("O"), st.lists(tensors | st.just(("N",)), max_size=3).map(tuple)),
    st.tuples(st.just("s"), st.lists(scalars, max_size=3).map(tuple)),
)
calls = st.builds(
    wire.Call,
    st.text(max_size=12),
    st.text(max_size=12),
    st.lists(values, max_size=5).map(tuple),
)
plain_records = st.one_of(
    st.tuples(st.sampled_from(["alloc", "resize"]), ids, u64),
    st.tuples(st.just("free"), st.lists(ids, max_size=5)),
    st.tuples(st.just("seed"), u64, u64),
    st.tuples(st.just("genstate"), u64, st.binary(max_size=9)),
    st.tuples(st.just("default"), st.integers(0, 255)),
)


@st.composite
def definitions(draw):
    """A definition, a call of it, and its end."""
    call = draw(calls)
    promises = draw(st.lists(st.none() | views, max_size=3))
    number = draw(u64)
    n = wire.count(wire.views(call.values)), wire.count(promises)
    fills = {"J": i64, "D": f64, "G": u64, "W": st.binary(min_size=16, max_size=16)}
    dyn = tuple(draw(fills[v[0]]) for v in wire.leaves(call.values) if v[0] in fills)
    used, fresh = (draw(st.lists(ids, min_size=k, max_size=k)) for k in n)
    exec_ = ("exec", number, used, dyn, fresh)
    return [("define", number, call, promises), exec_, ("drop", [number])]


@given(st.lists(plain_records.map(lambda r: [r]) | definitions(), max_size=5))
@settings(max_examples=100, deadline=None, database=None)
def test_codec_reads_what_it_writes(groups):
    records = [record for group in groups for record in group]
    data = wire.Records().encode(*records)
    assert wire.Records().decode(data) == records


@given(u64, u64, st.integers(0, 255), st.text(), st.text(), st.text())
@settings(max_examples=30, deadline=None, database=None)
def test_codec_reads_errors(serial, number, kind, op, arguments, text):
    error = wire.Error(serial, number, kind, op, arguments, text)
    assert wire.Get(wire.error(error)).error() == error


# ---- a native worker, driven by the codec ----
@pytest.fixture(scope="module")
def client():
    with PythonClient() as running:
        yield running
        assert running.farewell() == ""
    assert running.served == (1, "")  # the connection's end, no violation


@st.composite
def programs(draw):
    """Storages with any ids, written, resized, read in part, and freed."""
    steps = []
    for number in draw(st.lists(ids, min_size=1, max_size=4, unique=True)):
        n = draw(st.integers(0, 40))
        data = draw(st.binary(min_size=n, max_size=n))
        bigger = draw(st.none() | st.integers(0, 60))
        offset = draw(st.integers(0, n))
        stride = draw(st.integers(1, 3))
        size = (n - offset + stride - 1) // stride
        steps.append((number, data, bigger, offset, size, stride))
    return steps


@given(programs(), st.integers(1, 16))
@settings(max_examples=60, deadline=None, database=None)
def test_worker_keeps_what_the_codec_wrote(client, steps, chunk):
    for number, data, bigger, *_ in steps:
        client.do(("alloc", number, len(data)))
        view = wire.View(0, (len(data),), (1,), len(data))
        body = wire.upload(number, view, data[:chunk], len(data))
        client.send(wire.UPLOAD, body)
        for at in range(chunk, len(data), chunk):
            client.send(wire.DATA, data[at : at + chunk])
        if bigger is not None:
            client.do(("resize", number, bigger))
    for number, data, bigger, offset, size, stride in steps:
        n = len(data) if bigger is None else bigger
        view = wire.View(0, (min(n, len(data)),), (1,), n)
        assert client.read(number, view) == data[:n]
        view = wire.View(0, (size,), (stride,), n, offset)
        if offset + (size - 1) * stride < min(n, len(data)) or size == 0:
            assert client.read(number, view) == data[offset::stride][:size]
    client.do(("free", [number for number, *_ in steps]))
    client.sync()
    assert list(ops.worker_memory(client.handle))[:2] == [0, 0]


def sample(dtype, *sizes):
    numbers = torch.arange(torch.Size(sizes).numel()).view(sizes) + 1
    return numbers.to(dtype)


T = sample(F32, 2, 3)
SQUARE = sample(F32, 1, 1, 4, 4)
WORD = struct.Struct("<q8x").pack


def v(tensor, storage=0, **others):
    return "T", view_of(tensor, storage)._replace(**others)


CALLS = {
    "int": (("add.Tensor", v(T), v(T), ("I", 3)), [T], (), lambda: T + 3 * T),
    "dynamic int": (("add.Tensor", v(T), v(T), ("J",)), [T], (5,), lambda: 6 * T),
    "two": (
        ("mul.Tensor", v(T), v(T.t().contiguous().t(), 1)),
        [T, T.t().contiguous()],
        (),
        lambda: T * T,
    ),
    "scalar tensor": (
        ("mul.Tensor", v(T), ("W", 4, True)),
        [T],
        (WORD(7),),
        lambda: T * 7,
    ),
    "float": (("add.Scalar", v(T), ("E", 0.5), ("I", 1)), [T], (), lambda: T + 0.5),
    "dynamic": (
        ("pow.Tensor_Scalar", v(T), ("D",)),
        [T],
        (1.5,),
        lambda: T**1.5,
    ),
    "complex": (
        ("mul.Scalar", v(T.to(torch.complex64)), ("C", 0.0, 2.0)),
        [T.to(torch.complex64)],
        (),
        lambda: T * 2j,
    ),
    "bits": (
        ("add.Tensor", *[v((T * 1j).conj())] * 2, ("I", 1)),
        [T * 1j],
        (),
        lambda: (T * -2j).resolve_conj(),
    ),
    "ints": (
        ("sum.dim_IntList", v(T), ("i", (1,)), ("B", True), ("N",)),
        [T],
        (),
        lambda: T.sum(1, keepdim=True),
    ),
    "dtype": (("sum", v(T), ("I", 7)), [T], (), lambda: T.sum(dtype=torch.float64)),
    "doubles": (
        ("upsample_nearest1d.vec", v(SQUARE[0]), ("N",), ("d", (2.0,))),
        [SQUARE[0]],
        (),
        lambda: SQUARE[0].repeat_interleave(2, -1),
    ),
    "text": (
        ("gelu", v(T), ("S", "tanh")),
        [T],
        (),
        lambda: torch.nn.functional.gelu(T, approximate="tanh"),
    ),
    "list": (
        ("cat", ("L", (v(T), v(T), v(T[:1]))), ("I", 0)),
        [T],
        (),
        lambda: torch.cat([T, T, T[:1]]),
    ),
    "optionals": (
        ("index.Tensor", v(T), ("O", (("N",), v(sample(I64, 2), 1)))),
        [T, sample(I64, 2)],
        (),
        lambda: T[:, sample(I64, 2)],
    ),
    "device": (
        ("zeros", ("i", (2,)), ("I", 6), ("N",), ("V",), ("B", False)),
        [],
        (),
        lambda: torch.zeros(2),
    ),
    "generator": (
        ("bernoulli.p", v(T), ("E", 1.0), ("G",)),
        [T],
        (77,),
        lambda: torch.ones(2, 3),
    ),
    "scalars": (
        ("_foreach_add.ScalarList", ("L", (v(T),)), ("s", (("J",),))),
        [T],
        (4,),
        lambda: T + 4,
    ),
    "undefined": (
        (
            *("convolution_backward", v(SQUARE), v(SQUARE), v(SQUARE[:, :, :1, :1], 1)),
            *(("N",), ("i", (1, 1)), ("i", (0, 0)), ("i", (1, 1)), ("B", False)),
            *(("i", (0, 0)), ("I", 1), ("b", (True, False, False))),
        ),
        [SQUARE, SQUARE],
        (),
        lambda: SQUARE * SQUARE[0, 0, 0, 0],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_worker_computes_calls_of_the_codec(client, name):
    (op, *given_values), operands, dyn, expected = CALLS[name]
    base, overload = (*op.split("."), "")[:2]
    call = wire.Call(f"aten::{base}", overload, tuple(given_values))
    numbers = list(range(101, 101 + len(operands)))
    for number, operand in zip(numbers, operands, strict=True):
        client.do(("alloc", number, operand.untyped_storage().nbytes()))
        client.upload(number, operand.contiguous())
    result = expected()
    promise = contiguous(result.dtype, *result.shape)
    n = (
        len(getattr(torch.ops.aten, base).default._schema.returns)
        if not overload
        else 1
    )
    client.do(
        ("define", 1, call, [promise] + [None] * (n - 1)),
        ("exec", 1, numbers, dyn, [301]),
        ("exec", 1, numbers, dyn, [302]),
        ("drop", [1]),
    )
    first, second = client.read(301, promise), client.read(302, promise)
    assert (first, client.events) == (data_of(result), [])
    assert second == first
    # The same by RUN: only the worker says what the result looks like.
    data = client.ask_well(wire.run(call, numbers, dyn, 400, 8))
    results, changed = wire.Get(data).answer()
    assert changed == []
    kind, *rest = results[0]
    kind, number, view = rest[0][0] if kind == 2 else results[0]
    assert (kind, number) == (1, 400)
    assert view.sizes == tuple(result.shape)
    assert client.read(400, view) == first
    client.do(("free", [*numbers, 301, 302, 400]))
    client.sync()
    assert list(ops.worker_memory(client.handle))[:2] == [0, 0]


def test_views_are_read_as_the_codec_says(client):
    base = sample(torch.complex64, 4, 6)
    client.do(("alloc", 1, 192))
    client.upload(1, base)
    for view in (base.t(), base[1:, ::2], base.conj(), base[2, 3], base[4:], base.mH):
        assert client.read(1, view_of(view)) == data_of(view)
    imag = view_of(base.conj().imag)
    assert imag.bits == 2
    whole = tensor_on(base.untyped_storage(), imag)
    assert client.read(1, imag) == data_of(whole)
    client.do(("free", [1]))


def test_generators_and_default_dtype(client):
    generator = torch.Generator().manual_seed(3)
    client.do(("seed", 5, 3))
    state = client.ask_well(struct.pack("<BQ", wire.GETSTATE, 5))
    assert state == data_of(generator.get_state())
    client.do(("genstate", 6, state), ("genstate", 5, b""), ("default", 7))
    client.do(("default", 6))
    state_6 = client.ask_well(struct.pack("<BQ", wire.GETSTATE, 6))
    assert state_6 == state


def test_failures_spoil_results_and_pass(client):
    call = wire.Call("aten::mm", "", (v(T), v(T)))
    promise = contiguous(F32, 2, 2)
    before = len(client.events)
    client.do(
        ("alloc", 1, 24),
        ("define", 9, call, [promise]),
        ("exec", 9, [1], (), [2]),
        ("drop", [9]),
    )
    status, data = client.ask(wire.read(2, promise))
    failure = wire.Get(data).error()
    assert status == 1
    assert client.events[before:] == [failure]
    assert failure.op == "aten::mm"
    assert failure.arguments == "float32[2,3], float32[2,3]"
    status, data = client.ask(wire.run(call, [1], (), 50, 1))
    assert (status, wire.Get(data).error().serial) == (1, failure.serial + 1)
    client.upload(2, sample(F32, 2, 2))  # sound again
    assert client.read(2, promise) == data_of(sample(F32, 2, 2))
    client.do(("free", [1, 2]))


def test_control_ping_and_large_answers(client):
    assert client.ask(b"\x80", wire.CONTROL) == (0, b"\x80")
    client.send(wire.PING)
    assert client.receive() == (wire.PONG, 0, b"")
    n = 5 * wire.MAX_PAYLOAD // 2
    client.do(("alloc", 1, n), ("resize", 1, n + 1))
    client.do(("resize", 1, n))
    status, data = client.ask(wire.read(1, wire.View(0, (n,), (1,), n)))
    assert (status, len(data)) == (0, n)
    client.do(("free", [1]))


# ---- a native client, whose worker is the codec ----
@pytest.fixture(scope="module")
def worker():
    with native_client() as running:
        yield running
    assert running.problem is None
    assert running.frames[-1][0] == wire.BYE


@pytest.fixture(scope="module")
def device(worker):
    return torch.device("mycelya", SLOT)


@pytest.mark.critical
def test_client_trains_on_a_worker_of_the_codec(worker, device):
    def train(device):
        torch.manual_seed(1)
        x = torch.randn(8, 6).to(device)
        with torch.device("cpu"):
            layers = torch.nn.Linear(6, 5), torch.nn.GELU(), torch.nn.Linear(5, 1)
            model = torch.nn.Sequential(*layers)
        model.to(device)
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert train(device) == train("cpu")
    assert worker.problem is None


def test_client_sends_each_record_and_question(worker, device):
    x = torch.arange(12.0, device=device).view(3, 4)
    assert torch.equal(x.t()[1:].cpu(), torch.arange(12.0).view(3, 4).t()[1:])
    assert x.nonzero().shape == (11, 2)
    assert [part.sum().item() for part in x.split(2)] == [28.0, 38.0]
    assert torch.equal(torch.cat([x, x]).cpu()[3:], x.cpu())
    z = (x * 1j).conj()
    assert torch.equal(z.cpu(), (x.cpu() * -1j))
    y = torch.empty(0, device=device).resize_(5).fill_(2)
    assert y.tolist() == [2] * 5
    large = torch.arange(5e6)  # 20 MB: UPLOAD and DATA
    assert torch.equal(large.to(device)[-3:].cpu(), large[-3:])
    assert torch.equal(large.to(device).cpu(), large)  # REPLY and DATA
    with pytest.raises(IndexError, match="out of bounds"):
        x[torch.tensor([9], device=device)].cpu()
    torch.mycelya.synchronize(device)
    state = torch.mycelya.get_rng_state(device)
    torch.mycelya.set_rng_state(state, device)
    ops.seed_default(SLOT, 4)
    torch.set_default_dtype(torch.float64)
    try:
        half = torch.ones(1, dtype=torch.int64, device=device) / 2
        assert half.dtype == torch.float64
        assert half.item() == 0.5  # computed before this process changes back
    finally:
        torch.set_default_dtype(F32)
    (x + 1).sum().item()
    payload = torch.tensor([0x80], dtype=torch.uint8)
    assert ops.control(SLOT, payload, "control").tolist() == [0x80]
    assert worker.problem is None
    missing = set(wire.RECORDS) - set(worker.seen)
    assert missing <= {"drop"}, missing
    assert set(worker.seen["ask"]) == {wire.READ, wire.RUN, wire.SYNC, wire.GETSTATE}
    kinds = {kind for kind, _ in worker.frames}
    assert kinds >= {wire.OPS, wire.UPLOAD, wire.DATA, wire.ASK, wire.CONTROL}


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from([F32, I64, torch.bfloat16, torch.complex64, torch.bool]),
    st.data(),
)
@settings(max_examples=40, deadline=None, database=None)
def test_client_describes_any_view(worker, device, sizes, dtype, data):
    local = sample(dtype, *sizes)
    remote = local.to(device)
    for _ in range(data.draw(st.integers(0, 4))):
        dim = data.draw(st.integers(0, local.dim() - 1))
        start = data.draw(st.integers(0, local.shape[dim]))
        step = data.draw(st.integers(1, 3))
        index = (slice(None),) * dim + (slice(start, None, step),)
        other = data.draw(st.integers(0, local.dim() - 1))
        local = local[index].transpose(dim, other)
        remote = remote[index].transpose(dim, other)
    assert remote.stride() == local.stride()
    assert torch.equal(remote.cpu(), local)
    remote.logical_not_()
    assert torch.equal(remote.cpu(), local.logical_not_())
    assert worker.problem is None


def test_client_pings_a_silent_worker():
    with native_client(timeout=0.6, slot=SLOT - 1) as worker:
        x = torch.ones(3, device=f"mycelya:{SLOT - 1}")
        assert x.sum().item() == 3
        end = time.monotonic() + 10
        while (wire.PING, 0) not in worker.frames and time.monotonic() < end:
            time.sleep(0.02)
        assert x.sum().item() == 3
    assert (wire.PING, 0) in worker.frames
    assert worker.problem is None
