# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a machine has done, and the lines of the program that waited for it."""

import _thread
import contextlib
import ctypes
import os
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, fields
from types import FrameType

import torch

from mycelya_torch import _device, _logging

_OURS = tuple(
    os.path.dirname(os.path.abspath(path)) + os.sep
    for path in (__file__, torch.__file__)
)
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_NOWHERE = ("<no Python frame>", 0, "backward")
# One for each device index: (file, line, function, reason) -> [count, seconds].
_points: list[dict[tuple[str, int, str, str], list]] = [
    {} for _ in range(_device.SLOTS)
]
_lock = threading.RLock()
_is_internal: dict[str, bool] = {}
_quiet = threading.local()


@dataclass(frozen=True)
class SyncPoint:
    """A line of the program that waited for a machine.

    Attributes:
        filename: The file; ``"<no Python frame>"`` in a thread of autograd.
        line: The line, from 1.
        function: The function's name; ``"backward"`` in a thread of autograd.
        reason: ``"read value"``, ``"copy to cpu"``, ``"dynamic shape: <op>"``,
            ``"probe: <op>"``, ``"synchronize"`` or ``"load"``.
        count: How often it waited.
        seconds: For how long, in all.
    """

    filename: str
    line: int
    function: str
    reason: str
    count: int
    seconds: float


@dataclass(frozen=True)
class MachineStats:
    """Counts since the machine started, or since its last ``reset_stats()``.

    Attributes:
        ops: Operations sent; views and the creation of tensors are none.
        cache_hits: Operations whose signature was known.
        cache_misses: Operations whose result had to be inferred.
        probes: Of these, how many asked the worker.
        dynamic_ops: Operations whose result's shape depends on data.
        relayouts: Results that the worker laid out anew.
        frames_sent: Writes of batches of operations to the socket.
        round_trips: Questions that had to wait for an answer.
        bytes_sent: Bytes to the worker.
        bytes_received: Bytes from it.
        storages_live: Storages on the machine now.
        bytes_live: Their bytes.
        queue_bytes: Bytes that wait to be sent now.
        sync_points: Where the program waited, the most expensive first.
    """

    ops: int
    cache_hits: int
    cache_misses: int
    probes: int
    dynamic_ops: int
    relayouts: int
    frames_sent: int
    round_trips: int
    bytes_sent: int
    bytes_received: int
    storages_live: int
    bytes_live: int
    queue_bytes: int
    sync_points: tuple[SyncPoint, ...] = ()

    def __str__(self) -> str:
        counts = [field.name for field in fields(self)][:-1]
        lines = [f"{name:<16}{getattr(self, name):>16,}" for name in counts]
        if self.ops and self.frames_sent:
            lines.append(f"{'ops per frame':<16}{self.ops / self.frames_sent:>16,.1f}")
        if self.sync_points:
            lines.append(f"{'seconds':>10} {'count':>8}  waited for")
        for point in self.sync_points:
            place = f"{point.filename}:{point.line} in {point.function}"
            cost = f"{point.seconds:>10.4f} {point.count:>8}"
            lines.append(f"{cost}  {point.reason} at {place}")
        return "\n".join(lines)


def read(index: int) -> MachineStats:
    """Return the counts of the machine at a device index."""
    counts = list(torch.ops.mycelya.stats(index))
    with _lock:
        found = [
            SyncPoint(*key, count=count, seconds=seconds)
            for key, (count, seconds) in _points[index].items()
        ]
    found.sort(key=lambda point: point.seconds, reverse=True)
    return MachineStats(*counts, sync_points=tuple(found))


def reset(index: int) -> None:
    """Begin to count anew."""
    torch.ops.mycelya.reset_stats(index)
    with _lock:
        _points[index].clear()


def _user_line(frame: FrameType | None) -> tuple[str, int, str]:
    while frame is not None:
        code = frame.f_code
        name = code.co_filename
        internal = _is_internal.get(name)
        if internal is None:
            internal = _is_internal[name] = name.startswith(_OURS)
        if not internal:
            return name, frame.f_lineno, code.co_name
        frame = frame.f_back
    return _NOWHERE


