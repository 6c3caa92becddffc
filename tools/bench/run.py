# SPDX-License-Identifier: Apache-2.0
"""Run a package's benchmark, keep its figures, and write them into its README.

Measure, and keep the figures in tools/bench/results/PACKAGE.json:

    python tools/bench/run.py PACKAGE

Rewrite the README's tables from the kept figures, without measuring:

    python tools/bench/run.py PACKAGE --render

A benchmark is the file tools/bench/<package with underscores>.py. Its `rows()`
yields dicts: measure, value (number or text), unit, peer, goal, note, all but
the first two optional; `table` names the README's table they belong to, the
package's name if absent. The README marks where a table goes:

    <!-- bench:NAME -->
    <!-- /bench:NAME -->
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COLUMNS = ("measure", "value", "unit", "peer", "goal", "note")

# A benchmark file may have its package's import name: without this line it
# would be imported in the package's place.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", metavar="PACKAGE", choices=packages())
    parser.add_argument("--render", action="store_true", help="only rewrite the README")
    chosen = parser.parse_args(arguments)
    if chosen.render:
        render(chosen.package)
    else:
        show(measure(chosen.package))


def packages() -> list[str]:
    """Return the names of the packages that have a benchmark."""
    names = (file.stem.replace("_", "-") for file in HERE.glob("*.py"))
    return sorted(name for name in names if (ROOT / "packages" / name).is_dir())


def measure(package: str) -> list[dict[str, Any]]:
    """Run a package's benchmark and write its figures; return the rows."""
    from torchworks_core.bench import machine
    from torchworks_core.checkpoint import write_json

    path = HERE / f"{package.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = []
    for row in module.rows():
        unknown = set(row) - {*COLUMNS, "table"}
        if unknown or not {"measure", "value"} <= set(row):
            raise ValueError(f"row {row}: measure and value are needed, not {unknown}")
        rows.append(row)
        print(f"{row['measure']}: {text(row, 'value')} {row.get('unit', '')}")
    about = machine()
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    document = {"package": package, "date": about.pop("date"), "machine": about}
    write_json(results / f"{package}.json", {**document, "rows": rows})
    return rows


def render(package: str) -> None:
    """Put the kept figures between the markers of the package's README."""
    from torchworks_core.checkpoint import read_json, write_atomic

    document = read_json(HERE / "results" / f"{package}.json")
    readme = ROOT / "packages" / package / "README.md"
    content = readme.read_text(encoding="utf-8")
    tables: dict[str, list] = {}
    for row in document["rows"]:
        tables.setdefault(row.get("table", package), []).append(row)
    for name, rows in tables.items():
        begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        block = "\n".join([begin, *markdown(rows), "", origin(document), end])
        content, count = re.subn(
            pattern, lambda _, block=block: block, content, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"{readme}: {begin} stands there {count} times, not once")
    write_atomic(readme, lambda file: file.write(content.encode()))
    print(f"rewritten: {readme.relative_to(ROOT)}")


def markdown(rows: list[dict]) -> Iterable[str]:
    """Yield the lines of a Markdown table, without the columns nobody fills."""
    columns = filled(rows)
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        cells = (text(row, column).replace("|", "\\|") for column in columns)
        yield "| " + " | ".join(cells) + " |"


def show(rows: list[dict]) -> None:
    """Print the rows as a plain table."""
    columns = filled(rows)
    lines = [columns, *([text(row, c) for c in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, strict=True)
        print("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


def filled(rows: list[dict]) -> list[str]:
    """Return the columns in which at least one row says something."""
    return [c for c in COLUMNS if any(text(row, c) for row in rows)]


def text(row: dict, column: str) -> str:
    """Return a cell: three significant digits for numbers."""
    value = row.get(column)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str("" if value is None else value)


def origin(document: dict) -> str:
    """Return the line that says when and on what the figures were taken."""
    about = document["machine"]
    gpus = ", ".join(about["gpus"]) or "no GPU"
    command = f"tools/bench/run.py {document['package']}"
    return (
        f"Measured on {document['date']} by `{command}`: "
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, "
        f"{about['memory_gib']} GiB, {gpus}; {about['system']}, "
        f"Python {about['python']}, torch {about['torch']}."
    )


if __name__ == "__main__":
    main()
