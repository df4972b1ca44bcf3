"""What the command line says of finished runs: a budget that was missed, and the mean over several seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsebayes.words import count, milliseconds

__all__ = ["missed_budget", "over_seeds"]


def missed_budget(folder: Path) -> str:
    """One sentence if the run's network exceeds its budget, else nothing."""
    budget = _report(folder).get("budget")
    if budget is None or budget["met"]:
        return ""
    missed = [
        f"{limit['kind']} {_limit(limit, 'reached')} instead of {_limit(limit, 'limit')}"
        for limit in budget["limits"]
        if not limit["met"]
    ]
    return (
        f"the budget is not met, and the closest network is exported: {', '.join(missed)}; "
        "raise train.cycles.count, train.cycles.shrink or prune.max_removal"
    )


def over_seeds(folders: Sequence[Path]) -> str:
    """Mean and standard deviation over runs that differ in their seeds; nothing for fewer than two reports.

    >>> over_seeds([Path("runs/a-seed0"), Path("runs/a-seed1")])
    'mean of 2 seeds: test error 0.84 % (sd 0.03), dense 0.70 % (sd 0.01), 2,557 parameters (sd 12), 90,123 MACs (sd 0)'
    """
    reports = [report for report in map(_report, folders) if "compact" in report]
    if len(reports) < 2:
        return ""

    def percent(network: str) -> str:
        mean, spread = _mean_and_sd([100 * report[network]["test_error"] for report in reports])
        return f"{mean:.2f} % (sd {spread:.2f})"

    def whole(what: str, words: str) -> str:
        mean, spread = _mean_and_sd([report["compact"][what] for report in reports])
        return f"{count(round(mean))} {words} (sd {count(round(spread))})"

    parts = [f"test error {percent('compact')}", f"dense {percent('dense')}"]
    parts += [whole("params", "parameters"), whole("macs", "MACs")]
    return f"mean of {len(reports)} seeds: {', '.join(parts)}"


def _mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values)


def _report(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return report


def _limit(limit: dict[str, Any], name: str) -> str:
    """A limit, or what was reached of it, so rounded that the larger one still looks larger."""
    value = limit[name]
    if limit["kind"] == "latency_ms":
        return milliseconds(value)
    return count(math.floor(value) if name == "limit" else math.ceil(value))
