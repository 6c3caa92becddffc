# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Mutated frames: a worker process that gets them, and a client process that does.

``python fuzz.py worker FRAMES [SEED]`` sends so many mutated frames to a worker
process, ``python fuzz.py client FRAMES [SEED]`` to a client process. Both print what
they counted and what went wrong, and end with status 1 if anything did. The processes
that get the frames are this file, too: ``serve FD`` and ``receive FRAMES SEED``.
"""

import argparse
import collections
import contextlib
import faulthandler
import json
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import msgpack
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
PATIENCE = 15.0  # seconds after which something hangs
MEMORY = 3 << 30  # so that no mutation takes all of it
USAGE = "descriptors", "threads", "bytes"
ROOM = 0, 1, 300 << 20  # by how much a worker's usage may grow


# ---- programs whose frames are mutated ----
def elements(device):
    x = torch.arange(12.0, device=device).view(3, 4)
    y = (x.t() * 2 + 1)[1:, ::2] - x[0, 0]
    y.mul_(3).clamp_(0, 9)
    (x + 1j).conj()[1].cpu()
    return y.sum(1, keepdim=True).cpu(), x.argmax().item(), x.equal(x + 1)


def training(device):
    w = torch.full((3, 4), 0.5, device=device, requires_grad=True)
    b = torch.zeros(3, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([w, b])
    x = torch.ones(2, 4).to(device)
    torch.nn.functional.gelu(torch.nn.functional.linear(x, w, b)).sum().backward()
    optimizer.step()
    return w.detach().cpu()


def images(device):
    x = torch.arange(64.0, device=device).view(1, 1, 8, 8).requires_grad_()
    w = torch.ones(2, 1, 3, 3, device=device)
    y = torch.nn.functional.conv2d(x, w, stride=2, padding=1)
    torch.nn.functional.max_pool2d(y, 2).sum().backward()
    return x.grad.cpu(), torch.nn.functional.interpolate(y, scale_factor=2.0).cpu()


def dynamic(device):
    x = torch.tensor([3, 1, 2, 1, 0], device=device)
    parts = x.split([2, 3])
    y = x[x > 1], torch.nonzero(x), *torch.unique(x, return_counts=True)
    return [one.cpu() for one in (*y, *parts, x.repeat_interleave(x))]


def transfers(device):
    x = torch.arange(5000.0).view(50, 100).t().to(device)
    x[:, 3] = torch.ones(100)
    x.resize_(60, 100)
    x[1].copy_(torch.zeros(100))
    y = torch.empty(0, device=device).resize_(7).zero_()
    return x[::7, 2].cpu(), torch.cat([y, x[0]]).tolist()


def indices(device):
    table = torch.arange(20.0, device=device).view(5, 4)
    i = torch.tensor([4, 0, 2], device=device)
    rows = torch.nn.functional.embedding(i, table)
    table.index_put_((i, i % 2), rows[:, 0], accumulate=True)
    table.scatter_(0, i.view(3, 1), 7.0)
    return rows.gather(1, i.view(3, 1)).cpu(), table.index_select(0, i).cpu()


def failures(device):
    x = torch.ones(3, device=device)
    with contextlib.suppress(IndexError):
        x[torch.tensor([9], device=device)].add_(1).cpu()
    return x.sum().item()


def algebra(device):
    x = torch.eye(4, device=device) * 2 + 1
    order = x.sort(dim=0, descending=True)
    q = x.view(1, 1, 4, 4)
    y = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    return torch.linalg.qr(x).R.cpu(), order.indices.cpu(), y.softmax(-1).cpu()


def chances(device):
    generator = torch.Generator(device).manual_seed(3)
    x = torch.rand(5, device=device, generator=generator)
    state = generator.get_state()
    y = torch.nn.functional.dropout(torch.ones(5, device=device), 0.5)
    generator.set_state(state)
    return x.cpu(), y.normal_(generator=generator).cpu()


def requests(device):
    from wire_peers import ops

    for request in ({"do": "memory"}, {"do": "properties"}, {"do": "no"}):
        body = torch.tensor(list(msgpack.packb(request)), dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):
            ops.control(device.index, body, "control")
    ops.synchronize(device.index, "synchronize")


PROGRAMS = [elements, training, images, dynamic, transfers, indices, failures]
PROGRAMS += [algebra, requests]


def record():
    """Return the frames that a client sends, for each program."""
    from wire_peers import SLOT, native_client

    found = []
    for program in [*PROGRAMS, chances]:
        with native_client() as worker, contextlib.suppress(RuntimeError):
            program(torch.device("mycelya", SLOT))
        if worker.problem is not None:
            raise worker.problem
        found.append(worker.raw)
    return found


# ---- the worker's side ----
class FuzzedWorker:
    """A worker process for many sessions."""

    def __init__(self):
        self._control, theirs = socket.socketpair()
        self._control.settimeout(PATIENCE)
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        with theirs:
            command = [sys.executable, __file__, "serve", str(theirs.fileno())]
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=self._output,
            )

    def session(self, frames, hello=None, patience=PATIENCE):
        """Send all of it; return what comes back until the worker closes.

        Raises:
            TimeoutError: it hangs.
            ConnectionError: it crashed.
        """
        from mycelya_torch import _handshake

        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(self._control, [b"x"], [theirs.fileno()])
            ours.settimeout(patience)
            hello = hello or _handshake.pack(HELLO)
            sender = threading.Thread(target=self._send, args=(ours, hello, frames))
            sender.start()
            try:
                got, end = bytearray(), time.monotonic() + patience
                while part := ours.recv(1 << 16):
                    got += part
                    if time.monotonic() > end:  # but its heart beats
                        raise TimeoutError("it computes without an end")
            except ConnectionResetError:
                pass  # it didn't read everything
            finally:
                with contextlib.suppress(OSError):
                    ours.shutdown(socket.SHUT_RDWR)
                sender.join(PATIENCE)
        if not self._control.recv(1):  # said at the end of each session
            status = self.process.wait(PATIENCE)
            self._output.seek(0)
            last = self._output.read()[-3000:].decode("utf-8", "replace")
            raise ConnectionError(f"exit status {status}: {last}")
        return bytes(got)

    @staticmethod
    def _send(sock, hello, frames):
        with contextlib.suppress(OSError):
            sock.sendall(hello + b"".join(frames))
            sock.shutdown(socket.SHUT_WR)

    def usage(self):
        """Return open descriptors, threads, and resident bytes."""
        proc = Path("/proc") / str(self.process.pid)
        pages = int((proc / "statm").read_text().split()[1])
        n = [len(os.listdir(proc / name)) for name in ("fd", "task")]
        return *n, pages * resource.getpagesize()

    def ended(self):
        """Return the exit status, if the process ends within a while."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        return self.process.returncode

    def close(self):
        self._control.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._output.close()


