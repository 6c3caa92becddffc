# SPDX-License-Identifier: Apache-2.0
"""The two trained models, from the cache or by training.

A cache entry is a folder named by a hash of all that decides the weights. It is
made aside and renamed when it is whole, so a killed run leaves nothing that a
later run would use; a damaged entry is found by its files' hashes and made anew.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from tools.tour.corpus import Corpus
from tools.tour.training import Settings, train_experts

INDEX = "index.json"
PARTIAL = ".partial-"
STALE_SECONDS = 3600


@dataclass(frozen=True)
class Experts:
    """Folders of the two models ("prose" and "code"), and how they were made.

    `losses` has (step, bits per byte) by domain; `seconds` is what the training
    took, on the run that did it; `cached` tells whether that was an earlier run.
    """

    folders: dict[str, Path]
    losses: dict[str, list[tuple[int, float]]]
    seconds: float
    cached: bool


def cache_key(settings: Settings, corpus: Corpus) -> str:
    """Hash of settings, versions, text, and the source that trains."""
    source = Path(__file__).with_name("training.py").read_bytes()
    parts = {
        "settings": asdict(settings),
        "versions": [torch.__version__, transformers.__version__],
        "corpus": corpus.digest,
        "source": hashlib.sha256(source).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def prepare_experts(settings: Settings, corpus: Corpus, cache: Path) -> Experts:
    """Read both models from `cache`, or train them and put them there."""
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / cache_key(settings, corpus)
    found = read_entry(folder)
    if found is not None:
        return found
    remove_stale(cache)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=cache))
    try:
        begin = time.perf_counter()
        texts = {domain: corpus.text(domain) for domain in settings.recipes()}
        losses = train_experts(settings, texts, partial)
        seconds = time.perf_counter() - begin
        write_index(partial, losses, seconds)
        if read_entry(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    folders = {domain: folder / domain for domain in texts}
    return Experts(folders, losses, seconds, cached=False)


def write_index(
    folder: Path, losses: dict[str, list[tuple[int, float]]], seconds: float
) -> None:
    """Write the file that makes an entry whole: losses and every file's hash."""
    files = {
        path.relative_to(folder).as_posix(): _hash(path) for path in _files(folder)
    }
    index = {"losses": losses, "seconds": seconds, "files": files}
    with open(folder / INDEX, "w", encoding="utf-8") as file:
        json.dump(index, file)
        file.flush()
        os.fsync(file.fileno())


def read_entry(folder: Path) -> Experts | None:
    """An entry whose files are all as they were written, else None."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        whole = all(_hash(folder / n) == h for n, h in index["files"].items())
        losses = {d: [(s, b) for s, b in rows] for d, rows in index["losses"].items()}
        seconds = float(index["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    folders = {domain: folder / domain for domain in losses}
    return Experts(folders, losses, seconds, cached=True) if whole else None


def remove_stale(cache: Path) -> None:
    """Remove what runs that were killed over an hour ago left behind."""
    for path in cache.glob(f"{PARTIAL}*"):
        if time.time() - path.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
