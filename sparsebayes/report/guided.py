"""The chart of posterior-guided sampling: the best of n drawn sub-networks against n, beside random ones.

>>> [figure.title for figure in sampling_figures(run)]
['Best of n, cycle 3']
"""

from __future__ import annotations

import math

from sparsebayes.inference.sampling import expected_best
from sparsebayes.report.charts import Figure
from sparsebayes.report.records import MetricsRecord, Run
from sparsebayes.report.svg import Dot, Series, line_chart

__all__ = ["sampling_figures"]


def sampling_figures(run: Run) -> tuple[Figure, ...]:
    """Expected held-out loss of the best of n sub-networks, in the last cycle that drew several.

    Args:
        run: the run's records.

    Returns:
        One figure; none for a run that drew nothing.
    """
    drawn = [record for record in run.metrics if len(_finite(record.losses)) > 1]
    return (_figure(drawn[-1]),) if drawn else ()


def _figure(record: MetricsRecord) -> Figure:
    series: list[Series] = []
    # Searches draw operations, once; compressions draw widths, in every cycle.
    blind = "random, as many operations" if record.cycle is None else "random, same widths"
    for name, losses in (("guided", _finite(record.losses)), (blind, _finite(record.random_losses))):
        if losses:
            best = expected_best(losses).tolist()
            series.append(Series(name, tuple(Dot(float(n), value) for n, value in enumerate(best, start=1))))
    title = "Best of n" if record.cycle is None else f"Best of n, cycle {record.cycle}"
    caption = "Held-out loss of drawn sub-networks with the weights they have; mean over all choices of n of the draws."
    chart = line_chart(title, series, x_label="sub-networks n", y_label="nats per image")
    return Figure(title, chart, caption, tuple(one.name for one in series))


def _finite(losses: list[float] | None) -> list[float]:
    return [loss for loss in losses or () if math.isfinite(loss)]
