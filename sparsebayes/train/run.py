"""From a recipe to a run folder: data, model, compression, the one reading of the test set, exports, report.

A run folder holds the recipe as resolved, metrics.jsonl, pareto.json, points/K (every network of the front), the chosen
network (model.safetensors and architecture.json), model.onnx and dense.onnx, report.json, report.md and report.html.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from sparsebayes.data import load
from sparsebayes.files import append_line, write_atomically
from sparsebayes.launcher import launched
from sparsebayes.prune.gating import check_gates
from sparsebayes.recipe import AnyRecipe, Recipe, SearchRecipe
from sparsebayes.recipe.contradictions import refuse_contradictions
from sparsebayes.report import read_report, summary_line, write_report
from sparsebayes.train.compress import Compressor
from sparsebayes.train.example import Example, write_example
from sparsebayes.train.folder import mend_lines_, open_folder, read_seconds, settle_lines_, write_seconds
from sparsebayes.train.interrupt import terminable
from sparsebayes.train.lock import locked
from sparsebayes.train.processes import in_turn, join, leave, lost_connections, shared_folder
from sparsebayes.train.progress import Reporter
from sparsebayes.train.removal import dense_groups
from sparsebayes.train.results import results
from sparsebayes.train.search_run import run_search
from sparsebayes.train.setup import check_export, check_model, make_builder, make_loaders, resolve_device
from sparsebayes.train.trouble import machine_trouble

__all__ = ["run_recipe"]


def run_recipe(
    recipe: AnyRecipe,
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
    with machine_trouble(), lost_connections():
        if isinstance(recipe, SearchRecipe):
            join(recipe)  # refuses many processes
            return run_search(recipe, out=out, resume=resume, quiet=quiet, overwrite=overwrite)
        return _run_compression(recipe, out, resume, quiet, overwrite)


def _run_compression(
    recipe: Recipe, out: Path | None, resume: Path | None, quiet: bool, overwrite: bool
) -> Path:
    """Check that the recipe can be carried out, and compress; the arguments are those of `run_recipe`."""
    refuse_contradictions(recipe)
    is_first = join(recipe)
    check_export(recipe)
    device = resolve_device(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    dataset = in_turn(lambda: load(recipe.data.name, root=recipe.data.root))
    loaders, test = make_loaders(recipe, dataset, device)
    make = make_builder(recipe, device)
    # What cannot work is said before hours of training, and before anything is written.
    model = make()
    check_model(model, loaders, dataset.num_classes)
    groups = dense_groups(recipe, model, loaders.example)
    if recipe.posterior != "laplace":
        check_gates(groups.grouping)
    opened = shared_folder(lambda: open_folder(recipe, out, resume or _begun(out, overwrite), overwrite))
    with opened as folder, locked(folder), Reporter(quiet=quiet or not is_first) as reporter, terminable():
        reporter.line(f"run folder {folder}")
        if is_first:
            write_example(folder, Example(loaders.example, test.mean, test.std))
        metrics = folder / "metrics.jsonl"
        mend_lines_(metrics)

        def record(row: dict[str, Any]) -> None:
            append_line(metrics, json.dumps(row))
            # With every epoch: a kill leaves no time to do it.
            write_seconds(folder, compressor.phases.now(), compressor.watch.now())

        compressor = Compressor(recipe, loaders, make, folder, record, reporter, groups)
        compressor.phases.seconds, compressor.watch.seconds = read_seconds(folder)
        try:
            try:
                chosen = compressor.run()
            finally:
                write_seconds(folder, compressor.phases.seconds, compressor.watch.seconds)
            if not leave():
                return folder
            reporter.phase("export", 1)
            with compressor.phases.of("export"), compressor.watch.of("export"):
                report = results(recipe, compressor, chosen, test, loaders, folder)
        except KeyboardInterrupt as interrupt:
            # Whoever catches it can tell the user which folder to resume.
            raise type(interrupt)(str(folder)) from None
        report["wall_seconds"] = {name: round(s, 3) for name, s in compressor.phases.seconds.items()}
        report["work_seconds"] = {kind: round(s, 3) for kind, s in compressor.watch.seconds.items()}
        settle_lines_(metrics)
        write_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")
        write_report(folder)
        reporter.line(summary_line(read_report(folder)))
        reporter.line(f"report {folder / 'report.html'}")
    return folder


def _begun(out: Path | None, overwrite: bool) -> Path | None:
    """The run folder to go on with after torchrun has restarted all processes; None at the first start."""
    if out is None or launched().restarts == 0 or not (out / "recipe.yaml").is_file():
        return None
    # A finished one that was to be replaced is not ours: a process died before that.
    return None if overwrite and (out / "report.json").is_file() else out
