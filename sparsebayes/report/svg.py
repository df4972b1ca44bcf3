"""Small charts with axes as inline SVG: no library, no script, no font or file from anywhere else.

Colours are classes (`c0`, `c1`, ...) that the page's style sheet fills in for light and dark. Charts are drawn 440
units wide so that their text stays readable on a phone. Series differ in colour and in the shape of their markers;
what they are called stands in the page, not in the drawing. Every text is escaped here. Pictures without axes are in
`shares.py`.

    >>> line_chart("Loss", [Series("held out", (Dot(1, 0.5), Dot(2, 0.3)))], x_label="epoch", y_label="nats")
    Markup('<svg viewBox="0 0 440 270" ...')
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from sparsebayes.report.axes import Axis, short_number

__all__ = [
    "NUM_COLOURS",
    "Band",
    "Dot",
    "Mark",
    "Series",
    "histogram",
    "line_chart",
    "scatter_chart",
]

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 40, 44
NUM_COLOURS = 8
MOST_MARKERS = 40
"""Points of a curve up to which each is marked."""


@dataclass(frozen=True)
class Dot:
    """A point, with the text that is shown when it is pointed at.

    Attributes:
        x: where it stands; one that is not finite is a gap.
        y: where it stands; likewise.
        text: shown when it is pointed at.
        chosen: drawn larger and ringed.
        spread: half the length of its error bar, in the units of y; None for none.
    """

    x: float
    y: float
    text: str = ""
    chosen: bool = False
    spread: float | None = None


@dataclass(frozen=True)
class Series:
    """A named curve or cloud of points."""

    name: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Band:
    """A named stretch of the x axis."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Mark:
    """A named height that points are compared with."""

    name: str
    y: float


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    bands: Sequence[Band] = (),
) -> Markup:
    """Draw curves over a common x axis.

    Args:
        title: heading, also read out to those who do not see the chart.
        series: the curves.
        x_label: what the x axis shows, with its unit.
        y_label: what the y axis shows, with its unit.
        log_y: logarithmic y axis; values <= 0 are gaps.
        bands: stretches of the x axis to be told apart.

    Returns:
        An SVG element.
    """
    dots = [dot for one in series for dot in one.dots]
    ends = [end for band in bands for end in (band.start, band.end)]
    x_axis = Axis.around([*(dot.x for dot in dots), *ends])
    y_axis = Axis.around([dot.y for dot in dots], log=log_y, from_zero=True)
    parts = [_band(band, index, x_axis) for index, band in enumerate(bands)]
    parts.append(_frame(title, x_axis, y_axis, x_label, y_label))
    for number, one in enumerate(series):
        parts.append(_curve(one.dots, x_axis, y_axis, number, "line"))
        if len(one.dots) <= MOST_MARKERS:
            parts += [_marker(dot, x_axis, y_axis, number, 2.4) for dot in one.dots]
    return _svg(title, parts)


def scatter_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    marks: Sequence[Mark] = (),
) -> Markup:
    """Draw points, those of a series joined in the order of x; a chosen point is larger and ringed.

    Args:
        title: heading.
        series: the points.
        x_label: what the x axis shows, with its unit.
        y_label: what the y axis shows, with its unit.
        log_x: logarithmic x axis.
        log_y: logarithmic y axis.
        marks: heights that are drawn as dashed lines.

    Returns:
        An SVG element.
    """
    dots = [dot for one in series for dot in one.dots]
    heights = [dot.y + side * (dot.spread or 0.0) for dot in dots for side in (-1, 1)]
    x_axis = Axis.around([dot.x for dot in dots], log=log_x)
    y_axis = Axis.around([*heights, *(mark.y for mark in marks)], log=log_y)
    parts = [_frame(title, x_axis, y_axis, x_label, y_label)]
    for number, one in enumerate(series):
        ordered = sorted(one.dots, key=lambda dot: dot.x)
        parts.append(_curve(ordered, x_axis, y_axis, number, "line thin"))
        parts += [_error_bar(dot, x_axis, y_axis, number) for dot in ordered]
        parts += [_marker(dot, x_axis, y_axis, number, 7 if dot.chosen else 4) for dot in ordered]
    parts += [_mark(mark, y_axis) for mark in marks]
    return _svg(title, parts)


def histogram(
    title: str,
    values: Sequence[float],
    *,
    x_label: str,
    log: bool = True,
    threshold: float | None = None,
) -> Markup:
    """Draw how many values fall into each bin; values without a place on the axis are left out.

    Args:
        title: heading.
        values: the numbers.
        x_label: what they are, with their unit.
        log: logarithmic axis, for positive values; False: a straight one.
        threshold: marked by a vertical line that is also the edge of a bin; bars below it have another colour.

    Returns:
        An SVG element.
    """
    ends = [] if threshold is None else [threshold]
    wide = Axis.around([*values, *ends], log=log)
    places = [place for place in map(wide.place, values) if place is not None]
    num_bins = min(40, max(8, math.isqrt(4 * len(places))))
    mark = None if threshold is None else wide.place(threshold)
    # Bins are counted from the threshold on, so that none of them holds both what stays and what goes.
    shift = 0.0 if mark is None else (mark * num_bins) % 1.0
    counts = [0] * (num_bins + 1)
    for place in places:
        counts[min(math.floor(place * num_bins - shift + 1 + 1e-9), num_bins)] += 1
    y_axis = Axis(0.0, max([*counts, 1]) * 1.05)
    parts = [_frame(title, wide, y_axis, x_label, "groups")]
    base = _y(0.0)
    for number, height in enumerate(counts):
        left, right = (number - 1 + shift) / num_bins, (number + shift) / num_bins
        if height:
            top = _y(y_axis.place(height) or 0.0)
            start, end = _x(max(left, 0.0)), _x(min(right, 1.0))
            colour = "c1" if mark is not None and right <= mark + 1e-9 else "c0"
            parts.append(
                Markup(
                    f'<rect class="fill {colour}" x="{start + 0.5:.1f}" y="{top:.1f}" '
                    f'width="{max(end - start - 1, 0.5):.1f}" height="{base - top:.1f}">'
                    f"<title>{height}</title></rect>"
                )
            )
    if mark is not None:
        x = _x(mark)
        parts.append(Markup(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base:.1f}"/>'))
    return _svg(title, parts)


def _svg(title: str, parts: Sequence[Markup]) -> Markup:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="chart" role="img" aria-label="{escape(title)}">'
    return Markup(head) + Markup("").join(parts) + Markup("</svg>")


def _x(place: float) -> float:
    return LEFT + place * (WIDTH - LEFT - RIGHT)


def _y(place: float) -> float:
    return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)


