"""Before and after in words."""

from __future__ import annotations

from sparsebayes.report import summary_line, summary_table
from sparsebayes.report.records import Figures, Report
from sparsebayes.report.summary import comparison_rows


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
