# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The wire page of csrc/mycelya/MycelyaWire.h once more, from outside: both ways.

Values are tuples whose first item is the tag. Strict: what is left over, and what
the page doesn't name, is an error.
"""

import struct
from typing import NamedTuple

HEADER = struct.Struct("<IBBHQ")
MAX_PAYLOAD = 16 << 20
OPS, UPLOAD, DATA, ASK, CONTROL, ACK, BYE, PING = range(1, 9)
REPLY, REPLY_DATA, EVENT, WORKER_ACK, PONG = range(16, 21)
UNCOUNTED = (ACK, PING, WORKER_ACK, PONG)
READ, RUN, SYNC, GETSTATE = range(1, 5)
RECORDS = ("alloc", "free", "resize", "define", "exec", "seed", "genstate", "drop")
RECORDS = (*RECORDS, "default")
LISTS = {"i": "q", "d": "d", "b": "?"}
SLOTS = {"J": "q", "D": "d", "G": "Q", "W": "16s"}  # what `dyn` fills
PLAIN = {3: "q", 4: "?", 5: "d", 6: "dd"}  # results that are no tensors


class View(NamedTuple):
    """A strided view of one storage; ``dtype`` is c10's number."""

    dtype: int
    sizes: tuple
    strides: tuple
    nbytes: int
    offset: int = 0
    storage: int = 0
    bits: int = 0


class Error(NamedTuple):
    serial: int
    op_number: int
    kind: int
    op: str
    arguments: str
    text: str


class Call(NamedTuple):
    """Operator, overload, and a value for each argument."""

    op: str
    overload: str
    values: tuple


def frame(kind, payload=b"", correlation=0, flags=0, zero=0, length=None):
    length = len(payload) if length is None else length
    return HEADER.pack(length, kind, flags, zero, correlation) + payload


def var(number):
    out = bytearray()
    while number >= 128:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def text(value, size):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<H" if size == 16 else "<I", len(data)) + data


def view(v):
    head = struct.pack("<bBHQqB", v[0], v.bits, v.storage, v[3], v[4], len(v.sizes))
    return head + struct.pack(f"<{2 * len(v.sizes)}q", *v.sizes, *v.strides)


def value(item):
    tag, *rest = item
    out = tag.encode()
    if tag in "LOs":
        out += struct.pack("<I", len(rest[0])) + b"".join(map(value, rest[0]))
    elif tag in LISTS:
        out += struct.pack(f"<I{len(rest[0])}{LISTS[tag]}", len(rest[0]), *rest[0])
    elif tag == "T":
        out += view(rest[0])
    elif tag == "S":
        out += text(rest[0], 32)
    else:
        shape = {"I": "q", "E": "d", "B": "?", "C": "dd", "W": "b?"}.get(tag, "")
        out += struct.pack("<" + shape, *rest)
    return out


def call(c):
    values = b"".join(map(value, c.values))
    head = text(c.op, 16) + text(c.overload, 16) + struct.pack("<H", len(c.values))
    return head + text(values, 32)


def leaves(values):
    """Return the values, lists of tensors and scalars opened."""
    for item in values:
        yield from leaves(item[1]) if item[0] in "LOs" else (item,)


def slots(values):
    return "<" + "".join(SLOTS.get(item[0], "") for item in leaves(values))


def count(views):
    return len({v.storage for v in views if v is not None})


def views(values):
    return [item[1] for item in leaves(values) if item[0] == "T"]


def error(e):
    head = struct.pack("<QQB", e.serial, e.op_number, e.kind)
    return head + text(e.op, 16) + text(e.arguments, 16) + text(e.text, 32)


def result(item):
    kind, *rest = item
    out = bytes([kind])
    if kind == 1:
        return out + struct.pack("<Q", rest[0]) + view(rest[1])
    if kind == 2:
        return out + struct.pack("<I", len(rest[0])) + b"".join(map(result, rest[0]))
    return out + struct.pack("<" + {7: "H", **PLAIN}.get(kind, ""), *rest)


def answer(results, changed=()):
    """Return the data of a REPLY to RUN."""
    out = struct.pack("<H", len(results)) + b"".join(map(result, results))
    changes = (struct.pack("<H", index) + view(v) for index, v in changed)
    return out + struct.pack("<H", len(changed)) + b"".join(changes)


def read(number, v):
    return struct.pack("<BQ", READ, number) + view(v)


def run(c, ids, dyn, first, offered):
    packed = struct.pack(slots(c.values), *dyn)
    head = bytes([RUN]) + call(c) + struct.pack(f"<H{len(ids)}Q", len(ids), *ids)
    return head + text(packed, 32) + struct.pack("<QQ", first, offered)


def upload(number, v, data, total=None):
    total = len(data) if total is None else total
    return struct.pack("<Q", number) + view(v) + struct.pack("<Q", total) + data


