# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The worker: one session with one client, from the hello to its end.

A process of its own (`command`), or a thread of the client (mock). The process
never runs the package's ``__init__``, so it registers nothing: it imports torch,
loads the library, and this file. The library executes what comes; only CONTROL
requests come back to Python.
"""

import ctypes
import json
import os
import signal
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import msgpack
import torch

from mycelya_torch import _handshake, _library
from mycelya_torch._errors import ProtocolError, kind_of

BYE, LOST, CONTROL, VIOLATION = range(4)
_BEAT = 5.0  # seconds; a third of the client's patience if that is shorter
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_LAUNCH = (
    "import sys, types; p = types.ModuleType('mycelya_torch'); "
    "p.__path__ = [sys.argv[1]]; sys.modules['mycelya_torch'] = p; "
    "from mycelya_torch._worker import main; main(sys.argv[2:])"
)


@dataclass(frozen=True)
class Options:
    """What whoever starts the worker allows it; none of it comes from the client."""

    own_generator: bool = False  # mock: not the process's default one
    device: str | None = None  # "cpu" or "cuda": no other
    max_memory: int = 0  # bytes; 0: no limit
    any_folder: bool = False  # weights may be read from any folder
    hub_root: str | None = None  # ... from below this one
    allow_hub: bool = False  # ... and from the hub
    parent: int = 0  # the process that it must not outlive
    under_server: bool = False  # connections come through the socket
    silence: float = 0.0  # seconds after which a mute client's connection is cut; 0: no


def command(python: str, fd: int, options: Options) -> list[str]:
    """Return the command line of a worker process on an inherited socket."""
    settings = json.dumps(asdict(options))
    return [python, "-P", "-c", _LAUNCH, str(_library.FOLDER), str(fd), settings]


def serve_session(sock: socket.socket, options: Options) -> None:
    """Serve the client at the other end of ``sock`` until its session is over."""
    try:
        hello = _handshake.receive_hello(sock)
    except (OSError, ProtocolError):
        sock.close()  # the client has gone, or isn't one
        return
    Session(options).run(sock, hello)


class Session:
    """One client's storages, and the requests that Python answers."""

    def __init__(self, options: Options, server: socket.socket | None = None) -> None:
        self.options = options
        self._server = server  # new connections come through it
        self._handle = -1
        self._device = torch.device("cpu")
        self._id = os.urandom(16)
        self._timeout = 0.0
        self._loader: Any = None

    def run(self, sock: socket.socket, hello: dict[str, Any]) -> None:
        """Answer the hello, and serve until the end; closes ``sock``."""
        try:
            self._begin(sock, _handshake.check_client(hello))
        except (OSError, ValueError, RuntimeError) as error:
            _handshake.refuse(sock, str(error))
            return
        try:
            self._serve()
        except RuntimeError as error:  # the library's, of what the client sent
            print(f"the session ends: {error}", file=sys.stderr, flush=True)
        finally:
            torch.ops.mycelya.worker_close(self._handle)

    def _begin(self, sock: socket.socket, hello: dict[str, Any]) -> None:
        _handshake.check_torch(hello["torch"], "client")
        self._device = choose_device(hello["device"], self.options.device)
        self._id = hello["session"] or self._id
        self._timeout = max(float(hello["timeout"]), 0.1)
        limit = self.options.max_memory
        if not self.options.own_generator and hello["threads"] > 0:
            most = 4 * (os.cpu_count() or 1)
            torch.set_num_threads(min(hello["threads"], most))
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            torch.empty(1, device=self._device)
            total = torch.cuda.get_device_properties(self._device).total_memory
            if 0 < limit < total:
                torch.cuda.set_per_process_memory_fraction(limit / total)
        sock.sendall(_handshake.pack(self._hello(0)))
        self._prepare(sock)
        self._handle = torch.ops.mycelya.worker_new(
            sock.detach(),
            str(self._device),
            self.options.own_generator,
            self._server is not None,
            limit,
            min(_BEAT, self._timeout / 3),
        )

    def _prepare(self, sock: socket.socket) -> None:
        """Make a socket fit for the library: it blocks, but not for ever."""
        sock.settimeout(None)
        if seconds := self.options.silence:
            value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                sock.setsockopt(socket.SOL_SOCKET, option, value)

    def _hello(self, received: int) -> dict[str, Any]:
        cuda = self._device.type == "cuda"
        return {
            "version": _handshake.VERSION,
            "torch": torch.__version__,
            "device": str(self._device),
            "device_name": torch.cuda.get_device_name() if cuda else "cpu",
            "cuda": cuda,
            "pid": os.getpid(),
            "session": self._id,
            "received": received,
        }

    def _serve(self) -> None:
        while True:
            event, number, payload = torch.ops.mycelya.worker_serve(self._handle)
            if event == CONTROL:
                self._answer(number, to_bytes(payload))
            elif event == VIOLATION:
                text = to_bytes(payload).decode("utf-8", "replace")
                print(f"protocol violation: {text}", file=sys.stderr, flush=True)
                return
            elif event != LOST or not self._resume():
                return

    def _answer(self, number: int, request: bytes) -> None:
        try:
            answer = msgpack.packb(self._control(_handshake.unpack(request)))
            status = 0
        except Exception as error:
            status, text = 1 + kind_of(error), str(error) or type(error).__name__
            answer = text[:16384].encode("utf-8", "replace")
        torch.ops.mycelya.worker_reply(self._handle, number, status, to_tensor(answer))

    def _control(self, request: dict[str, Any]) -> Any:
        match request.get("do"):
            case "memory":
                return self._memory()
            case "properties":
                return properties(self._device)
            case "reset_peak":
                if self._device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                else:
                    torch.ops.mycelya.worker_reset_peak(self._handle)
            case "empty_cache":
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
            case "list" | "load" | "describe" | "adopt" | "forget":
                return self._load(request)
            case other:
                raise ValueError(f"no such request: {other!r:.80}")
        return None

    def _memory(self) -> dict[str, int]:
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            used = torch.cuda.memory_allocated()
            numbers = (used, torch.cuda.memory_reserved())
            peak = torch.cuda.max_memory_allocated()
        else:
            _, used, *more = torch.ops.mycelya.worker_memory(self._handle)
            numbers, peak = (used, used), more[0] if more else used
            page = os.sysconf("SC_PAGE_SIZE")
            total = page * os.sysconf("SC_PHYS_PAGES")
            free = total - used
            if "SC_AVPHYS_PAGES" in os.sysconf_names:  # not on macOS
                free = page * os.sysconf("SC_AVPHYS_PAGES")
        if self.options.max_memory:
            total = min(total, self.options.max_memory)
            free = min(free, max(total - used, 0))
        names = ("allocated", "reserved", "max_allocated", "total", "free")
        return dict(zip(names, (*numbers, peak, total, free), strict=True))

    def _load(self, request: dict[str, Any]) -> Any:
        from mycelya_torch._weights import Loader

        if self._loader is None:
            self._loader = Loader(self.options, self._device)
        if request["do"] == "list":
            return self._loader.find(request)
        if request["do"] == "describe":
            return self._loader.describe(request)
        if request["do"] == "forget":
            return self._loader.forget(request)
        if request["do"] == "load":
            room = None
            if self.options.max_memory:
                _, used, *_ = torch.ops.mycelya.worker_memory(self._handle)
                room = self.options.max_memory - used
            return self._loader.load(request, room)
        for number, tensor in self._loader.adopt(request):
            torch.ops.mycelya.worker_adopt(self._handle, number, tensor)
        return None

    def _resume(self) -> bool:
        """Wait for the client to come back; False when it doesn't."""
        if self._server is None:
            return False
        end = time.monotonic() + self._timeout
        while (left := end - time.monotonic()) > 0:
            self._server.settimeout(left)
            try:
                sock, hello = take_connection(self._server)
            except OSError:
                return False
            try:
                received = torch.ops.mycelya.worker_received(self._handle)
                sock.sendall(_handshake.pack(self._hello(received)))
                self._prepare(sock)
            except OSError:
                sock.close()  # cut again
                continue
            torch.ops.mycelya.worker_resume(
                self._handle, sock.detach(), hello["received"]
            )
            return True
        return False


