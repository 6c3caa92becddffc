# SPDX-License-Identifier: Apache-2.0
"""``report.html`` and ``report.json``: every figure on the page is in the JSON.

The page needs no network and no script, and follows the reader's light or dark mode.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from tools.tour import charts, figures
from tools.tour.story import TEXTS
from tools.tour.table import against, cells

STYLE = Path(__file__).with_name("report.css")
HEAD = (
    "",
    *TEXTS,
    "change",
    "parameters",
    "memory",
    "CPU ms per byte",
    "time ratio",
)


def write_report(report: dict[str, Any], out: Path) -> Path:
    """Write both files into `out`, made where missing; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    page = out / "report.html"
    page.write_text(render(json.loads(text)), encoding="utf-8")
    return page


def render(report: dict[str, Any]) -> str:
    """The whole page, from the figures of ``report.json`` alone."""
    sections = [
        _summary(report),
        _section("Figures", _table(report) + _bars(report)),
        _section("Promises", _checks(report)),
        *(_exhibit(exhibit) for exhibit in report["exhibits"]),
        _section("Text and training", _origin(report)),
    ]
    if len(report["seeds"]) > 1:
        sections.insert(3, _section("Seeds", _seeds(report)))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>The tour of torchworks</title>"
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>"
        f"{''.join(sections)}"
        f"<footer>{escape(figures.machine_line(report))}<br>"
        f"Whole run: {report['seconds']:.0f} s.</footer></main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _summary(report: dict[str, Any]) -> str:
    # Of those with equal bits the first: what runs it elsewhere adds none.
    compared = [row for row in report["rows"] if row["time_change"]]
    last = min(compared, key=lambda row: row["bits"]["mean"])
    kept = sum(check["kept"] for check in report["checks"])
    tiles = [
        (
            figures.percent(last["bits_change"]),
            f"bits per character of the {last['name']} against the {last['against']}, "
            "on the mean of held-out prose and code",
        ),
        (
            figures.bits(last["bits"]["mean"]),
            f"bits per character of the {last['name']}",
        ),
        (f"{kept} of {len(report['checks'])}", "promises kept in this run"),
    ]
    chapters = "".join(
        f"<li><b>{escape(c['title'])}.</b> {escape(c['about'])}</li>"
        for c in report["chapters"]
    )
    shown = "".join(
        f"<div><strong>{escape(value)}</strong>{escape(text)}</div>"
        for value, text in tiles
    )
    return (
        "<header><h1>The tour of torchworks</h1>"
        "<p>Take two small language models; get one better model; run it elsewhere. "
        "Every figure on this page was measured on one machine, in one run; the models "
        f"were {escape(figures.training_line(report))}.</p>"
        f'<div class="tiles">{shown}</div><ol>{chapters}</ol></header>'
    )


def _table(report: dict[str, Any]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEAD)
    body = []
    for chapter in report["chapters"]:
        title = escape(chapter["title"])
        body.append(f'<tr class="chapter"><th colspan="{len(HEAD)}">{title}</th></tr>')
        for row in report["rows"]:
            if row["chapter"] == chapter["title"]:
                name, *values = cells(row)
                about = f"{escape(name)}<small>{escape(row['about'])}</small>"
                shown = "".join(f"<td>{escape(value)}</td>" for value in values)
                body.append(f'<tr><th scope="row">{about}</th>{shown}</tr>')
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        '<p class="note">Change and time ratio: against the '
        f"{escape(against(report))}; in brackets the interval of the ratio's median. "
        f"{escape(figures.units_line(report))}</p>"
    )


def _bars(report: dict[str, Any]) -> str:
    groups = {
        text: {row["name"]: row["bits"][text] for row in report["rows"]}
        for text in TEXTS
    }
    return charts.bar_chart(groups, "bits per character, less is better")


def _checks(report: dict[str, Any]) -> str:
    many = len(report["seeds"]) > 1
    items = []
    for check in report["checks"]:
        mark = "kept" if check["kept"] else "not kept"
        seed = f"Seed {check['seed']}. " if many else ""
        items.append(
            f'<li><b class="{"good" if check["kept"] else "bad"}">{mark}</b> '
            f"{escape(seed + check['promised'])} "
            f"<em>{escape(check['measured'])}</em></li>"
        )
    return f'<ul class="checks">{"".join(items)}</ul>'


def _seeds(report: dict[str, Any]) -> str:
    names = [row["name"] for row in report["rows"]]
    head = "".join(f"<th>{escape(name)}</th>" for name in ("seed", *names))
    rows = []
    for entry in report["seeds"]:
        values = (entry["bits_per_character"][name]["mean"] for name in names)
        shown = "".join(f"<td>{figures.bits(value)}</td>" for value in values)
        rows.append(f'<tr><th scope="row">{entry["seed"]}</th>{shown}</tr>')
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>'
        f"{''.join(rows)}</tbody></table></div>"
        '<p class="note">Bits per character, mean of held-out prose and code.</p>'
    )


def _exhibit(exhibit: dict[str, Any]) -> str:
    if exhibit["kind"] == "Lines":
        body = charts.line_chart(
            exhibit["series"],
            exhibit["x_label"],
            exhibit["y_label"],
            exhibit["y_range"],
        )
    else:
        low, high = exhibit["low"], exhibit["high"]
        body = charts.shade_legend(low, high)
        body += "".join(charts.shaded_text(t, high) for t in exhibit["texts"])
    caption = f'<p class="note">{escape(exhibit["caption"])}</p>'
    return _section(exhibit["title"], body + caption)


def _origin(report: dict[str, Any]) -> str:
    rows = []
    for domain, source in (
        ("prose", "Python's help pages (pydoc_data.topics)"),
        ("code", "the top-level modules of Python's standard library"),
    ):
        sizes, recipe = report["texts"][domain], report["settings"][domain]
        rows.append(
            f"<li><b>{domain}</b>: {source}; {sizes['training_bytes']:,} bytes to "
            f"train on, {sizes['held_out_bytes']:,} held out. "
            f"Model: {recipe['family']}, {recipe['layers']} layers, "
            f"width {recipe['width']}, "
            f"{recipe['steps']:,} steps of {recipe['batch']} windows.</li>"
        )
    return (
        f"<ul>{''.join(rows)}</ul><p>Documents that share twelve words in a row are on "
        "the same side of the split. The models were "
        f"{escape(figures.training_line(report))}.</p>"
    )
