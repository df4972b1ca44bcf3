"""What a sweep over batch sizes and threads found: as a table for a terminal, as JSON and as a page with plots.

>>> print(timing_table(rows))
file     threads  batch   latency  inputs/s  memory
dense          1      1  0.412 ms     2,430  9.1 MB
compact        1      1  0.067 ms    14,900  7.0 MB
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sparsebayes.export.sweep import Timing
from sparsebayes.files import write_atomically
from sparsebayes.report.charts import Figure
from sparsebayes.report.pages import page
from sparsebayes.report.provenance import busy_note, library_versions, machine_hardware
from sparsebayes.report.svg import Dot, Series, scatter_chart
from sparsebayes.words import milliseconds, ratio, size

__all__ = ["timing_table", "write_timings"]

HEAD = ("file", "threads", "batch", "latency", "inputs/s", "memory", "against the first")
DEFINITIONS = (
    "Latency is the median time of one call in onnxruntime on the CPU; the files of one setting are measured in "
    "turn, so that a busy machine slows all of them alike. Memory is what opening the file and running one batch "
    "adds to the peak of a fresh process."
)


def timing_table(rows: Sequence[Timing]) -> str:
    """Write the sweep as aligned plain text.

    Args:
        rows: the timings; the first file named is what the others are compared with.

    Returns:
        A heading and one line per timing, without a newline at the end.
    """
    lines = [HEAD, *_cells(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def write_timings(rows: Sequence[Timing], folder: Path, title: str) -> Path:
    """Write `bench.json` and `bench.html`.

    Args:
        rows: the timings.
        folder: an existing folder; earlier files of the two names are replaced.
        title: heading of the page.

    Returns:
        The path of the page.

    Raises:
        RunError: the folder cannot be written.
    """
    hardware, versions, busy = machine_hardware(), library_versions(), busy_note()
    record = {
        "title": title,
        "hardware": hardware,
        "versions": versions,
        "note": busy,
        "rows": [{**asdict(row), "throughput": row.throughput} for row in rows],
    }
    write_atomically(folder / "bench.json", json.dumps(record, indent=1) + "\n")
    target = folder / "bench.html"
    content = page(
        "timings",
        heading=title,
        head=HEAD,
        rows=_cells(rows),
        figures=_figures(rows),
        definitions=DEFINITIONS,
        note=busy,
        machine=[("processor", hardware), *versions.items()],
    )
    write_atomically(target, content)
    return target


def _cells(rows: Sequence[Timing]) -> list[tuple[str, ...]]:
    first = {(row.batch, row.threads): row for row in reversed(rows)}  # the first of each setting wins
    lines: list[tuple[str, ...]] = []
    for row in rows:
        against = first[row.batch, row.threads]
        lines.append(
            (
                row.file,
                str(row.threads),
                str(row.batch),
                milliseconds(row.latency_ms),
                f"{row.throughput:,.0f}",
                "-" if row.memory_mb is None else size(round(1e6 * max(row.memory_mb, 0.0))),
                "" if row is against else ratio(against.latency_ms, row.latency_ms, "faster", "slower"),
            )
        )
    return lines


def _figures(rows: Sequence[Timing]) -> list[Figure]:
    """Latency and throughput over the batch size for each number of threads."""
    names = tuple(dict.fromkeys(row.file for row in rows))
    figures = []
    for threads in dict.fromkeys(row.threads for row in rows):
        mine = [row for row in rows if row.threads == threads]
        words = "one thread" if threads == 1 else f"{threads} threads"
        latency = [
            Series(name, tuple(Dot(r.batch, r.latency_ms, _describe(r)) for r in mine if r.file == name))
            for name in names
        ]
        through = [
            Series(name, tuple(Dot(r.batch, r.throughput, _describe(r)) for r in mine if r.file == name))
            for name in names
        ]
        for title, series, label in (
            (f"Latency, {words}", latency, "milliseconds for one call"),
            (f"Throughput, {words}", through, "inputs per second"),
        ):
            chart = scatter_chart(title, series, x_label="batch", y_label=label, log_x=True, log_y=True)
            figures.append(Figure(title, chart, keys=names))
    return figures


def _describe(row: Timing) -> str:
    return f"{row.file}, batch {row.batch}: {milliseconds(row.latency_ms)}, {row.throughput:,.0f} inputs per second"
