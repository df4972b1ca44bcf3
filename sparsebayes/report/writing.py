"""A run folder gets its report: report.html for reading, report.md for pasting; both from the same figures.

The page is one file: style sheet and charts are inside, nothing is loaded, no script runs. All text from the
run (names, reasons, recipe) is escaped.

    >>> write_report(Path("runs/lenet5-20250101-120000"))
    PosixPath('runs/lenet5-20250101-120000/report.html')
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from sparsebayes.files import write_atomically
from sparsebayes.report import markdown
from sparsebayes.report.cells import cell_figures
from sparsebayes.report.charts import (
    cycle_figures,
    epoch_figures,
    evidence_figures,
    layer_figure,
    pareto_figures,
    width_figure,
)
from sparsebayes.report.guided import sampling_figures
from sparsebayes.report.pages import page
from sparsebayes.report.records import REMOVAL, ParetoPoint, Report, Run, read_run
from sparsebayes.report.summary import comparison_rows, summary_line
from sparsebayes.words import count, duration, percent, ratio, strength_text

__all__ = ["render_html", "render_markdown", "write_report"]

DEFINITIONS = (
    "MACs are multiply-accumulates. Latency is the median time of one batch in onnxruntime on the CPU, dense and "
    "compact measured in turn."
)


@dataclass(frozen=True)
class Table:
    """A titled table of names and values."""

    title: str
    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Point:
    """One line of the table of the trade-off."""

    cells: tuple[str, ...]
    chosen: bool


POINT_HEAD = ("point", "strength", "parameters", "MACs", "held-out loss", "held-out error")


def write_report(run_dir: Path) -> Path:
    """Write `report.md` and `report.html` into a run folder, from the records that lie there.

    Args:
        run_dir: the run folder; `report.json` must be there, other records add figures (see `records`).

    Returns:
        The path of `report.html`.

    Raises:
        RunError: the folder or `report.json` is absent, a record is damaged, or the folder cannot be written.
    """
    run = read_run(Path(run_dir))
    target = run.folder / "report.html"
    write_atomically(run.folder / "report.md", render_markdown(run))
    write_atomically(target, render_html(run))
    return target


def render_html(run: Run) -> str:
    """Write the page.

    Args:
        run: the run's records.

    Returns:
        A whole HTML document that loads nothing.
    """
    rows = comparison_rows(run.report)
    sections = (
        ("Over the cycles", cycle_figures(run)),
        ("Over the epochs", (*epoch_figures(run), *sampling_figures(run))),
        ("What the groups are worth", evidence_figures(run)),
    )
    return page(
        "report",
        report=run.report,
        line=summary_line(run.report),
        about=_about(run),
        tiles=[row for row in rows if row.change != "-" and "64" not in row.label],
        notes=_notes(run),
        rows=rows,
        definitions=DEFINITIONS,
        cells=cell_figures(run.folder),
        widths=[figure for figure in (width_figure(run), layer_figure(run)) if figure is not None],
        pareto=pareto_figures(run),
        points=[_point(point) for point in run.pareto],
        point_head=POINT_HEAD,
        sections=[(title, figures) for title, figures in sections if figures],
        tables=_tables(run),
        recipe=run.recipe,
    )


def render_markdown(run: Run) -> str:
    """Write the report without charts.

    Args:
        run: the run's records.

    Returns:
        Markdown.
    """
    report = run.report
    parts = [
        f"# {markdown.text(report.name)}",
        markdown.text(summary_line(report)),
        markdown.text(_about(run)),
        *(markdown.text(note) for note in _notes(run)),
        "## Before and after",
        markdown.table(
            ["", "dense", "compact", "change"],
            [[row.label, row.dense, row.compact, row.change] for row in comparison_rows(report)],
        ),
        DEFINITIONS,
    ]
    if report.widths:
        rows = [
            [name, count(dense), count(compact), ratio(dense, compact, "narrower", "wider")]
            for name, (dense, compact) in report.widths.items()
        ]
        parts += ["## Width of each layer", markdown.table(["layer", "dense", "compact", "change"], rows)]
    if run.pareto:
        cells = [[*point.cells, "yes" if point.chosen else ""] for point in map(_point, run.pareto)]
        parts += ["## The trade-off", markdown.table([*POINT_HEAD, "delivered"], cells)]
    parts.append("## Refused units")
    if report.refused:
        parts.append("\n".join(f"* {markdown.text(reason)}" for reason in report.refused))
    else:
        parts.append("No unit was refused.")
    for table in _tables(run):
        parts += [f"## {table.title}", markdown.table(["", ""], table.rows)]
    if run.recipe is not None:
        parts += ["## Recipe", markdown.fenced(run.recipe, "yaml")]
    return "\n\n".join(parts) + "\n"


def _about(run: Run) -> str:
    about = f"task {run.report.task}, seed {run.report.seed}"
    words = _selection_words(run)
    return f"{about}, {words}" if words else about


def _notes(run: Run) -> tuple[str, ...]:
    """What a reader must not miss: a budget that was missed, and a network that is not faster."""
    notes = []
    budget = run.report.budget
    if isinstance(budget, dict) and budget.get("met") is False:
        details = "; ".join(f"{name} {value}" for name, value in _budget_rows(budget))
        notes.append(
            f"The budget was missed ({details}): raise train.cycles.count, train.cycles.shrink or prune.max_removal."
        )
    dense, compact = run.report.dense, run.report.compact
    if compact.params < dense.params and compact.macs == dense.macs:
        notes.append(
            "Nothing was cut out: what was removed is held at zero in tensors of the old shape, so file and time "
            "stay as they were. Groups of the kind 'units' are removed physically."
        )
    before, after = dense.latency_ms_batch1, compact.latency_ms_batch1
    smaller = compact.macs < 0.8 * dense.macs
    if before is not None and after is not None and after > 0.95 * before:
        reason = (
            "at this size the fixed cost of calling each layer may dominate"
            if smaller
            else "the multiply-accumulates hardly fell either"
        )
        notes.append(
            f"Latency at batch 1 did not fall: {reason}. Measure your batch with 'sparsebayes bench'."
        )
    return tuple(notes)


def _tables(run: Run) -> tuple[Table, ...]:
    """The tables of names and values at the end; empty ones are left out."""
    report = run.report
    seconds = [(phase, duration(value)) for phase, value in report.wall_seconds.items()]
    if len(seconds) > 1:
        seconds.append(("together", duration(sum(report.wall_seconds.values()))))
    # A machine's record repeats the versions that have a table of their own.
    machine = {name: value for name, value in (run.environment or {}).items() if value != report.versions}
    extra = {
        **_flat("", report.model_extra),
        **_flat("dense.", report.dense.model_extra),
        **_flat("compact.", report.compact.model_extra),
    }
    tables = (
        Table("Budget", _budget_rows(report.budget)),
        Table("Wall time", tuple(seconds)),
        Table("Wall time by kind of work", _work_rows(report)),
        Table("Machine", tuple(_flat("", machine).items())),
        Table("Versions", tuple(report.versions.items())),
        Table("Also recorded", tuple(extra.items())),
    )
    return tuple(table for table in tables if table.rows)


def _work_rows(report: Report) -> tuple[tuple[str, str], ...]:
    """Each kind of work with its share of the run, and that of all that finds and removes groups."""
    share, total = report.removal_share, sum(report.wall_seconds.values())
    if share is None:
        return ()
    other = total - sum(report.work_seconds.values())
    seconds = {**report.work_seconds, "other": max(other, 0.0), " + ".join(REMOVAL): share * total}
    return tuple((kind, f"{duration(value)}, {100 * value / total:.1f} %") for kind, value in seconds.items())


def _budget_rows(budget: JsonValue) -> tuple[tuple[str, str], ...]:
    """Each limit by its kind, with what was reached; other records of a budget as they are."""
    if budget is None:
        return ()
    if not isinstance(budget, dict):
        return (("budget", _plain(budget)),)
    rows = []
    limits = budget.get("limits")
    for limit in limits if isinstance(limits, list) else []:
        if isinstance(limit, dict):
            words = f"at most {_figure(limit.get('limit'))}, reached {_figure(limit.get('reached'))}"
            rows.append((str(limit.get("kind")), words + ("" if limit.get("met") else ", missed")))
    others = {name: value for name, value in budget.items() if name not in ("met", "limits")}
    return (*rows, *_flat("", others).items())


def _figure(value: JsonValue) -> str:
    """A count with separators, any other value as it is."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= 1000
    return f"{value:,.0f}" if whole else _plain(value)


def _flat(prefix: str, values: Mapping[str, object] | None) -> dict[str, str]:
    """Dotted name -> value in words."""
    flat: dict[str, str] = {}
    for name, value in (values or {}).items():
        if isinstance(value, dict) and value:
            flat |= _flat(f"{prefix}{name}.", value)
        else:
            flat[prefix + name] = _plain(value)
    return flat


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _selection_words(run: Run) -> str:
    if run.selection is None:
        return ""
    kept, total = count(run.selection.num_kept), count(run.selection.num_groups)
    strength = (
        "" if run.selection.strength is None else f" at strength {strength_text(run.selection.strength)}"
    )
    return f"{kept} of {total} {run.selection.grouping} kept{strength}"


def _point(point: ParetoPoint) -> Point:
    cells = (
        str(point.point),
        "-" if point.strength is None else strength_text(point.strength),
        count(point.params),
        count(point.macs),
        f"{point.heldout_loss:.4g}",
        percent(point.heldout_error),
    )
    return Point(cells, point.chosen)
