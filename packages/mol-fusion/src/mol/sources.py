# SPDX-License-Identifier: Apache-2.0
"""The files of one model: configuration, tensor index, and reading by name.

Headers are parsed and bounds-checked before a tensor is touched; only the
tensors that are asked for are read. Nothing is unpickled or executed.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mol.config import ModelInfo, MoLConfig
from mol.errors import (
    InvalidValue,
    MissingFile,
    NotYetBuilt,
    OutOfMemory,
    UnsupportedArchitectureError,
)
from torchworks_core.checkpoint import (
    TensorEntry,
    read_header,
    read_json,
    resolve_inside,
)

__all__ = ["ModelSource", "available_memory", "check_memory", "check_model"]

FAMILIES = ("gpt2", "llama")
# What transformers writes into a configuration without acting on it.
NO_MEANING = ("_name_or_path", "architectures", "transformers_version")
NO_ATTENTION = ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt")
_CHUNK = 1 << 20


class ModelSource:
    """A model folder, opened by its headers only.

    Args:
        name: the folder, as written in ``MoLConfig.models``.
        config: the whole configuration; dtype and memory options come from it.
        folder: where the files lie now, when that differs from ``name``.

    Raises:
        MissingFile: folder, configuration or a shard is not there.
        InvalidValue: files that cannot be used as they are.
        NotYetBuilt: a hub id, or a family that this release does not run.
        UnsupportedArchitectureError: no ``ForCausalLM`` class exists.
    """

    def __init__(self, name: str, config: MoLConfig, folder: str | None = None) -> None:
        self.name = name
        # Absolute, so that a later change of directory changes nothing.
        self.folder = _folder(folder or name).resolve()
        if config.revisions and name in config.revisions:
            raise InvalidValue(
                f"revisions[{name!r}]={config.revisions[name]!r} cannot be applied",
                "that model is a local folder, which has no revisions",
                "Remove the entry",
            )
        self.private = not config.memory_efficient
        self.settings, self.config = _model_config(self.folder, name)
        self.cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
        self.index: dict[str, tuple[Path, TensorEntry]] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._hashes: dict[str, str] = {}
        self._expected: dict[str, dict] = {}
        self.tokenizer_folder = self.folder
        self.full: PreTrainedModel | None = None
        for file in _shards(self.folder):
            self._stamps[file] = _stamp(file)
            for key, entry in read_header(file).items():
                self.index[key] = (file, entry)
        if not self.index:
            raise InvalidValue(
                f"the weights of {name!r} hold no tensor",
                "the files have headers without entries",
                "Save the model again",
            )
        self.info = self._describe()
        # One dtype for the whole model, as from_pretrained gives it.
        self.dtype = getattr(torch, config.dtype or self.info.dtype)

    def locate(self, name: str) -> str | None:
        """The file's key for a parameter of the ``ForCausalLM`` class, or None.

        Some checkpoints were written from the bare backbone and lack its
        prefix (``transformer.``, ``model.``).
        """
        if name in self.index:
            return name
        prefix = self.cls.base_model_prefix + "."
        bare = name.removeprefix(prefix)
        return bare if name.startswith(prefix) and bare in self.index else None

    def under(self, prefix: str) -> dict[str, str]:
        """``{rest of the name: file's key}`` of everything below ``prefix``."""
        bare = prefix.removeprefix(self.cls.base_model_prefix + ".")
        for start in (prefix, bare):
            found = {k[len(start) :]: k for k in self.index if k.startswith(start)}
            if found:
                return found
        return {}

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors by the file's keys, cast as the configuration asks.

        Raises:
            InvalidValue: a tensor is not finite, or not what a checkpoint says.
            RuntimeError: the file changed since it was opened.
        """
        tensors, by_file = {}, {}
        for key in keys:
            by_file.setdefault(self.index[key][0], []).append(key)
        for file, names in by_file.items():
            self._unchanged(file)
            for key in names:
                self._check_hash(key)
            with safe_open(file, framework="pt") as opened:
                for key in names:
                    tensors[key] = self._placed(opened.get_tensor(key))
                    self._check_finite(key, tensors[key])
        return tensors

    def num_bytes(self, keys: Iterable[str]) -> int:
        """Bytes that ``read(keys)`` will occupy, the cast included."""
        size = self.dtype.itemsize
        return sum(math.prod(self.index[key][1].shape) * size for key in keys)

    def vocabulary(self) -> dict[str, int] | None:
        """Token to id, or None where the folder has no tokenizer."""
        tokenizer = self.tokenizer()
        return None if tokenizer is None else tokenizer.get_vocab()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The folder's tokenizer, or None where it has no tokenizer files.

        Raises:
            InvalidValue: it would run code from the folder.
        """
        folder = self.tokenizer_folder
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            return None
        settings = folder / "tokenizer_config.json"
        if settings.is_file():
            _refuse_code(read_json(settings), f"the tokenizer of {self.name!r}")
        # False, not the default: without it transformers asks on the terminal.
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )

    def sha256(self, key: str) -> str:
        """Hash of a tensor's stored bytes.

        Raises:
            RuntimeError: the file changed since it was opened.
        """
        if key not in self._hashes:
            file, entry = self.index[key]
            self._unchanged(file)
            digest = hashlib.sha256()
            with file.open("rb") as stream:
                stream.seek(entry.begin)
                left = entry.end - entry.begin
                while left:
                    chunk = stream.read(min(_CHUNK, left))
                    digest.update(chunk)
                    left -= len(chunk)
            self._hashes[key] = digest.hexdigest()
        return self._hashes[key]

    def describe(self, key: str) -> dict:
        """Dtype, shape and hash of a tensor, as a checkpoint records them."""
        entry = self.index[key][1]
        shape = list(entry.shape)
        return {"dtype": entry.dtype, "shape": shape, "sha256": self.sha256(key)}

    def expect(self, settings: dict, tensors: dict[str, dict]) -> None:
        """From now on, read only tensors that are as a checkpoint recorded them.

        Args:
            settings: the model's ``config.json`` at that time.
            tensors: key to dtype, shape and hash.

        Raises:
            InvalidValue: the configuration is another, or a tensor is missing,
                or of another dtype or shape.
        """
        for key in sorted(settings.keys() | self.settings.keys()):
            now, then = self.settings.get(key), settings.get(key)
            if now != then and key not in NO_MEANING:
                raise InvalidValue(
                    f"config.json of {self.name!r} has {key}={now!r:.60}",
                    f"the checkpoint was built with {then!r:.60}",
                    "Give the folder of the model that was used",
                )
        for key, record in tensors.items():
            entry = self.index.get(key) and self.index[key][1]
            found = entry and [entry.dtype, list(entry.shape)]
            wanted = [record.get("dtype"), record.get("shape")]
            if found != wanted:
                raise InvalidValue(
                    f"tensor {key!r} of {self.name!r} is {found}",
                    f"the checkpoint was built with {wanted}",
                    "Give the folder of the model that was used",
                )
        self._expected = tensors

    def _check_hash(self, key: str) -> None:
        if key not in self._expected:
            return
        wanted, found = self._expected[key].get("sha256"), self.sha256(key)
        if wanted != found:
            raise InvalidValue(
                f"tensor {key!r} of {self.name!r} has the hash {found[:12]}",
                f"the checkpoint was built with {str(wanted)[:12]}",
                "Give the folder of the model that was used",
            )

    def _check_finite(self, key: str, tensor: torch.Tensor) -> None:
        if tensor.is_floating_point():
            # In pieces: a mask of a whole embedding would be large.
            pieces = tensor.flatten().split(_CHUNK)
            if not all(piece.isfinite().all() for piece in pieces):
                raise InvalidValue(
                    f"tensor {key!r} of {self.name!r} is not finite in {self.dtype}",
                    "a model with it would give NaN",
                    "The weights are damaged, or overflow; try dtype='float32'",
                )

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.dtype != self.dtype:
            return tensor.to(self.dtype)
        return tensor.clone() if self.private else tensor

    def _unchanged(self, file: Path) -> None:
        if _stamp(file) != self._stamps[file]:
            raise RuntimeError(
                f"{file} was changed after it was opened, so its tensors may not be "
                "the ones in use. Build the runtime again from the new files."
            )

    def _describe(self) -> ModelInfo:
        config, entries = self.config, [entry for _, entry in self.index.values()]
        by_dtype: dict[str, int] = {}
        for entry in entries:
            count = math.prod(entry.shape)
            by_dtype[entry.dtype] = by_dtype.get(entry.dtype, 0) + count
        main = max(by_dtype, key=lambda d: by_dtype[d])
        if main not in _TORCH_NAMES:
            raise InvalidValue(
                f"the weights of {self.name!r} are stored as {main}",
                f"this release reads {', '.join(_TORCH_NAMES)}",
                "Give a folder with floating-point weights",
            )
        if not 1 <= config.num_hidden_layers <= len(entries):
            raise InvalidValue(
                f"the configuration of {self.name!r} has "
                f"{config.num_hidden_layers} layers",
                f"the files hold {len(entries)} tensors",
                "The files do not fit the configuration; save the model again",
            )
        return ModelInfo(
            name=self.name,
            model_type=config.model_type,
            architecture=self.cls.__name__,
            kind="decoder",
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            max_positions=getattr(config, "max_position_embeddings", None),
            dtype=_TORCH_NAMES[main],
            num_parameters=sum(by_dtype.values()),
        )


