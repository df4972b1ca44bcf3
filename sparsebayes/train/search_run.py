"""From a recipe of `task: search` to a run folder: search, network, optional compression, test set, exports, report.

The folder holds what every run has, and genotype.json, switches.json (every switch with what it is worth),
candidates.json (the architectures that were compared, where several were), cell-*.svg, and `found`: the network of the
genotype before anything was removed from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from pydantic import BaseModel

from sparsebayes.export.saved import load_model, save_model
from sparsebayes.files import append_line, write_atomically
from sparsebayes.nas.decision import Decided
from sparsebayes.nas.draw import draw_cell
from sparsebayes.nas.genotype import Genotype, Op
from sparsebayes.nas.network import BUILDER, build_network, inherit_
from sparsebayes.prune.architecture import architecture_of
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.report import read_report, summary_line, write_report
from sparsebayes.report.files import parse_json, read_text
from sparsebayes.train.compress import Compressor
from sparsebayes.train.example import Example, write_example
from sparsebayes.train.fit import Epoch
from sparsebayes.train.folder import mend_lines_, open_folder, read_seconds, settle_lines_, write_seconds
from sparsebayes.train.interrupt import terminable
from sparsebayes.train.lock import locked
from sparsebayes.train.progress import Reporter
from sparsebayes.train.random_search import random_search
from sparsebayes.train.results import results
from sparsebayes.train.retrain import retrain_
from sparsebayes.train.search import Searcher
from sparsebayes.train.search_draws import choose_architecture, estimate_norms_
from sparsebayes.train.search_results import about_search, search_results
from sparsebayes.train.search_setup import Setting, set_up
from sparsebayes.train.seeding import derive_seed
from sparsebayes.train.stopwatch import Phase, Stopwatch

__all__ = ["run_search"]

Result = TypeVar("Result")


class _Worth(BaseModel):
    """What the picture of a cell shows of a group, out of switches.json."""

    cell: str
    source: int
    target: int
    op: str | None
    score: float


def run_search(
    recipe: SearchRecipe,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    quiet: bool = False,
    overwrite: bool = False,
) -> Path:
    """Run a search from data to report.

    Args:
        recipe: what to do.
        out: run folder; None: a new one below `recipe.out`.
        resume: folder of an interrupted run of the same recipe.
        quiet: print nothing.
        overwrite: replace `out` if it holds a run.

    Returns:
        The run folder.

    Raises:
        SparseBayesError: in one sentence: what was expected, what came, what to do.
        KeyboardInterrupt: if interrupted; the folder can then be resumed.
    """
    setting = set_up(recipe)
    folder = open_folder(recipe, out, resume, overwrite)
    with locked(folder), Reporter(quiet=quiet) as reporter, terminable():
        reporter.line(f"run folder {folder}")
        write_example(folder, Example(setting.loaders.example, setting.test.mean, setting.test.std))
        run = _SearchRun(setting, folder, reporter)
        try:
            report = run.run()
        except KeyboardInterrupt as interrupt:
            # Whoever catches it can tell the user which folder to resume, and SIGTERM from Ctrl-C.
            raise type(interrupt)(str(folder)) from None
        settle_lines_(folder / "metrics.jsonl")
        write_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")
        write_report(folder)
        reporter.line(summary_line(read_report(folder)))
        reporter.line(f"report {folder / 'report.html'}")
    return folder


@final
class _SearchRun:
    """The phases of one search in its folder, from wherever that stands.

    Args:
        setting: what it starts from.
        folder: the run folder.
        reporter: told of every step.
    """

    def __init__(self, setting: Setting, folder: Path, reporter: Reporter) -> None:
        self._setting = setting
        self._recipe = setting.recipe
        self._folder = folder
        self._reporter = reporter
        self._metrics = folder / "metrics.jsonl"
        phases, work = read_seconds(folder)
        self._phases, self._watch = Stopwatch(phases), Stopwatch(work)
        self._searcher = Searcher(
            setting.recipe,
            setting.supernet,
            setting.search_loaders,
            folder,
            self._record,
            reporter,
            self._watch,
        )

    def run(self) -> dict[str, Any]:
        """Do what is left to do.

        Returns:
            The content of report.json.
        """
        mend_lines_(self._metrics)
        self._searcher.resume()
        self._timed("search", self._search)
        self._timed("retrain", self._retrain)
        if self._recipe.compress is None:
            report = self._timed("export", self._deliver)
        else:
            report = self._timed("compress", self._compress)
        report["wall_seconds"] = {name: round(value, 3) for name, value in self._phases.seconds.items()}
        report["work_seconds"] = {kind: round(value, 3) for kind, value in self._watch.seconds.items()}
        return report

    def _record(self, row: dict[str, Any]) -> None:
        append_line(self._metrics, json.dumps(row))
        # With every epoch: a kill leaves no time to do it.
        write_seconds(self._folder, self._phases.now(), self._watch.now())

    def _timed(self, name: Phase, work: Callable[[], Result]) -> Result:
        try:
            with self._phases.of(name):
                return work()
        finally:
            write_seconds(self._folder, self._phases.seconds, self._watch.seconds)

    def _genotype(self) -> Genotype:
        return Genotype.from_json(read_text(self._folder / "genotype.json"))

    def _search(self) -> None:
        """Search, and write what was found, as far as the folder does not have it."""
        setting, path = self._setting, self._folder / "genotype.json"
        is_random = self._recipe.search.baseline == "random"
        if path.is_file():
            if not is_random:
                self._searcher.run()  # nothing is left to do, unless the supernet's checkpoint was lost
        elif is_random:
            with self._watch.of("training"):
                decided = random_search(
                    self._recipe, setting.supernet, setting.search_loaders, self._record, self._reporter
                )
            self._found(decided)
        else:
            decided = self._decided()
            self._write_switches(decided)
            self._found(decided)
        self._draw()

    def _found(self, decided: Decided) -> None:
        """Write the genotype, and say what it is."""
        for key in decided.rescued:
            self._reporter.line(
                f"nothing of cell {key} was worth the strength, so its best path stays; lower search.strength to keep "
                "more"
            )
        genotype = decided.genotype
        write_atomically(self._folder / "genotype.json", genotype.to_json())
        share = 100 * genotype.parameter_free_share
        self._reporter.line(f"found {genotype.num_ops} operations, {share:.0f} % of them without weights")

    def _decided(self) -> Decided:
        """The method's decision when the supernet is trained, or the best of several architectures."""
        searcher, setting = self._searcher, self._setting
        own, method = searcher.run(), searcher.method
        if self._recipe.num_draws == 1:
            return own
        with self._watch.of("evaluation"):
            compared = choose_architecture(
                self._recipe,
                setting.supernet,
                method,
                own,
                setting.search_loaders,
                self._record,
                self._reporter,
            )
        write_atomically(self._folder / "candidates.json", compared.to_json())
        return compared.winner

    def _write_switches(self, decided: Decided) -> None:
        """Write what every group was worth when it was last updated, and whether it is part of the genotype."""
        table = self._setting.supernet.table
        cells, specs = decided.genotype.cells, dict(table.cells)
        values, scores = self._searcher.worth
        rows = []
        for switch, value, score in zip(table.groups, values.tolist(), scores.tolist(), strict=True):
            edge = specs[switch.key].edges[switch.edge]
            row = {"cell": switch.key, "source": edge.source, "target": edge.target, "op": switch.op}
            chosen = (edge.source, edge.target, switch.op) in cells[switch.key]
            rows.append({**row, "value": value, "score": score, "chosen": chosen})
        write_atomically(self._folder / "switches.json", json.dumps(rows, indent=1) + "\n")

    def _draw(self) -> None:
        """Draw the cells that have no picture yet."""
        genotype, path = self._genotype(), self._folder / "switches.json"
        rows = parse_json(list[_Worth], read_text(path), path) if path.is_file() else []
        worth: dict[str, dict[Op, float]] = {key: {} for key in genotype.cells}
        for row in rows:
            if row.cell in worth and row.op is not None:
                worth[row.cell][row.source, row.target, row.op] = row.score
        for key in genotype.cells:
            picture = self._folder / f"cell-{key}.svg"
            if not picture.is_file():
                write_atomically(picture, draw_cell(genotype, key, worth[key]))

    def _retrain(self) -> None:
        """Build the network, train it and save it in `found`; done already if it is there."""
        if (self._folder / "found" / "architecture.json").is_file():
            return
        setting, section, genotype = self._setting, self._recipe.retrain, self._genotype()
        options = self._options(genotype)
        sizes = {name: options[name] for name in ("width", "depth", "in_channels", "num_classes")}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self._recipe.seed, "retrain"))
            network = build_network(genotype, **sizes, auxiliary=section.auxiliary > 0)
        device = setting.loaders.example.device
        network.to(device)
        if section.inherit:
            supernet = setting.supernet
            values = self._searcher.method.inherited(supernet.switches) * supernet.alive
            inherit_(network, supernet.network, values, supernet.table)
            # The supernet's statistics are those of all its operations together.
            estimate_norms_(self._recipe, network, setting.search_loaders)
        self._reporter.phase("retrain", section.epochs)
        ended = retrain_(
            network,
            setting.loaders.train,
            setting.loaders.heldout,
            section,
            seed=self._recipe.seed,
            folder=self._folder,
            on_epoch=self._log_epoch,
            say=self._reporter.line,
            watch=self._watch,
        )
        self._reporter.line(f"network of the genotype: held-out error {100 * ended.error:.2f} %")
        network.cpu().eval()
        save_model(
            self._folder / "found", network, architecture_of(network, builder=BUILDER, options=options)
        )

    def _log_epoch(self, epoch: Epoch) -> None:
        self._reporter.step()
        row = {"phase": "retrain", "epoch": epoch.epoch, "lr": epoch.lr, "train_loss": epoch.train_loss}
        self._record({**row, "heldout_loss": epoch.heldout.loss, "heldout_error": epoch.heldout.error})

    def _options(self, genotype: Genotype) -> dict[str, Any]:
        """What `derived_network` is called with."""
        shape = self._setting.supernet.shape
        width, depth = self._recipe.network_size
        return {
            "genotype": genotype.to_dict(),
            "width": width,
            "depth": depth,
            "in_channels": shape.in_channels,
            "num_classes": shape.num_classes,
        }

    def _deliver(self) -> dict[str, Any]:
        """Read the test set once, export, and say what was found."""
        self._reporter.phase("export", 1)
        device = self._setting.loaders.example.device
        network = load_model(self._folder / "found").to(device)
        values = self._searcher.method.mean(self._setting.supernet.switches)
        with self._watch.of("export"):
            return search_results(self._setting, values, network, self._genotype(), self._folder)

    def _compress(self) -> dict[str, Any]:
        """Compress the network that was found, in the same folder; the report's dense network is that one."""
        setting, genotype = self._setting, self._genotype()
        recipe = self._recipe.compression(BUILDER, self._options(genotype))
        device = setting.loaders.example.device
        compressor = Compressor(
            recipe,
            setting.loaders,
            lambda: load_model(self._folder / "found").to(device),
            self._folder,
            self._record,
            self._reporter,
        )
        compressor.watch = self._watch
        chosen = compressor.run()
        with self._watch.of("export"):
            report = results(recipe, compressor, chosen, setting.test, setting.loaders, self._folder)
        return {**report, "task": "search", **about_search(self._recipe, genotype, setting.table)}
