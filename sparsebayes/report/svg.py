"""Small charts as inline SVG: no library, no script, no font or file from anywhere else.

Colours are classes (`c0`, `c1`, ...) that the page's style sheet fills in for light and dark. Charts with
axes are drawn 440 units wide so that their text stays readable on a phone; bars of shares are laid out in
percent of the page's width. Every text is escaped here.

    >>> line_chart("Loss", [Line("held out", ((1, 0.5), (2, 0.3)))], x_label="epoch", y_label="nats")
    Markup('<svg viewBox="0 0 440 270" ...')
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = [
    "Axis",
    "Band",
    "Dot",
    "Line",
    "histogram",
    "line_chart",
    "scatter_chart",
    "share_bars",
    "short_number",
]

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 40, 44
BAR_ROW = 44
NUM_COLOURS = 4


@dataclass(frozen=True)
class Line:
    """A named curve through points (x, y); a point that is not finite breaks it."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Band:
    """A named stretch of the x axis."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Dot:
    """A point of a scatter chart, with the text that is shown when it is pointed at."""

    x: float
    y: float
    text: str
    chosen: bool = False


@dataclass(frozen=True)
class Axis:
    """The numbers from `low` to `high` on a line from 0 to 1, straight or logarithmic."""

    low: float
    high: float
    log: bool = False

    @staticmethod
    def around(values: Sequence[float], *, log: bool = False, from_zero: bool = False) -> Axis:
        """Choose an axis that shows all finite values (positive ones, if logarithmic).

        Args:
            values: what is to be shown.
            log: logarithmic axis.
            from_zero: a straight axis begins at 0.

        Returns:
            An axis of positive length, with a margin of 5 %.
        """
        shown = [value for value in values if _drawable(value, log)]
        if not shown:
            return Axis(1.0, 10.0, True) if log else Axis(0.0, 1.0)
        low, high = min(shown), max(shown)
        if log:
            margin = max((high / low) ** 0.05, 1.1)
            return Axis(low / margin, high * margin, True)
        low = min(low, 0.0) if from_zero else low
        margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
        return Axis(low if from_zero and low == 0 else low - margin, high + margin)

    def place(self, value: float) -> float | None:
        """Position of a value, 0 at `low` and 1 at `high`; None where it has none."""
        if not _drawable(value, self.log):
            return None
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values between `low` and `high`, three to eight of them where the range allows."""
        return self._log_ticks() if self.log else self._straight_ticks()

    def _straight_ticks(self) -> list[float]:
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
        for factor in (1, 2, 5, 10):
            if (self.high - self.low) / (step * factor) <= 6:
                step *= factor
                break
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        stride = max(1, math.ceil((last - first) / 7))
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            ticks = [f * 10.0**power for power in range(first, last + 1, stride) for f in factors]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) >= 3:
                return ticks
        return [self.low, self.high]


def _drawable(value: float, log: bool) -> bool:
    """Whether a value has a place; beyond 1e-100 and 1e100 the ratios on an axis could leave the floats."""
    return -1e100 < value < 1e100 and (value > 1e-100 or not log)