_TORCH_NAMES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F64": "float64",
}


def check_model(name: str, sources: Mapping[str, ModelSource]) -> None:
    """Raise ``InvalidValue`` where ``name`` is none of the opened models."""
    if name not in sources:
        why = f"the models are {', '.join(map(repr, sources))}"
        raise InvalidValue(f"model {name!r} is unknown", why, "Name one of them")


def available_memory() -> int | None:
    """Bytes of memory that this process may still take, None where unknown."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def check_memory(name: str, need: int) -> None:
    """Raise ``OutOfMemory`` when ``need`` bytes for a model are not free."""
    free = available_memory()
    if free is not None and need > free:
        raise OutOfMemory(
            f"{name!r} needs {need:,} bytes of memory and {free:,} are free",
            "the chosen tensors would not fit",
            "Name fewer layers, set dtype='bfloat16', or take a smaller model",
        )


def _folder(name: str) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    looks_local = name.startswith((".", "/", "~")) or "\\" in name
    if looks_local or name.count("/") > 1 or folder.exists():
        raise MissingFile(
            f"{name!r} is not a folder",
            "a model is a folder with config.json and safetensors files",
            "Check the path",
        )
    raise NotYetBuilt(
        f"{name!r} is not a folder here, and this release does not read the hub",
        "reading by ranges from the hub is not built yet",
        f"Download it first (hf download {name} --local-dir DIR) and name DIR",
    )


def _model_config(folder: Path, name: str) -> tuple[dict, PreTrainedConfig]:
    """The configuration as the file has it, and as transformers reads it."""
    file = folder / "config.json"
    if not file.is_file():
        raise MissingFile(
            f"{str(file)!r} does not exist",
            f"model {name!r} has no configuration",
            "Give a folder written by save_pretrained",
        )
    raw = read_json(file)
    _refuse_code(raw, f"the configuration of {name!r}")
    kind = str(raw.get("model_type"))
    if kind in FAMILIES:
        try:
            return raw, AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise InvalidValue(
                f"transformers cannot read the configuration of {name!r}",
                f"{type(error).__name__}: {error!s:.200}",
                "Mend its config.json",
            ) from error
    if kind in CONFIG_MAPPING and kind not in NO_ATTENTION:
        raise NotYetBuilt(
            f"model {name!r} is of the family {kind!r}",
            f"this release runs the families {', '.join(FAMILIES)}",
            "Choose a model of one of these",
        )
    raise UnsupportedArchitectureError(
        f"model {name!r} is of the family {kind!r}",
        "transformers does not know it, or it has no attention blocks",
        f"Choose a model of the families {', '.join(FAMILIES)}",
    )


def _refuse_code(settings: dict, what: str) -> None:
    if settings.get("auto_map"):
        raise InvalidValue(
            f"{what} has auto_map={settings['auto_map']!r:.100}",
            "loading it would run code from the folder",
            "Use a model whose code is part of transformers",
        )


def _shards(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", "model.safetensors"
    # transformers, too, prefers the single file where both are there.
    if (folder / single).is_file():
        names = [single]
    elif index.is_file():
        weights = read_json(index, max_bytes=256 << 20).get("weight_map")
        texts = isinstance(weights, dict) and all(
            isinstance(name, str) for name in weights.values()
        )
        if not texts or not weights:
            raise InvalidValue(
                f"{str(index)!r} has no weight_map",
                "it must name the shard of every tensor",
                "Save the model again",
            )
        names = sorted(set(weights.values()))
    else:
        _explain_no_weights(folder)
    # The hub's cache holds links from snapshots/COMMIT to blobs beside it.
    cached = folder.resolve().parent.name == "snapshots"
    root = folder.resolve().parent.parent if cached else None
    files = [resolve_inside(folder, name, root=root) for name in names]
    for file in files:
        if not file.is_file():
            raise MissingFile(
                f"{str(file)!r} does not exist",
                "the index names it as a shard",
                "Copy or download the missing shard",
            )
    return files


def _explain_no_weights(folder: Path) -> NoReturn:
    for name in _PICKLED:
        if (folder / name).is_file():
            raise InvalidValue(
                f"{str(folder)!r} holds only pickled weights ({name})",
                "unpickling can run any code, so it is never done",
                "Convert them to safetensors first (save_pretrained writes them)",
            )
    raise MissingFile(
        f"{str(folder / 'model.safetensors')!r} does not exist",
        "the folder holds no weights",
        "Give a folder written by save_pretrained",
    )


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns
