# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The worker's half of `load_huggingface_state_dicts`: safetensors files only.

``list`` finds the files, ``load`` reads one of them, ``describe`` names what was
read, ``adopt`` gives it the client's storage ids. Until then nothing is the client's,
so one bad file means that nothing is loaded. ``forget`` is for a client that was
interrupted: it drops what was read, or says that it has been adopted.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mycelya_torch._worker import Options

_INDEX = ".safetensors.index.json"
_MAX_JSON = 64 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_EMBEDDINGS = (
    "wte.weight",
    "embed_tokens.weight",
    "embed_in.weight",
    "word_embeddings.weight",
)
_HEADS = ("lm_head.weight", "embed_out.weight")
_HEADED_MODELS = ("ForCausalLM", "LMHeadModel")


class Loader:
    """What one client is loading; a new ``list`` forgets what was not adopted."""

    def __init__(self, options: "Options", device: torch.device) -> None:
        self._options, self._device = options, device
        self._token = 0
        self._adopted: set[int] = set()
        self._files: list[tuple[str, Path]] = []  # folder in the repository, file
        self._folder = Path()
        self._dicts: dict[str, dict[str, torch.Tensor]] = {}
        self._bytes = 0

    def find(self, request: dict[str, Any]) -> dict[str, Any]:
        """Find the files of a repository."""
        repo_id, path = str(request["repo_id"]), str(request["path"])
        folder, root = self._locate(repo_id, path, request["revision"])
        self._forget()
        self._token += 1
        self._folder = folder
        self._files = find_files(folder, root)
        if not self._files:
            raise ValueError(_nothing(repo_id, folder))
        return {"token": self._token, "files": len(self._files)}

    def load(self, request: dict[str, Any], room: int | None) -> None:
        """Read one file; ``room`` is how many bytes there are left."""
        self._check(request)
        where, file = self._files[request["file"]]
        self._bytes += file.stat().st_size
        if room is not None and self._bytes > room:
            self._forget()
            raise torch.OutOfMemoryError(f"{file.name} does not fit: {room} bytes left")
        entries = self._dicts.setdefault(where, {})
        try:
            for name, tensor in read_file(file, self._device).items():
                if name in entries:
                    text = f"{file.name} and another file of its folder hold {name!r}"
                    raise ValueError(text)
                entries[name] = tensor
        except BaseException:
            self._forget()
            raise

    def describe(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return all names, with the number of their storage, dtype and shape."""
        self._check(request)
        for where, entries in self._dicts.items():
            tie_head(entries, self._folder / where / "config.json")
        numbers = {id(t): n for n, t in enumerate(self._tensors())}
        return {
            "storages": [
                tensor.untyped_storage().nbytes() for tensor in self._tensors()
            ],
            "dicts": {
                where: {
                    name: (
                        numbers[id(tensor)],
                        str(tensor.dtype).removeprefix("torch."),
                        tuple(tensor.shape),
                    )
                    for name, tensor in entries.items()
                }
                for where, entries in self._dicts.items()
            },
        }

    def adopt(self, request: dict[str, Any]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each tensor with the id that the client's storage has."""
        self._check(request)
        tensors, ids = self._tensors(), request["ids"]
        if len(ids) != len(tensors) or not all(type(one) is int for one in ids):
            raise ValueError(f"{len(ids)} ids for {len(tensors)} storages")
        self._forget()
        self._adopted.add(self._token)
        yield from zip(ids, tensors, strict=True)

    def forget(self, request: dict[str, Any]) -> bool:
        """Drop what was read but not adopted; return whether it was adopted."""
        if request["token"] == self._token:
            self._forget()
        return request["token"] in self._adopted

    def _tensors(self) -> list[torch.Tensor]:
        every = (t for entries in self._dicts.values() for t in entries.values())
        return list({id(tensor): tensor for tensor in every}.values())

    def _check(self, request: dict[str, Any]) -> None:
        if request.get("token") != self._token or not self._files:
            raise ValueError("that was not listed, or has been adopted")

    def _forget(self) -> None:
        self._files, self._dicts, self._bytes = [], {}, 0

    def _locate(self, repo_id: str, path: str, revision: Any) -> tuple[Path, Path]:
        """Return the folder to read, and the one that no file may lie outside of."""
        options = self._options
        base = Path(options.hub_root).resolve() if options.hub_root else None
        if base or options.any_folder:
            root = ((base or Path()) / repo_id).resolve()
            if base and not options.any_folder and not root.is_relative_to(base):
                raise PermissionError(f"{repo_id!r} is not below the worker's hub root")
            if root.is_dir():
                # The hub's cache keeps links in snapshots/ to files in blobs/.
                cached = root.parent.name == "snapshots"
                limit = root.parent.parent if cached else root
                return _inside(root, path), base if base and cached else limit
        if not options.allow_hub:
            what = "hub ids" if base is None else "hub ids, nor has its hub root this"
            raise PermissionError(
                f"the worker does not allow {what} ({repo_id!r}): the server's "
                "--allow-hub and --hub-root allow repositories"
            )
        return self._download(repo_id, path, revision)

    def _download(self, repo_id: str, path: str, revision: Any) -> tuple[Path, Path]:
        from huggingface_hub import snapshot_download

        prefix = f"{path}/" if path else ""
        names = ("*.safetensors", f"*{_INDEX}", "config.json", "*/config.json")
        patterns = [prefix + name for name in names]
        found = snapshot_download(repo_id, revision=revision, allow_patterns=patterns)
        snapshot = Path(found)
        return _inside(snapshot, path), snapshot.parent.parent


def find_files(folder: Path, root: Path) -> list[tuple[str, Path]]:
    """Return the files of weights below ``folder``, each with its folder's name.

    An index names the files of its folder; without one all ``*.safetensors`` count.

    Raises:
        PermissionError: a file lies outside of ``root``.
        ValueError: an index is none, or a folder has several.
    """
    found: list[tuple[str, Path]] = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        indexes = [name for name in names if name.endswith(_INDEX)]
        chosen = sorted(name for name in names if name.endswith(".safetensors"))
        if len(indexes) > 1:
            indexes = [name for name in indexes if name == f"model{_INDEX}"]
            if not indexes:
                raise ValueError(f"{where} has several indexes, none model{_INDEX}")
        if indexes:
            chosen = _of_index(Path(where, indexes[0]), chosen)
        key = "" if where == str(folder) else Path(where).relative_to(folder).as_posix()
        for name in chosen:
            file = Path(where, name)
            if not file.resolve().is_relative_to(root.resolve()):
                raise PermissionError(f"{file} leads out of the repository")
            found.append((key, file))
    return found


def read_file(file: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, each in a storage of its own.

    Names that ``safetensors.torch.save_model`` dropped, as another one has the same
    storage, are given again.

    Raises:
        ValueError: it is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no dict
                # On the CPU they are views of the mapped file.
                tensor = opened.get_tensor(name)
                tensors[name] = tensor.clone() if device.type == "cpu" else tensor
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file.name} can't be read: {error}") from error
    for name, kept in metadata.items():
        if name not in tensors and kept in tensors:
            tensors[name] = tensors[kept]
    return tensors


def tie_head(entries: dict[str, torch.Tensor], config: Path) -> None:
    """Add ``lm_head.weight`` as a second name of the embedding, where it is tied."""
    try:
        settings = _json(config)
    except (OSError, ValueError):
        return
    architectures = settings.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    headed = any(str(name).endswith(_HEADED_MODELS) for name in names)
    has_head = any(name.endswith(_HEADS) for name in entries)
    if not headed or has_head or settings.get("tie_word_embeddings") is False:
        return
    found = [name for name in entries if name.endswith(_EMBEDDINGS)]
    if len(found) == 1:
        entries["lm_head.weight"] = entries[found[0]]


def _of_index(index: Path, names: list[str]) -> list[str]:
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index.name} has no weight_map")
    wanted = {str(name) for name in weight_map.values()}
    if missing := wanted - set(names):
        text = f"{index.name} names {min(missing)!r}, which is not beside it"
        raise FileNotFoundError(text)
    return sorted(wanted)


def _json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _MAX_JSON:
        raise ValueError(f"{file.name} has more than {_MAX_JSON} bytes")
    content = json.loads(file.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is no JSON object")
    return content


def _inside(root: Path, path: str) -> Path:
    folder = (root / path).resolve()
    if not folder.is_relative_to(root.resolve()):
        raise PermissionError(f"path {path!r} leads out of the repository")
    if not folder.is_dir():
        raise FileNotFoundError(f"the repository has no folder {path!r}")
    return folder


def _nothing(repo_id: str, folder: Path) -> str:
    pickles = any(
        name.endswith(_PICKLES) for _, _, ns in os.walk(folder) for name in ns
    )
    found = "only .bin or .pt files" if pickles else "no *.safetensors files"
    return (
        f"{repo_id!r} has {found} there: other formats are pickles, which may run "
        "code and are refused. Give the revision= of a safetensors conversion, such "
        "as 'refs/pr/N', or convert the repository"
    )
