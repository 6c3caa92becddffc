# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""A worker in a Modal sandbox: our server behind a tunnel, which ends TLS.

All that is asked of the ``modal`` module stands in the functions at the end.
"""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mycelya_torch import _tls
from mycelya_torch._errors import AuthenticationError
from mycelya_torch.backends.base import Backend, Settings
from mycelya_torch.backends.tcp import open_socket, prove_over_tls
from torchworks_core.errors import InvalidValue, MissingExtra, NotReady

APP = "mycelya-torch"
PORT = 8765
# Seconds without a client after which the server in the sandbox ends, and with it the
# sandbox: nobody else would end it, and pay no longer, once the client is gone.
IDLE_SECONDS = 180
_DELAY = 0.5
_DAY = 24 * 3600
_LEFT = (
    "The sandbox may still be running, and cost money: call stop() again, or end it in "
    f"Modal's dashboard; by itself it ends {IDLE_SECONDS} s after its client"
)
_LOGIN = (
    "Run `modal setup`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET as Modal's "
    "settings page shows them"
)


class ModalBackend(Backend):
    """Options: see `RemoteMachine`; ``image`` and ``package`` replace ours.

    ``package`` is a requirement, or the file of an sdist or wheel of this package.
    """

    resumable = True
    options = ("image", "package", "region", "cpu", "memory", "sandbox_timeout")

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        seconds = settings.options.get("sandbox_timeout", _DAY)
        if type(seconds) is not int or not 0 < seconds <= _DAY:
            what = f"option sandbox_timeout={seconds!r}"
            raise InvalidValue(what, f"it has to be an int from 1 to {_DAY} s")
        self._seconds = seconds
        self._modal = find_modal()
        self._token = secrets.token_urlsafe(32)
        self._sandbox: Any = None
        self._address: tuple[str, int] | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # of `stop`: one of them ends the sandbox

    def start(self, deadline: float) -> None:
        """Have the image built and the sandbox made; Modal does so in its own time."""
        given = self.settings
        try:
            app = find_app(self._modal)
            image = given.options.get("image") or make_image(
                self._modal, given.options.get("package")
            )
            secret = make_secret(self._modal, self._token)
            self._check_wanted()
            self._sandbox = make_sandbox(
                self._modal,
                app,
                image,
                secret,
                gpu=given.gpu_type or "",
                seconds=self._seconds,
                options=given.options,
            )
        except NotReady:
            raise
        except Exception as error:
            raise self._explained(error) from error
        try:
            self._check_wanted()
        except NotReady as error:
            # `stop` came while Modal worked, and had nothing to end yet.
            try:
                self.stop(0.0)
            except NotReady as second:
                error.add_note(str(second))
            raise

    def connect(self, deadline: float) -> socket.socket:
        """Dial through the tunnel until the server in the sandbox answers."""
        while True:
            self._check_wanted()
            if ended := self.explain():
                raise NotReady(ended)
            try:
                return self._dial(deadline)
            except AuthenticationError:
                raise
            except OSError as error:
                if time.monotonic() + _DELAY > deadline:
                    raise TimeoutError(str(error)) from error
            self._stopped.wait(_DELAY)

    def explain(self) -> str:
        """Return how the sandbox ended, if it did."""
        sandbox = self._sandbox
        if sandbox is None:
            return ""
        try:
            status = poll(sandbox)
        except Exception as error:
            return str(self._explained(error))
        if status is None:
            return ""
        return (
            f"the Modal sandbox with GPU {self.settings.gpu_type} ended with status "
            f"{status}: by its time limit (options['sandbox_timeout']), or its output "
            "in Modal's dashboard tells why"
        )

    def stop(self, grace: float) -> None:
        """Terminate the sandbox; it is tried again if called again after a failure."""
        self._stopped.set()
        with self._lock:
            if self._sandbox is None:
                return
            try:
                terminate(self._sandbox)
            except Exception as error:
                raise self._explained(error, _LEFT) from error
            self._sandbox = None

    def _check_wanted(self) -> None:
        if self._stopped.is_set():
            raise NotReady(f"machine {self.settings.machine_id} is stopped")

    def _dial(self, deadline: float) -> socket.socket:
        if self._address is None:
            left = max(deadline - time.monotonic(), 1.0)
            try:
                self._address = find_tunnel(self._sandbox, left)
            except Exception as error:
                raise self._explained(error) from error
        host, port = self._address
        sock = open_socket(host, port, deadline)
        try:
            tls = _tls.wrap_client(sock, host, self.settings.tls_ca, None)
            # The tunnel's certificate is not the server's: it binds nothing.
            return prove_over_tls(tls, self._token, b"", deadline)
        except BaseException:
            sock.close()
            raise

    def _explained(self, error: Exception, do: str = "") -> NotReady:
        text = str(error) or type(error).__name__
        what = f"Modal, GPU {self.settings.gpu_type}"
        if is_login(self._modal, error):
            do = f"{_LOGIN}. {do}" if do else _LOGIN
        return NotReady(what, f"{type(error).__name__}: {text}", do)


def find_modal() -> Any:
    """Return the ``modal`` module.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import modal
    except ImportError as error:
        do = "pip install 'mycelya-torch[modal]'"
        raise MissingExtra("provider 'modal'", "modal is missing", do) from error
    return modal


