# SPDX-License-Identifier: Apache-2.0
"""Chapter 4, kernel-pytorch: the fused model with other attention."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from kernel_pytorch.attention import register_with_transformers
from kernel_pytorch.attention.tiling import counting
from tools.tour.fusion_row import FUSED
from tools.tour.measures import greedy
from tools.tour.story import Chapter, Check, Measured, Story, System
from tools.tour.training import WINDOW

EXACT, SPARSE = "exact attention", "sparse attention"
MOST_NATS = 1e-3
MOST_LOGIT = 1e-3
BLOCK, LEFT_OUT = 16, 0.5


def chapter(story: Story) -> Chapter:
    """Two copies of the fused model, with the ring's and with sparse attention."""
    register_with_transformers(sparsity_ratio=LEFT_OUT, block_size=BLOCK)
    exact = swapped(story, "kernel_pytorch_ring")
    sparse = swapped(story, "kernel_pytorch_sparse")
    systems = (
        System(
            name=EXACT,
            about="kernel_pytorch: the fused model on blockwise attention",
            log_probs=exact.logits,
            modules=(exact,),
            generate=greedy(exact),
            cache=lambda ids: (
                exact.model(input_ids=ids, use_cache=True).past_key_values
            ),
        ),
        System(
            name=SPARSE,
            about=f"kernel_pytorch: half of the blocks of {BLOCK} bytes, by content",
            log_probs=sparse.logits,
            modules=(sparse,),
        ),
    )
    return Chapter(
        title="Attention by kernel-pytorch",
        about="The same weights; attention runs by plans that never drop a mask.",
        systems=systems,
        check=lambda measured: [
            check_equal(measured),
            check_padding(story, exact),
            check_work(story, sparse),
        ],
        exhibits=lambda: [],
    )


def swapped(story: Story, name: str) -> nn.Module:
    """Copy the fused model and give all its parts another attention."""
    model = copy.deepcopy(story.models["fused"])
    for part in model.modules():
        config = getattr(part, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation = name
    return model


def check_equal(measured: Mapping[str, Measured]) -> Check:
    """On every window the loss is that of the model's own attention."""
    before, after = measured[FUSED].nats, measured[EXACT].nats
    worst = max((before[t] - after[t]).abs().max().item() for t in before)
    return Check(
        "With blockwise attention the loss of every window is the same to "
        f"{MOST_NATS:g} nats.",
        f"Largest difference: {worst:.1e} nats.",
        worst <= MOST_NATS,
    )


def check_padding(story: Story, exact: nn.Module) -> Check:
    """Padding on the left is hidden, as in the model's own attention."""
    ids = story.windows["switch"][:8]
    seen = torch.ones_like(ids)
    for row in range(len(seen)):
        seen[row, : row * WINDOW // 16] = 0
    with torch.no_grad():
        before = story.models["fused"].model(input_ids=ids, attention_mask=seen).logits
        with counting() as work:
            after = exact.model(input_ids=ids, attention_mask=seen).logits
    worst = ((before - after) * seen[..., None]).abs().max().item()
    return Check(
        f"With padding on the left, too: every logit to {MOST_LOGIT:g}.",
        f"Largest difference of a logit: {worst:.1e}, by {work.calls} calls of "
        f"{' and '.join(sorted(work.backends))}.",
        worst <= MOST_LOGIT and work.calls > 0,
    )


def check_work(story: Story, sparse: nn.Module) -> Check:
    """The sparse model computes the share of blocks that was asked for."""
    with Lists() as lists, torch.no_grad():
        sparse.logits(story.windows["prose"][:4])
    rows = lists.found
    kept = sum(int(row.sum()) for row in rows)
    # Under a causal mask the n-th block of queries has n blocks to see.
    per_list = sum(range(1, WINDOW // BLOCK + 1))
    whole = sum(row.numel() // row.shape[-1] * per_list for row in rows)
    budget = sum(max(1, round(n * LEFT_OUT)) for n in range(1, WINDOW // BLOCK + 1))
    return Check(
        f"Sparse attention computes {100 * budget / per_list:.0f} % of the blocks, "
        "in every layer and head.",
        f"{100 * kept / max(whole, 1):.1f} % in {len(rows)} layers.",
        bool(rows) and kept * per_list == budget * whole,
    )


class Lists(TorchDispatchMode):
    """Collects the lengths of all lists of blocks that attention is run with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.kernel_pytorch.block_sparse_forward.default:
            self.found.append(args[3])
        return func(*args, **(kwargs or {}))
