# SPDX-License-Identifier: Apache-2.0
"""A fused model on disk: what was trained, and exactly what it was built from.

``config.json`` holds the settings, the rows, and for each source model its
folder and the hash of every tensor in use; the trained tensors lie beside it.
The document is the commit point: a kill at any moment leaves the old or the
new checkpoint.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from mol.config import MoLConfig
from mol.errors import InvalidValue, MissingFile
from mol.sources import ModelSource
from torchworks_core.checkpoint import (
    commit,
    load_document,
    read_json,
    resolve_inside,
    write_atomic,
    write_hashed,
    write_json,
)
from torchworks_core.checkpoint import load as load_tensors
from torchworks_core.checkpoint import save as save_tensors
from torchworks_core.errors import CorruptFile

if TYPE_CHECKING:
    from mol.modeling import MoLForCausalLM

__all__ = ["load", "save", "trained_tensors"]

DOCUMENT = "config.json"
_SCHEMA = 1
_FILES = r"model-[0-9a-f]{12}(-\d{5}-of-\d{5})?\.(safetensors|pt)"


def trained_tensors(model: "MoLForCausalLM") -> dict[str, Tensor]:
    """Adapters and routers by name; sources keep their own files."""
    trained = ("streams.layers.", "streams.gate.")
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.startswith(trained)
    }


def save(
    model: "MoLForCausalLM", path: str | os.PathLike, *, use_safetensors: bool = True
) -> None:
    """Write the checkpoint; see ``MoLRuntime.save_checkpoint``."""
    model.streams.ready()
    folder = Path(path)
    _check_target(folder, str(path), model.streams.sources)
    _check_experts(model)
    tensors = {k: v.detach() for k, v in trained_tensors(model).items()}
    for name, value in tensors.items():
        _check_finite(name, value)
    document = _document(model)
    folder.mkdir(parents=True, exist_ok=True)
    primary = model.streams.sources[model.streams.primary]
    document["tokenizer"] = _write_tokenizer(primary, folder)
    if use_safetensors or not tensors:
        save_tensors(folder, tensors, document, document_name=DOCUMENT)
        # Again, so that weights of the other format are removed, too.
        document = load_document(folder, document_name=DOCUMENT)
    else:
        tensors = {k: v.cpu().clone() for k, v in tensors.items()}
        write = partial(torch.save, tensors)
        file, digest = write_hashed(folder, "model", ".pt", write)
        weights = dict.fromkeys(tensors, file)
        entry = {"schema": 1, "weights": weights, "sha256": {file: digest}}
        document = document | {"torchworks": entry}
    _commit(folder, document, _files_of(document))
    # Only for readers other than `load`, which takes it from the document.
    write_json(folder / "generation_config.json", document["generation"])


def load(
    path: str | os.PathLike, *, models: Mapping[str, str] | None = None
) -> "MoLForCausalLM":
    """Read a checkpoint; see ``MoLRuntime.load_checkpoint``."""
    from mol.modeling import MoLForCausalLM, MoLModelConfig

    folder = Path(path)
    document = load_document(folder, document_name=DOCUMENT)
    if document.get("model_type") != "mol" or document.get("mol_schema") != _SCHEMA:
        raise CorruptFile(
            f"document {str(folder / DOCUMENT)!r}",
            f"it has model_type={document.get('model_type')!r} and "
            f"mol_schema={document.get('mol_schema')!r}, not 'mol' and {_SCHEMA}",
            "Give a folder written by save_checkpoint",
        )
    settings = MoLConfig.from_dict(_part(document, "fusion", dict))
    rows = _part(document, "rows", list)
    recorded = _part(document, "sources", dict)
    _check_shapes_of(rows, settings.models, models or {})
    sources = {}
    for name in settings.models:
        place = _place(name, recorded, models or {})
        source = ModelSource(name, settings, place)
        source.expect(recorded[name]["config"], recorded[name]["tensors"])
        sources[name] = source
    config = MoLModelConfig.of(settings, sources[settings.models[0]])
    model = MoLForCausalLM(config, sources)
    model.streams.load_embeddings()
    model.streams.load_head()
    for row in rows:
        model.add_row(row)
    _restore(model, _read(folder, document))
    generation = _part(document, "generation", dict)
    model.generation_config = GenerationConfig.from_dict(generation)
    if _whole(folder, _part(document, "tokenizer", dict)):
        sources[settings.models[0]].tokenizer_folder = folder.resolve()
    return model


def _check_target(folder: Path, given: str, sources: dict[str, ModelSource]) -> None:
    """Refuse to write where something else would be lost."""
    why = ""
    if not given:
        why = "it is empty"
    elif folder.exists() and not folder.is_dir():
        why = "it is a file"
    elif folder.resolve() in [source.folder for source in sources.values()]:
        why = "it is the folder of a source model, which would be overwritten"
    elif (folder / DOCUMENT).is_file():
        kind = read_json(folder / DOCUMENT).get("model_type")
        if kind != "mol":
            why = f"it holds a model of type {kind!r}, which would be overwritten"
    if why:
        what = f"{given!r} cannot hold a checkpoint"
        raise InvalidValue(what, why, "Give a new folder, or one of a checkpoint")


def _check_experts(model: "MoLForCausalLM") -> None:
    """A checkpoint names the sources' tensors; changed ones would be lost."""
    trained = trained_tensors(model)
    for name, parameter in model.named_parameters():
        changed = parameter.requires_grad or parameter._version > 0
        if name not in trained and changed:
            raise InvalidValue(
                f"parameter {name!r} of an expert was changed, or may be trained",
                "a checkpoint holds adapters and routers, and names the source "
                "models for the rest",
                "Keep the experts frozen, or save model.state_dict() yourself",
            )
    for source in model.streams.sources.values():
        shell = model.streams.shell_of(source.name)
        if shell.source is source and shell.dtype != source.dtype:
            raise InvalidValue(
                f"the model was cast from {source.dtype} to {shell.dtype}",
                "a checkpoint would be loaded as the sources are stored",
                "Build it with MoLConfig(dtype=...) instead",
            )


