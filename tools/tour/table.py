# SPDX-License-Identifier: Apache-2.0
"""The tables in the terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tools.tour import figures
from tools.tour.story import TEXTS


def _console() -> Console:
    console = Console(highlight=False)
    # A log file has no width; wrapped there, the table could not be read.
    if not console.is_terminal:
        console.width = max(console.width, 140)
    return console


def print_table(report: dict[str, Any]) -> None:
    """One line for each system, under its chapter."""
    table = Table(title="Bits per character on held-out text, and what they cost")
    table.add_column("", min_width=16)
    for text in TEXTS:
        table.add_column(text, justify="right")
    for name in ("change", "parameters", "memory", "CPU ms/byte", "time ratio"):
        table.add_column(name, justify="right")
    for chapter in report["chapters"]:
        table.add_section()
        table.add_row(f"[bold]{escape(chapter['title'])}")
        for row in report["rows"]:
            if row["chapter"] == chapter["title"]:
                table.add_row(*cells(row))
    console = _console()
    console.print(table)
    console.print(f"change, time ratio: against the {against(report)}")
    console.print(figures.units_line(report), style="dim")
    console.print(figures.machine_line(report), style="dim")
    console.print(f"Models {figures.training_line(report)}.", style="dim")


def cells(row: dict[str, Any]) -> list[str]:
    """One system's figures, as they are shown everywhere."""
    return [
        row["name"],
        *(figures.bits(row["bits"][text]) for text in TEXTS),
        figures.percent(row["bits_change"]),
        figures.count(row["parameters"]),
        figures.memory(row["parameter_bytes"], row["cache_bytes"]),
        figures.milliseconds(row["milliseconds"]),
        figures.times(row["time_change"]),
    ]


def against(report: dict[str, Any]) -> str:
    """The systems that others were compared with."""
    names = [row["against"] for row in report["rows"] if row["against"]]
    return ", ".join(dict.fromkeys(names)) + ", the best of the chapter before"


def print_seeds(report: dict[str, Any]) -> None:
    """Mean bits per character of every system, by seed."""
    seeds = report["seeds"]
    table = Table("", *(f"seed {entry['seed']}" for entry in seeds))
    table.title = "Mean of prose and code, by seed"
    for name in (row["name"] for row in report["rows"]):
        values = (entry["bits_per_character"][name]["mean"] for entry in seeds)
        table.add_row(name, *map(figures.bits, values))
    kept = ("kept" if entry["kept"] else "not kept" for entry in seeds)
    table.add_row("promises", *kept)
    _console().print(table)


def print_samples(report: dict[str, Any]) -> None:
    """Text that models wrote, as it is."""
    console = _console()
    for exhibit in report["exhibits"]:
        if exhibit["kind"] == "Shaded":
            console.print(f"[bold]{escape(exhibit['title'])}[/]")
            for pieces in exhibit["texts"]:
                console.print(Text("".join(text for text, _ in pieces), style="italic"))


def print_checks(report: dict[str, Any]) -> None:
    """Every promise, and whether it was kept."""
    console = _console()
    many = len(report["seeds"]) > 1
    for check in report["checks"]:
        mark = "[green]kept[/]" if check["kept"] else "[bold red]not kept[/]"
        seed = f"seed {check['seed']}: " if many else ""
        text = escape(f"{seed}{check['promised']} {check['measured']}")
        console.print(f"{mark}  {text}")
