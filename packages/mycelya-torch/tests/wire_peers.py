# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""A client and a worker in Python, made of `wire_codec` and torch's CPU operators."""

import contextlib
import socket
import struct
import threading
from collections import defaultdict

import torch
import wire_codec as wire

NAMES = (
    *("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"),
    *("complex32", "complex64", "complex128", "bool"),
)
DTYPES = {n: getattr(torch, name) for n, name in enumerate(NAMES)}
DTYPES[15] = torch.bfloat16
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
KINDS = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError)
SLOT = 31  # the last device index: RemoteMachine counts from 0
ops = torch.ops.mycelya


def view_of(tensor, storage=0):
    return wire.View(
        NUMBERS[tensor.dtype],
        tuple(tensor.shape),
        tensor.stride(),
        tensor.untyped_storage().nbytes(),
        tensor.storage_offset(),
        storage,
        int(tensor.is_conj()) | int(tensor.is_neg()) << 1,
    )


def contiguous(dtype, *sizes, **others):
    """Return the view of a whole storage."""
    return view_of(torch.empty(sizes, dtype=dtype, device="cpu"))._replace(**others)


def tensor_on(storage, view):
    tensor = torch.empty(0, dtype=DTYPES[view.dtype], device="cpu")
    tensor.set_(storage, view.offset, view.sizes, view.strides)
    if view.bits & 1:
        tensor = torch._conj(tensor)
    return torch._neg_view(tensor) if view.bits & 2 else tensor


def data_of(tensor):
    """Return a tensor's elements as they go over the wire."""
    plain = tensor.resolve_conj().resolve_neg()
    packed = torch.empty(plain.shape, dtype=plain.dtype, device="cpu").copy_(plain)
    return bytes(packed.view(-1).view(torch.uint8).tolist())


def receive_frame(sock):
    """Return type, correlation and payload; None at the end."""
    head = b""
    while len(head) < 16:
        part = sock.recv(16 - len(head))
        if not part:
            return None
        head += part
    length, kind, flags, zero, correlation = wire.HEADER.unpack(head)
    assert (flags, zero) == (0, 0)
    assert length <= wire.MAX_PAYLOAD
    payload = bytearray()
    while len(payload) < length:
        part = sock.recv(length - len(payload))
        if not part:
            return None
        payload += part
    return kind, correlation, bytes(payload)


