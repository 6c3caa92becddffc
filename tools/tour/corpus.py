# SPDX-License-Identifier: Apache-2.0
"""The tour's text: Python's own help pages (prose) and its own sources (code).

Decisions:
- Both come with every Python, so the tour has real input without a network.
- The help pages repeat each other: whole sections of `specialnames` are pages of
  their own, and some pages quote a module's docstring. A split by file alone would
  test on sentences that were trained on. Documents that share twelve words in a row
  are therefore put into one group, prose and code together; no group is ever split.
- A held-out group is drawn by the hash of its name, so that the split does not
  depend on the order of files and changes little between Python versions.
"""

import hashlib
import pydoc_data.topics
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SHARED_WORDS = 12
HELD_OUT_SHARE = {"prose": 0.14, "code": 0.10}
LARGEST_HELD_OUT_SHARE = 0.05
CODE_BYTES_PER_FILE = 8_000
CODE_BYTES_MINIMUM = 2_000
CODE_BYTES = 1_000_000


@dataclass(frozen=True)
class Document:
    """One help page or source file: domain ("prose" or "code"), name and text."""

    domain: str
    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out; `digest` is of all text."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    digest: str

    def text(self, domain: str, held_out: bool = False) -> bytes:
        """UTF-8 of one domain's documents, joined by a blank line."""
        documents = self.held_out if held_out else self.train
        return "\n\n".join(d.text for d in documents if d.domain == domain).encode()


def load_documents() -> list[Document]:
    """Every help page, and the head of each top-level module up to 1 MB in all."""
    topics = sorted(pydoc_data.topics.topics.items())
    documents = [Document("prose", name, text) for name, text in topics]
    room = CODE_BYTES
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        raw = file.read_bytes()
        if len(raw) < CODE_BYTES_MINIMUM or room <= 0:
            continue
        text = raw[: min(CODE_BYTES_PER_FILE, room)].decode(errors="ignore")
        documents.append(Document("code", file.name, text))
        room -= len(text.encode())
    return documents


def word_runs(text: str) -> set[str]:
    """Every run of twelve words, with white space made equal."""
    words = text.split()
    starts = range(len(words) - SHARED_WORDS + 1)
    return {" ".join(words[i : i + SHARED_WORDS]) for i in starts}


def group_documents(documents: list[Document]) -> list[list[Document]]:
    """Connected components of "shares a run of twelve words with" (union-find)."""
    parent = list(range(len(documents)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    owner: dict[str, int] = {}
    for i, document in enumerate(documents):
        for run in word_runs(document.text):
            parent[root(i)] = root(owner.setdefault(run, i))
    groups: dict[int, list[Document]] = {}
    for i, document in enumerate(documents):
        groups.setdefault(root(i), []).append(document)
    return list(groups.values())


def _draw(group: list[Document]) -> str:
    first = min(group, key=lambda d: (d.domain, d.name))
    return hashlib.sha256(f"{first.domain}/{first.name}".encode()).hexdigest()


def split_documents(documents: list[Document]) -> Corpus:
    """Hold out whole groups until each domain's share of its characters is reached."""
    total = dict.fromkeys(HELD_OUT_SHARE, 0)
    for document in documents:
        total[document.domain] += len(document.text)
    wanted = {d: share * total[d] for d, share in HELD_OUT_SHARE.items()}
    train: list[Document] = []
    held_out: list[Document] = []
    for group in sorted(group_documents(documents), key=_draw):
        size = {d: sum(len(x.text) for x in group if x.domain == d) for d in total}
        small = all(size[d] <= LARGEST_HELD_OUT_SHARE * total[d] for d in total)
        needed = all(wanted[d] > 0 for d in total if size[d])
        chosen = small and needed
        (held_out if chosen else train).extend(group)
        if chosen:
            wanted = {d: wanted[d] - size[d] for d in total}
    digest = hashlib.sha256(repr((train, held_out)).encode()).hexdigest()
    return Corpus(tuple(train), tuple(held_out), digest)


def load_corpus() -> Corpus:
    """The split that every seed of the tour uses."""
    return split_documents(load_documents())


def cut_windows(text: bytes, count: int, length: int) -> Tensor:
    """`count` windows at equal distances over the text: int64 [count, length]."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    if len(tokens) < length:
        raise ValueError(f"{len(tokens)} bytes hold no window of {length}")
    starts = torch.linspace(0, len(tokens) - length, count).long()
    return torch.stack([tokens[i : i + length] for i in starts.tolist()])


def cut_test_windows(corpus: Corpus, count: int, length: int) -> dict[str, Tensor]:
    """Held-out windows [count, length] of prose, of code, and of text that switches.

    A "switch" window is half code and half prose; every other one starts with prose.
    """
    prose = cut_windows(corpus.text("prose", held_out=True), count, length)
    code = cut_windows(corpus.text("code", held_out=True), count, length)
    half = length // 2
    switch = torch.cat([code[:, :half], prose[:, half:]], 1)
    switch[1::2] = torch.cat([prose[1::2, :half], code[1::2, half:]], 1)
    return {"prose": prose, "code": code, "switch": switch}
