"""Charts as SVG, without a script: readable in light and dark, on a phone, and without colour.

Series differ by colour, by dashes and by the letter at their end. Colours are CSS variables of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 12, 36
DASHES = ("", "7 3", "2 2", "9 3 2 3", "4 4", "1 3")
COLOURS = 6
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        letter: at its end.
        name: what a reader that speaks the page says.
        points: in the order of x; those that are not finite are left out.
    """

    letter: str
    name: str
    points: Points


def lines(series: Sequence[Series], x_name: str, y_name: str, *, log_x: bool = False) -> str:
    """A line chart; empty if there is nothing to show.

    Args:
        log_x: whether x is on a logarithmic scale; points at 0 and below are left out.
    """
    shown = [
        Series(
            each.letter, each.name, [p for p in each.points if all(map(math.isfinite, p)) and (p[0] > 0 or not log_x)]
        )
        for each in series
    ]
    points = [point for each in shown for point in each.points]
    if not points:
        return ""
    across, x_ticks = _scale([x for x, _ in points], LEFT, WIDTH - RIGHT, log_x)
    up, y_ticks = _scale([y for _, y in points], HEIGHT - BOTTOM, TOP, False)
    drawn = [*_axes(across, up, x_ticks, y_ticks, x_name, y_name)]
    for number, each in enumerate(shown):
        drawn += _line(each, number, across, up)
    label = f"{y_name} against {x_name}: {', '.join(f'{each.letter} {each.name}' for each in shown)}"
    return _svg(WIDTH, HEIGHT, label, drawn)


def _line(each: Series, number: int, across: Callable[[float], float], up: Callable[[float], float]) -> Iterator[str]:
    if not each.points:
        return
    style = f'class="s{number % COLOURS}" stroke-dasharray="{DASHES[number % len(DASHES)]}"'
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in each.points)
    if len(each.points) > 1:
        yield f'<polyline {style} points="{path}"/>'
    x, y = each.points[-1]
    yield f'<circle class="e{number % COLOURS}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5"/>'
    # The letters of lines that end at one place stand below each other.
    yield f'<text class="t{number % COLOURS}" x="{across(x) + 5:.1f}" y="{up(y) + 4 + 9 * (number % 3 - 1):.1f}">'
    yield f"{escape(each.letter)}</text>"


def _axes(
    across: Callable[[float], float],
    up: Callable[[float], float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_name: str,
    y_name: str,
) -> Iterator[str]:
    for tick in y_ticks:
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        yield f'<text class="axis" text-anchor="end" x="{LEFT - 5}" y="{up(tick) + 4:.1f}">{short(tick)}</text>'
    for tick in x_ticks:
        yield f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        place = f'x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 14}"'
        yield f'<text class="axis" text-anchor="middle" {place}>{short(tick)}</text>'
    centre = f'text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}"'
    yield f'<text class="axis" {centre}>{escape(x_name)}</text>'
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 11 {middle})" text-anchor="middle" x="11" y="{middle + 3}"'
    yield f'<text class="axis" {turned}>{escape(y_name)}</text>'


def _scale(
    values: Sequence[float], start: float, stop: float, logarithmic: bool
) -> tuple[Callable[[float], float], list[float]]:
    """From a value to its place, and where ticks are."""
    low, high = min(values), max(values)
    if logarithmic:
        low, high = math.log10(low), math.log10(high)
    if high == low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2

    def place(value: float) -> float:
        return start + ((math.log10(value) if logarithmic else value) - low) / (high - low) * (stop - start)

    if logarithmic:
        decades = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
        return place, decades if len(decades) > 1 else [10**low, 10**high]
    step = _nice((high - low) / 4)
    first = math.ceil(low / step)
    return place, [number * step for number in range(first, math.floor(high / step) + 1)]


def _nice(step: float) -> float:
    """The next larger of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= step), 10 * power)


def short(value: float) -> str:
    """A number in few characters, such as "0.95", "1.5k" or "20M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def timeline(exchanges: str) -> str:
    """The epochs of a run as a strip: A is high, B half as high, C low; each stretch with its letter if it fits."""
    if not exchanges:
        return ""
    wide, high, drawn, begin = WIDTH, 46, [], 0
    heights = {"A": 30, "B": 18, "C": 8}
    for letter, stretch in groupby(exchanges):
        count = len(list(stretch))
        x, width = wide * begin / len(exchanges), wide * count / len(exchanges)
        tall = heights.get(letter, 8)
        kind = letter if letter in heights else ""
        title = f"<title>epochs {begin + 1} to {begin + count}: {escape(letter)}</title>"
        drawn.append(
            f'<rect class="x{kind}" x="{x:.2f}" y="{30 - tall}" width="{max(width - 0.3, 0.5):.2f}" height="{tall}">'
            f"{title}</rect>"
        )
        if width > 24:
            text = escape(f"{count} {letter}" if width > 40 else letter)
            drawn.append(f'<text class="axis" text-anchor="middle" x="{x + width / 2:.1f}" y="43">{text}</text>')
        begin += count
    count = ", ".join(f"{exchanges.count(letter)} {letter}" for letter in "ABC")
    return _svg(wide, high, f"exchanges by epoch: {count}", drawn)


def heat_map(counts: Sequence[Sequence[int]], rows: Sequence[str], columns: Sequence[str], about: str) -> str:
    """Counts as cells that are darker the larger they are, with the numbers in them."""
    if not counts or not counts[0]:
        return ""
    side, left, top = 30, 44, 20
    largest = max(max(row) for row in counts) or 1
    drawn = [
        f'<text class="axis" text-anchor="middle" x="{left + (number + 0.5) * side}" y="14">{escape(name)}</text>'
        for number, name in enumerate(columns)
    ]
    for down, (name, row) in enumerate(zip(rows, counts, strict=True)):
        y = top + down * side
        drawn.append(f'<text class="axis" text-anchor="end" x="{left - 6}" y="{y + 19}">{escape(name)}</text>')
        for right, count in enumerate(row):
            x, share = left + right * side, count / largest
            size = f'width="{side - 1}" height="{side - 1}"'
            drawn.append(f'<rect class="cell" x="{x}" y="{y}" {size} fill-opacity="{share:.2f}"/>')
            if count:
                shade = "onfull" if share > 0.55 else "onempty"
                place = f'text-anchor="middle" x="{x + side / 2 - 0.5}" y="{y + 18}"'
                drawn.append(f'<text class="{shade}" {place}>{short(count)}</text>')
    return _svg(left + side * len(columns), top + side * len(rows), about, drawn)


def _svg(width: float, height: float, label: str, drawn: Sequence[str]) -> str:
    body = "".join(drawn)
    size = f'viewBox="0 0 {width:g} {height:g}" style="max-width:{1.5 * width:g}px"'
    return f'<svg role="img" aria-label="{escape(label, quote=True)}" {size}>{body}</svg>'
