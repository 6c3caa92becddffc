# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""A worker process on this computer, over an inherited socketpair."""

import os
import socket
import subprocess
import sys
import tempfile
from typing import Any

import torch

from mycelya_torch import _worker
from mycelya_torch.backends.base import Backend, Settings
from torchworks_core.errors import InvalidValue, NotReady

TAIL_LINES = 20


class LocalBackend(Backend):
    """Options: ``python`` (an interpreter with torch) and ``threads``."""

    options = ("python", "threads")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._python = os.fspath(settings.options.get("python") or sys.executable)
        self._threads = settings.options.get("threads")
        if self._threads is not None and (
            type(self._threads) is not int or self._threads < 1
        ):
            why, do = "it is no number of threads", "Use an int from 1"
            raise InvalidValue(f"option threads={self._threads!r}", why, do)
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._output: Any = None

    @property
    def pid(self) -> int | None:
        """The worker's process."""
        return self._process.pid if self._process else None

    @property
    def threads(self) -> int:
        """As many as the client has: another number changes the last bits."""
        return self._threads or torch.get_num_threads()

    def start(self, deadline: float) -> None:
        """Start the process; it imports torch while the program goes on."""
        self._socket, theirs = socket.socketpair()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as we do
        fd = theirs.fileno()
        options = _worker.Options(parent=os.getpid(), any_folder=True, allow_hub=True)
        command = _worker.command(self._python, fd, options)
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[fd],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                # Ctrl-C in the terminal is for the program, not for its worker.
                process_group=0,
            )
        except (OSError, ValueError) as error:
            self._socket.close()
            self._output.close()
            what = f"the worker of {self.settings.machine_id} can't be started"
            raise NotReady(what, str(error), "Check options['python']") from error
        finally:
            theirs.close()

    def connect(self, deadline: float) -> socket.socket:
        """Return our end; the worker reads it as soon as it has imported torch."""
        if self._socket is None:
            raise RuntimeError("the worker was not started")
        sock, self._socket = self._socket, None
        return sock

    def explain(self) -> str:
        """Return a failed worker's exit status and the last lines of its output."""
        if self._process is None or self._output.closed:
            return ""
        try:
            status = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return ""
        try:
            size = os.fstat(self._output.fileno()).st_size
            data = os.pread(self._output.fileno(), 16384, max(0, size - 16384))
        except (OSError, ValueError):  # stop() closed it meanwhile
            return ""
        lines = data.decode("utf-8", "replace").splitlines()[-TAIL_LINES:]
        text = f"the worker process exited with status {status}"
        if lines:
            text += "; the last lines of its output:\n" + "\n".join(lines)
        return text if status else ""

    def stop(self, grace: float) -> None:
        """Wait for the process, then kill it."""
        if self._socket is not None:
            self._socket.close()
        if self._process is None:
            return
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()
