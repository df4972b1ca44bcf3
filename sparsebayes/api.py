"""A model, its groups and what is believed about them: the object for your own training loop.

    sparse = sparsebayes.wrap(model, groups="units")
    for _ in range(8):
        train_one_epoch(sparse.model, optimizer)
        sparse.update(loader, strength=10.0)     # curvature of every group's switch, then the posterior
        sparse.select()                          # which groups stay
        sparse.compact(optimizer)                # sparse.model is now a smaller ordinary network
    sparse.export_onnx("model.onnx")

It holds no maths of its own: groups, curvature, inference and prune do the work. Sizes and shapes that the groups need
are read off the first batch that `update` sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsebayes.curvature import Curvature, entry_curvature, gate_curvature
from sparsebayes.curvature.images import check_seen, warn_of_augmentation
from sparsebayes.data.peeking import first_images, num_images
from sparsebayes.errors import DataError, ModelError, RecipeError, RunError, unknown
from sparsebayes.groups import Grouping, UnitGraph, make_grouping
from sparsebayes.inference import Laplace
from sparsebayes.inference.laplace import SCALES, UPDATES
from sparsebayes.networks import as_input
from sparsebayes.prune.carry import carry_grouping
from sparsebayes.prune.compaction import Compaction, compact, trace_compacted
from sparsebayes.prune.masking import Masks, prune_
from sparsebayes.prune.optimizer import check_optimizer, move_optimizer_
from sparsebayes.prune.pricing import KINDS, entry_costs, group_prices
from sparsebayes.prune.selection import Selection, select

__all__ = ["GroupSpec", "SparseModel", "wrap"]

GroupSpec = str | Callable[[nn.Module, Tensor | None], Grouping] | Grouping | Sequence[Any]
"""A rule's name, a function of model and example input, a `Grouping`, or several of them to stack."""

Batches = Iterable[tuple[Tensor, Tensor]]


def wrap(
    model: nn.Module,
    groups: GroupSpec = "units",
    *,
    example: Tensor | None = None,
    num_data: int | None = None,
    scale: str = "switches",
    update: str = "reweighted",
    price: str = "none",
    seed: int = 0,
) -> SparseModel:
    """Put a sparse prior on groups of a model's weights.

    Args:
        model: Any network; it is not changed here.
        groups: What may go: ``"units"``, ``"filters"``, ``"weights"``, ``["units", "features"]``, a function, or a
            `Grouping`.
        example: A batch of inputs, of which two are kept; None: taken from the first `update`.
        num_data: Images in the training set; None: asked of the first loader given to `update`.
        scale: ``"switches"``, one prior variance for the scale of a group, or ``"entries"``, the paper's form.
        update: ``"reweighted"`` or ``"mackay"``: how prior variances and penalty follow from the curvature.
        price: ``"none"``, ``"params"`` or ``"macs"``: what makes a group's strength larger.
        seed: Seed of the curvature estimates.

    Returns:
        The wrapped model.

    Raises:
        GroupingError: If a rule is unknown or matches nothing (at once, or at the first update for rules that need an
            example input).
        RecipeError: If `scale`, `update` or `price` is unknown.
        ModelError: If the model is one that spreads another over devices.
    """
    return SparseModel(
        model,
        groups,
        example=example,
        num_data=num_data,
        scale=scale,
        update=update,
        price=price,
        seed=seed,
    )


