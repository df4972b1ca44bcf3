"""Before and after in words: how figures are written, and the rows, the line and the table made of them.

>>> summary_line(report)
'431,080 -> 2,512 parameters (172x fewer), test error 0.71 % -> 0.84 %, latency 6.1x shorter'
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsebayes.report.records import Figures, Report

__all__ = [
    "Comparison",
    "comparison_rows",
    "count",
    "duration",
    "milliseconds",
    "percent",
    "ratio",
    "size",
    "strength_text",
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


def count(value: int) -> str:
    """Write a number with thousands separators: 431,080."""
    return f"{value:,}"


def percent(fraction: float) -> str:
    """Write a share of 1 in percent with two decimals: 0.71 %."""
    return f"{100 * fraction:.2f} %"


def size(num_bytes: int) -> str:
    """Write bytes in the unit of 1000s that leaves one to three digits before the point: 1.72 MB."""
    value = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if value < 999.5:
            return f"{num_bytes} bytes" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} GB" if value < 999.5 else f"{value:,.0f} GB"


def milliseconds(value: float) -> str:
    """Write a latency with three digits: 0.412 ms."""
    return f"{value:,.0f} ms" if value >= 999.5 else f"{value:.3g} ms"


def duration(seconds: float) -> str:
    """Write a wall time: 3.2 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def strength_text(value: float) -> str:
    """Write a strength with at most four digits and no exponent up to a million: 0.5, 2,048."""
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.4g}"


def ratio(dense: float, compact: float, less: str, more: str) -> str:
    """Write how many times less, or more, there is afterwards.

    Args:
        dense: the figure before, >= 0.
        compact: the figure after, >= 0.
        less: what a decrease is called ("fewer").
        more: what an increase is called ("more").

    Returns:
        "172x fewer", "1.3x more", "the same", "about the same" below half a percent; "-" if one of the two
        is 0, where a ratio says nothing.
    """
    if dense == compact:
        return "the same"
    if dense <= 0 or compact <= 0:
        return "-"
    factor = max(dense / compact, compact / dense)
    if factor < 1.005:
        return "about the same"
    number = f"{factor:,.0f}" if factor >= 9.95 else f"{factor:.1f}" if factor >= 1.05 else f"{factor:.2f}"
    return f"{number}x {less if dense > compact else more}"


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