class Get:
    """Reads what the functions above write."""

    def __init__(self, data):
        self.data, self.at = bytes(data), 0

    def left(self):
        return len(self.data) - self.at

    def bytes(self, size):
        if size > self.left():
            raise ValueError(f"{size} bytes wanted, {self.left()} left")
        self.at += size
        return self.data[self.at - size : self.at]

    def all(self, shape):
        shape = "<" + shape
        return struct.unpack(shape, self.bytes(struct.calcsize(shape)))

    def one(self, shape):
        return self.all(shape)[0]

    def end(self):
        if self.left():
            raise ValueError(f"{self.left()} bytes too many")

    def var(self):
        number = shift = 0
        while True:
            byte = self.one("B")
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift >= 70:
                raise ValueError("a number over 64 bits")

    def text(self, size):
        return self.bytes(self.one("H" if size == 16 else "I")).decode()

    def view(self):
        dtype, bits, storage, nbytes, offset, dims = self.all("bBHQqB")
        sizes, strides = self.all(f"{dims}q"), self.all(f"{dims}q")
        return View(dtype, sizes, strides, nbytes, offset, storage, bits)

    def value(self):
        tag = chr(self.one("B"))
        if tag in "LOs":
            return tag, tuple(self.value() for _ in range(self.one("I")))
        if tag in LISTS:
            return tag, self.all(f"{self.one('I')}{LISTS[tag]}")
        if tag == "T":
            return tag, self.view()
        if tag == "S":
            return tag, self.text(32)
        if tag not in "NUVWIJEDBCG":
            raise ValueError(f"unknown tag {tag!r}")
        shape = {"I": "q", "E": "d", "B": "?", "C": "dd", "W": "b?"}.get(tag, "")
        return tag, *self.all(shape)

    def call(self):
        op, overload, n = self.text(16), self.text(16), self.one("H")
        inner = Get(self.bytes(self.one("I")))
        values = tuple(inner.value() for _ in range(n))
        inner.end()
        return Call(op, overload, values)

    def error(self):
        head = self.all("QQB")
        return Error(*head, self.text(16), self.text(16), self.text(32))

    def result(self):
        kind = self.one("B")
        if kind == 1:
            return kind, self.one("Q"), self.view()
        if kind == 2:
            return kind, tuple(self.result() for _ in range(self.one("I")))
        if kind not in (0, 7, *PLAIN):
            raise ValueError(f"unknown kind of result {kind}")
        return kind, *self.all({7: "H", **PLAIN}.get(kind, ""))

    def answer(self):
        results = [self.result() for _ in range(self.one("H"))]
        changed = [(self.one("H"), self.view()) for _ in range(self.one("H"))]
        self.end()
        return results, changed

    def run(self):
        """Read RUN after the question's number."""
        c = self.call()
        ids = self.all(f"{self.one('H')}Q")
        inner = Get(self.bytes(self.one("I")))
        dyn = inner.all(slots(c.values)[1:])
        inner.end()
        first, offered = self.all("QQ")
        self.end()
        return c, ids, dyn, first, offered


class Records:
    """One direction of records: remembers the newest id and the signatures."""

    def __init__(self):
        self.newest, self.known = 0, {}

    def _put(self, number):
        delta = self.newest - number
        self.newest = max(self.newest, number)
        return var(delta * 2 if delta >= 0 else -delta * 2 - 1)

    def _get(self, get):
        coded = get.var()
        number = self.newest - (-(coded + 1) // 2 if coded & 1 else coded // 2)
        self.newest = max(self.newest, number)
        return number

    def encode(self, *records):
        return b"".join(
            bytes([RECORDS.index(r[0]) + 1]) + getattr(self, "_put_" + r[0])(*r[1:])
            for r in records
        )

    def _put_alloc(self, number, nbytes):
        return self._put(number) + var(nbytes)

    _put_resize = _put_alloc

    def _put_free(self, ids):
        return var(len(ids)) + b"".join(map(self._put, ids))

    def _put_define(self, number, c, results):
        self.known[number] = c, results
        body = call(c) + struct.pack("<H", len(results))
        for v in results:
            body += b"\0" if v is None else b"\1" + view(v)
        return var(number) + text(body, 32)

    def _put_exec(self, number, ids, dyn, fresh):
        packed = struct.pack(slots(self.known[number][0].values), *dyn)
        out = var(number) + b"".join(map(self._put, ids))
        return out + packed + b"".join(map(self._put, fresh))

    def _put_seed(self, generator, seed):
        return var(generator) + struct.pack("<Q", seed)

    def _put_genstate(self, generator, state):
        return var(generator) + text(state, 32)

    def _put_drop(self, numbers):
        return var(len(numbers)) + b"".join(map(var, numbers))

    def _put_default(self, dtype):
        return bytes([dtype])

    def decode(self, payload):
        get, found = Get(payload), []
        while get.left():
            name = RECORDS[get.one("B") - 1]
            found.append((name, *getattr(self, "_get_" + name)(get)))
        return found

    def _get_alloc(self, get):
        return self._get(get), get.var()

    _get_resize = _get_alloc

    def _get_free(self, get):
        return ([self._get(get) for _ in range(get.var())],)

    def _get_define(self, get):
        number = get.var()
        inner = Get(get.bytes(get.one("I")))
        c = inner.call()
        found = [
            inner.view() if inner.one("?") else None for _ in range(inner.one("H"))
        ]
        inner.end()
        self.known[number] = c, found
        return number, c, found

    def _get_exec(self, get):
        number = get.var()
        c, results = self.known[number]
        ids = [self._get(get) for _ in range(count(views(c.values)))]
        dyn = get.all(slots(c.values)[1:])
        return number, ids, dyn, [self._get(get) for _ in range(count(results))]

    def _get_seed(self, get):
        return get.var(), get.one("Q")

    def _get_genstate(self, get):
        return get.var(), get.bytes(get.one("I"))

    def _get_drop(self, get):
        numbers = [get.var() for _ in range(get.var())]
        for number in numbers:
            del self.known[number]
        return (numbers,)

    def _get_default(self, get):
        return (get.one("B"),)
