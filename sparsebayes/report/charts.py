"""Which charts a run's records give: the trade-off, the widths, the cycles, the epochs, the evidence.

A chart whose figures were not recorded is left out.

    >>> [figure.title for figure in epoch_figures(run)]
    ['Loss', 'Held-out error']
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

from sparsebayes.report.files import recipe_values
from sparsebayes.report.records import MetricsRecord, ParetoPoint, Run
from sparsebayes.report.shares import heat_map, share_bars
from sparsebayes.report.svg import Band, Dot, Mark, Series, histogram, line_chart, scatter_chart
from sparsebayes.words import count, percent, strength_text

__all__ = [
    "Figure",
    "cycle_figures",
    "epoch_figures",
    "evidence_figures",
    "layer_figure",
    "pareto_figures",
    "trade_off_dots",
    "width_figure",
]

GAP = math.nan
EVENTS = ("point", "select")
"""Phases whose records stand for a moment, not for an epoch."""
ENTROPY_THRESHOLD = 1 / (2 * math.pi * math.e)
"""Gamma below which a switch has negative differential entropy (BayesNAS, Algorithm 1)."""


@dataclass(frozen=True)
class Figure:
    """A chart, the names of its series if there are several, and the sentence below it."""

    title: str
    chart: Markup
    caption: str = ""
    keys: tuple[str, ...] = ()


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
    told = "; ".join(f"{name} {dense:,} to {compact:,}" for name, dense, compact in rows[:40])
    return Figure("Widths", share_bars(f"Width of each layer, dense to compact: {told}", rows))


def layer_figure(run: Run) -> Figure | None:
    """Groups of each layer after each cycle, as a table of shaded cells.

    Args:
        run: the run's records.

    Returns:
        The figure; None for a run of no cycle, or whose points do not name their layers.
    """
    points = run.pareto
    dense = points[0].widths if len(points) > 1 else {}
    if not dense:
        return None
    # A layer that a point does not name has nothing left.
    cells = [
        [
            (point.widths.get(name, 0) / whole if whole else 0.0, str(point.widths.get(name, 0)))
            for point in points
        ]
        for name, whole in dense.items()
    ]
    title = "Groups left of each layer after each cycle"
    chart = heat_map(title, list(dense), [str(point.point) for point in points], cells)
    caption = (
        "Groups left after each cycle; 0 is the dense network. The stronger the colour, the more is left."
    )
    return Figure(title, chart, caption)


def pareto_figures(run: Run) -> tuple[Figure, ...]:
    """Held-out error over parameters and held-out loss over MACs, one point per cycle.

    Args:
        run: the run's records.

    Returns:
        Two figures; none for a run without a trade-off.
    """
    if not run.pareto:
        return ()
    best = min(run.pareto, key=lambda point: point.heldout_loss)
    marks = []
    if best.standard_error is not None:
        marks.append(Mark("one standard error above the best", best.heldout_loss + best.standard_error))
    error = Series(run.report.name, trade_off_dots(run.pareto, "params", "error"))
    loss = Series(run.report.name, trade_off_dots(run.pareto, "macs", "loss"))
    return (
        Figure(
            "Held-out error and parameters",
            scatter_chart("Held-out error", [error], x_label="parameters", y_label="percent", log_x=True),
        ),
        Figure(
            "Held-out loss and MACs",
            scatter_chart(
                "Held-out loss",
                [loss],
                x_label="MACs for one input",
                y_label="nats per image",
                log_x=True,
                marks=marks,
            ),
            "Bars are standard errors." if marks else "",
        ),
    )


def trade_off_dots(points: Sequence[ParetoPoint], size: str, quality: str) -> tuple[Dot, ...]:
    """The points of a front for a scatter chart.

    Args:
        points: the front.
        size: "params" or "macs", for x.
        quality: "error" (percent) or "loss" (nats per image, with its standard error), for y.

    Returns:
        One dot per point.
    """
    return tuple(
        Dot(
            point.params if size == "params" else point.macs,
            100 * point.heldout_error if quality == "error" else point.heldout_loss,
            _describe(point),
            point.chosen,
            None if quality == "error" else point.standard_error,
        )
        for point in points
    )


def cycle_figures(run: Run) -> tuple[Figure, ...]:
    """Size and strength over the cycles.

    Args:
        run: the run's records.

    Returns:
        One figure for each quantity that was recorded; none for a run of no cycle.
    """
    points, dense = run.pareto, run.report.dense
    if len(points) < 2:
        return ()
    figures = []
    sizes = [
        Series("parameters", tuple(Dot(p.point, _share(p.params, dense.params)) for p in points)),
        Series("MACs", tuple(Dot(p.point, _share(p.macs, dense.macs)) for p in points)),
    ]
    if any(math.isfinite(dot.y) for one in sizes for dot in one.dots):
        chart = line_chart("Size", sizes, x_label="cycle", y_label="percent of dense", log_y=True)
        figures.append(Figure("Size", chart, keys=("parameters", "MACs")))
    strength = tuple(Dot(p.point, p.strength) for p in points if p.strength is not None)
    if strength:
        chart = line_chart(
            "Strength", [Series("strength", strength)], x_label="cycle", y_label="strength T", log_y=True
        )
        caption = "A group goes when its switch is worth less than about T nats of evidence."
        judged = _judged_by(run.recipe) == "evidence"
        figures.append(Figure("Strength", chart, caption if judged else ""))
    return tuple(figures)


def epoch_figures(run: Run) -> tuple[Figure, ...]:
    """Loss and held-out error over the epochs of all phases, which are shaded bands.

    Args:
        run: the run's records.

    Returns:
        One figure for each quantity that was recorded at least once.
    """
    records = [record for record in run.metrics if record.phase not in EVENTS]
    plans: list[tuple[str, str, list[tuple[str, Callable[[MetricsRecord], float | None]]]]] = [
        (
            "Loss",
            "nats per image",
            [("training", lambda r: r.train_loss), ("held out", lambda r: r.heldout_loss)],
        ),
        (
            "Held-out error",
            "percent",
            [("held out", lambda r: None if r.heldout_error is None else 100 * r.heldout_error)],
        ),
    ]
    bands = _phase_bands(records)
    figures = []
    for title, y_label, curves in plans:
        series = [one for name, get in curves if (one := _series(name, records, get)) is not None]
        if series:
            chart = line_chart(title, series, x_label="epoch, all phases", y_label=y_label, bands=bands)
            keys = tuple(one.name for one in series)
            figures.append(Figure(title, chart, keys=keys if len(keys) > 1 else ()))
    return tuple(figures)


def evidence_figures(run: Run) -> tuple[Figure, ...]:
    """Histograms of evidence and gamma over the groups of the last removal.

    Where gamma was not recorded it is taken from the evidence: at its fixed point the prior variance of a
    switch that stands at 1 is max(1 - 1 / evidence, 0). Other scores (magnitude, Taylor, random), rules and posteriors
    have numbers of other meanings, so there is nothing to show for them.

    Args:
        run: the run's records.

    Returns:
        A figure for each of the two that is known and has a positive value.
    """
    if run.evidence is None or _judged_by(run.recipe) != "evidence":
        return ()
    evidence, gamma = run.evidence.evidence, run.evidence.gamma
    figures = []
    positive = [value for value in evidence or () if value > 0 and math.isfinite(value)]
    if evidence is not None and positive:
        kept = sum(value > 1 for value in evidence)
        left_out = len(evidence) - len(positive)
        caption = f"{count(len(evidence))} groups, {count(kept)} above 1 and kept by the rule."
        caption += f" {count(left_out)} without a positive value are not drawn." if left_out else ""
        chart = histogram("Evidence", positive, x_label="evidence z²h / T of a group", threshold=1.0)
        figures.append(Figure("Evidence", chart, caption))
    derived = gamma is None and evidence is not None
    if derived:
        gamma = [max(1 - 1 / value, 0.0) if value > 0 else 0.0 for value in evidence or ()]
    positive = [value for value in gamma or () if value > 0 and math.isfinite(value)]
    if gamma is not None and positive:
        caption = (
            f"{count(len(gamma) - len(positive))} of {count(len(gamma))} groups stand at 0 and are not drawn."
        )
        caption += " From the evidence, max(1 - 1 / evidence, 0)." if derived else ""
        caption += " Dashed: the paper's entropy threshold 1 / (2πe)."
        chart = histogram(
            "Gamma",
            positive,
            x_label="prior variance gamma of a group",
            log=False,
            threshold=ENTROPY_THRESHOLD,
        )
        figures.append(Figure("Gamma", chart, caption))
    return tuple(figures)


def _judged_by(recipe: str | None) -> str:
    """What the groups were judged by: "evidence", another score, another rule, or another posterior than laplace.

    A recipe that cannot be read speaks for evidence.
    """
    values = recipe_values(recipe)
    plain = {"posterior": "laplace", "prune.score": "evidence", "prior.rule": "evidence"}
    for key, usual in plain.items():
        section, _, name = key.rpartition(".")
        part = values.get(section) if section else values
        found = part.get(name, usual) if isinstance(part, dict) else usual
        if found != usual:
            return str(found)
    return "evidence"


def _series(
    name: str, records: Sequence[MetricsRecord], get: Callable[[MetricsRecord], float | None]
) -> Series | None:
    """A curve over the record numbers; None if no record has a finite value."""
    values = [get(record) for record in records]
    if not any(value is not None and math.isfinite(value) for value in values):
        return None
    # A record without the quantity (another kind of phase) is skipped; one that is not a number is a gap.
    return Series(name, tuple(Dot(i, value) for i, value in enumerate(values, start=1) if value is not None))


def _phase_bands(records: Sequence[MetricsRecord]) -> tuple[Band, ...]:
    """Stretches of consecutive records of the same phase; none where there is only one."""
    bands, start = [], 0.5
    for phase, stretch in groupby(records, key=lambda record: record.phase):
        end = start + len(list(stretch))
        bands.append(Band(phase, start, end))
        start = end
    return tuple(bands) if len(bands) > 1 else ()


def _share(value: int, whole: int) -> float:
    """Percent of the dense network; a gap if that has none."""
    return 100 * value / whole if whole else GAP


def _describe(point: ParetoPoint) -> str:
    strength = "" if point.strength is None else f", strength {strength_text(point.strength)}"
    tuned = ", fine-tuned" if point.finetuned else ""
    return (
        f"point {point.point}{strength}: {count(point.params)} parameters, {count(point.macs)} MACs, "
        f"loss {point.heldout_loss:.4g}, error {percent(point.heldout_error)}{tuned}"
    )