def find_app(modal: Any) -> Any:
    """Return our app, which is created if it is missing."""
    return modal.App.lookup(APP, create_if_missing=True)


def make_image(modal: Any, package: str | os.PathLike | None) -> Any:
    """Return an image with this Python, this torch and this package.

    torch comes first: the package is built against the one that is there.
    """
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    release = torch.__version__.partition("+")[0]
    image = modal.Image.debian_slim(python_version=python).apt_install("g++")
    image = image.pip_install(f"torch=={release}", "setuptools", "ninja")
    package = package or f"mycelya-torch=={metadata.version('mycelya-torch')}"
    if not Path(package).is_file():
        return image.pip_install(str(package), extra_options="--no-build-isolation")
    inside = f"/packages/{Path(package).name}"
    image = image.add_local_file(os.fspath(package), inside, copy=True)
    return image.run_commands(f"pip install --no-build-isolation {inside}")


def make_secret(modal: Any, token: str) -> Any:
    """Return the token as a Modal secret."""
    return modal.Secret.from_dict({"MYCELYA_TOKEN": token})


def make_sandbox(
    modal: Any,
    app: Any,
    image: Any,
    secret: Any,
    *,
    gpu: str,
    seconds: int,
    options: Mapping[str, Any],
) -> Any:
    """Start our server in a sandbox. Only Modal's tunnel reaches it."""
    command = ["python", "-m", "mycelya_torch.server", "--bind", "0.0.0.0"]
    command += ["--port", str(PORT), "--insecure", "--allow-hub"]
    command += ["--exit-when-idle", str(IDLE_SECONDS)]
    known = {
        name: options[name] for name in ("region", "cpu", "memory") if name in options
    }
    return modal.Sandbox.create(
        *command,
        app=app,
        image=image,
        secrets=[secret],
        gpu=gpu,
        timeout=seconds,
        encrypted_ports=[PORT],
        **known,
    )


def find_tunnel(sandbox: Any, seconds: float) -> tuple[str, int]:
    """Return host and port at which the tunnel speaks TLS."""
    return sandbox.tunnels(timeout=max(int(seconds), 1))[PORT].tls_socket


def poll(sandbox: Any) -> int | None:
    """Return the exit status of a sandbox, None while it runs."""
    return sandbox.poll()


def terminate(sandbox: Any) -> None:
    """End a sandbox."""
    sandbox.terminate()


def is_login(modal: Any, error: Exception) -> bool:
    """Return whether the credentials are missing or refused."""
    return isinstance(error, modal.exception.AuthError)
