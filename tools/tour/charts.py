# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG and shaded text as HTML; colours come from the page's CSS."""

import math
from html import escape

from tools.tour import figures

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 16, 40


def bar_chart(groups: dict[str, dict[str, float]], label: str) -> str:
    """Grouped bars from zero, each with its value; `groups` is group -> name -> y."""
    names = list(next(iter(groups.values())))
    top = max(y for bars in groups.values() for y in bars.values())
    step = (WIDTH - LEFT - RIGHT) / len(groups)
    width = min(40.0, step * 0.84 / len(names))
    parts = [_y_axis(0.0, top, label)]
    for place, (group, bars) in enumerate(groups.items()):
        middle = LEFT + step * (place + 0.5)
        parts.append(_text(middle, HEIGHT - BOTTOM + 20, group, "middle"))
        for number, name in enumerate(names):
            x = middle + (number - len(names) / 2) * width
            y = _scale(bars[name], 0.0, top)
            title = f"{group}, {name}: {figures.bits(bars[name])}"
            parts.append(
                f'<rect class="s{number}" x="{x + 1:.1f}" y="{y:.1f}" '
                f'width="{width - 2:.1f}" height="{HEIGHT - BOTTOM - y:.1f}" rx="2">'
                f"<title>{escape(title)}</title></rect>"
            )
            parts.append(
                _text(x + width / 2, y - 4, f"{bars[name]:.2f}", "middle", "value")
            )
    return legend(names) + _svg(parts, f"{label} by text and system")


def line_chart(
    series: dict[str, list[tuple[float, float]]],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines over a common x axis; the y axis spans the data unless `y_range`."""
    points = [point for line in series.values() for point in line]
    low_x, high_x = (f(x for x, _ in points) for f in (min, max))
    low, high = y_range or (min(y for _, y in points), max(y for _, y in points))
    parts = [_y_axis(low, high, y_label)]
    for x in _ticks(low_x, high_x):
        place = _across(x, low_x, high_x)
        parts.append(_text(place, HEIGHT - BOTTOM + 18, f"{x:g}", "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, x_label, "end"))
    for number, line in enumerate(series.values()):
        way = " ".join(
            f"{_across(x, low_x, high_x):.1f},{_scale(y, low, high):.1f}"
            for x, y in line
        )
        parts.append(f'<polyline class="l{number}" points="{way}"/>')
    return legend(list(series)) + _svg(parts, f"{y_label} by {x_label}")


def legend(names: list[str]) -> str:
    """Names beside the colours of their series."""
    items = (
        f'<span><i class="b{n}"></i>{escape(x)}</span>' for n, x in enumerate(names)
    )
    return f'<p class="legend">{"".join(items)}</p>'


def shaded_text(pieces: list[tuple[str, float]], high: str) -> str:
    """Preformatted text, each piece on a mixture of the colours of low and high."""
    spans = (
        f'<span style="--w:{100 * share:.0f}%" '
        f'title="{100 * share:.0f} % {escape(high)}">{escape(text)}</span>'
        for text, share in pieces
    )
    return f'<pre class="shaded">{"".join(spans)}</pre>'


def shade_legend(low: str, high: str) -> str:
    """The two ends of the shading."""
    ends = (
        f'<span><i style="--w:{w}%" class="shade"></i>{escape(name)}</span>'
        for name, w in ((low, 0), (high, 100))
    )
    return f'<p class="legend">{"".join(ends)}</p>'


def _y_axis(low: float, high: float, label: str) -> str:
    parts = [_text(4, TOP - 4, label, "start")]
    for value in _ticks(low, high):
        y = _scale(value, low, high)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(LEFT - 6, y + 4, f"{value:g}", "end"))
    return "".join(parts)


def _ticks(low: float, high: float) -> list[float]:
    if high <= low:
        return [low]
    power = 10 ** math.floor(math.log10((high - low) / 3))
    step = next(s * power for s in (1, 2, 5, 10) if (high - low) / (s * power) <= 6)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 6) for n in range(first, last + 1)]


def _scale(y: float, low: float, high: float) -> float:
    share = (y - low) / (high - low) if high > low else 0.5
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP - 12)


def _across(x: float, low: float, high: float) -> float:
    share = (x - low) / (high - low) if high > low else 0.5
    return LEFT + 4 + share * (WIDTH - LEFT - RIGHT - 12)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "axis") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _svg(parts: list[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