def _check_finite(name: str, value: Tensor) -> None:
    if not value.isfinite().all():
        raise InvalidValue(
            f"tensor {name!r} holds values that are not finite",
            "a fused model with them would give NaN",
            "Train again with a lower learning rate, or load an earlier save",
        )


def _check_shapes_of(rows: list, names: list[str], moved: Mapping[str, str]) -> None:
    pairs = [pair for row in rows for pair in (row if isinstance(row, list) else [0])]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise CorruptFile(
            f"document {DOCUMENT!r}",
            f"its rows {rows!r:.60} are no lists of [model, layer]",
            "Give a folder written by save_checkpoint",
        )
    for name in moved:
        if name not in names:
            why = f"the checkpoint's models are {names}"
            raise InvalidValue(f"models names {name!r}", why, "Name one of these")


def _whole(folder: Path, files: dict[str, str]) -> bool:
    """Whether the tokenizer files are those of this document."""
    paths = {resolve_inside(folder, name): digest for name, digest in files.items()}
    return bool(paths) and all(
        path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest
        for path, digest in paths.items()
    )


def _document(model: "MoLForCausalLM") -> dict:
    streams, config = model.streams, model.config
    sources = {}
    for name, source in streams.sources.items():
        tensors = {key: source.describe(key) for key in streams.source_keys(name)}
        sources[name] = {
            "path": str(source.folder),
            "revision": None,
            "config": source.settings,
            "tensors": tensors,
        }
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {
        "model_type": "mol",
        "architectures": ["MoLForCausalLM"],
        "mol_schema": _SCHEMA,
        "fusion": streams.settings.to_dict(),
        "rows": [[list(pair) for pair in row] for row in streams.rows],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "tie_word_embeddings": False,
        **{name: getattr(config, name) for name in ids},
        "generation": model.generation_config.to_dict(),
        "sources": sources,
    }


