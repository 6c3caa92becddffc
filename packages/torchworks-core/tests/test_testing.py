# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin in runs of its own, and the tiny models."""

import random
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchworks_core import testing
from torchworks_core.errors import InvalidValue

PLUGIN_RUN = """
import random, socket
import numpy, pytest, torch

def draw():
    return random.random(), numpy.random.rand(), torch.rand(()).item()

seen = []

def test_first():
    seen.append(draw())

def test_second():
    seen.append(draw())
    assert seen[0] == seen[-1]

@pytest.mark.gpu
def test_gpu():
    assert torch.cuda.is_available()

@pytest.mark.slow
@pytest.mark.fast
@pytest.mark.critical
def test_marked():
    pass
"""


def test_plugin_run(tmp_path):
    (tmp_path / "test_it.py").write_text(PLUGIN_RUN)
    command = [sys.executable, "-m", "pytest", "--strict-markers", "-q", "-rs"]
    command += [
        "-p",
        "no:cacheprovider",
        "-p",
        "torchworks_core.testing",
        "-W",
        "error",
    ]
    command += ["--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if torch.cuda.is_available():
        assert "skipped tests: 0" in done.stdout
    else:
        assert "no CUDA device" in done.stdout
        assert "skipped tests: 1" in done.stdout


def test_seed_is_set_before_each_test(seed):
    found = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    assert found == (random.random(), np.random.rand(), torch.rand(()).item())


@pytest.mark.critical
@pytest.mark.parametrize("host", ["203.0.113.1", "example.org", "10.0.0.1"])
@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_socket_guard_blocks_connections(host, method):
    with socket.socket() as sock:
        sock.settimeout(0.2)
        with pytest.raises(testing.SocketBlocked, match=r"127\.0\.0\.1"):
            getattr(sock, method)((host, 80))


def test_socket_guard_blocks_the_rest():
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with udp, pytest.raises(testing.SocketBlocked):
        udp.sendto(b"x", ("203.0.113.1", 9))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with udp, pytest.raises(testing.SocketBlocked):
        udp.sendto(b"x", 0, ("203.0.113.1", 9))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with udp, pytest.raises(testing.SocketBlocked):
        udp.sendmsg([b"x"], [], 0, ("203.0.113.1", 9))
    six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with six, pytest.raises(testing.SocketBlocked):
        six.connect(("2001:db8::1", 9))
    for lookup in (socket.gethostbyname, socket.gethostbyname_ex):
        with pytest.raises(testing.SocketBlocked):
            lookup("example.org")
    for host in ("example.org", b"example.org"):
        with pytest.raises(testing.SocketBlocked):
            socket.getaddrinfo(host, 80)
    with pytest.raises(testing.SocketBlocked):
        socket.create_connection(("example.org", 80), timeout=0.2)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_allowed(host):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection((host, port), timeout=5) as client:
            client.sendall(b"x")
    assert socket.getaddrinfo(None, 80)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        assert udp.sendto(b"x", ("127.0.0.1", port)) == 1


@pytest.mark.parametrize("host", ["::1", "::ffff:127.0.0.1", "0.0.0.0", "fe80::1%lo"])
def test_which_addresses_are_loopback(host):
    if host.startswith("fe80"):
        with pytest.raises(testing.SocketBlocked):
            testing._refuse(host)
    else:
        testing._refuse(host)


def test_unix_sockets_are_allowed(tmp_path):
    path = str(tmp_path / "s")
    with (
        socket.socket(socket.AF_UNIX) as server,
        socket.socket(socket.AF_UNIX) as client,
    ):
        server.bind(path)
        server.listen()
        client.connect(path)


def test_tolerance_and_assert_close():
    assert testing.tolerance(torch.int64) == {"rtol": 0.0, "atol": 0.0}
    assert testing.tolerance(torch.float8_e4m3fn)["rtol"] == 0.125
    one = torch.ones(3)
    testing.assert_close(one, one + 1e-6)
    with pytest.raises(AssertionError):
        testing.assert_close(one, one + 1e-3)
    testing.assert_close(one, (one + 1e-3).to(torch.bfloat16), check_dtype=False)
    testing.assert_close(one, one + 0.1, rtol=0.2, atol=0)
    with pytest.raises(AssertionError):
        testing.assert_close(torch.tensor([1]), torch.tensor([2]))
    testing.assert_close([1.0], [1.0])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tiny_model(family):
    state = torch.random.get_rng_state()
    model = testing.tiny_model(family)
    assert torch.equal(state, torch.random.get_rng_state())
    ids = torch.arange(0, 256, 8)[None]
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
    assert found.logits.shape == (1, 32, 256)
    for before, after in zip(
        found.hidden_states, found.hidden_states[1:], strict=False
    ):
        assert (after - before).norm() > 0.2 * before.norm()
    same, other = testing.tiny_model(family), testing.tiny_model(family, seed=1)
    pairs = list(zip(model.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(model(ids).logits, other(ids).logits)
    small = testing.tiny_model(family, num_hidden_layers=2, hidden_size=32)
    assert small.config.num_hidden_layers == 2
    assert small.get_input_embeddings().weight.shape == (256, 32)


def test_unknown_family():
    with pytest.raises(InvalidValue, match="Did you mean 'llama'"):
        testing.tiny_model("lama")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_save_tiny_is_read_back_by_transformers(tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = testing.save_tiny(tmp_path / "m", family, num_hidden_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "  h\u00e9llo w\u00f6rld ,\n\t'tis <s> \u6f22\u5b57 \U0001f600 \x00\x7f . "
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert len(tokenizer) == 256
    assert tokenizer.all_special_ids == []
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([list(b"abc")])
    again = testing.tiny_model(family, num_hidden_layers=1)
    testing.assert_close(model(ids).logits, again(ids).logits)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_every_byte_survives_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    testing.byte_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "".join(map(chr, range(0x800)))
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    offsets = tokenizer("a\u00e9b", return_offsets_mapping=True).offset_mapping
    assert [end for _, end in offsets][-1] == 3
