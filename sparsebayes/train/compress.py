"""One compression: pre-train, then cycles of {curvature, update, select, compact, train}, then fine-tune.

Every cycle raises the strength just far enough to remove its share of what is left, and leaves a smaller ordinary
network behind: a point of the run's front, saved at once. Everything a cycle does follows from the point before it and
from the run's seed, so an interrupted run goes on from its last point to the same numbers.

Decisions use held-out training images only. `strength: auto` takes the smallest network whose held-out loss, after
fine-tuning, is within one standard error of the best seen; a number or a budget ends the cycles where it says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsebayes.cost import cost
from sparsebayes.errors import NumericsError
from sparsebayes.export.saved import load_model, save_model
from sparsebayes.files import make_folder
from sparsebayes.prune.architecture import architecture_of
from sparsebayes.prune.carry import Lineage
from sparsebayes.prune.selection import Selection
from sparsebayes.recipe.schema import Recipe, TrainSection
from sparsebayes.train.batch_norm import reestimate_
from sparsebayes.train.budget import goals_of, network_latency_ms, next_aim
from sparsebayes.train.distributed import from_first
from sparsebayes.train.evaluation import Evaluation, logits_table
from sparsebayes.train.fit import Epoch, Phase, fast_layout_, fit_
from sparsebayes.train.front import Point, band_limit, read_front, replace_point, write_front
from sparsebayes.train.holding import hold_at_zero
from sparsebayes.train.loaders import Loaders
from sparsebayes.train.phase_checkpoints import PhaseCheckpoints
from sparsebayes.train.posteriors import remove_next
from sparsebayes.train.progress import Reporter
from sparsebayes.train.removal import DenseGroups, Removal, dense_groups, kept_widths, write_evidence
from sparsebayes.train.seeding import derive_seed
from sparsebayes.train.stopwatch import Stopwatch
from sparsebayes.train.switched import Switched

__all__ = ["Compressor"]

PATIENCE = 2
"""Cycles in a row whose loss is out of reach of the band before `strength: auto` stops exploring."""
REACH = 2.0
"""Times the band's limit that fine-tuning is trusted to bring back."""


