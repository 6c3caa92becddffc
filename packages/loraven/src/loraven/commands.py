# SPDX-License-Identifier: Apache-2.0
"""The subcommands of ``loraven``; imported by `loraven.cli` alone, needs ``[cli]``.

Decisions:
- What can be refused is refused before the model is read: the goal of an audit, the
  levels, a folder that can't be written.
- Without ``--factors`` audit and bench convert with every other text and measure on
  the rest: a file in some order doesn't set them apart.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import loraven
from loraven.batches import main_output, run, valid
from loraven.features import check_goal
from loraven.levels import check_levels
from loraven.meter import as_device
from loraven.reading import (
    Batch,
    Source,
    check_runs,
    read_batches,
    read_model,
    read_texts,
)
from torchworks_core import bench as timing
from torchworks_core.errors import InvalidValue, MissingFile

_WEIGHING = "factorising and weighing the layers"

app = typer.Typer(
    help="Turn a model's linear layers into one family of compute budgets.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Folder = Annotated[Path, typer.Argument(help="A transformers model's folder.")]
Texts = Annotated[Path, typer.Option(help="Text file, one example on each line.")]
Factors = Annotated[
    Path | None, typer.Option(help="Folder that convert wrote; else convert first.")
]
Levels = Annotated[str, typer.Option(help="Budgets in (0, 1], with commas between.")]
Cost = Annotated[str, typer.Option(help="macs, latency or energy.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples in a batch.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens of an example.")]
Device = Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1.")]


@app.command()
def convert(
    model_dir: Folder,
    texts: Texts,
    out: Annotated[Path, typer.Option(help="Folder for the factors.")],
    levels: Levels = "0.3,0.5,0.7,1.0",
    cost: Cost = "macs",
    include: Annotated[list[str] | None, typer.Option(help="Shell pattern.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Shell pattern.")] = None,
    batch_size: BatchSize = 16,
    max_length: MaxLength = 128,
    device: Device = "cpu",
) -> None:
    """Convert a model with unlabelled texts, and save the factors."""
    chosen = _levels(levels)
    _check_out(out)
    source = _source(model_dir, texts, batch_size, max_length, device)
    model = read_model(source)
    batches = read_batches(source, source.texts)
    check_runs(source, model, batches)
    shown = _Shown(batches, "calibration", _WEIGHING)
    options = {"levels": chosen, "cost": cost, "include": include or None}
    summary = loraven.convert(model, shown, exclude=exclude or (), **options)
    try:
        loraven.save(model, out)
    except OSError as error:
        raise InvalidValue(f"--out {str(out)!r}", str(error)) from error
    print_levels(summary)
    typer.echo(f"saved in {out}")


@app.command()
def audit(
    model_dir: Folder,
    texts: Texts,
    factors: Factors = None,
    target: Annotated[float, typer.Option(help="Wanted quality: a cosine.")] = 0.95,
    alpha: Annotated[float, typer.Option(help="Share that may miss it.")] = 0.05,
    levels: Levels = "0.3,0.5,0.7,1.0",
    cost: Cost = "macs",
    batch_size: BatchSize = 16,
    max_length: MaxLength = 128,
    device: Device = "cpu",
) -> None:
    """Say whether deciding the budget for each input pays on these texts."""
    check_goal(target, alpha)
    chosen = _levels(levels)
    source = _source(model_dir, texts, batch_size, max_length, device)
    model, batches, _ = _family(source, factors, chosen, cost)
    shown = _Shown(batches, "audit", "judging")
    typer.echo(str(loraven.audit(model, shown, target=target, alpha=alpha)))


@app.command()
def bench(
    model_dir: Folder,
    texts: Texts,
    factors: Factors = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of each level.")] = 15,
    levels: Levels = "0.3,0.5,0.7,1.0",
    cost: Cost = "macs",
    batch_size: BatchSize = 16,
    max_length: MaxLength = 128,
    device: Device = "cpu",
) -> None:
    """Time each level against the model as it is, and compare their outputs."""
    chosen = _levels(levels)
    source = _source(model_dir, texts, batch_size, max_length, device)
    model, batches, summary = _family(source, factors, chosen, cost)
    original = read_model(source)
    wanted = [_pooled(original, batch) for batch in batches]
    table = Table("level", "time", "interval", "cosine", "min", "MACs of the model")
    for level, found in tqdm(summary.levels.items(), "levels", leave=False):
        loraven.set_budget(model, level)
        cosines = _cosines(model, batches, wanted)
        with torch.no_grad():
            ratio = timing.compare(
                lambda: run(model, batches[0]),
                lambda: run(original, batches[0]),
                repeats=repeats,
                device=source.device,
            )
        table.add_row(
            f"{level:g}",
            f"{ratio.ratio:.2f}",
            f"{ratio.low:.2f} to {ratio.high:.2f}",
            f"{cosines.mean():.4f}",
            f"{cosines.min():.4f}",
            f"{found.model_macs_fraction:.4f}",
        )
    Console().print(table)
    typer.echo("time: of the level, divided by the original model's; below 1 is faster")


def print_levels(summary: Any) -> None:
    """Print one row for each level of a `loraven.ConversionSummary`."""
    table = Table("level", "cost", "MACs of the model", "MiB of weights alone")
    for level, found in summary.levels.items():
        alone = f"{found.resident_bytes / 2**20:.1f}"
        shares = f"{found.cost_fraction:.4f}", f"{found.model_macs_fraction:.4f}"
        table.add_row(f"{level:g}", *shares, alone)
    Console().print(table)
    counts = f"{len(summary.layers)} layers converted, {len(summary.skipped)} skipped"
    typer.echo(f"{counts}; {summary.tokens} tokens, {summary.seconds:.1f} s")


def _source(
    folder: Path, texts: Path, batch_size: int, max_length: int, device: str
) -> Source:
    if not (folder / "config.json").is_file():
        do = "Give a folder that save_pretrained wrote"
        raise MissingFile(f"model {str(folder)!r}", "it has no config.json", do)
    where = as_device(device)
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InvalidValue(f"--device {device!r}", why) from error
    return Source(folder, read_texts(texts), batch_size, max_length, where)


def _levels(text: str) -> tuple[float, ...]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as error:
        do = "Give numbers with commas between, as in 0.5,1.0"
        raise InvalidValue(f"--levels {text!r}", str(error), do) from error
    return check_levels(found)


def _check_out(out: Path) -> None:
    """Raise InvalidValue where no folder can be made or written."""
    folder = next(path for path in (out, *out.absolute().parents) if path.exists())
    what, do = f"--out {str(out)!r}", "Give a folder that can be written"
    if not folder.is_dir():
        it = "it" if folder == out else repr(str(folder))
        raise InvalidValue(what, f"{it} is a file", do)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidValue(what, f"{str(folder)!r} is read-only", do)


def _family(
    source: Source, factors: Path | None, levels: tuple[float, ...], cost: str
) -> tuple[nn.Module, list[Batch], Any]:
    """Return a converted model, the batches to measure on, and the summary."""
    texts = source.texts
    if factors is None and len(texts) < 2:
        do = "Give more, or --factors"
        raise InvalidValue("texts", "one can't both calibrate and measure", do)
    model = read_model(source)
    if factors is not None:
        summary = loraven.load(model, factors)
        batches = read_batches(source, texts)
        check_runs(source, model, batches)
        return model, batches, summary
    batches, known = (read_batches(source, texts[i::2]) for i in (1, 0))
    check_runs(source, model, batches + known)
    shown = _Shown(known, "calibration", _WEIGHING)
    return model, batches, loraven.convert(model, shown, levels=levels, cost=cost)


class _Shown:
    """Batches that show their progress, and then what goes on after the last."""

    def __init__(self, batches: list[Batch], what: str, then: str) -> None:
        self.batches, self.what, self.then = batches, what, then

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from tqdm(self.batches, self.what, unit="batch", leave=False)
        typer.echo(f"{self.then} ...", err=True)


def _cosines(
    model: nn.Module, batches: list[Batch], wanted: list[torch.Tensor]
) -> torch.Tensor:
    """Cosine of each example's pooled output and the wanted one."""
    found = zip((_pooled(model, batch) for batch in batches), wanted, strict=True)
    return torch.cat([F.cosine_similarity(a, b, dim=-1).cpu() for a, b in found])


@torch.no_grad()
def _pooled(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The model's output, averaged over the real positions of each example."""
    output = main_output(run(model, batch)).float()
    if output.dim() == 3:
        mask = valid(batch)
        weights = torch.ones(output.shape[:2]) if mask is None else mask.float()
        weights = weights.to(output.device)[..., None]
        output = (output * weights).sum(1) / weights.sum(1)
    return output
