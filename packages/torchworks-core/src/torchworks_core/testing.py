# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin, tolerances, and tiny models; load it by ``-p``.

``-p torchworks_core.testing`` registers the markers ``critical``, ``fast``, ``slow``
and ``gpu`` (skipped where CUDA is missing), seeds every test, blocks sockets that
leave this machine (in this process, not in its children), and prints the number
of skipped tests. torch and transformers are imported only when needed.
"""

import ipaddress
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from torchworks_core.errors import InvalidValue, TorchworksError, nearest

if TYPE_CHECKING:
    import torch

SEED = 20260101
_MARKERS = {
    "critical": "the few tests that guard the main promises",
    "fast": "the tests of most functions, a few minutes in all",
    "slow": "takes more than a few seconds",
    "gpu": "needs CUDA; skipped with a reason where there is none",
}
_RTOL = {"float64": 1e-7, "float32": 1.3e-6, "bfloat16": 1.6e-2, "float16": 1e-3}
_TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    # Wide enough that each layer clearly changes the output.
    "initializer_range": 0.15,
}
# Every id is a byte of text, so no id may mark a beginning or an end.
_TINY |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"num_key_value_heads": 2, "intermediate_size": 160},
}


class SocketBlocked(TorchworksError, RuntimeError):
    """A test tried to reach another machine."""


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    for name, text in _MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked ``gpu`` where CUDA is missing."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many tests were skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.write_line(f"skipped tests: {len(skipped)}")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed random, numpy and torch, so that no test depends on their order."""
    import numpy as np
    import torch

    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(autouse=True, scope="session")
def block_sockets() -> Iterator[None]:
    """Raise `SocketBlocked` for any address that is not on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto", "sendmsg"):
            patch.setattr(socket.socket, name, _guarded(name))
        for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
            patch.setattr(socket, name, _guarded_lookup(getattr(socket, name)))
        yield


def _guarded(name: str) -> Any:
    original = getattr(socket.socket, name)

    def call(self: socket.socket, *args: Any) -> Any:
        # sendmsg has its address in the fourth place, the others in the last.
        for address in args[3:] if name == "sendmsg" else args[-1:]:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                _refuse(address[0] if isinstance(address, tuple) else address)
        return original(self, *args)

    return call


def _guarded_lookup(original: Any) -> Any:
    def call(host: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse(host)
        return original(host, *args, **kwargs)

    return call


def _refuse(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return
    try:
        address = ipaddress.ip_address(str(name).split("%")[0])
    except ValueError:
        address = None
    mapped = getattr(address, "ipv4_mapped", None) or address
    if mapped is None or not (mapped.is_loopback or mapped.is_unspecified):
        why, do = "tests may not leave this machine", "Serve it on 127.0.0.1"
        raise SocketBlocked(f"connection to {name!r}", why, do)


def tolerance(dtype: "torch.dtype") -> dict[str, float]:
    """Return ``rtol`` and ``atol`` for results of ``dtype``.

    The figures are torch.testing's; an 8-bit float gets one unit in the last
    place, integers and bool get 0.

    Example:
        >>> import torch
        >>> tolerance(torch.float16)
        {'rtol': 0.001, 'atol': 1e-05}
    """
    import torch

    name = str(dtype.to_real()).removeprefix("torch.")
    if name in _RTOL:
        rtol, atol = _RTOL[name], 1e-7 if name == "float64" else 1e-5
    else:
        rtol = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
        atol = rtol and torch.finfo(dtype).smallest_normal
    return {"rtol": rtol, "atol": atol}


def assert_close(actual: Any, expected: Any, **options: Any) -> None:
    """Like ``torch.testing.assert_close``, with the wider `tolerance` of the two.

    Give both ``rtol`` and ``atol``, or neither; other options are passed on.
    """
    import torch

    if "rtol" not in options and "atol" not in options:
        tensors = [x for x in (actual, expected) if isinstance(x, torch.Tensor)]
        found = [tolerance(tensor.dtype) for tensor in tensors]
        options |= max(found, key=lambda t: t["rtol"], default={})
    torch.testing.assert_close(actual, expected, **options)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """Build a small causal language model of a transformers family, in eval mode.

    Args:
        family: ``"gpt2"`` or ``"llama"``.
        seed: For the random weights; torch's generator is left as it was.
        **overrides: Entries of the config, such as ``num_hidden_layers=2``.

    Returns:
        A transformers model: 256 ids, width 64, 4 layers, 4 heads (llama: 2 for
        keys and values), 128 positions, float32 on the CPU.

    Raises:
        InvalidValue: the family is not in the table.
    """
    if family not in _FAMILIES:
        close = nearest(family, _FAMILIES)
        do = f"Did you mean {close!r}?" if close else ""
        raise InvalidValue(f"family {family!r}", f"known: {', '.join(_FAMILIES)}", do)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **_TINY | _FAMILIES[family] | overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def byte_tokenizer(folder: str | os.PathLike) -> None:
    """Write a tokenizer whose ids are the bytes of the text in UTF-8.

    256 entries, no merges, no special tokens; ``AutoTokenizer.from_pretrained``
    reads it without a network.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # GPT-2's alphabet: printable bytes stand for themselves, the others, in their
    # order, for the characters from 256 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    order = sorted(range(256), key=lambda byte: (chr(byte) not in alphabet, byte))
    vocabulary = dict(zip(alphabet, order, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    whole_text = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = whole_text
    tokenizer.decoder = decoders.ByteLevel()
    options = {"tokenizer_object": tokenizer, "clean_up_tokenization_spaces": False}
    PreTrainedTokenizerFast(**options).save_pretrained(folder)


def save_tiny(folder: str | os.PathLike, family: str, **overrides: Any) -> Path:
    """Write `tiny_model` and `byte_tokenizer` into ``folder``, and return it."""
    tiny_model(family, **overrides).save_pretrained(folder)
    byte_tokenizer(folder)
    return Path(folder)
