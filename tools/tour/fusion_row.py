# SPDX-License-Identifier: Apache-2.0
"""Chapter 2, mol-fusion: both models under one gate, without training."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

import mol
from tools.tour.measures import greedy, regret_bound
from tools.tour.story import Chapter, Check, Lines, Measured, Shaded, Story, System
from tools.tour.training import WINDOW

MOST_BITS = 0.98
# Sums of float32 logarithms over a window.
ROUNDING_NATS = 1e-3
FUSED = "fused model"
PROMPTS = ('The "with" statement is ', "def read(self, size=-1):\n")
SAMPLE_BYTES = 100
SHADES = 8


def chapter(story: Story) -> Chapter:
    """Fuse the two models; `story.models` gets "fused"."""
    names = [str(story.experts.folders[domain]) for domain in ("prose", "code")]
    config = mol.MoLConfig(models=names, stream="parallel", gate="bayes")
    runtime = mol.fuse(config)
    story.models["fused"] = runtime
    parts = (story.models["prose"], story.models["code"])
    average = System(
        name="average of both",
        about="the mean of both models' probabilities, for comparison",
        log_probs=lambda ids: _average([_log_probs(m, ids) for m in parts]),
        modules=parts,
    )
    fused = System(
        name=FUSED,
        about="mol.fuse: both models, weighed at every byte by how well they did",
        log_probs=runtime.logits,
        modules=(runtime,),
        generate=greedy(runtime),
        cache=lambda ids: runtime.model(input_ids=ids, use_cache=True).past_key_values,
    )
    return Chapter(
        title="Fused by mol-fusion",
        about="A Bayes gate mixes the predictions of both; nothing is trained.",
        systems=(average, fused),
        check=lambda measured: [
            check_gain(measured),
            check_bound(measured, config.gate_share),
            _check_alone(story, names[0]),
        ],
        exhibits=lambda: [_weights(story), _samples(story)],
    )


def check_gain(measured: Mapping[str, Measured]) -> Check:
    """The fused model against the better single one, on prose and code."""
    experts = [measured["prose model"], measured["code model"]]
    best = min(experts, key=lambda m: m.bits["mean"])
    bits, least = measured[FUSED].bits["mean"], best.bits["mean"]
    return Check(
        f"The fused model needs at most {MOST_BITS} times the bits per character of "
        "the better single model, on the mean of held-out prose and code.",
        f"{bits:.3f} against {least:.3f} of the {best.name}: {bits / least:.3f} times.",
        bits <= MOST_BITS * least,
    )


def check_bound(measured: Mapping[str, Measured], share: float) -> Check:
    """On every single window, the gate's loss to the better model is bounded."""
    bound = regret_bound(WINDOW - 1, 2, share)
    losses = []
    for text, nats in measured[FUSED].nats.items():
        both = [measured[f"{domain} model"].nats[text] for domain in ("prose", "code")]
        losses.append(nats - torch.minimum(*both))
    worst = torch.cat(losses).max().item() / math.log(2)
    return Check(
        "On every held-out window the fused model needs at most "
        f"{bound / math.log(2):.2f} bits more than the model that is better on it "
        f"(ln 2 - {WINDOW - 2} ln(1 - {share} / 2) nats).",
        f"At most {worst:.2f} bits more, on {sum(map(len, losses))} windows.",
        worst * math.log(2) <= bound + ROUNDING_NATS,
    )


def _check_alone(story: Story, name: str) -> Check:
    ids = story.windows["switch"][:8]
    with torch.no_grad(), story.models["fused"].force_expert(name):
        forced = story.models["fused"].logits(ids)
        alone = story.models["prose"](input_ids=ids, use_cache=False).logits
    difference = (forced - alone).abs().max().item()
    return Check(
        "Routed to the prose model alone, the fused model's output is that model's, "
        "bit for bit.",
        f"Largest difference of a logit: {difference:g}.",
        difference == 0,
    )


def _log_probs(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)


def _average(log_probs: list[Tensor]) -> Tensor:
    return torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs))


@torch.no_grad()
def _prose_weight(story: Story, ids: Tensor) -> Tensor:
    """The gate's weight of the prose model after each byte: [B, T]."""
    _, stats = story.models["fused"](ids, return_router_stats=True)
    return stats["gate"]["expert_weights"][..., 0]


def _weights(story: Story) -> Lines:
    weight = _prose_weight(story, story.windows["switch"])
    parts = {"code, then prose": weight[::2], "prose, then code": weight[1::2]}
    counts = " and ".join(str(len(part)) for part in parts.values())
    return Lines(
        title="The gate follows the text",
        caption="Weight of the prose model in windows whose topic switches at byte "
        f"{WINDOW // 2}; mean over {counts} held-out windows.",
        x_label="byte of the window",
        y_label="weight",
        series={
            name: list(enumerate(part.mean(0).tolist(), 1))
            for name, part in parts.items()
        },
        y_range=(0.0, 1.0),
    )


def _samples(story: Story) -> Shaded:
    texts = []
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([list(prompt.encode())])
        torch.manual_seed(story.seed + number)
        made = story.models["fused"].generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(SAMPLE_BYTES, WINDOW - ids.shape[1]),
            do_sample=True,
            temperature=0.7,
            top_k=0,
        )
        texts.append(shade(bytes(made[0].tolist()), _prose_weight(story, made)[0]))
    shown = " and ".join(repr(prompt) for prompt in PROMPTS)
    return Shaded(
        title="Text from the fused model",
        caption=f"Sampled at temperature 0.7 after {shown}; the shade is the gate's "
        "weight after each byte.",
        low="code model",
        high="prose model",
        texts=texts,
    )


def shade(raw: bytes, weight: Tensor) -> list[tuple[str, float]]:
    """Cut text into pieces of nearly equal weight, no character in two."""
    pieces: list[tuple[bytes, float]] = []
    for byte, value in zip(raw, weight.tolist(), strict=True):
        level = round(value * SHADES) / SHADES
        inside = byte & 0xC0 == 0x80
        if pieces and (inside or pieces[-1][1] == level):
            pieces[-1] = pieces[-1][0] + bytes([byte]), pieces[-1][1]
        else:
            pieces.append((bytes([byte]), level))
    return [(piece.decode(errors="replace"), level) for piece, level in pieces]
