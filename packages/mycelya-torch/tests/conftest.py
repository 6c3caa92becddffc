# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Machines: one for each module, and at most two workers at a time."""

import datetime
import ipaddress
import json
import os
import secrets
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

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
    """Paths of a certificate for localhost, signed by itself, and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    secret = ec.generate_private_key(ec.SECP256R1())
    public = secret.public_key()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    # All that a strict verifier asks of a certificate that it trusts by itself.
    extensions = [
        (x509.SubjectAlternativeName([x509.DNSName("localhost"), loopback]), False),
        (x509.BasicConstraints(ca=True, path_length=None), True),
        (x509.SubjectKeyIdentifier.from_public_key(public), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(public), False),
    ]
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(name, name, public, x509.random_serial_number())
    builder = builder.not_valid_before(now - day).not_valid_after(now + day)
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    signed = builder.sign(secret, hashes.SHA256())
    cert.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(cert), str(key)
