# SPDX-License-Identifier: Apache-2.0
"""A folder of transformers and a text file, as the model and batches of a command.

Decisions:
- The folder is read without a network and without running code out of it. The
  model's class is the one that its config names.
- transformers makes a tokenizer of a folder that has none: one that knows no word.
  Such a tokenizer is refused, and so are texts that are mostly unknown to theirs.
- Padding is made here, so that a tokenizer without a padding token will do; the
  attention mask says what is real.
- Reading runs much of other libraries' code on files that may be anything: whatever
  it raises becomes one sentence with the folder's name in it.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from loraven.batches import run
from torchworks_core.errors import CorruptFile, InvalidValue, MissingFile

__all__ = ["Batch", "Source", "check_runs", "read_batches", "read_model", "read_texts"]

Batch = dict[str, torch.Tensor]
# A tokenizer's vocabulary by other names than those its class tells.
_VOCABULARY = ("tokenizer.*", "*.model", "*.tiktoken", "tekken.json")
_UNKNOWN = 0.5


class Source(NamedTuple):
    """Where a model comes from, and how its texts become batches."""

    folder: Path
    texts: list[str]
    batch_size: int
    max_length: int
    device: torch.device


def read_texts(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8 that are not blank.

    Raises:
        MissingFile: it is no file.
        CorruptFile: it is not in UTF-8, or can't be read.
        InvalidValue: it has no text.
    """
    if not path.is_file():
        raise MissingFile(f"texts {str(path)!r}", "there is no such file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFile(f"texts {str(path)!r}", str(error)) from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        do = "Put one example on each line"
        raise InvalidValue(f"texts {str(path)!r}", "the file has no text", do)
    return found


def read_model(source: Source) -> nn.Module:
    """Load the model of the class that its config names, in evaluation mode.

    Raises:
        CorruptFile: transformers can't make a model of the folder.
        InvalidValue: the model takes no token ids, or more than them.
    """
    import transformers

    what = f"model {str(source.folder)!r}"
    with _explained(what):
        config = _config(source.folder)
        names = config.architectures or ["AutoModel"]
        kind = getattr(transformers, names[0], transformers.AutoModel)
    known = transformers.AutoModel, transformers.PreTrainedModel
    if not (isinstance(kind, type) and issubclass(kind, known)):
        do = "Name the class of the model in config.json"
        raise CorruptFile(f"{what}, architectures {names}", "this is no model", do)
    with _explained(what):
        model = kind.from_pretrained(source.folder, dtype="auto", local_files_only=True)
    _check_inputs(what, model)
    return model.eval().to(source.device)


def read_batches(source: Source, texts: list[str]) -> list[Batch]:
    """Tokenize, pad on the right with a mask of what is real, and batch.

    Examples are cut at ``max_length`` tokens, or at as many as the model has
    positions.

    Raises:
        CorruptFile: transformers can't make a tokenizer of the folder.
        MissingFile: the folder has no vocabulary.
        InvalidValue: the texts have no token, most are unknown to the tokenizer, or
            some to the model.
    """
    tokenizer = _tokenizer(source.folder)
    with _explained(f"model {str(source.folder)!r}"):
        config = _config(source.folder).get_text_config()
    rows = _rows(tokenizer, texts, source.max_length)
    places = getattr(config, "max_position_embeddings", None) or 0
    if 0 < places < max(map(len, rows)):
        why = f"texts are cut at {places} tokens: the model has no more positions"
        warnings.warn(why, UserWarning, stacklevel=2)
        rows = _rows(tokenizer, texts, places)
    _check_known(source.folder, tokenizer, config, rows)
    pad = tokenizer.pad_token_id or 0
    starts = range(0, len(rows), source.batch_size)
    return [_pad(rows[i : i + source.batch_size], pad, source.device) for i in starts]


def check_runs(source: Source, model: nn.Module, batches: list[Batch]) -> None:
    """Run one example of the longest batch, to learn early what the model can't do.

    Raises:
        InvalidValue: the model raised something.
    """
    longest = max(batches, key=lambda batch: batch["input_ids"].shape[1])
    try:
        with torch.no_grad():
            run(model, {name: value[:1] for name, value in longest.items()})
    except Exception as error:
        tokens = longest["input_ids"].shape[1]
        what = f"model {str(source.folder)!r} on {tokens} tokens"
        do = "Give a smaller --max-length, or convert it in Python with other inputs"
        raise InvalidValue(what, _reason(error), do) from error


def _config(folder: Path) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def _check_inputs(what: str, model: Any) -> None:
    """Refuse what a batch of ids and a mask can't be enough for."""
    needed = str(model.main_input_name)
    if "decoder_input_ids" in signature(model.forward).parameters:
        needed = "decoder_input_ids"
    if needed != "input_ids":
        why = f"a {type(model).__name__} needs {needed}, not only texts"
        do = "Convert it in Python: loraven.convert(model, batches)"
        raise InvalidValue(what, why, do)


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, unless transformers made it out of nothing."""
    import transformers

    what, load = f"tokenizer {str(folder)!r}", transformers.AutoTokenizer
    with _explained(what):
        tokenizer = load.from_pretrained(folder, local_files_only=True)
    # One of bytes or of characters has no vocabulary, and no names for its files.
    names = getattr(tokenizer, "vocab_files_names", {}).values()
    patterns = (*names, *_VOCABULARY)
    if names and not any(any(folder.glob(pattern)) for pattern in patterns):
        do = f"Put its files there: {', '.join(names)}"
        raise MissingFile(what, "the folder has no vocabulary", do)
    return tokenizer


def _rows(tokenizer: Any, texts: list[str], length: int) -> list[list[int]]:
    """Ids of each text that has some, with the marks at its ends within the length."""
    found = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    rows = [ids for ids in found if ids]
    if not rows:
        raise InvalidValue("texts", "the tokenizer makes no token of them")
    return rows


def _check_known(
    folder: Path, tokenizer: Any, config: Any, rows: list[list[int]]
) -> None:
    """Refuse ids that say nothing, or that the model has no embedding for."""
    what = f"tokenizer {str(folder)!r}"
    size, largest = getattr(config, "vocab_size", None), max(map(max, rows))
    if size and largest >= size:
        why = f"it makes the id {largest}, the model knows {size} ids"
        raise InvalidValue(what, why, "Restore the model's own tokenizer")
    unknown = tokenizer.unk_token_id
    marks = {*tokenizer.all_special_ids} - {unknown}
    words = [word for row in rows for word in row if word not in marks]
    share = words.count(unknown) / max(1, len(words))
    if share > _UNKNOWN:
        why = f"{100 * share:.0f} % of the texts' tokens are unknown to it"
        do = "Restore the model's own tokenizer, or give texts that it knows"
        raise InvalidValue(what, why, do)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever a file makes transformers raise into a CorruptFile."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise CorruptFile(what, _reason(error)) from error


def _reason(error: Exception) -> str:
    """An error's text on one line, with its type where that says more."""
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return text if isinstance(error, OSError) and text else f"{kind}: {text or 'none'}"


def _pad(rows: list[list[int]], pad: int, device: torch.device) -> Batch:
    longest = max(map(len, rows))
    ids = [row + [pad] * (longest - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    return {name: value.to(device) for name, value in batch.items()}
