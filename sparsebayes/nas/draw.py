"""A cell as a picture: nodes in a row, an arc for every edge, its operations written on it.

    >>> draw_cell(genotype, "normal", {(0, 3, "skip_connect"): 12.5})
    '<svg class="cell" xmlns="http://www.w3.org/2000/svg" ...'

Arcs over a longer way reach higher, so that no two of them hide each other; the width of a line grows with what its
operation is worth. The picture is one SVG element without script, font or file from anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from sparsebayes.nas.genotype import Genotype, Op

__all__ = ["draw_cell"]

STEP, RADIUS, LINE, RISE, MARGIN = 150, 20, 15, 46, 46
THIN, THICK = 1.5, 7.0
COLOURS = ("#1f6fb5", "#c2571a", "#2f8f5b", "#8a4fa8", "#8a6d1a", "#5d6874", "#b3365b")


def draw_cell(genotype: Genotype, key: str, worth: Mapping[Op, float] | None = None) -> str:
    """Draw one cell.

    Args:
        genotype: the operations.
        key: which of its cells.
        worth: for each operation what it is worth, positive and finite; the lines' widths follow its logarithm. None,
            or an operation that is not in it: a thin line.

    Returns:
        An SVG document.

    Raises:
        RecipeError: the genotype has no such cell.
    """
    edges = genotype.edges(key)
    spec = genotype.spec(key)
    longest = max((edge.target - edge.source for edge in edges), default=0)
    top = RISE * longest + LINE * max((len(edge.ops) for edge in edges), default=0) + MARGIN
    width = STEP * (spec.num_nodes - 1) + 2 * MARGIN
    height = top + RADIUS + MARGIN
    names = sorted({op for edge in edges for op in edge.ops})
    widths = _widths(
        {(e.source, e.target, op): (worth or {}).get((e.source, e.target, op)) for e in edges for op in e.ops}
    )
    parts = [f'<text x="{width / 2}" y="20" class="title">{escape(key)}</text>']
    for edge in edges:
        start, end = MARGIN + STEP * edge.source, MARGIN + STEP * edge.target
        for number, op in enumerate(edge.ops):
            colour = COLOURS[names.index(op) % len(COLOURS)]
            peak = top - RISE * (edge.target - edge.source) - LINE * number
            middle = (start + end) / 2
            # A quadratic curve reaches half the way to its control point.
            path = f"M{start} {top} Q{middle} {2 * peak - top} {end} {top}"
            stroke = f'stroke="{colour}" stroke-width="{widths[edge.source, edge.target, op]:.2f}"'
            parts.append(f'<path d="{path}" fill="none" {stroke} stroke-opacity="0.75"/>')
            label = escape(op.replace("_", " "))
            parts.append(f'<text x="{middle}" y="{peak - 4}" class="op" style="fill:{colour}">{label}</text>')
    for node in range(spec.num_nodes):
        x = MARGIN + STEP * node
        kind = "input" if node < spec.num_inputs else "output" if node in spec.outputs else "inner"
        parts.append(f'<circle cx="{x}" cy="{top}" r="{RADIUS}" class="{kind}"/>')
        parts.append(f'<text x="{x}" y="{top + 5}" class="node">{node}</text>')
        if kind != "inner":
            parts.append(f'<text x="{x}" y="{top + RADIUS + 16}" class="node">{kind}</text>')
    # Rules for this picture alone, also where it stands among others on a page.
    style = (
        "svg.cell text{font:12px system-ui,sans-serif;text-anchor:middle;fill:#1c2127}"
        "svg.cell .title{font-weight:600;font-size:14px}svg.cell .op{paint-order:stroke;stroke:#fff;stroke-width:4px}"
        "svg.cell circle{fill:#f3f5f7;stroke:#5d6874;stroke-width:1.5}"
        "svg.cell circle.input{fill:#dbe8f4}svg.cell circle.output{fill:#dcefe3}"
    )
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    head = f'<svg class="cell" xmlns="http://www.w3.org/2000/svg" {size}>'
    label = f"<title>Cell {escape(key)}</title>"
    return f'{head}{label}<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'


def _widths(worth: Mapping[Op, float | None]) -> dict[Op, float]:
    """Widths of the lines: thin for the least valuable operation, thick for the most valuable one."""
    known = [math.log(value) for value in worth.values() if value is not None and 0 < value < math.inf]
    low, high = min(known, default=0.0), max(known, default=0.0)
    widths = {}
    for op, value in worth.items():
        share = 0.0
        if value is not None and 0 < value < math.inf and high > low:
            share = (math.log(value) - low) / (high - low)
        widths[op] = THIN + share * (THICK - THIN)
    return widths
