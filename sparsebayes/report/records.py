"""What a run folder holds for its report, as typed records.

`report.json` is the one file that must be there; the others add figures where they exist:

    report.json       before and after: `Report`
    metrics.jsonl     one `MetricsRecord` per epoch
    pareto.json       list of `ParetoPoint`, one per cycle
    selection.json    groups kept per layer: `SelectionSummary`
    evidence.json     {"evidence": [G numbers], "gamma": [G numbers]}: `Evidence`
    recipe.yaml       the resolved recipe, as text
    environment.json  any JSON object

    >>> run = read_run(Path("runs/lenet5-20250101-120000"))
    >>> run.report.compact.params
    2512
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from sparsebayes.errors import RunError
from sparsebayes.report.files import parse_json, parse_json_lines, read_text

__all__ = [
    "Evidence",
    "Figures",
    "LayerCount",
    "MetricsRecord",
    "ParetoPoint",
    "Report",
    "Run",
    "SelectionSummary",
    "read_report",
    "read_run",
]

REMOVAL = ("curvature", "update", "compaction")
"""Kinds of work that a run without removal would not do."""

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Record(BaseModel):
    """A record that keeps what it does not know: a later writer's fields are shown, not lost."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Figures(_Record):
    """One network in figures.

    Attributes:
        test_error: share of the test set that is classified wrongly, 0 to 1.
        params: number of parameters.
        macs: multiply-accumulates for one input.
        onnx_bytes: size of the ONNX file; None if none was written.
        latency_ms_batch1: milliseconds for a batch of one in onnxruntime; None if not measured.
        latency_ms_batch64: milliseconds for a batch of 64; None if not measured.
    """

    test_error: Fraction
    params: Count
    macs: Count
    onnx_bytes: Count | None
    latency_ms_batch1: Positive | None
    latency_ms_batch64: Positive | None


class Report(_Record):
    """The outcome of a run.

    Attributes:
        name: the run's name.
        task: "compress" or "search".
        dense: the network before.
        compact: the network after.
        widths: layer name -> (width before, width after).
        seed: seed of the run.
        wall_seconds: phase -> seconds.
        work_seconds: kind of work -> seconds of those; empty if they were not recorded.
        versions: library -> version.
        refused: sentences on units that had to stay, each with its reason.
        budget: what the network was allowed to cost and what it costs, as it was recorded; None without one.
    """

    name: str
    task: str
    dense: Figures
    compact: Figures
    widths: dict[str, tuple[Count, Count]]
    seed: int
    wall_seconds: dict[str, Seconds]
    versions: dict[str, str]
    refused: list[str]
    budget: JsonValue = None
    work_seconds: dict[str, Seconds] = {}

    @property
    def removal_share(self) -> float | None:
        """Share of the wall time that went into finding and removing groups, 0 to 1; None if it was not recorded."""
        total = sum(self.wall_seconds.values())
        if not self.work_seconds or not total:
            return None
        return sum(self.work_seconds.get(kind, 0.0) for kind in REMOVAL) / total


class MetricsRecord(_Record):
    """One epoch. A loss that is not a number (a network that diverged) is a gap in its curve.

    Attributes:
        phase: "train", "cycle", "finetune" or another word.
        cycle: number of the cycle, in the phases that have one.
        epoch: number of the epoch in its phase or cycle.
        train_loss: mean loss over the training images, nats per image.
        heldout_loss: mean loss over the held-out images, nats per image.
        heldout_error: share of the held-out images that is classified wrongly, 0 to 1.
        params: parameters that are left.
        macs: multiply-accumulates for one input that are left.
        strength: the temperature T.
        seconds: wall seconds of the epoch, or since the start.
        losses: held-out losses of the sub-networks that were drawn, nats per image.
        random_losses: those of random sub-networks as large.
    """

    phase: str
    cycle: int | None = None
    epoch: int | None = None
    train_loss: float | None = None
    heldout_loss: float | None = None
    heldout_error: float | None = None
    params: Count | None = None
    macs: Count | None = None
    strength: float | None = None
    seconds: float | None = None
    losses: list[float] | None = None
    random_losses: list[float] | None = None


