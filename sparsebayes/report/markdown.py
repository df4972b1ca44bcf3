r"""Markdown from text that nobody vouches for: names, reasons and recipes cannot become markup.

>>> table(["layer", "width"], [["conv1 | <b>", "20"]])
'| layer | width |\n| --- | ---: |\n| conv1 \\| &lt;b> | 20 |'
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["fenced", "table", "text"]


def text(value: str) -> str:
    """Escape a text so that it stands in a line, or a table's cell, as it is.

    Args:
        value: any text.

    Returns:
        One line without HTML, links, code or cell borders.
    """
    flat = " ".join(value.split())
    # Without "<" and "&" there is no HTML; ">" stays, for the arrows.
    return re.sub(r"([\\`\[\]|*])", r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;"))


def fenced(value: str, language: str = "") -> str:
    """Put a text in a code block whose fence is longer than any run of backticks in the text.

    Args:
        value: any text.
        language: name behind the opening fence.

    Returns:
        The block, without a newline at the end.
    """
    longest = max((len(run) for run in re.findall(r"`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{value.rstrip()}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; the first column is flush left, the others flush right.

    Args:
        head: the columns' names.
        rows: cells, as many per row as there are columns; escaped here.

    Returns:
        The table, without a newline at the end.
    """
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)]]
    lines += [list(row) for row in rows]
    return "\n".join(
        f"| {' | '.join(cell if i == 1 else text(cell) for cell in line)} |" for i, line in enumerate(lines)
    )
