# SPDX-License-Identifier: Apache-2.0
"""How figures are written, in the terminal and on the page alike."""

from typing import Any

MISSING = "-"


def bits(value: float) -> str:
    """Bits per character or byte, three decimals."""
    return f"{value:.3f}"


def count(value: int) -> str:
    """A number of things, in thousands."""
    return f"{value / 1e3:,.0f} k"


def memory(parameters: int, cache: int | None) -> str:
    """Bytes of parameters and of what one sequence keeps, in KiB."""
    kept = "" if cache is None else f" + {cache / 1024:,.0f}"
    return f"{parameters / 1024:,.0f}{kept} KiB"


def milliseconds(value: float | None) -> str:
    """Milliseconds, two decimals."""
    return MISSING if value is None else f"{value:.2f}"


def percent(ratio: float | None) -> str:
    """A ratio as a signed change."""
    return MISSING if ratio is None else f"{100 * (ratio - 1):+.1f} %"


def times(change: list[float] | tuple[float, ...] | None) -> str:
    """A ratio of paired times with its interval."""
    if change is None:
        return MISSING
    return f"{change[0]:.2f} ({change[1]:.2f} to {change[2]:.2f})"


def machine_line(report: dict[str, Any]) -> str:
    """Hardware and versions in one line."""
    m = report["machine"]
    parts = [
        m["cpu"],
        f"{m['cores']} cores, {m['threads']} used for measuring",
        f"{m['memory_gib']} GiB" if m["memory_gib"] else "",
        *m["gpus"],
        m["system"],
        f"Python {m['python']}",
        f"torch {m['torch']}",
        f"transformers {m['transformers']}",
        m["date"],
    ]
    return " · ".join(part for part in parts if part)


def training_line(report: dict[str, Any]) -> str:
    """How long training took, and whether this run did it."""
    seconds = report["training"]["seconds"]
    if report["training"]["cached"]:
        return f"trained by an earlier run in {seconds:.0f} s, taken from the cache"
    return f"trained in this run in {seconds:.0f} s"


def units_line(report: dict[str, Any]) -> str:
    """What the columns mean."""
    test = report["test"]
    return (
        "Bits per character: all bits of the scored bytes over the characters that "
        f"begin among them, on {test['windows']} held-out windows of "
        f"{test['window_bytes']} bytes for each text; the first byte is given. "
        "Mean: of prose and code. Switch: the topic changes in the middle of the "
        "window. "
        "Memory: parameters + KV cache and state of one sequence of one window. "
        "Time: processor time of greedy cached decoding on one thread, one sequence, "
        "median of repeats taken in turns; a worker's is counted with it."
    )