class ParetoPoint(_Record):
    """One network of the trade-off between size and held-out loss.

    Attributes:
        point: its number.
        params: parameters.
        macs: multiply-accumulates for one input.
        heldout_loss: mean loss over the held-out images, nats per image.
        heldout_error: share of the held-out images that is classified wrongly, 0 to 1.
        strength: the temperature T that led to it; None for the dense network.
        chosen: True for the network that the run delivers.
        standard_error: of the mean held-out loss; None if not recorded.
        widths: layer -> groups that are left.
        finetuned: True if the final training was done on it.
    """

    point: int
    params: Count
    macs: Count
    heldout_loss: float
    heldout_error: float
    strength: float | None
    chosen: bool
    standard_error: float | None = None
    widths: dict[str, Count] = {}
    finetuned: bool = False


class LayerCount(_Record):
    """Groups of one layer: how many there were and how many stay."""

    name: str
    kept: Count
    groups: Count


class SelectionSummary(_Record):
    """The readable part of a selection; the flag of every single group is not needed here.

    Attributes:
        grouping: the grouping's name.
        num_groups: groups that there were.
        num_kept: groups that stay.
        strength: the temperature T at which it was made, if any.
        layers: groups per layer.
        evidence: z^2 h / T per group, if recorded here.
        gamma: prior variance per group, if recorded here.
    """

    grouping: str
    num_groups: Count
    num_kept: Count
    strength: float | None = None
    layers: list[LayerCount] = []
    evidence: list[float] | None = None
    gamma: list[float] | None = None


class Evidence(_Record):
    """Per group: evidence z^2 h / T (kept iff > 1) and prior variance gamma."""

    evidence: list[float] | None = None
    gamma: list[float] | None = None


@dataclass(frozen=True)
class Run:
    """A run folder as the report sees it; what the folder lacks is None or empty."""

    folder: Path
    report: Report
    metrics: tuple[MetricsRecord, ...] = ()
    pareto: tuple[ParetoPoint, ...] = ()
    selection: SelectionSummary | None = None
    evidence: Evidence | None = None
    recipe: str | None = None
    environment: Mapping[str, JsonValue] | None = None


def read_report(run_dir: Path) -> Report:
    """Read `report.json` of a run folder.

    Args:
        run_dir: the run folder.

    Returns:
        The validated report.

    Raises:
        RunError: the folder or the file is absent, damaged or incomplete.
    """
    if not run_dir.is_dir():
        raise RunError(f"a run folder was expected at {run_dir}, where there is none")
    path = run_dir / "report.json"
    return parse_json(Report, read_text(path), path)


def read_run(run_dir: Path) -> Run:
    """Read everything in a run folder that belongs in its report.

    Args:
        run_dir: the run folder; only `report.json` must be there.

    Returns:
        The validated records.

    Raises:
        RunError: the folder or `report.json` is absent, or any of the files is damaged or incomplete.
    """
    report = read_report(run_dir)
    metrics = run_dir / "metrics.jsonl"
    pareto = run_dir / "pareto.json"
    recipe = run_dir / "recipe.yaml"
    selection = _optional(SelectionSummary, run_dir / "selection.json")
    evidence = _optional(Evidence, run_dir / "evidence.json")
    if evidence is None and selection is not None:
        evidence = Evidence(evidence=selection.evidence, gamma=selection.gamma)
    return Run(
        folder=run_dir,
        report=report,
        metrics=parse_json_lines(MetricsRecord, read_text(metrics), metrics) if metrics.exists() else (),
        pareto=tuple(_optional(list[ParetoPoint], pareto) or ()),
        selection=selection,
        evidence=evidence,
        recipe=read_text(recipe) if recipe.exists() else None,
        environment=_optional(dict[str, JsonValue], run_dir / "environment.json"),
    )


Parsed = TypeVar("Parsed")


def _optional(kind: type[Parsed], path: Path) -> Parsed | None:
    return parse_json(kind, read_text(path), path) if path.exists() else None
