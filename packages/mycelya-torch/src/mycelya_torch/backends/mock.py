# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The worker's loop in a thread of this process: the same bytes, no process."""

import socket
import threading

from mycelya_torch import _worker
from mycelya_torch.backends.base import Backend, Settings


class MockBackend(Backend):
    """For development and tests; the worker draws from a generator of its own."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None

    def start(self, deadline: float) -> None:
        """Start the thread."""
        self._socket, theirs = socket.socketpair()
        options = _worker.Options(own_generator=True, any_folder=True, allow_hub=True)
        name = f"mycelya-worker-{self.settings.machine_id}"
        self._thread = threading.Thread(
            target=_worker.serve_session, args=(theirs, options), name=name, daemon=True
        )
        self._thread.start()

    def connect(self, deadline: float) -> socket.socket:
        """Return our end."""
        if self._socket is None:
            raise RuntimeError("the worker was not started")
        sock, self._socket = self._socket, None
        return sock

    def stop(self, grace: float) -> None:
        """Wait for the thread."""
        if self._socket is not None:
            self._socket.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(grace)
