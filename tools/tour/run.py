# SPDX-License-Identifier: Apache-2.0
"""The tour: ``python -m tools.tour``, from the top of the repository.

Trains two small models (or takes them from the cache), lets every package show what
it makes of them, and writes a table, ``report.html`` and ``report.json``. Exits with
1 when a promise was not kept, and with 2 when something is missing.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from tools.tour import (
    experts_row,
    fusion_row,
    kernel_row,
    loraven_row,
    measures,
    mycelya_row,
)
from tools.tour.corpus import Corpus, cut_test_windows, load_corpus
from tools.tour.experts import prepare_experts
from tools.tour.report import write_report
from tools.tour.story import Chapter, Check, Lines, Measured, Shaded, Story
from tools.tour.table import print_checks, print_samples, print_seeds, print_table
from tools.tour.training import WINDOW, Settings
from torchworks_core.bench import machine

HERE = Path(__file__).parent
CHAPTERS = (
    experts_row.chapter,
    fusion_row.chapter,
    loraven_row.chapter,
    kernel_row.chapter,
    mycelya_row.chapter,
)
TEST_WINDOWS = 128


@dataclass
class SeedResult:
    """What one seed gave."""

    seed: int
    chapters: list[tuple[Chapter, list[Measured]]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    exhibits: list[Lines | Shaded] = field(default_factory=list)
    training_seconds: float = 0.0
    cached: bool = False


def run_seed(
    settings: Settings, corpus: Corpus, cache: Path, windows: int, full: bool = True
) -> SeedResult:
    """Every chapter with one seed's models; times and exhibits only if `full`."""
    experts = prepare_experts(settings, corpus, cache)
    test = cut_test_windows(corpus, windows, WINDOW)
    texts = {domain: corpus.text(domain) for domain in settings.recipes()}
    story = Story(settings.seed, experts, test, texts)
    result = SeedResult(
        settings.seed, training_seconds=experts.seconds, cached=experts.cached
    )
    with story.cleanup:
        run_chapters(story, result, full)
    return result


def run_chapters(story: Story, result: SeedResult, full: bool) -> None:
    """Let every chapter make its systems, and measure them."""
    test = story.windows
    known: dict[str, Measured] = {}
    best = None
    for make in CHAPTERS:
        chapter = make(story)
        rows = {s.name: measures.measure(s, test) for s in chapter.systems}
        if best is not None:
            for row in rows.values():
                measures.compare_bits(row, known[best.name])
        if full:
            measures.time_chapter(chapter.systems, best, rows, test["prose"][:1])
            result.exhibits += chapter.exhibits()
        known |= rows
        result.checks += chapter.check(known)
        result.chapters.append((chapter, list(rows.values())))
        best = min(
            (s for s in chapter.systems if s.generate is not None),
            key=lambda s: rows[s.name].bits["mean"],
        )


def make_report(
    results: list[SeedResult], corpus: Corpus, settings: Settings, windows: int
) -> dict[str, Any]:
    """All figures of the run, as they stand in ``report.json``."""
    first = results[0]
    rows = [
        {k: v for k, v in vars(row).items() if k != "nats"} | {"chapter": chapter.title}
        for chapter, measured in first.chapters
        for row in measured
    ]
    texts = {
        domain: {
            "training_bytes": len(corpus.text(domain)),
            "held_out_bytes": len(corpus.text(domain, held_out=True)),
        }
        for domain in ("prose", "code")
    }
    seeds = [
        {
            "seed": r.seed,
            "bits_per_character": {m.name: m.bits for _, ms in r.chapters for m in ms},
            "kept": all(check.kept for check in r.checks),
        }
        for r in results
    ]
    return {
        "chapters": [{"title": c.title, "about": c.about} for c, _ in first.chapters],
        "rows": rows,
        "checks": [asdict(c) | {"seed": r.seed} for r in results for c in r.checks],
        "seeds": seeds,
        "texts": texts,
        "test": {"windows": windows, "window_bytes": WINDOW},
        "training": {"seconds": first.training_seconds, "cached": first.cached},
        "settings": asdict(settings),
        "machine": machine() | {"transformers": transformers.__version__},
        "exhibits": [asdict(e) | {"kind": type(e).__name__} for e in first.exhibits],
    }


def run_tour(
    settings: Settings, seeds: int, windows: int, out: Path, cache: Path
) -> dict[str, Any]:
    """Run all seeds, print the tables, write both reports, and return the figures."""
    begin = time.perf_counter()
    corpus = load_corpus()
    results = []
    for number in range(seeds):
        seeded = replace(settings, seed=settings.seed + number)
        results.append(run_seed(seeded, corpus, cache, windows, full=number == 0))
    report = make_report(results, corpus, settings, windows)
    report["seconds"] = time.perf_counter() - begin
    print_table(report)
    if seeds > 1:
        print_seeds(report)
    print_samples(report)
    print_checks(report)
    page = write_report(report, out)
    print(f"The whole report: {page}  ({report['seconds']:.0f} s)")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.tour", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument("--steps", type=int, help="training steps, for a quick look")
    parser.add_argument("--windows", type=int, default=TEST_WINDOWS)
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps", "windows"):
        value = getattr(options, name)
        if value is not None and value < 1 + (name == "windows"):
            parser.error(f"--{name} is {value}, which is too small")
    settings = Settings()
    if options.steps is not None:
        prose, code = (
            replace(recipe, steps=options.steps)
            for recipe in (settings.prose, settings.code)
        )
        settings = replace(settings, prose=prose, code=code)
    # The models are too small for threads to help, and one gives equal sums anywhere.
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report = run_tour(
        settings, options.seeds, options.windows, options.out, options.cache
    )
    broken = [check for check in report["checks"] if not check["kept"]]
    for check in broken:
        print(
            f"Promise not kept (seed {check['seed']}). Promised: {check['promised']} "
            f"Measured: {check['measured']}",
            file=sys.stderr,
        )
    return 1 if broken else 0
