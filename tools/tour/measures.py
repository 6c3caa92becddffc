# SPDX-License-Identifier: Apache-2.0
"""The yardstick: the same measurements for every system of the tour.

The first byte of a window is given, the others are scored. Bits per character are
all bits of the scored bytes over the characters that begin among them, so that a
character of several bytes costs the sum of its bytes; in ASCII text both are equal.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tools.tour.story import TEXTS, Measured, System
from torchworks_core.bench import compare

CHUNK = 16
PROMPT_BYTES = 8
GENERATED_BYTES = 64
REPEATS = 7


@torch.no_grad()
def window_nats(log_probs: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """Loss of each scored byte in nats: [B, T - 1], float64."""
    losses = []
    for ids in windows.split(CHUNK):
        predicted = log_probs(ids)[:, :-1].double()
        losses.append(-predicted.gather(-1, ids[:, 1:, None])[..., 0])
    return torch.cat(losses)


def count_characters(windows: Tensor) -> int:
    """Characters that begin among the scored bytes of UTF-8 text [B, T]."""
    return int(((windows[:, 1:] & 0xC0) != 0x80).sum())


def bits_per_character(nats: Tensor, windows: Tensor) -> float:
    """Bits of all scored bytes over the characters that begin among them."""
    return nats.sum().item() / math.log(2) / count_characters(windows)


def regret_bound(tokens: int, experts: int, share: float) -> float:
    """Most nats that a fixed-share mixture loses to its best expert, in total.

    ``ln E - (n - 1) ln(1 - share + share / E)`` for n predicted tokens (Herbster and
    Warmuth, 1998). Written here anew, so that a mistake in the package shows.

    Example:
        >>> round(regret_bound(101, 2, 0.02), 4)
        1.6982
    """
    return math.log(experts) - (tokens - 1) * math.log(1 - share + share / experts)


def measure(system: System, windows: dict[str, Tensor]) -> Measured:
    """Everything but times."""
    nats = {name: window_nats(system.log_probs, ids) for name, ids in windows.items()}
    bits = {n: bits_per_character(x, windows[n]) for n, x in nats.items()}
    per_byte = {n: x.mean().item() / math.log(2) for n, x in nats.items()}
    for values in (bits, per_byte):
        values["mean"] = (values["prose"] + values["code"]) / 2
    parameters = {id(p): p for m in system.modules for p in m.parameters()}.values()
    with torch.no_grad():
        cache = system.cache(windows["prose"][:1]) if system.cache else None
    return Measured(
        name=system.name,
        about=system.about,
        bits={name: bits[name] for name in TEXTS},
        bits_per_byte={name: per_byte[name] for name in TEXTS},
        nats={name: x.sum(1) for name, x in nats.items()},
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.nbytes for p in parameters),
        cache_bytes=None if cache is None else sum(t.nbytes for t in tensors(cache)),
    )


def tensors(cache: Any) -> list[Tensor]:
    """The tensors in a cache's layers, those in their dicts included."""
    found: dict[int, Tensor] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            inside: Iterable[Any] = (
                value.values() if isinstance(value, dict) else [value]
            )
            found |= {id(t): t for t in inside if isinstance(t, Tensor)}
    return list(found.values())


def compare_bits(measured: Measured, before: Measured) -> None:
    """Set what `measured` changed against a system of the chapter before."""
    measured.against = before.name
    measured.bits_change = measured.bits["mean"] / before.bits["mean"]


def time_chapter(
    systems: tuple[System, ...],
    before: System | None,
    measured: dict[str, Measured],
    prompt: Tensor,
) -> None:
    """Time every system that generates, in turns with the one it is compared with.

    In the first chapter all are timed in turns with its first, which sets no change.
    """
    able = [s for s in systems if s.generate is not None]
    reference = before or able[0]
    for system in able:
        if system is reference:
            continue
        result = compare(
            _job(system, prompt),
            _job(reference, prompt),
            repeats=REPEATS,
            # Processor time: other work on the machine then counts for neither.
            clock=system.clock or "process",
        )
        per_byte = 1000 / GENERATED_BYTES
        measured[system.name].milliseconds = result.a_median * per_byte
        if before is None:
            measured[reference.name].milliseconds = result.b_median * per_byte
        else:
            ratio = result.ratio, result.low, result.high
            measured[system.name].time_change = ratio


def _job(system: System, prompt: Tensor) -> Callable[[], Tensor]:
    generate = system.generate
    if generate is None:
        raise ValueError(f"{system.name} does not generate")
    return lambda: generate(prompt[:, :PROMPT_BYTES], GENERATED_BYTES)


def greedy(model: nn.Module) -> Callable[[Tensor, int], Tensor]:
    """`System.generate` of anything with the `generate` of transformers."""

    def generate(prompt: Tensor, count: int) -> Tensor:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            do_sample=False,
        )

    return generate
