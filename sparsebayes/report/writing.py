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

import jinja2
from pydantic import JsonValue

from sparsebayes.report import markdown
from sparsebayes.report.cells import cell_figures
from sparsebayes.report.charts import curve_figures, evidence_figures, pareto_figures, width_figure
from sparsebayes.report.files import write_text
from sparsebayes.report.records import ParetoPoint, Run, read_run
from sparsebayes.report.summary import (
    comparison_rows,
    count,
    duration,
    percent,
    ratio,
    strength_text,
    summary_line,
)

__all__ = ["render_html", "render_markdown", "write_report"]

DEFINITIONS = (
    "MACs are multiply-accumulates. Latency is the median time of one batch in onnxruntime on the CPU with "
    "one thread, dense and compact measured in turn."
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
    page = run.folder / "report.html"
    write_text(run.folder / "report.md", render_markdown(run))
    write_text(page, render_html(run))
    return page


def render_html(run: Run) -> str:
    """Write the page.

    Args:
        run: the run's records.

    Returns:
        A whole HTML document that loads nothing.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sparsebayes.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(
        report=run.report,
        line=summary_line(run.report),
        rows=comparison_rows(run.report),
        definitions=DEFINITIONS,
        selection=_selection_words(run),
        cells=cell_figures(run.folder),
        widths=width_figure(run),
        pareto=pareto_figures(run),
        points=[_point(point) for point in run.pareto],
        curves=curve_figures(run),
        evidence=evidence_figures(run),
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
    about = f"task {report.task}, seed {report.seed}"
    words = _selection_words(run)
    parts = [
        f"# {markdown.text(report.name)}",
        markdown.text(summary_line(report)),
        markdown.text(f"{about}, {words}" if words else about),
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


def _tables(run: Run) -> tuple[Table, ...]:
    """The tables of names and values at the end; empty ones are left out."""
    report = run.report
    seconds = [(phase, duration(value)) for phase, value in report.wall_seconds.items()]
    if len(seconds) > 1:
        seconds.append(("together", duration(sum(report.wall_seconds.values()))))
    extra = {
        **_extra("", report.model_extra),
        **_extra("dense.", report.dense.model_extra),
        **_extra("compact.", report.compact.model_extra),
    }
    tables = (
        Table("Wall time", tuple(seconds)),
        Table("Versions", tuple(report.versions.items())),
        Table("Machine", tuple((name, _plain(value)) for name, value in (run.environment or {}).items())),
        Table("Also recorded", tuple(extra.items())),
    )
    return tuple(table for table in tables if table.rows)


def _extra(prefix: str, values: Mapping[str, object] | None) -> dict[str, str]:
    return {prefix + name: _plain(value) for name, value in (values or {}).items()}


def _plain(value: JsonValue | object) -> str:
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