class PythonWorker(threading.Thread):
    """Decodes what the native client sends, and computes with torch.

    ``mangle`` may change each frame (its bytes) on the way out.
    """

    def __init__(self, sock, mangle=None):
        super().__init__(daemon=True)
        self.sock, self.mangle = sock, mangle or (lambda data: data)
        self.records, self.storages, self.bad = wire.Records(), {}, {}
        self.seen = defaultdict(list)  # records by name
        self.frames, self.raw, self.problem = [], [], None
        self.op_number = self.serial = 0
        self.pending = None  # id, view, bytes still to come, data

    def run(self):
        try:
            with torch.inference_mode(), torch.device("cpu"):
                while (got := receive_frame(self.sock)) is not None:
                    self.frames.append(got[:2])
                    self.raw.append(wire.frame(got[0], got[2], got[1]))
                    if got[0] == wire.BYE:
                        break
                    self.act(*got)
        except OSError:
            pass  # the client has left
        except BaseException as error:
            self.problem = error
        finally:
            self.sock.close()

    def send(self, kind, payload=b"", correlation=0):
        self.sock.sendall(self.mangle(wire.frame(kind, payload, correlation)))

    def act(self, kind, correlation, payload):
        assert (correlation != 0) == (kind in (wire.ASK, wire.CONTROL))
        assert self.pending is None or kind in (wire.DATA, wire.ACK, wire.PING)
        if kind == wire.OPS:
            for record in self.records.decode(payload):
                self.seen[record[0]].append(record[1:])
                with contextlib.suppress(AttributeError):
                    getattr(self, record[0])(*record[1:])
        elif kind == wire.UPLOAD:
            get = wire.Get(payload)
            number, view, total = get.one("Q"), get.view(), get.one("Q")
            self.pending = [number, view, total, b""]
            self.more(get.bytes(get.left()))
        elif kind == wire.DATA:
            self.more(payload)
        elif kind == wire.ASK:
            self.ask(wire.Get(payload), correlation)
        elif kind == wire.CONTROL:
            self.reply(correlation, payload)  # an echo
        elif kind == wire.PING:
            self.send(wire.PONG)
        else:
            assert kind == wire.ACK, kind

    def more(self, data):
        self.pending[3] += data
        number, view, total, whole = self.pending
        assert len(whole) <= total
        if len(whole) < total:
            return
        self.pending = None
        target = tensor_on(self.storages[number], view)
        assert total == target.numel() * target.itemsize
        if total:
            source = torch.frombuffer(bytearray(whole), dtype=target.dtype)
            target.copy_(source.view(target.shape))

    def ask(self, get, correlation):
        question = get.one("B")
        self.seen["ask"].append(question)
        if question == wire.READ:
            number, view = get.one("Q"), get.view()
            get.end()
            if number in self.bad:
                return self.fail(correlation, self.bad[number])
            data = data_of(tensor_on(self.storages[number], view))
            return self.reply(correlation, data)
        if question == wire.SYNC:
            get.end()
            return self.reply(correlation, struct.pack("<Q", 0))
        if question == wire.GETSTATE:
            get.one("Q")
            get.end()
            return self.reply(correlation, b"\1" * 5056)
        try:
            self.reply(correlation, self.answer(*get.run()))
        except KINDS as error:
            self.fail(correlation, self.failure("aten::op", error))

    def reply(self, correlation, data, status=0, chunk=1 << 20):
        head = struct.pack("<BQ", status, len(data))
        self.send(wire.REPLY, head + data[:chunk], correlation)
        for at in range(chunk, len(data), chunk):
            self.send(wire.REPLY_DATA, data[at : at + chunk], correlation)

    def fail(self, correlation, failure):
        self.reply(correlation, wire.error(failure), 1)

    def failure(self, op, error):
        self.serial += 1
        kind = next((i for i, one in enumerate(KINDS) if type(error) is one), 0)
        return wire.Error(self.serial, self.op_number, kind, op, "", str(error))

    # ---- records ----
    def alloc(self, number, nbytes):
        assert number not in self.storages
        self.storages[number] = torch.UntypedStorage(nbytes)

    def free(self, numbers):
        for number in numbers:
            del self.storages[number]
            self.bad.pop(number, None)

    def resize(self, number, nbytes):
        self.storages[number].resize_(nbytes)

    def exec(self, number, ids, dyn, fresh):
        call, promises = self.records.known[number]
        self.op_number += 1
        failure = next((self.bad[i] for i in ids if i in self.bad), None)
        try:
            results = () if failure else self.compute(call, ids, dyn)[0]
        except KINDS as error:
            failure = self.failure(call.op, error)
            self.send(wire.EVENT, wire.error(failure))
        if failure is not None:
            for one in fresh:
                self.storages[one], self.bad[one] = torch.UntypedStorage(0), failure
            return
        flat = []
        for item in results:
            flat += item if isinstance(item, (list, tuple)) else [item]
        flat = [item for item in flat if item is None or torch.is_tensor(item)]
        assert len(flat) == len(promises)
        for result, promise in zip(flat, promises, strict=True):
            if promise is None:
                continue
            one = fresh[promise.storage]
            if one not in self.storages:
                self.storages[one] = torch.UntypedStorage(promise.nbytes)
            assert tuple(result.shape) == promise.sizes, call
            assert NUMBERS[result.dtype] == promise.dtype, call
            tensor_on(self.storages[one], promise).copy_(result)

    # ---- calls ----
    def compute(self, call, ids, dyn):
        """Run a call; return the results and its tensors."""
        dyn, tensors = list(dyn), []
        space, name = call.op.split("::")
        op = getattr(getattr(torch.ops, space), name)
        op = getattr(op, call.overload or "default")
        arguments = op._schema.arguments
        assert len(arguments) == len(call.values)
        values = [self.argument(v, ids, dyn, tensors) for v in call.values]
        assert not dyn
        positional, named = [], {}
        for argument, value in zip(arguments, values, strict=True):
            if argument.kwarg_only:
                named[argument.name] = self.choice(argument, value)
            else:
                positional.append(self.choice(argument, value))
        results = op(*positional, **named)
        if not isinstance(results, tuple) or len(op._schema.returns) == 1:
            results = (results,) if op._schema.returns else ()
        return results, tensors

    @staticmethod
    def choice(argument, value):
        """Undo that dtypes, layouts and memory formats are ints on the wire."""
        kind = str(argument.type.kind())
        what = f"{argument.real_type} {kind}"
        if isinstance(value, int) and not isinstance(value, bool):
            if "ScalarType" in what:
                return DTYPES[value]
            if "Layout" in what:
                return torch.strided
            if "MemoryFormat" in what:
                known = (torch.contiguous_format, torch.preserve_format)
                return (*known, torch.channels_last, torch.channels_last_3d)[value]
        return value

    def argument(self, value, ids, dyn, tensors):
        tag, *rest = value
        if tag == "G":  # its numbers are not to be predicted here
            dyn.pop(0)
        if tag in "NUG":
            return None
        if tag == "T":
            tensors.append(tensor_on(self.storages[ids[rest[0].storage]], rest[0]))
            return tensors[-1]
        if tag == "W":
            raw = torch.frombuffer(bytearray(dyn.pop(0)), dtype=DTYPES[rest[0]])
            return raw[0].item() if rest[1] else raw[0].clone()
        if tag in "JD":
            return dyn.pop(0)
        if tag in "LOs":
            return [self.argument(item, ids, dyn, tensors) for item in rest[0]]
        if tag in wire.LISTS:
            return list(rest[0])
        if tag == "V":
            return torch.device("cpu")
        return complex(*rest) if tag == "C" else rest[0]

    def answer(self, call, ids, dyn, first, offered):
        """Run a call of RUN, and write what came of it."""
        results, tensors = self.compute(call, ids, dyn)
        before = [view_of(t) for t in tensors]
        places = {self.storages[i].data_ptr(): i for i in ids}
        made = []

        def one(item):
            if item is None:
                return (0,)
            if isinstance(item, (list, tuple)):
                return 2, [one(part) for part in item]
            if isinstance(item, bool):
                return 4, item
            if isinstance(item, int):
                return 3, item
            if isinstance(item, float):
                return 5, item
            for index, tensor in enumerate(tensors):
                if item is tensor:
                    return 7, index
            number = places.get(item.untyped_storage().data_ptr() or -1)
            if number is None:
                number = first + len(made)
                made.append(number)
                self.storages[number] = item.untyped_storage()
                places[item.untyped_storage().data_ptr() or -1] = number
            return 1, number, view_of(item)

        found = [one(item) for item in results]
        assert len(made) <= offered
        now = [view_of(t) for t in tensors]
        pairs = enumerate(zip(before, now, strict=True))
        return wire.answer(found, [(i, b) for i, (a, b) in pairs if a != b])


