# SPDX-License-Identifier: Apache-2.0
"""Chapter 3, loraven: the fused model as a family of budgets."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import loraven
from mol import MoLRuntime
from tools.tour.fusion_row import FUSED
from tools.tour.measures import greedy
from tools.tour.story import Chapter, Check, Lines, Measured, Story, System
from tools.tour.training import WINDOW

LEVELS = (0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
SHOWN = (1.0, 0.7, 0.5)
MOST_BITS = {0.7: 1.03, 0.5: 1.15}
WINDOWS, BATCH = 64, 16


def chapter(story: Story) -> Chapter:
    """Convert a copy of the fused model; `story.models` gets "family"."""
    family = copy.deepcopy(story.models["fused"])
    summary = loraven.convert(
        family.model, calibration(story), levels=LEVELS, output=root_probabilities
    )
    story.models["family"] = family
    static = {level: loraven.export_static(family, level) for level in SHOWN}
    systems = tuple(
        System(
            name=name(level),
            about=f"loraven: at most {level:.0%} of the converted layers' work",
            log_probs=static[level].logits,
            modules=(static[level],),
            generate=greedy(static[level]),
            cache=lambda ids, m=static[level]: (
                m.model(input_ids=ids, use_cache=True).past_key_values
            ),
        )
        for level in SHOWN
    )
    return Chapter(
        title="Compressed by loraven",
        about=f"{len(summary.layers)} linear layers, {len(LEVELS)} nested budgets from "
        f"{summary.tokens:,} bytes of training text; nothing is trained.",
        systems=systems,
        check=lambda measured: [
            check_bits(measured),
            check_full(story),
            check_work(story, summary),
        ],
        exhibits=lambda: [frontier(story)],
    )


def name(level: float) -> str:
    """What the system of a level is called."""
    return f"budget {level:g}"


def calibration(story: Story) -> list[dict[str, Any]]:
    """Windows of the text that the models were trained on, both kinds in turns."""
    generator = torch.Generator().manual_seed(story.seed)
    rows = []
    for domain in ("prose", "code"):
        raw = torch.frombuffer(bytearray(story.texts[domain]), dtype=torch.uint8)
        starts = torch.randint(len(raw) - WINDOW, (WINDOWS,), generator=generator)
        rows.append(torch.stack([raw[at : at + WINDOW] for at in starts.tolist()]))
    mixed = torch.stack(rows, 1).flatten(0, 1).long()
    return [{"input_ids": ids, "use_cache": False} for ids in mixed.split(BATCH)]


def root_probabilities(output: Any) -> Tensor:
    """Square roots of the next byte's probabilities.

    Their squared distance is twice that of Hellinger, for small changes a fourth of
    the Kullback-Leibler divergence: what bits for each character are made of.
    """
    return (output.logits.log_softmax(-1) / 2).exp()


def check_bits(measured: Mapping[str, Measured]) -> Check:
    """What the budgets cost in bits."""
    full = measured[FUSED].bits["mean"]
    ratios = {level: measured[name(level)].bits["mean"] / full for level in MOST_BITS}
    promised = " and ".join(f"{most} at {level}" for level, most in MOST_BITS.items())
    found = " and ".join(f"{ratio:.3f} at {level}" for level, ratio in ratios.items())
    return Check(
        "Bits per character, as a multiple of the fused model's, are at most "
        f"{promised}.",
        f"{found}.",
        all(ratios[level] <= most for level, most in MOST_BITS.items()),
    )


@torch.no_grad()
def check_full(story: Story) -> Check:
    """Budget 1.0 is the fused model."""
    family: MoLRuntime = story.models["family"]
    ids = story.windows["switch"][:8]
    loraven.set_budget(family, 0.5)
    loraven.set_budget(family, 1.0)
    worst = (family.logits(ids) - story.models["fused"].logits(ids)).abs().max().item()
    return Check(
        "Switched to 0.5 and back to 1.0, every logit is the fused model's, bit for "
        "bit.",
        f"Largest difference of a logit: {worst:g}.",
        worst == 0,
    )


@torch.no_grad()
def check_work(story: Story, summary: loraven.ConversionSummary) -> Check:
    """Counted work stays below what the summary says of the whole model."""
    family: MoLRuntime = story.models["family"]
    ids = story.windows["prose"][:4]
    counts = {}
    for level in LEVELS:
        loraven.set_budget(family, level)
        with FlopCounterMode(display=False) as counter:
            family.model(input_ids=ids, use_cache=False)
        counts[level] = counter.get_total_flops()
    loraven.set_budget(family, 1.0)
    dense = sum(
        2 * ids.numel() * layer.in_features * layer.out_features
        for layer in summary.layers
    )
    spent = {
        level: 1 - (counts[1.0] - count) / dense for level, count in counts.items()
    }
    shown = ", ".join(f"{spent[level]:.3f}" for level in LEVELS)
    return Check(
        "Counted multiply-adds of the converted layers stay within every budget.",
        f"{shown} of the dense ones at {', '.join(map(str, LEVELS))}.",
        all(spent[level] <= level + 1e-9 for level in LEVELS),
    )


@torch.no_grad()
def frontier(story: Story) -> Lines:
    """Bits per byte of held-out text against the budget."""
    family: MoLRuntime = story.models["family"]
    series: dict[str, list[tuple[float, float]]] = {}
    for text in ("prose", "code"):
        ids = story.windows[text]
        for level in LEVELS:
            loraven.set_budget(family, level)
            found = family.logits(ids[:, :-1]).log_softmax(-1)
            nats = -found.gather(2, ids[:, 1:, None]).mean().item()
            series.setdefault(text, []).append((level, nats / math.log(2)))
    loraven.set_budget(family, 1.0)
    return Lines(
        title="What a budget costs",
        caption="Held-out text, one family; the budget is switched between the points.",
        x_label="budget",
        y_label="bits per byte",
        series=series,
    )
