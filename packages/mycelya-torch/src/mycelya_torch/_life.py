# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""One life of a machine, from its start to its end, in a thread of its own.

The thread has the worker started (the kernel ends a worker with the thread that
started it), exchanges the hello, hands the connection to the library, and then
watches it: a cut connection of tcp or modal is dialled again. A start that nobody
waits for any more is undone by the thread, too, however late it succeeds.
"""

import random
import sys
import threading
import time
from typing import Any

import msgpack
import torch

from mycelya_torch import _handshake, _logging, _stats, _worker
from mycelya_torch._device import ALIVE, manager
from mycelya_torch._errors import AuthenticationError, ProtocolError
from mycelya_torch.backends import Backend
from torchworks_core.errors import NotReady

CHOICE_SECONDS = 1.0  # for which a first `device("cpu")` is waited for
GRACE_SECONDS = 5.0
LONGEST_WAIT = 20.0  # at a stop, for a worker that has not started yet
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 2.0


class Life:
    """A worker, its device index, and the thread that looks after them."""

    def __init__(self, backend: Backend, *, batching: bool, max_inflight: int) -> None:
        self.backend = backend
        self.settings = backend.settings
        self.name = self.settings.machine_id
        self.index = -1
        self.is_begun = False  # from then on the library knows the machine
        self.hello: dict[str, Any] = {}  # the worker's
        self.owner: object = None  # kept alive until it is stopped
        self._batching, self._max_inflight = batching, max_inflight
        self._wanted: str | None = None
        self._chosen = threading.Event()
        self._sent = False  # the choice is on its way to the worker
        self._lock = threading.Lock()
        self._started = threading.Event()
        self._answered = threading.Event()
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(
            target=self._run, name=f"mycelya-{self.name}", daemon=True
        )

    @property
    def state(self) -> str:
        """As in csrc/mycelya/MycelyaConnection.h, in lower case."""
        if not self.is_begun:
            return "new"
        if not manager.is_at(self.index, self):
            return "stopped"  # the index has another machine by now
        return torch.ops.mycelya.state(self.index)

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left but, perhaps, tensors."""
        ended = self._stopping.is_set()
        if self.is_begun:
            ended = self.state in ("stopped", "dead")
        return ended and not self._thread.is_alive()

    def begin(self, owner: object) -> None:
        """Start, and return as soon as the device can be used.

        Whatever it raises, also what interrupts it: `give_up` has to follow.

        Raises:
            RuntimeError: the worker can't be had, or `cancel` was called.
        """
        self.owner = owner
        self.index = manager.claim(self)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure
        if not self.is_begun:
            raise self._cancelled()

    def cancel(self) -> None:
        """Have a start that still goes on fail at once; else do nothing."""
        with self._lock:
            if not self.is_begun:
                self._stopping.set()
                self._started.set()

    def give_up(self, error: BaseException) -> None:
        """End a failed start; should that fail, too, ``error`` gets a note of it."""
        try:
            self.finish(0.0)
        except Exception as second:
            error.add_note(str(second))

    def join(self, seconds: float) -> None:
        """Wait for the end of the thread."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def choose(self, wanted: str | None) -> None:
        """Ask for the worker's device: "cpu", "cuda", "cuda:1", None for any.

        Raises:
            ValueError: the worker has, or will have, another one.
        """
        with self._lock:
            if not self._sent and (wanted is None or self._wanted in (None, wanted)):
                self._wanted = self._wanted or wanted
                self._chosen.set()
                return
            former = self._wanted
        if wanted is None or wanted == former:
            return
        if former is None:
            self._answered.wait(self.settings.connect_timeout)
            former = self.hello.get("device", wanted)  # none: it is dead anyway
        if former.partition(":0")[0] != wanted.partition(":0")[0]:
            raise ValueError(
                f"{self.name} computes on {former}, so {wanted} is not to be had: one "
                "machine has one device, which the first call of device() chooses"
            )

    def request(self, request: dict[str, Any], reason: str) -> Any:
        """Ask the worker's Python half, and wait for its answer.

        Raises:
            ProtocolError: the answer is no msgpack.
        """
        payload = _worker.to_tensor(msgpack.packb(request))
        answer = torch.ops.mycelya.control(self.index, payload, reason)
        return _handshake.decode(_worker.to_bytes(answer))

    def finish(self, grace: float = GRACE_SECONDS) -> None:
        """Stop; print a failure that nobody has seen. May be called again.

        Raises:
            RuntimeError: the provider could not end the worker.
        """
        self._chosen.set()
        state = self.state
        if grace and state == "starting" and torch.ops.mycelya.stats(self.index)[0]:
            # What is queued may fail, and nobody would know.
            self._answered.wait(min(self.settings.connect_timeout, LONGEST_WAIT))
        self.cancel()
        self._stopping.set()
        self.owner = None
        try:
            if state in ALIVE and _logging.wire.isEnabledFor(10):
                _logging.wire.debug("%s\n%s", self.name, _stats.read(self.index))
            # Not the machine that has the index of a dead one by now.
            if self.is_begun and manager.is_at(self.index, self):
                self._tell(torch.ops.mycelya.stop(self.index, grace))
        except BaseException as error:
            self._free(0.0, error)
            raise
        self._free(grace)

    def _free(self, grace: float, first: BaseException | None = None) -> None:
        """Free the backend; should it fail, the ``first`` error gets a note of it."""
        try:
            self.backend.stop(grace)
        except Exception as error:
            if first is None:
                raise
            first.add_note(str(error))
        finally:
            self.join(grace)
            _logging.machine.info("%s: stopped", self.name)

    def _tell(self, text: str) -> None:
        if text:
            line = f"mycelya_torch: {self.name} (mycelya:{self.index}): {text}"
            print(line, file=sys.stderr, flush=True)

    def _cancelled(self) -> NotReady:
        return NotReady(f"machine {self.name} was stopped while it started")

    def _run(self) -> None:
        try:
            self._open()
        except BaseException as error:
            self._failure = error
            self._free(0.0, error)
            if self._stopping.is_set():  # nobody gets the error
                self._tell("\n".join(getattr(error, "__notes__", ())))
            manager.release(self.index, self)
            return
        finally:
            self._started.set()
        # The time that the provider took to start it is its own.
        deadline = time.monotonic() + self.settings.connect_timeout
        _logging.machine.info("%s: starting as mycelya:%d", self.name, self.index)
        try:
            self._chosen.wait(CHOICE_SECONDS)
            self._attach(deadline)
        except Exception as error:
            self._die("the worker did not start", error)
        self._answered.set()
        self._watch()

    def _open(self) -> None:
        """Have the worker started, and make the device usable."""
        settings = self.settings
        self.backend.start(time.monotonic() + settings.connect_timeout)
        args = (settings.timeout, settings.connect_timeout, self._max_inflight)
        args = (*args, self._batching, self.backend.resumable)
        with self._lock:
            if self._stopping.is_set():
                raise self._cancelled()
            torch.ops.mycelya.open(self.index, self.name, *args)
            self.is_begun = True
        _stats.reset(self.index)

    def _attach(self, deadline: float) -> None:
        """Get a connection, say hello, and hand it to the library."""
        sock = self.backend.connect(deadline)
        try:
            with self._lock:
                self._sent = True
            _handshake.limit(sock, deadline)
            sock.sendall(_handshake.pack(self._our_hello()))
            hello = _handshake.check_worker(_handshake.receive_hello(sock, deadline))
            _handshake.check_torch(hello["torch"], "worker")
            if self.hello and hello["session"] != self.hello["session"]:
                raise ProtocolError("the server answered with another session")
            sock.settimeout(None)
            with self._lock:
                if self._stopping.is_set():
                    return
                self.hello = hello
                peer = hello["received"]
                fd = sock.detach()
            torch.ops.mycelya.connect(self.index, fd, hello["cuda"], peer)
        finally:
            sock.close()
        where = (hello["device_name"], hello["pid"])
        _logging.machine.info("%s: connected to %s, process %d", self.name, *where)

    def _our_hello(self) -> dict[str, Any]:
        return {
            "version": _handshake.VERSION,
            "torch": torch.__version__,
            "device": self._wanted,
            "threads": self.backend.threads,
            "timeout": self.settings.timeout,
            "session": self.hello.get("session", b""),
            "received": torch.ops.mycelya.received(self.index) if self.hello else 0,
        }

    def _watch(self) -> None:
        news = ""
        while not self._ended and news not in ("dead", "stopped"):
            news = torch.ops.mycelya.wait_lost(self.index, 3600.0)
            if news == "lost" and self._stopping.is_set():
                time.sleep(_FIRST_DELAY)  # `finish` is about to stop it
            elif news == "lost":
                _logging.machine.warning("%s: the connection is lost", self.name)
                self._redial()
        if news == "dead" and not self._ended and not self._stopping.is_set():
            self._end(self.backend.explain())

    def _redial(self) -> None:
        deadline = time.monotonic() + self.settings.timeout
        delay, last = _FIRST_DELAY, None
        while time.monotonic() < deadline and not self._stopping.is_set():
            try:
                return self._attach(deadline)
            except (AuthenticationError, ProtocolError) as error:
                return self._die("the connection can't be restored", error)
            except Exception as error:
                last = error
            self._stopping.wait(delay * random.uniform(0.8, 1.2))
            delay = min(delay * 2, _LONGEST_DELAY)
        if not self._stopping.is_set():
            limit = f"not restored within {self.settings.timeout:g} s"
            self._die(f"the connection was lost, and {limit}", last)

    def _die(self, what: str, error: BaseException | None) -> None:
        if self._stopping.is_set():
            return
        why = str(error) or type(error).__name__
        if isinstance(error, TimeoutError):
            why = f"no answer within {self.settings.connect_timeout:g} s"
        self._end(". ".join(filter(None, (f"{what}: {why}", self.backend.explain()))))

    def _end(self, reason: str) -> None:
        """Have it dead for this reason, if one is known, and free its backend."""
        self._ended = True
        if reason:
            torch.ops.mycelya.fail(self.index, reason)
        _logging.machine.error("%s: dead. %s", self.name, reason)
        try:
            self.backend.stop(0.0)
        except Exception as error:
            text = ". ".join(filter(None, (reason, str(error))))
            torch.ops.mycelya.fail(self.index, text)
