"""Before and after in words."""

from __future__ import annotations

import pytest

from sparsebayes.report import summary_line, summary_table
from sparsebayes.report.records import Figures, Report
from sparsebayes.report.summary import (
    comparison_rows,
    count,
    duration,
    milliseconds,
    percent,
    ratio,
    size,
    strength_text,
)


def make_report(latency: float | None = 0.0675) -> Report:
    dense = Figures(
        test_error=0.0071,
        params=431080,
        macs=2293000,
        onnx_bytes=1725000,
        latency_ms_batch1=0.412,
        latency_ms_batch64=14.2,
    )
    compact = Figures(
        test_error=0.0084,
        params=2512,
        macs=90123,
        onnx_bytes=None,
        latency_ms_batch1=latency,
        latency_ms_batch64=15.0,
    )
    return Report(
        name="lenet5",
        task="compress",
        dense=dense,
        compact=compact,
        widths={},
        seed=0,
        wall_seconds={},
        versions={},
        refused=[],
    )


def test_summary_line() -> None:
    assert summary_line(make_report()) == (
        "431,080 -> 2,512 parameters (172x fewer), test error 0.71 % -> 0.84 %, latency 6.1x shorter"
    )


def test_summary_line_without_latency() -> None:
    assert summary_line(make_report(None)) == (
        "431,080 -> 2,512 parameters (172x fewer), test error 0.71 % -> 0.84 %"
    )


def test_summary_table_is_aligned() -> None:
    assert summary_table(make_report()).splitlines() == [
        "                        dense       compact        change",
        "Test error             0.71 %        0.84 %  +0.13 points",
        "Parameters            431,080         2,512    172x fewer",
        "MACs for one input  2,293,000        90,123     25x fewer",
        "ONNX file             1.73 MB  not measured             -",
        "Latency, batch 1     0.412 ms     0.0675 ms  6.1x shorter",
        "Latency, batch 64     14.2 ms         15 ms   1.1x longer",
    ]


def test_unchanged_error_has_no_minus_zero() -> None:
    report = make_report()
    same = report.model_copy(update={"compact": report.dense.model_copy(update={"test_error": 0.00709999})})
    assert comparison_rows(same)[0].change == "+0.00 points"
    assert [row.change for row in comparison_rows(same)[1:]] == ["the same"] * 5


@pytest.mark.parametrize(
    ("dense", "compact", "words"),
    [
        (431080, 2512, "172x fewer"),
        (9.949, 1, "9.9x fewer"),
        (9.96, 1, "10x fewer"),
        (1_200_000, 1, "1,200,000x fewer"),
        (1, 1.3, "1.3x more"),
        (1.02, 1, "1.02x fewer"),
        (430001, 430000, "about the same"),
        (7, 7, "the same"),
        (0, 0, "the same"),
        (5, 0, "-"),
        (0, 5, "-"),
    ],
)
def test_ratio(dense: float, compact: float, words: str) -> None:
    assert ratio(dense, compact, "fewer", "more") == words


def test_figures_in_words() -> None:
    assert count(1234567) == "1,234,567"
    assert percent(0.00714) == "0.71 %"
    assert [size(n) for n in (0, 999, 1000, 11800, 999_499, 999_500, 1_725_000, 3_400_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1 kB",
        "11.8 kB",
        "999 kB",
        "1 MB",
        "1.73 MB",
        "3.4 GB",
    ]
    assert size(12_345_000_000_000) == "12,345 GB"
    assert [milliseconds(v) for v in (0.0216, 14.2, 999.4, 1234.5)] == [
        "0.0216 ms",
        "14.2 ms",
        "999 ms",
        "1,234 ms",
    ]
    assert [duration(s) for s in (0.04, 59.94, 59.96, 245, 3599.6, 7620)] == [
        "0.0 s",
        "59.9 s",
        "1 min 00 s",
        "4 min 05 s",
        "1 h 00 min",
        "2 h 07 min",
    ]
    assert [strength_text(t) for t in (0.5, 100.0, 2048.0, 2.5e7)] == ["0.5", "100", "2,048", "2.5e+07"]