HELLO = {
    "version": 1,
    "torch": torch.__version__,
    "device": "cpu",
    "threads": 0,
    "timeout": 1.0,
    "session": b"",
    "received": 0,
}


def check_stream(data):
    """Check that what a worker sent is a hello and whole frames."""
    import wire_codec as wire

    get = wire.Get(data)
    get.bytes(get.one("I"))
    while get.left():
        length, kind, flags, zero, _ = get.all("IBBHQ")
        assert kind in range(16, 21)
        assert (flags, zero) == (0, 0)
        payload = wire.Get(get.bytes(length))
        if kind == wire.EVENT:
            payload.error()
            payload.end()


def fuzz_worker(amount, seed):
    """Send mutated frames; return counts, or raise what went wrong.

    What is sent in a crash or a hang is kept in ``$FUZZ_KEEP``, if that is set.
    """
    from proxy import mutate

    chosen, counts, corpus = random.Random(seed), collections.Counter(), record()
    worker = FuzzedWorker()
    try:
        expected = [len(worker.session(frames)) for frames in corpus]
        before, begin = worker.usage(), time.monotonic()
        while counts["frames"] < amount:
            frames = list(chosen.choice(corpus))
            n = min(chosen.choice((1, 1, 1, 2, 3)), len(frames))
            for at in chosen.sample(range(len(frames)), n):
                frames[at] = mutate(frames[at], chosen)
            if chosen.random() < 0.05:
                at = chosen.randrange(len(frames))
                other = chosen.choice(chosen.choice(corpus))
                frames[at:at] = [other, frames[at]][: chosen.randrange(3)]
            counts["frames"] += n
            counts["sessions"] += 1
            start = time.monotonic()
            try:
                check_stream(worker.session(frames))
            except (TimeoutError, ConnectionError) as error:
                # It may compute for long, but then it ends when its client has gone.
                left = worker.ended() == 0
                counts[
                    "left" if left else f"{type(error).__name__}: {error!s:.60}"
                ] += 1
                _keep(frames, error)
                worker.close()
                worker = FuzzedWorker()
                worker.session(corpus[0])
                continue
            counts["slowest_ms"] = max(
                counts["slowest_ms"], int(1000 * (time.monotonic() - start))
            )
        counts["seconds"] = int(time.monotonic() - begin)
        after = worker.usage()
        assert [len(worker.session(frames)) for frames in corpus] == expected
    finally:
        worker.close()
    return counts, before, after


def _keep(frames, error):
    if folder := os.environ.get("FUZZ_KEEP"):
        path = Path(folder, f"{type(error).__name__}-{time.monotonic_ns()}")
        path.write_bytes(b"".join(frames))
        path.with_suffix(".txt").write_text(str(error))


def serve(fd):
    """Be the worker process."""
    import types

    package = types.ModuleType("mycelya_torch")  # as the worker does: no __init__
    package.__path__ = [str(next(
        Path(p, "mycelya_torch") for p in sys.path if Path(p, "mycelya_torch").is_dir()
    ))]  # fmt: skip
    sys.modules["mycelya_torch"] = package
    from mycelya_torch import _library, _worker

    _library.load()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    control = socket.socket(fileno=fd)
    options = _worker.Options(max_memory=256 << 20)
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            os._exit(0)
        _worker.serve_session(socket.socket(fileno=fds[0]), options)
        control.sendall(b".")


