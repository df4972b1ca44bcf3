"""Shares as pictures without axes, as inline SVG: a bar for each layer, and a table of shaded cells.

Bars are laid out in percent of the page's width, so that their text keeps its size on every screen; cells are drawn as
wide as charts are. Colours are the classes of `svg.py`. Every text is escaped here.

    >>> share_bars("Widths", [("conv1", 20, 5)])
    Markup('<svg class="bars" width="100%" height="44" ...')
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from sparsebayes.report.svg import WIDTH

__all__ = ["heat_map", "share_bars"]

BAR_ROW = 44
CELL_ROW = 24


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
                f'<text x="100%" y="{top + 16}" class="end">{whole:,} → {left:,}</text>'
                f'<rect class="whole" x="0" y="{top + 22}" width="100%" height="14" rx="3"/>'
                f'<rect class="fill c0" x="0" y="{top + 22}" width="{share:.2f}%" height="14" rx="3"/>'
            )
        )
    height = len(rows) * BAR_ROW
    head = f'<svg class="bars" width="100%" height="{height}" role="img" aria-label="{escape(title)}">'
    return Markup(head) + Markup("").join(parts) + Markup("</svg>")


def heat_map(
    title: str, names: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[tuple[float, str]]]
) -> Markup:
    """Draw a table of shaded cells, one row per name.

    Args:
        title: read out to those who do not see the chart.
        names: of the rows.
        columns: of the columns; as many as fit are written out.
        cells: for each row and column the share of 1 that the shade shows, and the cell's text.

    Returns:
        An SVG element.
    """
    left = min(150, 14 + max((len(name) for name in names), default=0) * 6.6)
    step = (WIDTH - left) / max(len(columns), 1)
    written = max((len(text) for row in cells for _, text in row), default=0) * 6.2 + 2 < step
    height = CELL_ROW * (len(names) + 1)
    # Half the colour at most: the same ink stays readable on every shade, light and dark.
    stride = max(1, math.ceil(22 / step))
    parts = [
        Markup(f'<text class="small mid" x="{left + (column + 0.5) * step:.1f}" y="14">{escape(name)}</text>')
        for column, name in enumerate(columns)
        if column % stride == 0
    ]
    for number, (name, row) in enumerate(zip(names, cells, strict=True)):
        top = CELL_ROW * (number + 1)
        room = int((left - 8) / 6.4)
        shown = name if len(name) <= room else "…" + name[1 - room :]
        parts.append(Markup(f'<text class="small" x="0" y="{top + 15}">{escape(shown)}</text>'))
        for column, (share, text) in enumerate(row):
            x, place = left + column * step, min(max(share, 0.0), 1.0)
            told = escape(f"{name}, {columns[column]}: {text}")
            parts.append(
                Markup(
                    f'<rect class="whole" x="{x:.1f}" y="{top}" width="{max(step - 1, 0.5):.1f}" '
                    f'height="{CELL_ROW - 2}"/>'
                    f'<rect class="fill c0" x="{x:.1f}" y="{top}" width="{max(step - 1, 0.5):.1f}" '
                    f'height="{CELL_ROW - 2}" fill-opacity="{place / 2:.3f}"><title>{told}</title></rect>'
                )
            )
            if written:
                middle = f'x="{x + step / 2:.1f}" y="{top + 15}"'
                parts.append(Markup(f'<text class="cell mid" {middle}>{escape(text)}</text>'))
    head = f'<svg viewBox="0 0 {WIDTH} {height}" class="chart" role="img" aria-label="{escape(title)}">'
    return Markup(head) + Markup("").join(parts) + Markup("</svg>")
