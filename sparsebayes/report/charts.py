"""Which charts a run's records give: widths, curves over the epochs, the trade-off, the evidence.

Curves are drawn over the number of the record in `metrics.jsonl`, since epochs count anew in every phase and
cycle; the phases are shaded bands. A chart whose figures were not recorded is left out.

    >>> [figure.title for figure in curve_figures(run)]
    ['Loss', 'Held-out error', 'Size', 'Strength']
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from sparsebayes.report.records import MetricsRecord, ParetoPoint, Run
from sparsebayes.report.summary import count, percent, strength_text
from sparsebayes.report.svg import Band, Dot, Line, histogram, line_chart, scatter_chart, share_bars

__all__ = ["Figure", "curve_figures", "evidence_figures", "pareto_figures", "width_figure"]

GAP = math.nan
Getter = Callable[[MetricsRecord], "float | None"]


@dataclass(frozen=True)
class Figure:
    """A chart and the sentence below it."""

    title: str
    chart: Markup
    caption: str = ""


def width_figure(run: Run) -> Figure | None:
    """Bars of what is left of every layer.

    Args:
        run: the run's records.

    Returns:
        The figure; None for a run without layers.
    """
    rows = [(name, dense, compact) for name, (dense, compact) in run.report.widths.items()]
    if not rows:
        return None
    return Figure("Widths", share_bars("Width of each layer, dense to compact", rows))


def curve_figures(run: Run) -> tuple[Figure, ...]:
    """Loss, held-out error, size and strength over the epochs of all phases.

    Args:
        run: the run's records.

    Returns:
        One figure for each quantity that was recorded at least once.
    """
    dense = run.report.dense
    plans: list[tuple[str, str, bool, list[tuple[str, Getter]]]] = [
        (
            "Loss",
            "nats per image",
            False,
            [("training", lambda r: r.train_loss), ("held out", lambda r: r.heldout_loss)],
        ),
        ("Held-out error", "percent", False, [("error", lambda r: _times(100, r.heldout_error))]),
        (
            "Size",
            "percent of dense",
            True,
            [
                ("parameters", lambda r: _share(r.params, dense.params)),
                ("MACs", lambda r: _share(r.macs, dense.macs)),
            ],
        ),
        ("Strength", "strength T", True, [("strength", lambda r: r.strength)]),
    ]
    bands = _phase_bands(run.metrics)
    figures = []
    for title, y_label, log_y, curves in plans:
        lines = [line for name, get in curves if (line := _line(name, run.metrics, get)) is not None]
        if lines:
            chart = line_chart(
                title, lines, x_label="epoch, all phases", y_label=y_label, log_y=log_y, bands=bands
            )
            figures.append(Figure(title, chart))
    return tuple(figures)


def pareto_figures(run: Run) -> tuple[Figure, ...]:
    """Held-out error over parameters and held-out loss over MACs, one point per cycle.

    Args:
        run: the run's records.

    Returns:
        Two figures; none for a run without a trade-off.
    """
    if not run.pareto:
        return ()
    error = [Dot(p.params, 100 * p.heldout_error, _describe(p), p.chosen) for p in run.pareto]
    loss = [Dot(p.macs, p.heldout_loss, _describe(p), p.chosen) for p in run.pareto]
    return (
        Figure(
            "Held-out error and parameters",
            scatter_chart("Held-out error", error, x_label="parameters", y_label="percent", log_x=True),
        ),
        Figure(
            "Held-out loss and MACs",
            scatter_chart(
                "Held-out loss", loss, x_label="MACs for one input", y_label="nats per image", log_x=True
            ),
        ),
    )


def evidence_figures(run: Run) -> tuple[Figure, ...]:
    """Histograms of evidence and gamma over the groups.

    Args:
        run: the run's records.

    Returns:
        A figure for each of the two that was recorded and has a positive value.
    """
    if run.evidence is None:
        return ()
    plans = (
        ("Evidence", run.evidence.evidence, "evidence z²h / T of a group", 1.0, "Kept where it exceeds 1."),
        ("Gamma", run.evidence.gamma, "prior variance gamma of a group", None, ""),
    )
    figures = []
    for title, values, x_label, threshold, remark in plans:
        positive = [value for value in values or () if value > 0 and math.isfinite(value)]
        if values is not None and positive:
            left_out = len(values) - len(positive)
            caption = (
                f"{count(len(positive))} groups drawn; {count(left_out)} without a positive value. {remark}"
            )
            chart = histogram(title, positive, x_label=x_label, threshold=threshold)
            figures.append(Figure(title, chart, caption.strip()))
    return tuple(figures)


def _line(name: str, metrics: Sequence[MetricsRecord], get: Getter) -> Line | None:
    """A curve over the record numbers; None if no record has a finite value."""
    values = [get(record) for record in metrics]
    if not any(value is not None and math.isfinite(value) for value in values):
        return None
    # A record without the quantity (another kind of phase) is skipped; one that is not a number is a gap.
    return Line(name, tuple((i, value) for i, value in enumerate(values, start=1) if value is not None))


def _phase_bands(metrics: Sequence[MetricsRecord]) -> tuple[Band, ...]:
    """Stretches of consecutive records of the same phase; none where there is only one."""
    starts = [i for i in range(len(metrics)) if i == 0 or metrics[i].phase != metrics[i - 1].phase]
    if len(starts) < 2:
        return ()
    ends = [*starts[1:], len(metrics)]
    return tuple(
        Band(metrics[start].phase, start + 0.5, end + 0.5) for start, end in zip(starts, ends, strict=True)
    )


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _share(value: int | None, whole: int) -> float | None:
    """Percent of the dense network; a gap if that has none."""
    if value is None:
        return None
    return 100 * value / whole if whole else GAP


def _describe(point: ParetoPoint) -> str:
    strength = "" if point.strength is None else f", strength {strength_text(point.strength)}"
    return (
        f"point {point.point}{strength}: {count(point.params)} parameters, {count(point.macs)} MACs, "
        f"loss {point.heldout_loss:.4g}, error {percent(point.heldout_error)}"
    )
