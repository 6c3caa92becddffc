# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""`RemoteMachine`: a worker somewhere, seen as a PyTorch device."""

import atexit
import contextlib
import enum
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from mycelya_torch import _stats
from mycelya_torch._device import ALIVE, manager
from torchworks_core.errors import InvalidValue, MissingFile, NotReady, nearest

if TYPE_CHECKING:
    from mycelya_torch._life import Life

TOKEN_VARIABLE = "MYCELYA_TOKEN"
_LAST_SECONDS = 20.0


class CloudProvider(enum.StrEnum):
    """Where a worker can run."""

    LOCAL = "local"
    MOCK = "mock"
    TCP = "tcp"
    MODAL = "modal"


class GPUType(enum.StrEnum):
    """The GPUs that a cloud provider can be asked for."""

    T4 = "T4"
    L4 = "L4"
    A10G = "A10G"
    A100 = "A100"
    A100_40GB = "A100-40GB"
    A100_80GB = "A100-80GB"
    L40S = "L40S"
    H100 = "H100"
    H200 = "H200"
    B200 = "B200"


class RemoteMachine:
    """A worker that holds tensors and computes on them; a device for PyTorch.

    It starts at construction and takes some seconds until it computes; the device
    can be used at once. ``stop()``, the end of a ``with`` block or of the program
    ends it.

    Args:
        provider: ``"local"`` (a process on this computer), ``"mock"`` (a thread of
            this process), ``"tcp"`` (``python -m mycelya_torch.server`` somewhere)
            or ``"modal"``; or a `CloudProvider`.
        gpu_type: A `GPUType` or its value; modal needs one, mock ignores it, for
            the others it must be None.
        start: False: only `start` starts it.
        batching: False: send every operation by itself, for debugging.
        address: ``"host:port"`` of the server, for tcp.
        token: The server's token, for tcp. Else ``token_file`` is read, else the
            environment's ``MYCELYA_TOKEN``.
        token_file: A file that holds the token.
        tls_ca: A file of certificates to trust instead of the system's.
        tls_fingerprint: SHA-256 of the server's certificate, in hex: trust it alone.
        insecure: Allow an address elsewhere without TLS.
        connect_timeout: Seconds that the worker may take until it answers.
        timeout: Seconds of silence after which a worker is dead, and within which
            a cut connection is restored (tcp, modal); at most 600.
        max_inflight_bytes: Limit of what waits to be sent.
        options: What only one provider knows. local: ``python``, ``threads``;
            modal: ``image``, ``package``, ``region``, ``cpu``, ``memory``,
            ``sandbox_timeout``.

    Raises:
        ValueError: an argument can't be used; nothing was started.
        ImportError: modal without the extra ``mycelya-torch[modal]``.
        AuthenticationError: the server at ``address`` has another token.
        RuntimeError: the worker can't be had.

    Example:
        >>> RemoteMachine("modal", "A10")
        Traceback (most recent call last):
            ...
        torchworks_core.errors.InvalidValue: gpu_type 'A10': known: T4, L4, A10G, ...
    """

    def __init__(
        self,
        provider: str | CloudProvider,
        gpu_type: str | GPUType | None = None,
        *,
        start: bool = True,
        batching: bool = True,
        address: str | None = None,
        token: str | None = None,
        token_file: str | os.PathLike | None = None,
        tls_ca: str | os.PathLike | None = None,
        tls_fingerprint: str | None = None,
        insecure: bool = False,
        connect_timeout: float = 60.0,
        timeout: float = 30.0,
        max_inflight_bytes: int = 64 << 20,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.provider = _member(CloudProvider, provider, "provider")
        self.gpu_type = _gpu(self.provider, gpu_type)
        tcp = self.provider is CloudProvider.TCP
        tls = (tls_ca, tls_fingerprint)
        if not tcp and (any((address, token, token_file, *tls)) or insecure):
            why = "address, token, token_file, tls_* and insecure are for 'tcp' only"
            raise InvalidValue(f"provider {self.provider.value!r}", why)
        if tcp:
            address = _address(address)
            token = _token(token, token_file)
            _check_tls(tls, insecure)
        from mycelya_torch._handshake import LONGEST_TIMEOUT

        self.machine_id = f"{self.provider.value}-{secrets.token_hex(2)}"
        self._settings = {
            "machine_id": self.machine_id,
            "gpu_type": self.gpu_type.value if self.gpu_type else None,
            "address": address,
            "token": token,
            "tls_ca": None if tls_ca is None else os.fspath(tls_ca),
            "tls_fingerprint": tls_fingerprint,
            "insecure": insecure,
            "connect_timeout": _seconds("connect_timeout", connect_timeout, 86400),
            "timeout": _seconds("timeout", timeout, LONGEST_TIMEOUT),
            "options": dict(options or {}),
        }
        self._batching = bool(batching)
        self._max_inflight = _bytes("max_inflight_bytes", max_inflight_bytes)
        self._lock = threading.RLock()
        self._life: Life | None = None
        self._backend = self._make_backend()
        _machines.add(self)
        if start:
            self.start()

    def start(self) -> None:
        """Start the worker, unless it runs; after `stop`, a new one.

        Raises:
            RuntimeError: it can't be had, or this process is a fork's child.
        """
        from mycelya_torch._life import Life

        with self._lock:
            if self.is_running:
                return
            if torch.ops.mycelya.in_bad_fork():
                do = "Use multiprocessing's start method 'spawn'"
                raise NotReady("a machine can't start after a fork", "", do)
            self.stop()  # what is left of a dead one
            backend = self._backend or self._make_backend()
            self._backend = None  # one backend serves one life
            inflight = self._max_inflight
            life = Life(backend, batching=self._batching, max_inflight=inflight)
            self._life = life  # so that `stop` and the program's end find it
            try:
                life.begin(self)
                _seed(life.index)
            except BaseException as error:
                life.give_up(error)
                self._life = None
                raise

    def stop(self) -> None:
        """Send what is queued, end the worker, and free what it holds.

        A failure on the worker that nobody has seen is printed to stderr. Tensors
        of the machine keep their metadata; everything else on them raises. A
        `start` in another thread fails.

        Raises:
            RuntimeError: the provider could not end the worker; to try again may help.
        """
        starting = self._life
        if starting is not None:
            starting.cancel()
        with self._lock:
            if self._life is not None:
                self._life.finish()
                self._life = None

    def device(self, type: str | None = None, index: int = 0) -> torch.device:
        """Return the device whose tensors live on this machine.

        Args:
            type: What the worker computes on: ``"cuda"``, ``"cpu"``, or None for
                CUDA where it has it. One machine has one; the first call chooses.
            index: Which CUDA device of the worker.

        Raises:
            ValueError: the arguments can't be used, or another device is in use.
            RuntimeError: the machine is not running.
        """
        if type not in (None, "cuda", "cpu"):
            raise InvalidValue(f"type {type!r}", "known: 'cuda', 'cpu' and None")
        if not isinstance(index, int) or index < 0 or (type == "cpu" and index):
            why = "it counts the worker's CUDA devices from 0; 'cpu' has only 0"
            raise InvalidValue(f"index {index!r}", why)
        life = self._running()
        wanted = f"cuda:{index}" if type == "cuda" or index else type
        life.choose(wanted)
        return torch.device("mycelya", life.index)

    def synchronize(self) -> None:
        """Wait until all that was asked for is done; raise what failed."""
        torch.ops.mycelya.synchronize(self._running().index, "synchronize")

    def stats(self) -> _stats.MachineStats:
        """Return the counts since the start or the last `reset_stats`."""
        return _stats.read(self._running().index)

    def reset_stats(self) -> None:
        """Begin to count anew."""
        _stats.reset(self._running().index)

    @property
    def is_running(self) -> bool:
        """Whether it runs, starts, or restores its connection."""
        return self._life is not None and self._life.state in ALIVE

    @property
    def worker_pid(self) -> int | None:
        """The worker's process if it is local, else None."""
        return self._life.backend.pid if self._life else None

    def _make_backend(self) -> Any:
        from mycelya_torch.backends import Settings, make

        return make(self.provider.value, Settings(**self._settings))

    def _running(self) -> "Life":
        if self._life is None or self._life.state in ("new", "stopped"):
            what = f"machine {self.machine_id} is stopped"
            raise NotReady(what, "", "start() starts a new worker")
        return self._life

    def __enter__(self) -> "RemoteMachine":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        gpu = f", {self.gpu_type.value!r}" if self.gpu_type else ""
        state = self._life.state if self._life else "stopped"
        place = f" mycelya:{self._life.index}" if self._life else ""
        name = f"RemoteMachine({self.provider.value!r}{gpu})"
        return f"<{name} {self.machine_id}{place} {state}>"


def get_all_machines() -> list[RemoteMachine]:
    """Return the machines that run, in the order of their devices."""
    lives = dict(manager.alive())
    found = {id(m._life): m for m in list(_machines) if m._life is not None}
    return [found[id(life)] for life in lives.values() if id(life) in found]


_machines: "weakref.WeakSet[RemoteMachine]" = weakref.WeakSet()


def _member(kind: type[enum.Enum], value: Any, name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        known = [str(member.value) for member in kind]
        close = nearest(str(value), known)
        do = f"Did you mean {close!r}?" if close else ""
        raise InvalidValue(
            f"{name} {value!r}", f"known: {', '.join(known)}", do
        ) from None


def _gpu(provider: CloudProvider, gpu_type: Any) -> GPUType | None:
    known = ", ".join(gpu.value for gpu in GPUType)
    if gpu_type is None:
        if provider is CloudProvider.MODAL:
            raise InvalidValue("gpu_type None", f"modal needs one of: {known}")
        return None
    gpu = _member(GPUType, gpu_type, "gpu_type")
    if provider in (CloudProvider.LOCAL, CloudProvider.TCP):
        why = f"{provider.value!r} uses what the worker's computer has"
        raise InvalidValue(f"gpu_type {gpu.value!r}", why, "Leave it out")
    return gpu


def _address(address: str | None) -> str:
    host, _, port = str(address or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        why = "tcp needs address='host:port', as the server prints it"
        raise InvalidValue(f"address {address!r}", why)
    return str(address)


def _token(token: str | None, token_file: Any) -> str:
    from mycelya_torch._handshake import check_token

    if token and token_file:
        raise InvalidValue("token and token_file", "both are given", "Give one")
    if token_file:
        try:
            token = Path(token_file).read_text()
        except OSError as error:
            what = f"token_file {os.fspath(token_file)!r}"
            raise MissingFile(what, error.strerror or str(error)) from error
        except UnicodeDecodeError:
            what = f"token_file {os.fspath(token_file)!r}"
            raise InvalidValue(what, "it holds no text in UTF-8") from None
    token = token or os.environ.get(TOKEN_VARIABLE)
    if not token:
        do = f"Give token= or token_file=, or set {TOKEN_VARIABLE}"
        raise InvalidValue("no token", "tcp needs the server's token", do)
    return check_token(token)


def _check_tls(tls: tuple[Any, Any], insecure: bool) -> None:
    ca, fingerprint = tls
    if insecure and (ca or fingerprint):
        why = "it turns TLS off, and tls_ca and tls_fingerprint turn it on"
        raise InvalidValue("insecure=True", why)
    if ca is not None and not Path(ca).is_file():
        raise MissingFile(f"tls_ca {os.fspath(ca)!r}", "there is no such file")
    digits = str(fingerprint or "0" * 64).replace(":", "")
    if len(digits) != 64 or set(digits.lower()) - set("0123456789abcdef"):
        why = "a SHA-256 has 64 hexadecimal digits"
        raise InvalidValue(f"tls_fingerprint {fingerprint!r}", why)


def _seconds(name: str, value: Any, most: float) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= most:
        why = f"it has to be more than 0 and at most {most:g} s"
        raise InvalidValue(f"{name}={value!r}", why, f"Use {most:g} or less")
    return float(value)


def _bytes(name: str, value: Any) -> int:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if not is_number or not 1 << 16 <= value < 1 << 62:
        raise InvalidValue(f"{name}={value!r}", "it has to be 65536 or more")
    return value


def _seed(index: int) -> None:
    """Give a new worker the seed of the last ``torch.manual_seed``, if any."""
    from mycelya_torch import _backend_hooks

    _backend_hooks.seed_new(index)


def _stop_all() -> None:
    lives = [machine._life for machine in list(_machines)]
    for machine in list(_machines):
        try:
            machine.stop()
        except BaseException as error:  # also Ctrl-C: the others must not run on
            why = str(error) or type(error).__name__
            text = f"mycelya_torch: {machine.machine_id}: {why}"
            print(text, file=sys.stderr, flush=True)
    for life in manager.starting():
        # A start that was given up: what it still gets is to be freed.
        with contextlib.suppress(KeyboardInterrupt):
            life.join(_LAST_SECONDS)
    with contextlib.suppress(KeyboardInterrupt):
        for life in lives:
            if life is not None:
                life.join(_LAST_SECONDS)
        _stats.end_threads(_LAST_SECONDS)


def _forget_all() -> None:
    """Make a fork's child leave the parent's machines alone."""
    manager.forget()
    _stats.forget()
    for machine in list(_machines):
        machine._lock = threading.RLock()
        machine._life = None


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_forget_all)
