"""From a recipe to a run folder: data, model, compression, the one reading of the test set, exports, report.

A run folder holds the recipe as resolved, metrics.jsonl, pareto.json, points/K (every network of the front), the chosen
network (model.safetensors and architecture.json), model.onnx and dense.onnx, report.json, report.md and report.html.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from sparsebayes.data import load
from sparsebayes.errors import RecipeError, Terminated
from sparsebayes.recipe import Recipe
from sparsebayes.report import read_report, summary_line, write_report
from sparsebayes.train.checkpoint import write_atomically
from sparsebayes.train.compress import Compressor
from sparsebayes.train.folder import mend_lines_, open_folder, read_seconds, settle_lines_
from sparsebayes.train.progress import Reporter
from sparsebayes.train.removal import recipe_grouping
from sparsebayes.train.results import results
from sparsebayes.train.setup import check_model, make_builder, make_loaders, resolve_device

__all__ = ["run_recipe"]


def run_recipe(
    recipe: Recipe,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    quiet: bool = False,
    overwrite: bool = False,
) -> Path:
    """Run a recipe from data to report.

    Args:
        recipe: What to do.
        out: Run folder; None: a new one below ``recipe.out``, named after the recipe and the time.
        resume: Folder of an interrupted run of the same recipe, to go on with.
        quiet: Print nothing.
        overwrite: Replace `out` if it exists and holds a run.

    Returns:
        The run folder.

    Raises:
        SparseBayesError: In one sentence: what was expected, what came, what to do.
        KeyboardInterrupt: If interrupted; the folder can then be resumed.
    """
    prior = recipe.prior
    if prior.joint and (prior.scale != "switches" or prior.rule != "evidence"):
        raise RecipeError(
            f"prior.joint judges switches by evidence, but scale is {prior.scale} and rule is {prior.rule}; "
            "set prior.joint to false, or the other two to switches and evidence"
        )
    device = resolve_device(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    dataset = load(recipe.data.name, root=recipe.data.root)
    loaders, test = make_loaders(recipe, dataset, device)
    make = make_builder(recipe, device)
    # What cannot work is said before hours of training, and before anything is written.
    model = make()
    check_model(model, loaders, dataset.num_classes)
    recipe_grouping(recipe, model, loaders.example)
    folder = open_folder(recipe, out, resume, overwrite)
    with Reporter(quiet=quiet) as reporter, _terminable():
        reporter.line(f"run folder {folder}")
        metrics = folder / "metrics.jsonl"
        mend_lines_(metrics)

        def record(row: dict[str, Any]) -> None:
            with metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

        compressor = Compressor(recipe, loaders, make, folder, record, reporter)
        compressor.seconds.update(read_seconds(folder))
        try:
            try:
                chosen = compressor.run()
            finally:
                write_atomically(folder / "seconds.json", json.dumps(compressor.seconds))
            reporter.phase("export", 1)
            start = time.perf_counter()
            report = results(recipe, compressor, chosen, test, loaders, folder)
        except KeyboardInterrupt as interrupt:
            # Whoever catches it can tell the user which folder to resume.
            raise type(interrupt)(str(folder)) from None
        compressor.seconds["export"] = time.perf_counter() - start
        report["wall_seconds"] = {name: round(s, 3) for name, s in compressor.seconds.items()}
        settle_lines_(metrics)
        write_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")
        write_report(folder)
        reporter.line(summary_line(read_report(folder)))
        reporter.line(f"report {folder / 'report.html'}")
    return folder


@contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C while a run works, so that both leave a folder to resume from."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
