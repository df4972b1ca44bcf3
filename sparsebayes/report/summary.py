"""Before and after in words: the rows of a table, one line, and the table for a terminal.

>>> summary_line(report)
'431,080 -> 2,512 parameters (172x fewer), test error 0.71 % -> 0.84 %, latency 6.1x shorter'
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsebayes.report.records import Figures, Report
from sparsebayes.words import count, milliseconds, percent, ratio, size

__all__ = [
    "Comparison",
    "comparison_rows",
    "summary_line",
    "summary_table",
]

ABSENT = "not measured"


@dataclass(frozen=True)
class Comparison:
    """One line of the table before -> after, in words; `is_worse` where the small network does worse than before."""

    label: str
    dense: str
    compact: str
    change: str
    is_worse: bool = False


def comparison_rows(report: Report) -> tuple[Comparison, ...]:
    """Table rows: test error, parameters, MACs, ONNX bytes, latency at batch 1 and 64.

    Args:
        report: the run's outcome.

    Returns:
        One row per figure, with the change: points for the error, a ratio for all others.
    """
    dense, compact = report.dense, report.compact
    points = round(100 * (compact.test_error - dense.test_error), 2) + 0.0  # + 0.0: no "-0.00"
    return (
        Comparison(
            "Test error",
            percent(dense.test_error),
            percent(compact.test_error),
            f"{points:+.2f} points",
            points > 0,
        ),
        _count_row("Parameters", dense.params, compact.params),
        _count_row("MACs for one input", dense.macs, compact.macs),
        _size_row(dense, compact),
        _latency_row("Latency, batch 1", dense.latency_ms_batch1, compact.latency_ms_batch1),
        _latency_row("Latency, batch 64", dense.latency_ms_batch64, compact.latency_ms_batch64),
    )


def summary_line(report: Report) -> str:
    """Say in one line what the run achieved.

    Args:
        report: the run's outcome.

    Returns:
        Parameters, test error and, if measured, latency at batch 1.
    """
    dense, compact = report.dense, report.compact
    parts = [
        f"{count(dense.params)} -> {count(compact.params)} parameters "
        f"({ratio(dense.params, compact.params, 'fewer', 'more')})",
        f"test error {percent(dense.test_error)} -> {percent(compact.test_error)}",
    ]
    if dense.latency_ms_batch1 is not None and compact.latency_ms_batch1 is not None:
        change = ratio(dense.latency_ms_batch1, compact.latency_ms_batch1, "shorter", "longer")
        parts.append(f"latency {change}")
    return ", ".join(parts)


def summary_table(report: Report) -> str:
    """Write the rows before -> after as aligned plain text for a terminal.

    Args:
        report: the run's outcome.

    Returns:
        A heading and one line per figure, without a newline at the end.
    """
    lines = [("", "dense", "compact", "change")]
    lines += [(row.label, row.dense, row.compact, row.change) for row in comparison_rows(report)]
    label, dense, compact, change = (max(len(line[column]) for line in lines) for column in range(4))
    return "\n".join(
        f"{line[0]:<{label}}  {line[1]:>{dense}}  {line[2]:>{compact}}  {line[3]:>{change}}" for line in lines
    )


def _count_row(label: str, dense: int, compact: int) -> Comparison:
    change = ratio(dense, compact, "fewer", "more")
    return Comparison(label, count(dense), count(compact), change, compact > dense)


def _size_row(dense: Figures, compact: Figures) -> Comparison:
    before, after = dense.onnx_bytes, compact.onnx_bytes
    change = "-" if before is None or after is None else ratio(before, after, "smaller", "larger")
    return Comparison(
        "ONNX file",
        ABSENT if before is None else size(before),
        ABSENT if after is None else size(after),
        change,
        before is not None and after is not None and after > before,
    )


def _latency_row(label: str, dense: float | None, compact: float | None) -> Comparison:
    change = "-" if dense is None or compact is None else ratio(dense, compact, "shorter", "longer")
    return Comparison(
        label,
        ABSENT if dense is None else milliseconds(dense),
        ABSENT if compact is None else milliseconds(compact),
        change,
        dense is not None and compact is not None and compact > dense,
    )