class Compressor:
    """Runs the phases of one compression in a run folder, from wherever the folder stands.

    Args:
        recipe: What to do.
        loaders: The images.
        build: Makes a fresh dense network on the run's device.
        folder: The run folder.
        record: Called with one dictionary per epoch and per cycle, for metrics.jsonl.
        reporter: Told of every step.
        groups: Those of the dense network, if they are known; None: found when they are needed.
    """

    def __init__(
        self,
        recipe: Recipe,
        loaders: Loaders,
        build: Callable[[], nn.Module],
        folder: Path,
        record: Callable[[dict[str, Any]], None],
        reporter: Reporter,
        groups: DenseGroups | None = None,
    ) -> None:
        self.recipe = recipe
        self.loaders = loaders
        self.folder = folder
        self.points: list[Point] = read_front(folder / "pareto.json")
        self.phases = Stopwatch()
        self.watch = Stopwatch()
        self._build = build
        self._record = record
        self._reporter = reporter
        self._teacher: Tensor | nn.Module | None = None
        self._groups = groups
        self._checkpoints = PhaseCheckpoints(folder, reporter.line)
        self._device = loaders.example.device

    def run(self) -> Point:
        """Do what is left to do.

        Returns:
            The chosen point; its network is in ``points/K``.

        Raises:
            NumericsError: If training collapses before there is a smaller network; later on the run ends with those
                that there are.
            ModelError: If the network cannot be traced or compacted.
        """
        if not self.points:
            with self.phases.of("pretrain"):
                self._pretrain()
        if not any(point.finetuned or point.chosen for point in self.points):
            with self.phases.of("cycles"):
                self._cycles()
        if not any(point.chosen for point in self.points):
            with self.phases.of("finetune"):
                self._finetune()
        return next(point for point in self.points if point.chosen)

    def network(self, point: int) -> tuple[nn.Module, Lineage]:
        """A saved network and how it came from the dense one."""
        folder = self.point_folder(point)
        lineage = Lineage.load(folder / "lineage.safetensors")
        masks = {name: mask.to(self._device) for name, mask in lineage.masks.items()}
        model = load_model(folder).to(self._device)
        return fast_layout_(model), replace(lineage, masks=masks)

    def _pretrain(self) -> None:
        model = self._build()
        train = self.recipe.train
        phase = Phase(
            name="pretrain",
            epochs=train.pretrain.epochs,
            lr=train.rate(train.pretrain),
            seed=self.recipe.seed,
            keep_best=True,
        )
        result = self._fit(model, phase, {})
        lineage = Lineage(torch.ones(self.groups(model).grouping.num_groups, dtype=torch.bool))
        self._add_point(model, lineage, result, None)

    def _cycles(self) -> None:
        """Shrink until the budget, the strength, the band or the number of cycles says stop."""
        recipe = self.recipe
        model, lineage = self.network(self.points[-1].point)
        goals = goals_of(recipe, self.points[0])
        while True:
            aim = next_aim(
                goals,
                model,
                self.loaders.example,
                lineage.masks,
                latency_ms=self.points[-1].latency_ms,
                shrink=recipe.train.cycles.shrink,
            )
            if aim is None:
                return
            if len(self.points) > recipe.train.cycles.count or self._explored():
                break
            number = len(self.points)
            with self.watch.of("update"):
                removal = remove_next(
                    recipe,
                    model,
                    lineage,
                    self.groups().grouping,
                    self.loaders,
                    self._fit,
                    self._record,
                    costs=aim.costs,
                    target=aim.target,
                    number=number,
                    watch=self.watch,
                )
            if removal is None:
                self._reporter.line("no group is left to remove within the bounds; the cycles end here")
                break
            model, lineage = removal.model, removal.lineage
            self._log_removal(removal, number)
            self.loaders.plain.reseed_(derive_seed(recipe.seed, "batch norm", number))
            with self.watch.of("compaction"):
                reestimate_(model, self.loaders.plain, recipe.prune.reestimate)
            train = recipe.train
            phase = Phase(
                name=f"cycle {number}",
                epochs=self._cycle_epochs(model),
                lr=train.rate(train.cycles),
                seed=recipe.seed,
                reference=self.points[-1].heldout_loss,
            )
            try:
                result = self._fit(model, phase, lineage.masks)
            except NumericsError as error:
                if number == 1:
                    raise
                self._reporter.line(f"{error}; the cycles end with the network before it")
                break
            self._add_point(model, lineage, result, removal.selection)
        if recipe.prune.budget is not None:
            self._reporter.line(
                "the budget is not reached; raise train.cycles.count, shrink or prune.max_removal"
            )

    def _cycle_epochs(self, model: nn.Module) -> int:
        """Passes of a cycle: as many as cost what the recipe's passes cost the dense network, within its bounds."""
        cycles = self.recipe.train.cycles
        cheaper = self.points[0].macs / max(cost(model, self.loaders.example).macs, 1)
        return max(cycles.epochs, min(cycles.max_epochs, int(cycles.epochs * cheaper)))

    def _finetune(self) -> None:
        """Train the result for long; with `strength: auto` find the smallest network that ends in the band."""
        if not self._is_auto():
            self._choose(self._finetune_point(self.points[-1]))
            return
        limit = band_limit(self.points)
        smallest_first = sorted(self.points[1:], key=lambda point: point.params)
        gain = 1.0 / REACH
        for point in smallest_first:
            # What fine-tuning brought the last point is expected of the next: points that it cannot save are skipped.
            if not point.finetuned and gain * point.heldout_loss > limit:
                continue
            tuned = point if point.finetuned else self._finetune_point(point)
            if tuned.heldout_loss <= limit:
                self._choose(tuned)
                return
            gain = tuned.heldout_loss / tuned.untuned_loss if tuned.untuned_loss else gain
        self._choose(self.points[0])

    def _finetune_point(self, point: Point) -> Point:
        model, lineage = self.network(point.point)
        train = self.recipe.train
        phase = Phase(
            name=f"finetune {point.point}",
            epochs=train.finetune.epochs,
            lr=train.rate(train.finetune),
            seed=self.recipe.seed,
            keep_best=True,
            reference=point.heldout_loss,
        )
        new = replace(point, finetuned=True, untuned_loss=point.heldout_loss)
        try:
            result = self._fit(model, phase, lineage.masks)
        except NumericsError as error:
            self._reporter.line(f"{error}; the network stays as its cycle left it")
        else:
            new = replace(
                new,
                heldout_loss=result.loss,
                standard_error=result.standard_error,
                heldout_error=result.error,
            )
            self._save_network(new.point, model, lineage)
        self.points = replace_point(self.points, new)
        write_front(self.folder / "pareto.json", self.points)
        self._reporter.line(f"fine-tuned point {new.point}: {new.describe()}")
        return new

    def _choose(self, point: Point) -> None:
        self.points = replace_point(self.points, replace(point, chosen=True))
        write_front(self.folder / "pareto.json", self.points)
        self._checkpoints.remove()

    def _fit(
        self, model: nn.Module, phase: Phase, masks: dict[str, Tensor], settings: TrainSection | None = None
    ) -> Evaluation:
        """Train one phase with what every phase shares: masks, teacher, records and the checkpoint to resume from."""
        self._reporter.phase(phase.name, phase.epochs)
        start = time.perf_counter()
        switched = model if isinstance(model, Switched) else None
        hold = hold_at_zero(model if switched is None else switched.network, masks) if masks else None

        def after_step(lr: float) -> None:
            if switched is not None:
                switched.learn_(lr)
            if hold is not None:
                hold()

        def on_epoch(epoch: Epoch) -> None:
            self._reporter.step()
            self._record(
                {
                    "phase": phase.name.split()[0],
                    "cycle": int(phase.name.rpartition(" ")[2]) if " " in phase.name else 0,
                    "epoch": epoch.epoch,
                    "lr": epoch.lr,
                    "train_loss": epoch.train_loss,
                    "heldout_loss": epoch.heldout.loss,
                    "heldout_error": epoch.heldout.error,
                    "seconds": time.perf_counter() - start,
                }
            )

        return fit_(
            model,
            self.loaders.train,
            self.loaders.heldout,
            phase,
            settings or self.recipe.train,
            teacher=self._teach() if phase.name != "pretrain" else None,
            after_step=after_step if hold or switched else None,
            on_epoch=on_epoch,
            save=partial(self._checkpoints.save, phase.name),
            resume=self._checkpoints.resumed(phase.name),
            watch=self.watch,
        )

    def _teach(self) -> Tensor | nn.Module | None:
        """What the small networks learn from: the dense network's logits by position, ``[N, C]``, or itself.

        The table is the target of changed images too: an augmentation is a change that should change nothing, and a
        table costs nothing per step where a second forward pass would cost more than a small network's training.
        """
        train = self.recipe.train
        if train.distill == 0:
            return None
        if self._teacher is None:
            dense = self.network(0)[0].eval()
            if train.distill_on == "augmented":
                self._teacher = dense
            else:
                self.loaders.plain.reseed_(derive_seed(self.recipe.seed, "teacher"))
                with self.watch.of("training"):
                    self._teacher = logits_table(dense, self.loaders.plain)
        return self._teacher

    def _add_point(
        self,
        model: nn.Module,
        lineage: Lineage,
        result: Evaluation,
        selection: Selection | None,
    ) -> None:
        """Save a network as the next point of the front; `selection` made it, None for the dense one."""
        number = len(self.points)
        spent = cost(model, self.loaders.example)
        strength = None if selection is None else selection.strength
        zeros = sum(int((~mask).sum()) for mask in lineage.masks.values())
        point = Point(
            number,
            spent.params - zeros,
            spent.macs,
            result.loss,
            result.standard_error,
            result.error,
            strength=strength,
            widths=kept_widths(self.groups(model if selection is None else None).grouping, selection),
            latency_ms=self._latency_ms(model),
        )
        self._save_network(number, model, lineage)
        self.points.append(point)
        # Recorded before it counts: after a kill in between it is recorded twice, and the first one is dropped.
        self._record(
            {
                "phase": "point",
                "cycle": number,
                "params": point.params,
                "macs": point.macs,
                "strength": strength,
                "heldout_loss": point.heldout_loss,
                "heldout_error": point.heldout_error,
            }
        )
        write_front(self.folder / "pareto.json", self.points)
        self._reporter.line(f"point {number}: {point.describe()}")

    def _save_network(self, point: int, model: nn.Module, lineage: Lineage) -> None:
        folder = self.point_folder(point)
        make_folder(folder)
        section = self.recipe.model
        save_model(folder, model, architecture_of(model, builder=section.name, options=section.options))
        lineage.save(folder / "lineage.safetensors")

    def point_folder(self, point: int) -> Path:
        """Folder of one network of the front."""
        return self.folder / "points" / str(point)

    def groups(self, dense: nn.Module | None = None) -> DenseGroups:
        """The recipe's groups over the dense network; those of smaller ones are followed from here.

        Args:
            dense: That network, if it is at hand.
        """
        if self._groups is None:
            model = dense if dense is not None else self.network(0)[0]
            self._groups = dense_groups(self.recipe, model, self.loaders.example)
        return self._groups

    def _latency_ms(self, model: nn.Module) -> float | None:
        """Measured latency, where the budget asks for it."""
        budget = self.recipe.prune.budget
        if budget is None or budget.latency_ms is None:
            return None
        legacy = self.recipe.export.legacy
        return from_first(lambda: network_latency_ms(model, self.loaders.example, legacy=legacy))

    def _is_auto(self) -> bool:
        return self.recipe.prior.strength == "auto" and self.recipe.prune.budget is None

    def _explored(self) -> bool:
        """Whether `strength: auto` has seen enough: the last points are all out of reach of the band."""
        if not self._is_auto() or len(self.points) <= PATIENCE:
            return False
        limit = REACH * band_limit(self.points)
        return all(point.heldout_loss > limit for point in self.points[-PATIENCE:])

    def _log_removal(self, removal: Removal, number: int) -> None:
        """Keep the decision and what it was made by, for the report."""
        selection = removal.selection
        self._record(
            {"phase": "select", "cycle": number, "strength": selection.strength, "kept": selection.num_kept}
        )
        write_evidence(removal, self.point_folder(number))