def _at(x: float, y: float, x_axis: Axis, y_axis: Axis) -> tuple[float, float] | None:
    place_x, place_y = x_axis.place(x), y_axis.place(y)
    return None if place_x is None or place_y is None else (_x(place_x), _y(place_y))


def _curve(dots: Sequence[Dot], x_axis: Axis, y_axis: Axis, number: int, style: str) -> Markup:
    """The stretches of a curve between its gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for dot in dots:
        at = _at(dot.x, dot.y, x_axis, y_axis)
        if at is not None:
            pieces[-1].append(at)
        elif pieces[-1]:
            pieces.append([])
    return Markup("").join(
        Markup(
            f'<polyline class="{style} c{number % NUM_COLOURS}" '
            f'points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in piece)}"/>'
        )
        for piece in pieces
        if piece
    )


def _marker(dot: Dot, x_axis: Axis, y_axis: Axis, number: int, radius: float) -> Markup:
    """A point's circle, square, diamond or triangle, by the number of its series; nothing where it has no place."""
    at = _at(dot.x, dot.y, x_axis, y_axis)
    if at is None:
        return Markup("")
    style = f"dot c{number % NUM_COLOURS}" + (" chosen" if dot.chosen else "")
    told = Markup(f"<title>{escape(dot.text)}</title>") if dot.text else Markup("")
    x, y, r = *at, radius
    if number % 4 == 0:
        shape = f'circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"'
        return Markup(f"<{shape}>{told}</circle>")
    corners = {
        1: ((-r, -r), (r, -r), (r, r), (-r, r)),
        2: ((0, -1.35 * r), (1.35 * r, 0), (0, 1.35 * r), (-1.35 * r, 0)),
        3: ((0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)),
    }[number % 4]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return Markup(f'<polygon class="{style}" points="{path}">{told}</polygon>')


def _error_bar(dot: Dot, x_axis: Axis, y_axis: Axis, number: int) -> Markup:
    """A vertical bar from y - spread to y + spread; nothing where one of them has no place."""
    if not dot.spread:
        return Markup("")
    low, high = (_at(dot.x, dot.y + side * dot.spread, x_axis, y_axis) for side in (-1, 1))
    if low is None or high is None:
        return Markup("")
    ends = f'x1="{low[0]:.1f}" x2="{low[0]:.1f}" y1="{low[1]:.1f}" y2="{high[1]:.1f}"'
    return Markup(f'<line class="spread c{number % NUM_COLOURS}" {ends}/>')


def _mark(mark: Mark, y_axis: Axis) -> Markup:
    place = y_axis.place(mark.y)
    if place is None:
        return Markup("")
    y = _y(place)
    line = f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return Markup(
        f'{line}<text class="small end halo" x="{WIDTH - RIGHT}" y="{y - 5:.1f}">{escape(mark.name)}</text>'
    )


def _frame(title: str, x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> Markup:
    """Title, grid, tick labels and axis labels."""
    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
    for tick, label in _labelled(y_axis):
        y = _y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{label}</text>')
    for tick, label in _labelled(x_axis):
        parts.append(f'<text class="mid" x="{_x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}">{label}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(0):.1f}" y2="{_y(0):.1f}"/>')
    centre = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="mid" x="{centre}" y="{HEIGHT - 8}">{escape(x_label)}</text>')
    parts.append(f'<text class="mid" transform="translate(13 {middle}) rotate(-90)">{escape(y_label)}</text>')
    return Markup("".join(parts))


def _labelled(axis: Axis) -> list[tuple[float, str]]:
    """Place and text of each tick; a text that rounding makes equal to the one before is left out."""
    ticks: list[tuple[float, str]] = []
    for value in axis.ticks():
        place, text = axis.place(value), short_number(value)
        if place is not None and (not ticks or ticks[-1][1] != text):
            ticks.append((place, text))
    return ticks


def _band(band: Band, index: int, x_axis: Axis) -> Markup:
    start, end = x_axis.place(band.start), x_axis.place(band.end)
    if start is None or end is None:
        return Markup("")
    x, width = _x(start), _x(end) - _x(start)
    shade = f'<rect class="band b{index % 2}" x="{x:.1f}" y="{TOP}" width="{width:.1f}" '
    shade += f'height="{HEIGHT - TOP - BOTTOM}"><title>{escape(band.name)}</title></rect>'
    room = len(band.name) * 6.5 < width
    label = f'<text class="small mid" x="{x + width / 2:.1f}" y="{TOP - 5}">{escape(band.name)}</text>'
    return Markup(shade + (label if room else ""))
