# SPDX-License-Identifier: Apache-2.0
"""Folders that lack something, lie, or hold what the command can't use."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from loraven.reading import Source, check_runs, read_batches, read_model, read_texts
from torchworks_core.errors import CorruptFile, InvalidValue, MissingFile
from torchworks_core.testing import byte_tokenizer, save_tiny

WORDS = [f"word{k}" for k in range(60)]
TEXTS = [" ".join(WORDS[k : k + 1 + k % 9]) for k in range(50)]
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A BERT that knows 65 words, with a tokenizer of words."""
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("bert")
    sizes = {"vocab_size": 65, "hidden_size": 64, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, max_position_embeddings=12)).save_pretrained(path)
    word_tokenizer(path, WORDS)
    return path


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "model")


def word_tokenizer(folder: Path, words: list[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {word: number for number, word in enumerate((*MARKS, *words))}
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=ends
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    marks = dict(zip(names, MARKS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=made, **marks).save_pretrained(folder)


def source(folder: Path, **options: Any) -> Source:
    given = {"batch_size": 16, "max_length": 128, "device": torch.device("cpu")}
    return Source(folder, TEXTS, **given | options)


def change(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def without_tokenizer(folder: Path) -> Path:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


@pytest.mark.critical
def test_a_folder_without_a_tokenizer_is_refused(copied, tmp_path):
    from transformers import AutoTokenizer

    # transformers makes one that knows no word.
    invented = AutoTokenizer.from_pretrained(without_tokenizer(copied))
    assert len({*invented(TEXTS[8])["input_ids"]} - {2, 3}) == 1
    with pytest.raises(MissingFile, match="has no vocabulary") as caught:
        read_batches(source(copied), TEXTS)
    assert "vocab.txt" in str(caught.value)
    causal = without_tokenizer(save_tiny(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(MissingFile, match=r"vocab\.json"):
        read_batches(source(causal), TEXTS)


def test_a_tokenizer_that_needs_no_file_will_do(tmp_path):
    from transformers import ByT5Tokenizer

    save_tiny(tmp_path, "gpt2", vocab_size=384, num_hidden_layers=1)
    without_tokenizer(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    ids = read_batches(source(tmp_path), ["ab"])[0]["input_ids"]
    assert ids.tolist() == [[ord("a") + 3, ord("b") + 3, 1]]


@pytest.mark.critical
@pytest.mark.parametrize(("known", "share"), [(0, 100), (20, 67), (40, None)])
def test_a_tokenizer_that_knows_few_words_is_refused(copied, known, share):
    word_tokenizer(copied, WORDS[:known])
    texts = [f"{word} {word}" for word in WORDS]
    if share is None:
        assert len(read_batches(source(copied), texts)) == 4
        return
    with pytest.raises(InvalidValue, match=rf": {share} % .* are unknown"):
        read_batches(source(copied), texts)


def test_a_tokenizer_of_a_larger_model_is_refused(copied):
    word_tokenizer(copied, ["more", *WORDS])
    with pytest.raises(InvalidValue, match="the id 65, the model knows 65 ids"):
        read_batches(source(copied), WORDS)
    assert read_batches(source(copied), WORDS[:-1])


def test_texts_are_cut_at_the_positions_that_the_model_has(copied):
    given = source(copied, max_length=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_batches(given, TEXTS)[0]["input_ids"].shape == (16, 9)
        assert read_batches(source(copied), TEXTS)[0]["input_ids"].shape == (16, 11)
    text = " ".join(WORDS)
    with pytest.warns(UserWarning, match="cut at 12 tokens"):
        (batch,) = read_batches(source(copied), [text, WORDS[0]])
    assert batch["input_ids"].shape == (2, 12)
    assert batch["input_ids"][:, [0, -1]].tolist() == [[2, 3], [2, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [12, 3]
    model = read_model(source(copied))
    check_runs(source(copied), model, [batch])


def test_what_the_model_cannot_run_is_one_sentence(folder):
    given = source(folder)
    model = read_model(given)
    short, long = (torch.ones(3, size, dtype=torch.long) for size in (4, 13))
    check_runs(given, model, [{"input_ids": short}])
    with pytest.raises(InvalidValue, match="on 13 tokens: ") as caught:
        check_runs(given, model, [{"input_ids": long}, {"input_ids": short}])
    assert "--max-length" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_texts_that_cannot_be_read(monkeypatch, tmp_path):
    def read_text(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "texts.txt"
    path.write_text("a\n")
    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(CorruptFile, match="Permission denied"):
        read_texts(path)


def test_weights_that_are_cut_off(copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptFile, match=r"model '.*': SafetensorError: "):
        read_model(source(copied))


def test_a_config_of_other_sizes(copied):
    change(copied, hidden_size=128)
    with pytest.raises(CorruptFile, match=r"model '.*': RuntimeError: "):
        read_model(source(copied))


@pytest.mark.parametrize(
    "name", ["DataCollatorWithPadding", "AutoTokenizer", "logging"]
)
def test_a_config_that_names_no_model(copied, name):
    change(copied, architectures=[name])
    with pytest.raises(CorruptFile, match=rf"architectures \['{name}'\]: .* no model"):
        read_model(source(copied))


@pytest.mark.parametrize("names", [None, [], ["AModelOfNoVersion"]])
def test_a_config_without_a_known_class_is_the_plain_model(copied, names):
    change(copied, architectures=names)
    assert type(read_model(source(copied))).__name__ == "BertModel"


def test_models_that_need_more_than_texts(tmp_path):
    from transformers import (
        T5Config,
        T5EncoderModel,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTModel,
    )

    sizes = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1}
    config = T5Config(**sizes, num_heads=4, is_gated_act=False)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(InvalidValue, match="needs decoder_input_ids"):
        read_model(source(tmp_path / "t5"))
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = ViTConfig(**small, intermediate_size=64, image_size=32)
    ViTModel(vision).save_pretrained(tmp_path / "vit")
    with pytest.raises(InvalidValue, match="needs pixel_values"):
        read_model(source(tmp_path / "vit"))
    # The encoder alone needs no more.
    T5EncoderModel(config).save_pretrained(tmp_path / "encoder")
    byte_tokenizer(tmp_path / "encoder")
    given = source(tmp_path / "encoder")
    check_runs(given, read_model(given), read_batches(given, TEXTS))
