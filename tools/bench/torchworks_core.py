# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and headers of the core against the safetensors library.

`save` also hashes the weights and waits for the disk, which the library's
save_file does not; so it is compared with save_file alone and with save_file
followed by the same two steps. load_file gives tensors that are still on the
disk; so both sides copy what they read.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file

from torchworks_core import bench, checkpoint


def rows() -> Iterable[dict]:
    """Yield all rows; about half a minute."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield from saving(folder)
        yield from loading(folder)
        yield from headers(folder)


def saving(folder: Path) -> Iterable[dict]:
    """Time `save` of 100 MB."""
    tensors = {f"layer.{n}": torch.randn(512, 1024) for n in range(50)}
    path = folder / "peer.safetensors"

    def ours() -> None:
        checkpoint.save(folder, tensors, {})

    def peer() -> None:
        save_file(tensors, path)

    def peer_synced() -> None:
        save_file(tensors, path)
        with open(path, "r+b") as file:
            hashlib.file_digest(file, "sha256")
            os.fsync(file.fileno())

    found = bench.compare(ours, peer, repeats=9, warmup=1)
    yield seconds("save 100 MB", found, "safetensors.torch.save_file")
    yield ratio("save 100 MB", found, "save_file, which neither hashes nor syncs")
    found = bench.compare(ours, peer_synced, repeats=9, warmup=1)
    yield ratio("save 100 MB", found, "save_file, then sha256 and fsync")


def loading(folder: Path) -> Iterable[dict]:
    """Time `load` of what `saving` wrote, from the page cache."""

    def peer() -> dict:
        return {k: v.clone() for k, v in load_file(folder / "peer.safetensors").items()}

    for verify in (True, False):

        def ours(verify: bool = verify) -> tuple:
            return checkpoint.load(folder, verify=verify)

        found = bench.compare(ours, peer, repeats=9, warmup=1)
        what = f"load 100 MB, verify={verify}"
        yield seconds(what, found, "safetensors.torch.load_file and a copy")
        yield ratio(what, found, "safetensors.torch.load_file and a copy")


def headers(folder: Path) -> Iterable[dict]:
    """Time the header of 10,000 small tensors."""
    path = folder / "many.safetensors"
    save_file({f"layer.{n}.weight": torch.zeros(4) for n in range(10_000)}, path)

    def peer() -> list[str]:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.keys()

    found = bench.compare(
        lambda: checkpoint.read_header(path), peer, repeats=15, warmup=2
    )
    yield seconds("read_header, 10,000 tensors", found, "safetensors.safe_open")
    yield ratio("read_header, 10,000 tensors", found, "safetensors.safe_open")


def seconds(measure: str, found: bench.Comparison, peer: str) -> dict:
    """Return the row of absolute times."""
    note = f"peer {found.b_median * 1000:.3g} ms"
    value = found.a_median * 1000
    return {
        "measure": measure,
        "value": value,
        "unit": "ms",
        "peer": peer,
        "note": note,
    }


def ratio(measure: str, found: bench.Comparison, peer: str) -> dict:
    """Return the row of the ratio with its interval."""
    note = f"{found.coverage:.1%} interval {found.low:.2f} to {found.high:.2f}"
    unit = "times the peer's time"
    return {
        "measure": measure,
        "value": found.ratio,
        "unit": unit,
        "peer": peer,
        "note": note,
    }
