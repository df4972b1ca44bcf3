"""Several runs on one page: their networks in a table, their trade-offs in one plot, and how the recipes differ.

>>> write_comparison([Path("runs/a"), Path("runs/b")], Path("comparison.html"))
PosixPath('comparison.html')
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsebayes.errors import RunError
from sparsebayes.files import write_atomically
from sparsebayes.report.charts import Figure, trade_off_dots
from sparsebayes.report.files import read_text, recipe_values
from sparsebayes.report.pages import page
from sparsebayes.report.records import Run, read_run
from sparsebayes.report.svg import Series, scatter_chart
from sparsebayes.words import count, milliseconds, percent, ratio, size

__all__ = ["render_comparison", "write_comparison"]

HEAD = (
    "run", "test error, dense", "test error", "parameters", "change", "MACs", "change", "ONNX file",
    "latency, batch 1", "change",
)  # fmt: skip
DEFINITIONS = (
    "All figures are of the compact networks, the changes against the dense network of the same run. MACs are "
    "multiply-accumulates for one input. Latency is the median time of one input in onnxruntime on the CPU; it "
    "can be compared between runs of the same machine only."
)
GENERATOR = '<meta name="generator" content="sparsebayes comparison">'
PATH_KEYS = ("name", "out", "presets")
"""Keys of a recipe that say nothing about how the network was made."""


def write_comparison(run_dirs: Sequence[Path], target: Path, *, overwrite: bool = False) -> Path:
    """Write a page that compares runs.

    Args:
        run_dirs: at least two run folders, in the order of the table.
        target: the HTML file; an earlier comparison there is replaced.
        overwrite: replace whatever file is there.

    Returns:
        `target`.

    Raises:
        RunError: fewer than two runs, one named twice, a folder is no finished run, or `target` cannot be
            written or holds something else.
    """
    if len(run_dirs) < 2:
        raise RunError(f"a comparison needs at least two runs, got {len(run_dirs)}")
    if len({path.resolve() for path in run_dirs}) < len(run_dirs):
        raise RunError("a comparison needs different runs, got the same folder twice")
    runs = [read_run(path) for path in run_dirs]
    if target.is_file() and not overwrite and GENERATOR not in read_text(target)[:2000]:
        raise RunError(f"{target} exists and is no comparison of ours; give another --out, or --overwrite")
    if not target.parent.is_dir():
        raise RunError(f"expected an existing folder for {target}, got {target.parent}, which is none")
    write_atomically(target, render_comparison(runs))
    return target


def render_comparison(runs: Sequence[Run]) -> str:
    """Write the page.

    Args:
        runs: the runs' records.

    Returns:
        A whole HTML document that loads nothing.
    """
    names = _names(runs)
    return page(
        "comparison",
        head=HEAD,
        rows=[_row(name, run) for name, run in zip(names, runs, strict=True)],
        figures=_figures(names, runs),
        differences=_differences(runs),
        definitions=DEFINITIONS,
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """Names of the folders; with the folder above where two are equal."""
    short = [run.folder.resolve().name for run in runs]
    return [
        name if short.count(name) == 1 else f"{run.folder.resolve().parent.name}/{name}"
        for name, run in zip(short, runs, strict=True)
    ]


def _row(name: str, run: Run) -> list[str]:
    dense, compact = run.report.dense, run.report.compact
    before, after = dense.latency_ms_batch1, compact.latency_ms_batch1
    return [
        name,
        percent(dense.test_error),
        percent(compact.test_error),
        count(compact.params),
        ratio(dense.params, compact.params, "fewer", "more"),
        count(compact.macs),
        ratio(dense.macs, compact.macs, "fewer", "more"),
        "-" if compact.onnx_bytes is None else size(compact.onnx_bytes),
        "-" if after is None else milliseconds(after),
        "-" if before is None or after is None else ratio(before, after, "shorter", "longer"),
    ]


def _figures(names: Sequence[str], runs: Sequence[Run]) -> list[Figure]:
    """Error over parameters and over MACs, one series per run that has a front."""
    fronts = [(name, run.pareto) for name, run in zip(names, runs, strict=True) if run.pareto]
    if not fronts:
        return []
    keys = tuple(name for name, _ in fronts)
    figures = []
    for unit, label in (("params", "parameters"), ("macs", "MACs for one input")):
        series = [Series(name, trade_off_dots(points, unit, "error")) for name, points in fronts]
        title = f"Held-out error over {'parameters' if unit == 'params' else 'MACs'}"
        chart = scatter_chart(title, series, x_label=label, y_label="percent", log_x=True)
        figures.append(Figure(title, chart, keys=keys))
    return figures


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys whose values are not the same in all recipes that can be read, with each run's value."""
    recipes = [_flat(_values(run)) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    rows = [(key, [recipe.get(key, "-") for recipe in recipes]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _values(run: Run) -> dict[str, object]:
    return {key: value for key, value in recipe_values(run.recipe).items() if key not in PATH_KEYS}


def _flat(content: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text."""
    flat: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif prefix + key == "groups" and isinstance(value, list):
            flat["groups"] = " + ".join(map(_rule_words, value))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _rule_words(rule: object) -> str:
    """A rule by its name where it applies to every layer, else in full."""
    if isinstance(rule, dict) and rule.get("include") == ["*"] and rule.get("exclude") == []:
        return str(rule.get("rule"))
    return json.dumps(rule, default=str)