# ---- the client's side ----
class FuzzedClients:
    """Threads, each with its own device, that run programs on mutated answers."""

    def __init__(self, amount, seed, threads=8):
        self.amount, self.counts = amount, collections.Counter()
        self._seed, self._progress = seed, [time.monotonic()] * threads

    def run(self):
        """Return counts; end the process if something hangs."""
        begin = time.monotonic()
        threads = [
            threading.Thread(target=self._work, args=(n,), daemon=True)
            for n in range(len(self._progress))
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            if min(self._progress) + PATIENCE < time.monotonic():
                faulthandler.dump_traceback()
                os._exit(3)
        self.counts["seconds"] = int(time.monotonic() - begin)
        self.counts["threads left"] = threading.active_count() - 1
        return self.counts

    def _work(self, n):
        chosen = random.Random(f"{self._seed} {n}")
        while self.counts["frames"] < self.amount:
            self._progress[n] = time.monotonic()
            self._session(chosen, 8 + n)
        self._progress[n] = float("inf")

    def _session(self, chosen, slot):
        from proxy import mutate
        from wire_peers import native_client

        import mycelya_torch

        program, rate = chosen.choice(PROGRAMS), chosen.choice((0.2, 0.5, 1.0))

        def mangle(data):
            if chosen.random() >= rate:
                return data
            self.counts["frames"] += 1
            worker.sock.settimeout(0.004)  # the client may wait for more
            if chosen.random() < 0.03:
                return data * 2
            return mutate(data, chosen)

        self.counts["sessions"] += 1
        try:
            with native_client(mangle, slot=slot) as worker:
                program(torch.device("mycelya", slot))
                self.counts["fine"] += 1  # numbers that look right are believed
        except Exception as error:
            name = type(error).__name__
            # A tensor may claim to be larger than this process may have.
            clean = isinstance(error, mycelya_torch.RemoteError)
            clean = clean or "alloc_cpu" in str(error)
            if not clean and os.environ.get("FUZZ_KEEP"):
                traceback.print_exc()
            self.counts[name if clean else f"unclean {name}: {error!s:.40}"] += 1
            error.__traceback__ = None


def fuzz_client(amount, seed):
    """Run `FuzzedClients` in a process; return its exit status, counts, errors."""
    done = subprocess.run(
        [sys.executable, __file__, "receive", str(amount), str(seed)],
        capture_output=True,
        text=True,
        timeout=amount / 20 + 120,
    )
    counts = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return done.returncode, counts, done.stderr[-4000:]


# ---- commands ----
def worker_problems(amount, seed):
    """Fuzz a worker; return what was counted and what went wrong."""
    counts, before, after = fuzz_worker(amount, seed)
    problems = [f"{counts[name]} x {name}" for name in counts if "Error" in name]
    if counts["left"] >= amount / 1000:  # computations that took too long
        problems.append(f"{counts['left']} sessions took over {PATIENCE:.0f} s")
    for name, less, more, room in zip(USAGE, before, after, ROOM, strict=True):
        if more > less + room:
            problems.append(f"{name}: {less} before, {more} after")
    return dict(counts), problems


def client_problems(amount, seed):
    """Fuzz a client; return what was counted and what went wrong."""
    status, counts, errors = fuzz_client(amount, seed)
    if status != 0:
        return counts, [f"exit status {status}: {errors}"]
    problems = [f"{counts[n]} x {n}" for n in counts if n.startswith("unclean")]
    if counts["frames"] < amount:
        problems.append(f"{counts['frames']} frames instead of {amount}")
    for name in ("ProtocolError", "fine"):
        if counts.get(name, 0) <= amount / 10:
            problems.append(f"{counts.get(name, 0)} x {name}: few for {amount} frames")
    if counts["threads left"] > 1:
        problems.append(f"{counts['threads left']} threads left")
    return counts, problems


def receive(amount, seed):
    """Be the client process."""
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    import mycelya_torch  # noqa: F401 - loads the library

    training(torch.device("cpu"))  # what torch imports late is no hang
    print(json.dumps(FuzzedClients(amount, seed).run()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("side", choices=["worker", "client", "serve", "receive"])
    parser.add_argument("number", type=int, help="frames; for serve, a descriptor")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    given = parser.parse_args()
    if given.side == "serve":
        return serve(given.number)
    if given.side == "receive":
        return receive(given.number, given.seed)
    import mycelya_torch  # noqa: F401 - loads the library

    fuzzed = worker_problems if given.side == "worker" else client_problems
    begin = time.monotonic()
    counts, problems = fuzzed(given.number, given.seed)
    print(json.dumps(counts), f"{time.monotonic() - begin:.0f} s in all", sep="\n")
    print("\n".join(problems) or "nothing went wrong")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