class SparseModel:
    """A model with a posterior over its groups. Make one with `wrap`.

    Attributes:
        model: The network as it is now; replaced by a smaller one at each `compact`.
        posterior: What is believed about the groups; None before the first `update` and after each `compact`.
        curvature: The last estimate; None where `posterior` is, and with the scale ``"entries"``.
        selection: The last decision; None before the first `select` and after each `compact`.
        masks: Entries held at zero, also those that `compact` could not cut out; None if there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: GroupSpec = "units",
        *,
        example: Tensor | None = None,
        num_data: int | None = None,
        scale: str = "switches",
        update: str = "reweighted",
        price: str = "none",
        seed: int = 0,
    ) -> None:
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            raise ModelError(f"wrap the network, not its {type(model).__name__}: wrap(model.module, ...)")
        for what, name, choices in (
            ("scale", scale, SCALES),
            ("update", update, UPDATES),
            ("price", price, ("none", *KINDS)),
        ):
            if name not in choices:
                raise RecipeError(unknown(what, name, choices))
        self.model = model
        self.posterior: Laplace | None = None
        self.curvature: Curvature | None = None
        self.selection: Selection | None = None
        self.masks: Masks | None = None
        self.num_data = num_data
        self.num_updates = 0
        self._groups = groups
        self._example = None if example is None else example[:2].detach().clone()
        self._scale = scale
        self._update = update
        self._price = price
        self._seed = seed
        self._grouping: Grouping | None = groups if isinstance(groups, Grouping) else None
        self._graph: UnitGraph | None = None
        self._norms: Tensor | None = None
        self._pruned: Selection | None = None  # what is masked of the present grouping
        if example is not None:
            self._make_grouping()

    def __repr__(self) -> str:
        groups = repr(self._grouping) if self._grouping is not None else f"groups={self._groups!r}"
        return f"SparseModel({type(self.model).__name__}, {groups}, {self.num_updates} updates)"

    @property
    def grouping(self) -> Grouping:
        """The groups of the present model.

        Raises:
            RunError: If they need an example input and none was seen yet.
        """
        if self._grouping is None:
            raise RunError("the groups are not known without an example input: call update(loader) first")
        return self._grouping

    def graph(self) -> UnitGraph:
        """Coupled units of the present model, traced once.

        Raises:
            ModelError: If the model cannot be exported.
            RunError: If no example input was seen yet.
        """
        if self._graph is None:
            self._graph = trace_compacted(self.model, self._seen_example())
        return self._graph

    def update(
        self,
        batches: Batches,
        *,
        strength: float | None = None,
        likelihood: str = "cross_entropy",
        num_images: int | Literal["auto"] | None = 2048,
        estimator: str = "monte_carlo",
        factor: str = "stick",
        draws: int = 1,
        importance: float = 1.0,
        tolerance: float = 0.05,
    ) -> Laplace:
        """Estimate the curvature of every group's switch and update the posterior.

        Args:
            batches: Pairs of images and labels, such as a `DataLoader` without augmentation.
            strength: Temperature T: a group is worth keeping if it saves more than about T nats; None: as it is, at
                first 1.
            likelihood: ``"cross_entropy"`` of class numbers, or ``"mse"`` or ``"binary_cross_entropy"`` of targets
                with the outputs' shape.
            num_images: Images that are used, at most; ``"auto"``: until the relative standard error of the curvature
                is below ``tolerance``; None: all.
            estimator: ``"monte_carlo"`` or ``"exact"``.
            factor: Random factor of the likelihood, for ``"monte_carlo"``.
            draws: Random draws per image.
            importance: Share of the images that get a backward pass, mostly those that the network is least sure of.
            tolerance: Where ``"auto"`` stops; it warns if the images end before.

        Returns:
            The posterior.

        Raises:
            DataError: If there is no image, a batch is no pair of tensors, targets do not fit the likelihood, or the
                size of the data set is neither given nor known, or smaller than what the loader holds.
        """
        batches = self._look(batches)
        grouping = self.grouping
        if self.posterior is None:
            self.posterior = Laplace(
                grouping.num_groups, scale=self._scale, update=self._update, strength=strength or 1.0
            )
        options: Mapping[str, Any] = {
            "num_data": self._num_data(),
            "likelihood": likelihood,
            "estimator": estimator,
            "factor": factor,
            "draws": draws,
            "importance": importance,
            "num_images": num_images,
            "tolerance": tolerance,
            "seed": self._seed + self.num_updates,
        }
        prices = None
        if self._price != "none":
            prices = group_prices(grouping, entry_costs(self.model, self._seen_example()[:1], self._price))
        if self._scale == "entries":
            entries = entry_curvature(self.model, list(grouping.parameters), batches, **options)
            norms = self._group_norms()
            self.posterior.update_(norms, entries, grouping=grouping, strength=strength, prices=prices)
        else:
            self.curvature = gate_curvature(self.model, grouping, batches, **options)
            check_seen(self.curvature.num_images, self._num_data())
            # Scaling a group's weights is scaling its switch, so an implicit switch always stands at 1.
            ones = torch.ones(grouping.num_groups, dtype=torch.float64)
            self.posterior.update_(ones, self.curvature.diagonal, strength=strength, prices=prices)
        self._norms = self._group_norms()
        self.num_updates += 1
        return self.posterior

    def penalty(self) -> Tensor:
        """Reweighted group-lasso penalty, to be added to a mean loss; 0 before the first update.

        The switch of a group is the norm of its gate weights relative to what it was at the last update (with the
        scale ``"entries"``: the norm itself). Under Adam or SGD this shrinks, but only `shrink_` makes exact zeros.

        Returns:
            A differentiable scalar, nats per image.
        """
        if self.posterior is None:
            return torch.zeros((), device=_device(self.model))
        norms = self._group_norms(differentiable=True)
        weight = (self.posterior.penalty / self._num_data()).to(norms)
        return (weight * norms / self._reference(norms)).sum()

    def shrink_(self, lr: float) -> None:
        """Proximal step of the penalty on the weights that it counts: call it after each optimizer step.

        Frozen parameters stay. A step is smaller than half precision can tell apart: keep the weights in float32, and
        use autocast.

        Args:
            lr: The step's learning rate; under SGD with momentum that rate over 1 - momentum, which is how far a
                gradient that stays the same moves a weight per step: loss and penalty then count alike.
        """
        if self.posterior is None:
            return
        norms = self._group_norms()
        amount = lr * self.posterior.penalty.to(norms) / (self._num_data() * self._reference(norms))
        factors = (1 - amount / norms.clamp(min=1e-12)).clamp(min=0)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            scales = self.grouping.scales(factors, gates_only=self._scale != "entries")
            for name, scale in scales.items():
                if parameters[name].requires_grad:
                    parameters[name].mul_(scale.to(parameters[name]))

    def select(self, *, rule: str = "evidence", max_removal: float = 0.6, min_keep: int = 1) -> Selection:
        """Decide which groups stay, by the posterior; what was pruned before stays off.

        Args:
            rule: ``"evidence"``, z^2 h > T, or ``"entropy"``, the paper's.
            max_removal: Largest share of a layer's groups still there that one update removes; the weakest go.
            min_keep: Groups that every layer keeps.

        Raises:
            RunError: Before the first `update`.
        """
        if self.posterior is None:
            raise RunError("nothing is known about the groups yet: call update(loader) before select()")
        # The rule decides; evidence orders the groups where the bounds have to choose among those that it drops.
        keep, evidence = self.posterior.keep(rule), self.posterior.evidence
        score = torch.where(keep, evidence.clamp(min=0) + 2.0, evidence / (1.0 + evidence))
        self.selection = select(
            self.grouping,
            score,
            threshold=1.0,
            previous=self._pruned,
            max_removal=max_removal,
            min_keep=min_keep,
            strength=self.posterior.strength,
        )
        return self.selection

    def prune_(self, selection: Selection | None = None) -> Masks:
        """Set what is off to zero; `masks.reapply_(model)` after an optimizer step holds it there.

        Args:
            selection: None: the last one.

        Raises:
            RunError: If there is no selection.
        """
        selection = selection or self.selection
        if selection is None:
            raise RunError("nothing is selected yet: call select() before prune_()")
        masks = prune_(self.model, self.grouping, selection)
        if self.masks is not None:
            for name, mask in self.masks.masks.items():
                masks.masks[name] = masks.masks[name] & mask if name in masks.masks else mask
        self.masks = masks
        if self._pruned is not None:
            selection = replace(selection, on=selection.on & self._pruned.on)
        self.selection = self._pruned = selection
        return masks

    def compact(
        self, optimizer: torch.optim.Optimizer | None = None, *, check: Tensor | None = None
    ) -> Compaction:
        """Replace the model by a smaller ordinary one that computes the same; a new selection is pruned first.

        What is off but cannot be cut out, such as single weights, stays as zeros: `masks.reapply_(model)` after each
        optimizer step holds it there.

        Args:
            optimizer: Of the present model; it then holds the new parameters and what remains of its state, in as many
                groups as before.
            check: More inputs to compare on.

        Returns:
            The compaction; its model is `self.model` from now on.

        Raises:
            ModelError: If the model cannot be traced, or the small one would not compute the same.
            RunError: If there is no selection.
        """
        if optimizer is not None:
            check_optimizer(optimizer, self.model)
        if self.selection is not self._pruned:
            self.prune_()
        if self.masks is None:
            raise RunError("nothing is selected yet: call select() before compact()")
        done = compact(self.model, self.masks.masks, self._seen_example(), units=self._graph, check=check)
        if optimizer is not None:
            move_optimizer_(optimizer, self.model, done.model, done.kept)
        on = None if self._pruned is None else self._pruned.on
        self._grouping, _ = carry_grouping(self.grouping, done.kept, on)
        self.model, self.masks = done.model, Masks(done.masks) if done.masks else None
        self.selection = self._pruned = self.posterior = self.curvature = self._norms = self._graph = None
        return done

    def export_onnx(self, path: str | Path) -> Path:
        """Write the present model as ONNX, checked against onnxruntime.

        Args:
            path: The file.

        Returns:
            The file.
        """
        from sparsebayes.export import export_onnx

        return Path(export_onnx(self.model, self._seen_example(), Path(path)).path)

    def _look(self, batches: Batches) -> Batches:
        """Learn example input, data size and groups from the batches; give back the same batches."""
        if self.num_data is None:
            self.num_data = num_images(batches)
        if self._example is None:
            warn_of_augmentation(batches)  # the loader can be asked, the batches below cannot
            with torch.random.fork_rng(devices=[]):  # a loader draws a seed when it begins
                images, batches = first_images(batches)
            self._example = images[:2].detach().clone()
        self._make_grouping()
        return batches

    def _make_grouping(self) -> None:
        if self._grouping is None:
            self._grouping = make_grouping(self.model, self._groups, example=self._example, trace=self.graph)

    def _seen_example(self) -> Tensor:
        if self._example is None:
            raise RunError("no example input was seen yet: call update(loader), or give example=batch")
        return as_input(self.model, self._example)

    def _num_data(self) -> int:
        if self.num_data is None:
            raise DataError("the size of the training set is not known: give wrap(..., num_data=N)")
        return self.num_data

    def _reference(self, norms: Tensor) -> Tensor:
        """What the penalty measures norms by: those of the last update, or 1 with the scale ``"entries"``."""
        if self._scale == "entries" or self._norms is None:
            return torch.ones_like(norms)
        return self._norms.to(norms).clamp(min=1e-12)

    def _group_norms(self, *, differentiable: bool = False) -> Tensor:
        """Norm of each group's gate weights, or with the scale ``"entries"`` of all its entries, of shape ``[G]``."""
        names = self.grouping.parameters
        squares = {n: p.square() for n, p in self.model.named_parameters() if n in names}
        total = self.grouping.reduce(squares, gates_only=self._scale != "entries")
        # The gradient of a square root at 0 is infinite: keep off it by less than any weight's square.
        return (total + 1e-24).sqrt() if differentiable else total.detach().sqrt()


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
