"""One search: train a supernet and its switches, update what is believed of them, and decide on a genotype.

    warm-up     weights alone, switches fixed                          (BayesNAS, Algorithm 2, first part)
    cycle       weights and switches under the penalty, then an update (Algorithm 1; one cycle in the paper)
    decision    switches that are worth it, connected, as a genotype

Weights and switches follow one cosine from their rates to 0, so that the last update measures curvature near a minimum:
it is the one that decides, and none before it should leave a single operation on an edge.
Which method learns the switches is no matter of the loop (`sparsebayes.nas.methods`). Every epoch draws from its own
random streams and ends in a checkpoint, so an interrupted search goes on to the very numbers of an unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from sparsebayes.data import Loader
from sparsebayes.errors import DataError, NumericsError
from sparsebayes.nas.decision import Decided, decide, living_scores
from sparsebayes.nas.rows import relative_rows
from sparsebayes.nas.spaces import Decision, Space
from sparsebayes.nas.supernet import Supernet
from sparsebayes.recipe.search_schema import SearchRecipe, SearchSection
from sparsebayes.train.batch_norm import reestimate_
from sparsebayes.train.checkpoint import phase_state, write_checkpoint
from sparsebayes.train.evaluation import evaluate
from sparsebayes.train.fit import fast_layout_
from sparsebayes.train.progress import Reporter
from sparsebayes.train.schedule import one_cycle
from sparsebayes.train.search_methods import make_method, weight_groups
from sparsebayes.train.search_removal import alive_groups, weakest_groups
from sparsebayes.train.second_order import architecture_gradient
from sparsebayes.train.seeding import derive_seed
from sparsebayes.train.stopwatch import Stopwatch

__all__ = ["SearchLoaders", "Searcher", "WithSwitches", "check_batch", "decision_of"]


@dataclass(frozen=True)
class SearchLoaders:
    """The images of a search.

    Attributes:
        train: for the weights, and for the switches where they learn together; shuffled, augmented.
        switches: for switches that learn from images of their own; the same images as `train` otherwise.
        plain: the images of `train` as they are, for curvature.
        heldout: for records, and to choose among drawn architectures.
    """

    train: Loader
    switches: Loader
    plain: Loader
    heldout: Loader


class Searcher:
    """Runs a search in a run folder, from wherever the folder stands.

    Args:
        recipe: what to do.
        supernet: on the run's device, fresh; trained in place.
        loaders: the images.
        folder: the run folder.
        record: called with one dictionary per epoch, for metrics.jsonl.
        reporter: told of every step.
        watch: told which time went into which kind of work.
    """

    def __init__(
        self,
        recipe: SearchRecipe,
        supernet: Supernet,
        loaders: SearchLoaders,
        folder: Path,
        record: Callable[[dict[str, Any]], None],
        reporter: Reporter,
        watch: Stopwatch | None = None,
    ) -> None:
        self.recipe = recipe
        self.supernet = supernet
        fast_layout_(supernet)
        self.loaders = loaders
        self.method = make_method(recipe, supernet, loaders.train.num_data)
        self._path = folder / "search.pt"
        self._record = record
        self._reporter = reporter
        self._watch = watch or Stopwatch()
        section = recipe.search
        self._weights = torch.optim.SGD(
            weight_groups(supernet, self.method),
            section.lr,
            section.momentum,
            weight_decay=section.weight_decay,
        )
        self._switches = self.method.optimizer(supernet.switches)
        self._epoch = 0
        self._own: Iterator[tuple[Tensor, Tensor]] = iter(())
        zeros = torch.zeros(supernet.table.num_groups, dtype=torch.float64)
        self._worth = torch.stack([zeros, zeros])  # value and score of every group

    @property
    def worth(self) -> tuple[Tensor, Tensor]:
        """Value and score of every group at the last update that it lived to see, each float64 of shape `[G]`."""
        values, scores = self._worth
        return values, scores

    def run(self) -> Decided:
        """Do what is left to do.

        Returns:
            The genotype.

        Raises:
            NumericsError: the search diverged.
        """
        section = self.recipe.search
        total = section.warmup_epochs + section.cycles * section.epochs
        if self._epoch < total:
            self._reporter.phase("search", total)
        while self._epoch < total:
            with self._watch.of("training"):
                self._run_epoch(total)
            done = self._epoch + 1 - section.warmup_epochs
            if done > 0 and done % section.epochs == 0:
                with self._watch.of("update"):
                    self._update(done // section.epochs)
            self._epoch += 1
            write_checkpoint(self._path, {"phase": "search", "state": self._state()})
            self._reporter.step()
        return self.decide()

    def decide(self) -> Decided:
        """The genotype that the present beliefs give; before the first update there are none."""
        supernet, method = self.supernet, self.method
        table = supernet.table
        alive = alive_groups(supernet)
        rule = decision_of(self.recipe.search, supernet.space, method.decision)
        scores = living_scores(method.scores().cpu(), alive)
        return decide(supernet.space, table, method.keep().cpu() & alive, scores, rule)

    def _run_epoch(self, total: int) -> None:
        """One pass over the training images."""
        section, seed = self.recipe.search, self.recipe.seed
        epoch = self._epoch
        self.loaders.train.reseed_(derive_seed(seed, "search", "epoch", epoch))
        self.loaders.switches.reseed_(derive_seed(seed, "search", "switches", epoch))
        self._own = iter(())
        generator = Generator().manual_seed(derive_seed(seed, "search", "sample", epoch))
        learns = epoch >= section.warmup_epochs
        supernet = self.supernet
        supernet.train()
        losses: list[Tensor] = []
        step = epoch * len(self.loaders.train)
        devices = [supernet.switches.device] if supernet.switches.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(derive_seed(seed, "search", "layers", epoch))
            for images, labels in self.loaders.train:
                factor = one_cycle(step, total * len(self.loaders.train), warmup=0.02)
                _set_rate(self._weights, section.lr * factor)
                self._set_decay()
                if learns and self.method.bilevel:
                    self._step_switches(images, labels, generator)
                losses.append(self._step(images, labels, generator, learns, section.switch_lr * factor))
                step += 1
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise NumericsError(
                f"the search diverged in epoch {epoch + 1}: its loss is no number; lower search.lr or set "
                "search.grad_clip"
            )
        self._log(loss, section.lr * factor)

    def _set_decay(self) -> None:
        """Let the weights of operations decay as the method says."""
        shares = self.method.decay_shares()
        if shares is not None:
            for group, share in zip(self._weights.param_groups[1:], shares.tolist(), strict=True):
                group["weight_decay"] = self.recipe.search.weight_decay * share

    def _step(
        self, images: Tensor, labels: Tensor, generator: Generator, learns: bool, rate: float
    ) -> Tensor:
        """One step of the weights, and of the switches where they learn from the same images."""
        supernet, section = self.supernet, self.recipe.search
        together = learns and not self.method.bilevel
        values = self._values(generator, len(images), learns=together)
        logits = supernet(images, values)
        loss = functional.cross_entropy(logits, labels)
        self._zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if section.grad_clip is not None:
            nn.utils.clip_grad_norm_(supernet.parameters(), section.grad_clip)
        self._weights.step()
        if together:
            self._learn(values, rate, len(images))
            self.method.shrink_(supernet.switches, rate)
        return loss.detach()

    def _values(self, generator: Generator, num_images: int, *, learns: bool) -> Tensor:
        """The switches of a step; a leaf of the graph where the method learns from its gradient."""
        values = self.method.sample(self.supernet.switches, generator, num_images)
        if learns and self._switches is not None:
            return values
        return values.detach().requires_grad_(learns)

    def _learn(self, values: Tensor, rate: float | None, num_images: int) -> None:
        """Let the method learn from a backward pass; its optimizer at this rate, or at its own."""
        if self._switches is None:
            assert values.grad is not None, "the network multiplies by every switch"
            self.method.learn_(values.grad, num_images)
            return
        if rate is not None:
            _set_rate(self._switches, rate)
        self._switches.step()

    def _zero_grad(self) -> None:
        self._weights.zero_grad(set_to_none=True)
        if self._switches is not None:
            self._switches.zero_grad(set_to_none=True)

    def _step_switches(self, train_images: Tensor, train_labels: Tensor, generator: Generator) -> None:
        """One step of the method's parameters, on images that the weights do not learn from.

        Args:
            train_images: what the weights learn from next; the second order alone looks at them.
            train_labels: of these.
            generator: of the method's samples.
        """
        batch = next(self._own, None)
        if batch is None:
            self._own = iter(self.loaders.switches)
            batch = next(self._own)
        images, labels = batch
        values = self._values(generator, len(images), learns=True)
        self._zero_grad()
        if self.recipe.search.second_order:
            values.backward(  # type: ignore[no-untyped-call]
                architecture_gradient(
                    self.supernet,
                    self._weights,
                    values,
                    lambda at: functional.cross_entropy(self.supernet(train_images, at), train_labels),
                    lambda at: functional.cross_entropy(self.supernet(images, at), labels),
                )
            )
        else:
            functional.cross_entropy(self.supernet(images, values), labels).backward()  # type: ignore[no-untyped-call]
        self._learn(values, None, len(images))

    def _update(self, cycle: int) -> None:
        """Take in what a cycle has learned; between cycles, switch the weakest operations off."""
        section, supernet, method = self.recipe.search, self.supernet, self.method

        def rows() -> Tensor:
            with self._watch.of("curvature"):
                return self._rows(cycle)

        method.update_(supernet.switches.detach(), rows)
        values = supernet.table.norms(method.mean(supernet.switches).detach()).double().cpu()
        new = torch.stack([values, method.scores().double().cpu()])
        self._worth = new.where(alive_groups(supernet), self._worth)
        if cycle < section.cycles and method.removes:
            alive, on, scores = alive_groups(supernet), method.keep().cpu(), method.scores().cpu()
            off = weakest_groups(supernet.table, alive, on, scores, section.removal)
            if bool(off.any()):
                supernet.switch_off_(off)
        left = alive_groups(supernet) & self._is_op()
        self._reporter.line(
            f"update {cycle}: {int(left.sum())} of {int(self._is_op().sum())} operations left"
        )

    def _rows(self, cycle: int) -> Tensor:
        """Derivatives of the switches on plain images, with batch norm as trained or estimated anew."""
        seed, curvature, plain = self.recipe.seed, self.recipe.curvature, self.loaders.plain
        plain.reseed_(derive_seed(seed, "search", "norms", cycle))
        network = WithSwitches(self.supernet, self.method.mean(self.supernet.switches))
        reestimate_(network, plain, num_images=self.recipe.search.norm_images)
        plain.reseed_(derive_seed(seed, "search", "curvature", cycle))
        return relative_rows(
            self.supernet,
            plain,
            num_images=curvature.likely_images,
            at_once=self.recipe.search.batch_size or self.recipe.data.batch_size,
            estimator=curvature.estimator,
            factor=curvature.factor,
            draws=curvature.draws,
            seed=derive_seed(seed, "search", "draws", cycle),
        )

    def _is_op(self) -> Tensor:
        return torch.tensor([switch.op is not None for switch in self.supernet.table.groups])

    def _log(self, loss: float, lr: float) -> None:
        values = self.method.mean(self.supernet.switches)
        with self._watch.of("evaluation"):
            held = evaluate(WithSwitches(self.supernet, values), self.loaders.heldout)
        phase = "warmup" if self._epoch < self.recipe.search.warmup_epochs else "search"
        record = {"phase": phase, "epoch": self._epoch + 1, "lr": lr, "train_loss": loss}
        self._record(
            {**record, "heldout_loss": held.loss, "heldout_error": held.error, **self.method.figures()}
        )
        self._reporter.line(
            f"{phase} epoch {self._epoch + 1}: training loss {loss:.3f}, held-out error {100 * held.error:.2f} %"
        )

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "supernet": self.supernet.state_dict(),
            "weights": self._weights.state_dict(),
            "switches": None if self._switches is None else self._switches.state_dict(),
            "method": self.method.state_dict(),
            "worth": self._worth,
        }

    def resume(self) -> None:
        """Take over the state of an interrupted or finished search, if the folder has one that can be read."""
        state = phase_state(self._path, "search", self._reporter.line)
        if state is None:
            return
        self.supernet.load_state_dict(state["supernet"])
        self._weights.load_state_dict(state["weights"])
        if self._switches is not None:
            self._switches.load_state_dict(state["switches"])
        self.method.load_state_dict(state["method"])
        self._worth = state["worth"]
        self._epoch = state["epoch"]


def decision_of(section: SearchSection, space: Space, own: Decision | None = None) -> Decision:
    """How operations are chosen: as the recipe says, else the space, else the method's own decision."""
    base = space.decision
    if base == Decision() and own is not None:
        base = own
    one = base.one_op_per_edge if section.one_op_per_edge is None else section.one_op_per_edge
    top = base.top_k_edges if section.top_k_edges is None else section.top_k_edges
    return Decision(one, top)


class WithSwitches(nn.Module):
    """A supernet with given values of its switches, as a network of images alone.

    Args:
        supernet: the network.
        values: of shape `[T]`.
    """

    def __init__(self, supernet: Supernet, values: Tensor) -> None:
        super().__init__()
        self.supernet = supernet
        self.values = values.detach()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape `[B, C]`."""
        logits: Tensor = self.supernet(images, self.values)
        return logits


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def check_batch(batch_size: int, num_images: int) -> None:
    """Refuse batches that batch norm cannot learn from.

    Raises:
        DataError: a batch of one image, or more than there are.
    """
    if batch_size < 2:
        raise DataError(
            f"a search needs batches of at least 2 images, as every operation ends in a batch norm, got {batch_size}; "
            "raise search.batch_size or data.batch_size"
        )
    if batch_size > num_images:
        raise DataError(
            f"the batch size is {batch_size}, but the search has only {num_images} images; lower it"
        )
