# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""A proxy between a client and a worker: counts, delays, cuts, and changes frames."""

import contextlib
import queue
import socket
import threading
import time
from collections import Counter

import wire_codec as wire

UP, DOWN = "up", "down"  # client -> worker, worker -> client


class Frames:
    """Finds the frames in a stream that begins with ``hellos`` of other things.

    Before the frames come the hellos (u32 length and body), and on TCP the proofs.
    """

    def __init__(self, proof=0, hello=True):
        self._skip, self._hello, self._buffer = proof, hello, bytearray()

    def feed(self, data):
        """Yield what is complete: (type, bytes); type None before the frames."""
        self._buffer += data
        while (size := self._size()) is not None and len(self._buffer) >= size:
            part = bytes(self._buffer[:size])
            del self._buffer[:size]
            if self._skip:
                self._skip = 0
                yield None, part
            elif self._hello:
                self._hello = False
                yield None, part
            else:
                yield part[4], part

    def _size(self):
        if self._skip:
            return self._skip
        need = 4 if self._hello else 16
        if len(self._buffer) < need:
            return None
        return need + int.from_bytes(self._buffer[:4], "little")


class Link:
    """One connection through the proxy."""

    def __init__(self, proxy, client, worker):
        self.proxy, self.ends = proxy, {UP: (client, worker), DOWN: (worker, client)}
        self._threads = []
        for direction in (UP, DOWN):
            later = queue.SimpleQueue()
            for work in (self._read, self._write):
                arguments = (direction, later)
                thread = threading.Thread(target=work, args=arguments, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _read(self, direction, later):
        proxy, source = self.proxy, self.ends[direction][0]
        frames = Frames(proxy.proof[direction])
        while True:
            try:
                data = source.recv(1 << 16)
            except OSError:
                data = b""
            if data and proxy.rewrite is None:
                for kind, _ in frames.feed(data):
                    proxy.frames[direction, kind] += 1
            elif data:
                parts = []
                for kind, part in frames.feed(data):
                    proxy.frames[direction, kind] += 1
                    parts.append(proxy.rewrite(direction, kind, part))
                data = b"".join(parts)
                if not data:
                    continue
            later.put((time.monotonic() + proxy.delay / 2, data))
            if not data:
                return

    def _write(self, direction, later):
        proxy, target = self.proxy, self.ends[direction][1]
        while True:
            due, data = later.get()
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            if not data:
                with contextlib.suppress(OSError):
                    target.shutdown(socket.SHUT_WR)
                return
            room = proxy.take(direction, len(data))
            with contextlib.suppress(OSError):
                target.sendall(data[:room])
            if room < len(data):
                self.cut()

    def cut(self):
        """Break the connection at both ends."""
        for source, _ in self.ends.values():
            with contextlib.suppress(OSError):
                source.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for source, _ in self.ends.values():
            source.close()


class Proxy:
    """Between clients and ``target``, an address; or between sockets (`through`).

    Args:
        target: ``"host:port"`` of a server, whose clients prove a token first.
        delay: Seconds that a round trip takes longer.
        rewrite: ``(direction, type, bytes) -> bytes`` for each frame.

    Attributes:
        bytes: How many went through, by direction.
        frames: How many came in, by direction and type.
        cuts: The numbers of bytes, of both directions together, after which the
            next connections are cut, in their order.
    """

    def __init__(self, target=None, delay=0.0, rewrite=None):
        self.delay, self.rewrite = delay, rewrite
        self.bytes, self.frames = Counter(), Counter()
        self.cuts, self.refuses, self.links, self._all = [], False, [], []
        self.proof = {UP: 38 + 32, DOWN: 38 + 32} if target else {UP: 0, DOWN: 0}
        self._lock, self._target, self._listener = threading.Lock(), target, None
        if target:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.address = "{}:{}".format(*self._listener.getsockname())
            self._thread = threading.Thread(target=self._accept, daemon=True)
            self._thread.start()

    def through(self, sock):
        """Return the client's end of a connection whose other end is ``sock``."""
        ours, theirs = socket.socketpair()
        self._add(Link(self, theirs, sock))
        return ours

    def between(self, machine):
        """Put the proxy before the worker of a machine that is not started yet."""
        connect = machine._backend.connect
        machine._backend.connect = lambda deadline: self.through(connect(deadline))

    def _add(self, link):
        self.links.append(link)  # which tests may empty
        self._all.append(link)

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuses:
                client.close()
                continue
            host, _, port = self._target.rpartition(":")
            worker = socket.create_connection((host, int(port)))
            for sock in (client, worker):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._add(Link(self, client, worker))

    def take(self, direction, count):
        """Return how many of ``count`` bytes may pass before a cut."""
        with self._lock:
            if self.cuts:
                passed = self.bytes.total()
                if passed + count > self.cuts[0]:
                    count = max(0, self.cuts.pop(0) - passed)
            self.bytes[direction] += count
            return count

    def close(self):
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._thread.join(10)
            self._listener.close()
        for link in self._all:
            link.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# ---- mutations ----
NUMBERS = [0, 1, 2, 7, 8, 64, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
NUMBERS += [2**38, 2**38 + 1, 2**62 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]


def mutate(data, random):
    """Return one frame (with its header), changed in one of many ways."""
    out = bytearray(data)
    fix = random.random() < 0.7  # the length is made right again
    kind = random.randrange(9)
    inside = len(out) > 16 and random.random() < 0.85
    at = random.randrange(16, len(out)) if inside else random.randrange(16)
    if kind == 0:
        out[at] ^= 1 << random.randrange(8)
    elif kind == 1:
        out[at] = random.randrange(256)
    elif kind == 2:
        size = random.choice((1, 2, 4, 8))
        number = random.choice(NUMBERS) % (1 << 8 * size)
        out[at : at + size] = number.to_bytes(size, "little")
    elif kind == 3:
        del out[max(at, 1) :]
    elif kind == 4:
        del out[at : at + random.randrange(1, 9)]
    elif kind == 5:
        out[at:at] = random.randbytes(random.randrange(1, 17))
    elif kind == 6:
        size = random.randrange(1, 33)
        from_ = random.randrange(len(out))
        out[at : at + size] = out[from_ : from_ + size]
    elif kind == 7:
        out[:4] = random.choice(NUMBERS).to_bytes(8, "little")[:4]
        fix = False
    else:
        value = int.from_bytes(out[at : at + 8], "little")
        value = (value + random.choice((-1, 1, 8, -8, 2**32))) % 2**64
        out[at : at + 8] = value.to_bytes(8, "little")
    if fix and len(out) >= 16 and at >= 4:
        out[:4] = (len(out) - 16).to_bytes(4, "little")
    return bytes(out)


def count_round_trips(proxy):
    """Return how many answers came back."""
    return proxy.frames[DOWN, wire.REPLY]