def choose_device(wanted: str | None, allowed: str | None) -> torch.device:
    """Return the device to use; CUDA by default where there is one.

    Raises:
        ValueError: there is no such device here, or it is not allowed.
    """
    available = torch.cuda.is_available()
    kind = wanted or allowed or ("cuda" if available else "cpu")
    if allowed and kind.partition(":")[0] != allowed:
        raise ValueError(f"device {kind!r}: this server offers {allowed!r} only")
    if kind == "cpu":
        return torch.device("cpu")
    name, _, index = kind.partition(":")
    count = torch.cuda.device_count() if available else 0
    if name != "cuda" or (index and not index.isdecimal()) or len(index) > 3:
        raise ValueError(f"device {kind[:40]!r}: 'cpu', 'cuda' and 'cuda:N' are known")
    if int(index or 0) >= count:
        raise ValueError(f"device {kind!r}: the worker has {count} CUDA devices")
    return torch.device("cuda", int(index or 0))


def properties(device: torch.device) -> dict[str, Any]:
    """Return what is known of a device: plain values only."""
    known: dict[str, Any] = {"type": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        known |= {"name": found.name, "total_memory": found.total_memory}
        known |= {"major": found.major, "minor": found.minor}
        known |= {"multi_processor_count": found.multi_processor_count}
        return known
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = torch.get_num_threads()
    return known | {"name": "cpu", "total_memory": memory, "threads": threads}


def to_tensor(data: bytes) -> torch.Tensor:
    """Return bytes as a uint8 CPU tensor."""
    if not data:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def to_bytes(tensor: torch.Tensor) -> bytes:
    """Return a uint8 CPU tensor's bytes; numpy isn't needed."""
    return ctypes.string_at(tensor.data_ptr(), tensor.numel()) if len(tensor) else b""


def take_connection(server: socket.socket) -> tuple[socket.socket, dict[str, Any]]:
    """Receive a connection and its client's hello from the server process.

    Raises:
        OSError: the server has gone, or the socket's timeout is over.
    """
    data, fds, _, _ = socket.recv_fds(server, 4, 1)
    if not fds:
        raise ConnectionError("the server process closed the connection")
    data += _handshake.receive(server, 4 - len(data))
    body = _handshake.receive(server, int.from_bytes(data, "little"))
    return socket.socket(fileno=fds[0]), _handshake.unpack(body)


def _bind_to_parent(parent: int) -> None:
    """Have the kernel end this process with its parent, where it can."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if parent and os.getppid() != parent:
        os._exit(1)


def main(arguments: list[str]) -> None:
    """Run as a process: the socket's descriptor, and the `Options` as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    options = Options(**json.loads(arguments[1]))
    _bind_to_parent(options.parent)
    _library.load()
    sock = socket.socket(fileno=int(arguments[0]))
    if options.under_server:
        connection, hello = take_connection(sock)
        Session(options, sock).run(connection, hello)
    else:
        serve_session(sock, options)
    sys.stderr.flush()
    # Nothing here needs an orderly end; torch's takes a while.
    os._exit(0)
