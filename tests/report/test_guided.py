"""The chart of the best of n sub-networks."""

from __future__ import annotations

from pathlib import Path

from sparsebayes.report.guided import sampling_figures
from sparsebayes.report.records import Figures, MetricsRecord, Report, Run


def run(*records: MetricsRecord) -> Run:
    figures = Figures(
        test_error=0.1, params=9, macs=9, onnx_bytes=None, latency_ms_batch1=None, latency_ms_batch64=None
    )
    report = Report(
        name="r",
        task="compress",
        dense=figures,
        compact=figures,
        widths={},
        seed=0,
        wall_seconds={},
        versions={},
        refused=[],
    )
    return Run(Path("run"), report, metrics=records)


def test_the_last_cycle_that_drew_several_is_shown() -> None:
    early = MetricsRecord(phase="sample", cycle=1, losses=[9.0, 8.0])
    last = MetricsRecord(phase="sample", cycle=2, losses=[0.5, 0.25, float("inf")], random_losses=[0.75, 1.0])
    alone = MetricsRecord(phase="sample", cycle=3, losses=[0.3])
    (figure,) = sampling_figures(run(early, last, alone))
    assert figure.title == "Best of n, cycle 2"
    assert figure.keys == ("guided", "random, same widths") and "inf" not in figure.chart
    (figure,) = sampling_figures(run(early))
    assert "random" not in figure.chart


def test_what_is_random_in_a_search_has_as_many_operations() -> None:
    (figure,) = sampling_figures(run(MetricsRecord(phase="sample", losses=[1.0, 2.0], random_losses=[3.0])))
    assert figure.title == "Best of n"
    assert figure.keys == ("guided", "random, as many operations")


def test_a_run_without_draws_has_no_chart() -> None:
    assert sampling_figures(run(MetricsRecord(phase="cycle", cycle=1))) == ()