def _part(document: dict, key: str, kind: type) -> Any:
    value = document.get(key)
    if not isinstance(value, kind):
        raise CorruptFile(
            f"document {DOCUMENT!r}",
            f"its entry {key!r} is {value!r:.60}, not a {kind.__name__}",
            "Give a folder written by save_checkpoint",
        )
    return value


def _place(name: str, recorded: dict[str, Any], models: Mapping[str, str]) -> str:
    """Where the source model lies now."""
    found = recorded.get(name)
    entry: dict[str, Any] = found if isinstance(found, dict) else {}
    tensors: Any = entry.get("tensors")
    known = isinstance(tensors, dict) and isinstance(entry.get("config"), dict)
    if not known or not all(isinstance(x, dict) for x in tensors.values()):
        raise CorruptFile(
            f"document {DOCUMENT!r}",
            f"it does not say which tensors of {name!r} are in use",
            "Give a folder written by save_checkpoint",
        )
    if name in models:
        return models[name]
    for place in (entry.get("path"), name):
        if isinstance(place, str) and Path(place).is_dir():
            return place
    raise MissingFile(
        f"source model {name!r} is not at {entry.get('path')!r}",
        "the checkpoint holds what was trained, not the models it was built from",
        f"Tell where it is: load_checkpoint(path, models={{{name!r}: FOLDER}})",
    )


def _read(folder: Path, document: dict) -> dict[str, Tensor]:
    files = _files_of(document)
    if not any(file.endswith(".pt") for file in files):
        return load_tensors(folder, document_name=DOCUMENT)[0]
    file = resolve_inside(folder, files[0])
    if not file.is_file():
        raise MissingFile(f"{str(file)!r} does not exist", "the document names it", "")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != document["torchworks"]["sha256"][files[0]]:
        why = f"its sha256 {digest[:12]} is not the one that was saved"
        raise CorruptFile(f"{str(file)!r}", why, "Restore the file")
    try:
        tensors = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CorruptFile(
            f"{str(file)!r} cannot be read", f"{error!s:.200}", "Save it again"
        ) from error
    if not isinstance(tensors, dict):
        raise CorruptFile(f"{str(file)!r}", "it holds no tensors by name", "")
    return tensors


def _restore(model: "MoLForCausalLM", tensors: dict[str, Tensor]) -> None:
    own = trained_tensors(model)
    if own.keys() != tensors.keys():
        differ = sorted(own.keys() ^ tensors.keys())
        raise CorruptFile(
            "the checkpoint's tensors are not those of its rows",
            f"{len(differ)} differ, such as {differ[:3]}",
            "Save the model again",
        )
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.shape != own[name].shape:
            raise CorruptFile(
                f"tensor {name!r} does not fit",
                f"the rows need shape {tuple(own[name].shape)}",
                "Save the model again",
            )
        _check_finite(name, value)
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def _files_of(document: dict) -> list[str]:
    return list(document["torchworks"]["sha256"])


def _commit(folder: Path, document: dict, keep: list[str]) -> None:
    commit(folder, document, document_name=DOCUMENT, keep=keep, pattern=_FILES)


def _write_tokenizer(primary: ModelSource, folder: Path) -> dict[str, str]:
    """Copy the primary's tokenizer; returns the hash of each file by name.

    The document's hashes decide whether the copy is read: after a kill it may
    belong to a save that was never committed.
    """
    tokenizer, hashes = primary.tokenizer(), {}
    if tokenizer is None:
        return hashes
    with tempfile.TemporaryDirectory() as scratch:
        for written in tokenizer.save_pretrained(scratch):
            file = Path(written)
            if file.is_file() and re.fullmatch(r"[\w.-]+", file.name):
                data = file.read_bytes()
                hashes[file.name] = hashlib.sha256(data).hexdigest()
                write_atomic(folder / file.name, lambda f, data=data: f.write(data))
    return hashes