def short_number(value: float) -> str:
    """Write a number in at most about six characters: 0.01, 250, 1.2M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    bands: Sequence[Band] = (),
) -> Markup:
    """Draw curves over a common x axis.

    Args:
        title: heading, also read out to those who do not see the chart.
        lines: at most four curves.
        x_label: what the x axis shows, with its unit.
        y_label: what the y axis shows, with its unit.
        log_y: logarithmic y axis; values <= 0 are gaps.
        bands: stretches of the x axis to be told apart.

    Returns:
        An SVG element.
    """
    xs = [x for line in lines for x, _ in line.points]
    x_axis = Axis.around([*xs, *(end for band in bands for end in (band.start, band.end))])
    y_axis = Axis.around([y for line in lines for _, y in line.points], log=log_y, from_zero=True)
    parts = [_band(band, index, x_axis) for index, band in enumerate(bands)]
    parts.append(_frame(title, x_axis, y_axis, x_label, y_label))
    for number, line in enumerate(lines):
        colour = f"c{number % NUM_COLOURS}"
        for piece in _pieces(line.points, x_axis, y_axis):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in piece)
            parts.append(Markup(f'<polyline class="line {colour}" points="{path}"/>'))
            if len(piece) <= 40:
                dots = (f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in piece)
                parts.append(Markup("".join(dots)))
    parts.append(_legend([line.name for line in lines]))
    return _svg(title, parts)


def scatter_chart(
    title: str,
    dots: Sequence[Dot],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
) -> Markup:
    """Draw points, joined in the order of x; a chosen point is larger and ringed.

    Args:
        title: heading.
        dots: the points.
        x_label: what the x axis shows, with its unit.
        y_label: what the y axis shows, with its unit.
        log_x: logarithmic x axis.
        log_y: logarithmic y axis.

    Returns:
        An SVG element.
    """
    x_axis = Axis.around([dot.x for dot in dots], log=log_x)
    y_axis = Axis.around([dot.y for dot in dots], log=log_y)
    parts = [_frame(title, x_axis, y_axis, x_label, y_label)]
    order = sorted(dots, key=lambda dot: dot.x)
    for piece in _pieces([(dot.x, dot.y) for dot in order], x_axis, y_axis):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in piece)
        parts.append(Markup(f'<polyline class="line thin c0" points="{path}"/>'))
    for dot in order:
        at = _at(dot.x, dot.y, x_axis, y_axis)
        if at is not None:
            style = 'class="dot c1 chosen" r="7"' if dot.chosen else 'class="dot c0" r="4"'
            place = f'cx="{at[0]:.1f}" cy="{at[1]:.1f}"'
            parts.append(Markup(f"<circle {style} {place}><title>{escape(dot.text)}</title></circle>"))
    return _svg(title, parts)


def histogram(title: str, values: Sequence[float], *, x_label: str, threshold: float | None = None) -> Markup:
    """Draw how many values fall into each bin of a logarithmic axis; values <= 0 or not finite are left out.

    Args:
        title: heading.
        values: the numbers.
        x_label: what they are, with their unit.
        threshold: a value to be marked by a vertical line.

    Returns:
        An SVG element.
    """
    x_axis = Axis.around([*values, *([] if threshold is None else [threshold])], log=True)
    places = [place for place in map(x_axis.place, values) if place is not None]
    num_bins = min(40, max(8, math.isqrt(len(places))))
    counts = [0] * num_bins
    for place in places:
        counts[min(int(place * num_bins), num_bins - 1)] += 1
    y_axis = Axis(0.0, max([*counts, 1]) * 1.05)
    parts = [_frame(title, x_axis, y_axis, x_label, "groups")]
    width = (WIDTH - LEFT - RIGHT) / num_bins
    base = _y(0.0)
    for number, height in enumerate(counts):
        if height:
            top = _y(y_axis.place(height) or 0.0)
            parts.append(
                Markup(
                    f'<rect class="fill c0" x="{LEFT + number * width + 0.5:.1f}" y="{top:.1f}" '
                    f'width="{width - 1:.1f}" height="{base - top:.1f}"><title>{height}</title></rect>'
                )
            )
    mark = None if threshold is None else x_axis.place(threshold)
    if mark is not None:
        x = _x(mark)
        parts.append(Markup(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base:.1f}"/>'))
    return _svg(title, parts)


def share_bars(title: str, rows: Sequence[tuple[str, int, int]]) -> Markup:
    """Draw one bar per row: how much of the whole is left. The whole of every row is the full width.

    Args:
        title: heading.
        rows: (name, whole, left), each >= 0.

    Returns:
        An SVG element as wide as its surroundings, whose text keeps its size.
    """
    parts = []
    for number, (name, whole, left) in enumerate(rows):
        top = number * BAR_ROW
        share = 100.0 * min(left / whole, 1.0) if whole else 0.0
        parts.append(
            Markup(
                f'<text x="0" y="{top + 16}">{escape(name)}</text>'
                f'<text x="100%" y="{top + 16}" class="end">{whole:,} -&gt; {left:,}</text>'
                f'<rect class="whole" x="0" y="{top + 22}" width="100%" height="14" rx="3"/>'
                f'<rect class="fill c0" x="0" y="{top + 22}" width="{share:.2f}%" height="14" rx="3"/>'
            )
        )
    height = len(rows) * BAR_ROW
    head = f'<svg class="bars" width="100%" height="{height}" role="img" aria-label="{escape(title)}">'
    return Markup(head) + Markup("").join(parts) + Markup("</svg>")


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


def _pieces(
    points: Sequence[tuple[float, float]], x_axis: Axis, y_axis: Axis
) -> list[list[tuple[float, float]]]:
    """The curve's stretches between its gaps, in units of the drawing."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        at = _at(x, y, x_axis, y_axis)
        if at is not None:
            pieces[-1].append(at)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


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


def _legend(names: Sequence[str]) -> Markup:
    """Names of the curves at the top right, right to left."""
    if len(names) < 2:
        return Markup("")
    parts, x = [], float(WIDTH - RIGHT)
    for number, name in reversed(list(enumerate(names))):
        parts.append(f'<text class="end" x="{x:.0f}" y="16">{escape(name)}</text>')
        x -= 8.2 * len(name) + 9
        parts.append(f'<circle class="dot c{number % NUM_COLOURS}" cx="{x:.0f}" cy="12" r="4"/>')
        x -= 12
    return Markup("".join(parts))
