# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a provider has to do; a new one is one file with one class."""

import abc
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torchworks_core.errors import InvalidValue, nearest


@dataclass(frozen=True)
class Settings:
    """What the user gave, checked as far as no provider is needed for it."""

    machine_id: str
    gpu_type: str | None = None
    address: str | None = None
    token: str | None = field(default=None, repr=False)
    tls_ca: str | None = None
    tls_fingerprint: str | None = None
    insecure: bool = False
    connect_timeout: float = 60.0
    timeout: float = 30.0
    options: Mapping[str, Any] = field(default_factory=dict)


class Backend(abc.ABC):
    """One worker of one machine, from its start to its end.

    All calls but `stop` come from one thread, which lives as long as the machine.
    """

    resumable: ClassVar[bool] = False  # whether `connect` can be called again
    options: ClassVar[tuple[str, ...]] = ()  # names that ``options=`` may have

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        for name in settings.options:
            if name not in self.options:
                close = nearest(name, self.options)
                why = f"known: {', '.join(self.options) or 'none for this provider'}"
                do = f"Did you mean {close!r}?" if close else ""
                raise InvalidValue(f"option {name!r}", why, do)

    @property
    def pid(self) -> int | None:
        """The worker's process, if it is one of this computer."""
        return None

    @property
    def threads(self) -> int:
        """How many threads the worker's operations may use; 0: its own number."""
        return 0

    @abc.abstractmethod
    def start(self, deadline: float) -> None:
        """Have a worker started, up to where failures are quick to see.

        Args:
            deadline: In seconds of `time.monotonic`.

        Raises:
            RuntimeError: it can't be had. Nothing is left running.
        """

    @abc.abstractmethod
    def connect(self, deadline: float) -> socket.socket:
        """Return a socket to the worker, ready for the hello.

        Raises:
            OSError, RuntimeError: it can't be had; the caller may try again.
        """

    def explain(self) -> str:
        """Return what is known about the worker's end, or an empty text."""
        return ""

    @abc.abstractmethod
    def stop(self, grace: float) -> None:
        """Free everything; kill what has not ended after ``grace`` seconds.

        May be called from any thread, more than once, and interrupts `connect`. What
        a `start` gets later is freed by another call.

        Raises:
            RuntimeError: the provider did not do it; to call again may help.
        """