class PythonClient:
    """Speaks to the native worker, which serves in a thread of this process."""

    def __init__(self, max_bytes=1 << 30):
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(20)
        self.records, self.events, self.correlation = wire.Records(), [], 0
        self.served = None
        arguments = (theirs.detach(), "cpu", True, False, max_bytes, 0.0)
        self.handle = ops.worker_new(*arguments)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        while True:
            event, number, payload = ops.worker_serve(self.handle)
            if event != 2:
                self.served = event, bytes(payload.tolist()).decode()
                break
            ops.worker_reply(self.handle, number, 0, payload)
        ops.worker_close(self.handle)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()
        self.thread.join(20)
        assert not self.thread.is_alive()

    def send(self, kind, payload=b"", correlation=0, **header):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.sock.sendall(wire.frame(kind, payload, correlation, **header))

    def do(self, *records):
        self.send(wire.OPS, self.records.encode(*records))

    def receive(self):
        with contextlib.suppress(ConnectionResetError):
            return receive_frame(self.sock)

    def ask(self, payload, kind=wire.ASK):
        """Return status and data of the answer; EVENTs are kept."""
        self.correlation += 1
        self.send(kind, payload, self.correlation)
        data, total, status = b"", None, None
        while total is None or len(data) < total:
            got = self.receive()
            assert got is not None, self.served or self.events
            what, correlation, payload = got
            if what == wire.EVENT:
                get = wire.Get(payload)
                self.events.append(get.error())
                get.end()
                continue
            if what in (wire.PONG, wire.WORKER_ACK):
                continue
            assert correlation == self.correlation
            if total is None:
                assert what == wire.REPLY
                status, total = struct.unpack_from("<BQ", payload)
                payload = payload[9:]
            else:
                assert what == wire.REPLY_DATA
                assert payload
            data += payload
        assert len(data) == total
        return status, data

    def ask_well(self, payload):
        status, data = self.ask(payload)
        assert status == 0, wire.Get(data).error()
        return data

    def sync(self):
        return self.ask_well(bytes([wire.SYNC]))

    def read(self, number, view):
        return self.ask_well(wire.read(number, view))

    def upload(self, number, tensor):
        data = data_of(tensor)
        self.send(wire.UPLOAD, wire.upload(number, view_of(tensor), data))

    def farewell(self):
        """Return the last EVENT's text before the worker closes; "" if none."""
        text = ""
        with contextlib.suppress(BrokenPipeError, OSError):
            self.sock.shutdown(socket.SHUT_WR)
        while (got := self.receive()) is not None:
            if got[0] == wire.EVENT:
                text = wire.Get(got[2]).error().text
        self.thread.join(20)
        return text


@contextlib.contextmanager
def native_client(mangle=None, timeout=20.0, slot=SLOT):
    """The library's client, connected to a `PythonWorker`."""
    ours, theirs = socket.socketpair()
    worker = PythonWorker(theirs, mangle)
    ops.open(slot, f"wire-{slot}", timeout, 20.0, 1 << 26, True, False)
    ops.connect(slot, ours.detach(), False, 0)
    worker.start()
    try:
        yield worker
    finally:
        ops.stop(slot, 5.0)
        worker.join(20)
        assert not worker.is_alive()