def _report(reason: bytes, seconds: float, index: int) -> None:
    # ctypes prints what is raised here, and goes on: an interrupt would be lost.
    try:
        if getattr(_quiet, "on", False) or not 0 <= index < _device.SLOTS:
            return
        key = (*_user_line(sys._getframe().f_back), reason.decode("utf-8", "replace"))
        with _lock:
            entry = _points[index].setdefault(key, [0, 0.0])
            entry[0] += 1
            entry[1] += seconds
    except KeyboardInterrupt:
        _thread.interrupt_main()


CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_double, ctypes.c_int)(
    _report
)


@contextlib.contextmanager
def forbid_sync() -> Iterator[None]:
    """Raise `SyncForbiddenError` where this thread would wait for a machine.

    Example:
        >>> import torch
        >>> with forbid_sync():
        ...     x = torch.ones(2) + 1  # a CPU tensor never waits
    """
    former = torch.ops.mycelya.forbid_sync(True)
    try:
        yield
    finally:
        torch.ops.mycelya.forbid_sync(former)


def start_thread(name: str, run: Callable[[], None]) -> None:
    """Start a thread whose waits are no line of the program's."""

    def quietly() -> None:
        _quiet.on = True
        run()

    thread = threading.Thread(target=quietly, name=name, daemon=True)
    _threads.add(thread)
    thread.start()


def end_threads(seconds: float) -> None:
    """Wait for the threads, once no machine is left that they could wait for.

    Python ends a thread that wants the lock of an interpreter which is going away; in
    the middle of an operator, that ends the process with an abort.
    """
    for reads in list(_reads.values()):
        reads.end()
    latest = time.monotonic() + seconds
    for thread in list(_threads):
        thread.join(max(0.0, latest - time.monotonic()))


class _Reads:
    """A thread that completes the reads of one machine, in order."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._begun: queue.SimpleQueue = queue.SimpleQueue()
        start_thread(f"mycelya-reads-{index}", self._run)

    def begin(self, future: Future, tensor: torch.Tensor) -> None:
        """Begin a read, and have the thread complete it.

        The library writes into the result's memory until the thread has waited for
        it, so the queue must hold the result before anything can interrupt this
        thread. Hence no line of Python between the two: the chain runs in C.
        """
        read = torch.ops.mycelya.begin_read.default._op
        queued = map(self._begun.put, zip([future], map(read, [tensor]), strict=True))
        deque(queued, maxlen=0)

    def end(self) -> None:
        """Have the thread end, after the reads that were begun."""
        self._begun.put(None)

    def _run(self) -> None:
        while (begun := self._begun.get()) is not None:
            future, (tensor, ticket) = begun
            del begun
            try:
                torch.ops.mycelya.finish_read(self._index, ticket, "copy to cpu")
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(tensor)
            del future, tensor


_reads: dict[int, _Reads] = {}


def to_cpu_async(tensor: torch.Tensor) -> "Future[torch.Tensor]":
    """Begin to copy a device tensor to the CPU, and return at once.

    The future holds a CPU tensor of the same shape and dtype, without gradient;
    a failure on the worker or a dead machine is raised by ``result()``.

    Raises:
        RuntimeError: it is no tensor of a machine.
    """
    _device.require(tensor)
    _logging.log_tensor("to_cpu_async", tensor)
    future: Future[torch.Tensor] = Future()
    future.set_running_or_notify_cancel()
    index = tensor.device.index
    with _lock:
        if index not in _reads:
            _reads[index] = _Reads(index)
    _reads[index].begin(future, tensor.detach())
    return future


def forget() -> None:
    """Drop what threads of the parent hold; they don't exist after a fork."""
    global _lock
    _lock = threading.RLock()
    _reads.clear()
    _threads.clear()
