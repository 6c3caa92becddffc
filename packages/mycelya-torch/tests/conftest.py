# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Machines: one for each module, and at most two workers at a time."""

import json
import os
import secrets
import subprocess
import sys

import pytest

from mycelya_torch import RemoteMachine


@pytest.fixture(scope="module")
def machine():
    """A worker process of this module."""
    with RemoteMachine("local") as running:
        yield running


@pytest.fixture(scope="module", params=["local", "mock"])
def both(request):
    """A machine of each kind that needs nothing from outside."""
    with RemoteMachine(request.param) as running:
        yield running


@pytest.fixture
def device(machine):
    return machine.device()


@pytest.fixture(scope="session")
def token():
    return secrets.token_urlsafe(32)


class ServerProcess:
    """``python -m mycelya_torch.server`` on the loopback."""

    def __init__(self, token, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mycelya_torch.server", *arguments],
            env={**os.environ, "MYCELYA_TOKEN": token},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.ready = json.loads(self.process.stdout.readline() or "{}")
        self.address = self.ready.get("address")
        self.log = ""

    def stop(self):
        """Terminate it; return the exit status."""
        if not self.process.stdout.closed:
            self.process.terminate()
            self.log += self.process.communicate(timeout=20)[1]
        return self.process.wait()


@pytest.fixture(scope="module")
def serve(token):
    """A function: start a server with these arguments."""
    started = []

    def start(*arguments, token=token):
        started.append(ServerProcess(token, *arguments))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Paths of a certificate for localhost and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    command += ["-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    return cert, key
