"""One removal: score the groups that are left, raise the strength just far enough, cut, and check the cut.

The score of a group is the strength up to which it survives, so that one comparison serves every decision; baselines
(magnitude, Taylor, random) give scores that only order the groups.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsebayes.api import SparseModel
from sparsebayes.curvature import gate_rows
from sparsebayes.curvature.workers import add_up_
from sparsebayes.data import Loader
from sparsebayes.files import make_folder, write_atomically
from sparsebayes.groups import Grouping, concatenate, make_grouping, trace_units
from sparsebayes.inference.joint import joint_survival
from sparsebayes.prune.carry import Lineage
from sparsebayes.prune.masking import Masks
from sparsebayes.prune.pricing import EntryCosts, entry_costs, group_prices, select_within
from sparsebayes.prune.scores import magnitude_score, random_score, taylor_score
from sparsebayes.prune.selection import Selection
from sparsebayes.recipe.schema import Recipe
from sparsebayes.train.distributed import check_same, own_images, same_scores
from sparsebayes.train.seeding import derive_seed
from sparsebayes.train.stopwatch import Stopwatch

__all__ = [
    "DenseGroups",
    "Removal",
    "choose_groups",
    "cut",
    "dense_groups",
    "kept_widths",
    "recipe_prices",
    "remove",
    "write_evidence",
]

MAX_HISTOGRAM = 100_000
"""Groups up to which the evidence of each is kept for the report's histogram."""


@dataclass(frozen=True, eq=False)
class Removal:
    """A network after one removal.

    Attributes:
        model: The smaller network, not trained yet.
        lineage: How it came from the dense one.
        selection: What was decided, over the groups that were left before.
        survives: Strength up to which each of those groups survives, of shape ``[G]``.
    """

    model: nn.Module
    lineage: Lineage
    selection: Selection
    survives: Tensor


def write_evidence(removal: Removal, folder: Path) -> None:
    """Keep each group's evidence for the report's histogram, unless there are too many; kept where it exceeds 1.

    Raises:
        RunError: If the folder cannot be written.
    """
    if removal.selection.num_groups <= MAX_HISTOGRAM:
        evidence = (removal.survives / (removal.selection.strength or 1.0)).tolist()
        make_folder(folder)
        write_atomically(folder / "evidence.json", json.dumps({"evidence": evidence}))


def kept_widths(dense: Grouping, selection: Selection | None) -> dict[str, int]:
    """Groups of each layer that are left.

    Args:
        dense: Those of the dense network.
        selection: What the last removal decided; None if nothing was removed.
    """
    if selection is not None:
        return {layer: kept for layer, (kept, _) in selection.counts().items()}
    counts = torch.bincount(dense.layer_index, minlength=len(dense.layers)).tolist()
    return dict(zip(dense.layers, counts, strict=True))


@dataclass(frozen=True, eq=False)
class DenseGroups:
    """The groups of a dense network, found once for a whole run.

    Attributes:
        grouping: The groups that the recipe names.
        fixed: One sentence for each layer whose channels stay, with the reason.
    """

    grouping: Grouping
    fixed: tuple[str, ...]


def dense_groups(recipe: Recipe, model: nn.Module, example: Tensor) -> DenseGroups:
    """The groups that a recipe names, over a dense network, from one trace of it.

    Rules that need no trace are no reason to go without: every removal follows what dies along with the groups.

    Args:
        recipe: Its rules, stacked in their order.
        model: The dense network.
        example: One input.

    Raises:
        GroupingError: If a rule finds nothing to group.
        ModelError: If the network cannot be traced.
    """
    graph = trace_units(model, example)
    parts = [
        make_grouping(
            model,
            rule.rule,
            example=example,
            include=rule.include,
            exclude=rule.exclude,
            trace=lambda: graph,
        )
        for rule in recipe.groups
    ]
    return DenseGroups(concatenate(parts), graph.fixed)


def recipe_prices(
    recipe: Recipe, model: nn.Module, grouping: Grouping, example: Tensor, costs: EntryCosts
) -> Tensor | None:
    """Cost of each group relative to the mean group, in the unit that the recipe names.

    Args:
        recipe: `prior.price`.
        model: The network as it stands.
        grouping: G groups of its parameters.
        example: One input.
        costs: What the present cycle counts, which `prior.price: budget` takes as prices.

    Returns:
        Of shape ``[G]``; None if groups have no price.
    """
    if recipe.prior.price == "none":
        return None
    if recipe.prior.price != "budget":
        costs = entry_costs(model, example, recipe.prior.price)
    return group_prices(grouping, costs)


def remove(
    recipe: Recipe,
    model: nn.Module,
    lineage: Lineage,
    dense: Grouping,
    images: Loader,
    example: Tensor,
    *,
    costs: EntryCosts,
    target: float,
    number: int,
    watch: Stopwatch,
) -> Removal | None:
    """Remove groups until the network costs no more than a target.

    Args:
        recipe: Prior, curvature, bounds and score.
        model: The network as it stands.
        lineage: How it came from the dense one.
        dense: The groups of the dense network.
        images: Training images as they are.
        example: One input.
        costs: What the target counts.
        target: Cost to reach; bounds and the recipe's strength may prevent it.
        number: Number of the cycle, for its random streams.
        watch: Told which time went into curvature, and which into compaction.

    Returns:
        The removal; None if no group may go.

    Raises:
        ModelError: If the network cannot be traced, or the cut one would not compute the same.
        NumericsError: If the curvature is not finite.
    """
    grouping, origin = lineage.grouping(dense)
    sparse = SparseModel(
        model,
        grouping,
        example=example,
        num_data=images.num_data,
        scale=recipe.prior.scale,
        seed=derive_seed(recipe.seed, "curvature", number) % 2**31,
    )
    sparse.masks = Masks(lineage.masks) if lineage.masks else None
    score = same_scores(_score(recipe, sparse, images, example, costs, number, watch))
    selection = choose_groups(recipe, sparse, lineage, dense, score, costs=costs, target=target)
    check_same("selection", selection.to_json())
    with watch.of("compaction"):
        return cut(sparse, lineage, origin, selection, score)


def choose_groups(
    recipe: Recipe,
    sparse: SparseModel,
    lineage: Lineage,
    dense: Grouping,
    score: Tensor,
    *,
    costs: EntryCosts,
    target: float,
) -> Selection:
    """Select within the recipe's bounds, at the weakest strength that meets a target cost.

    Args:
        recipe: Strength and bounds.
        sparse: The network and its groups as they stand.
        lineage: How it came from the dense one.
        dense: The groups of the dense network.
        score: Strength up to which each group survives, of shape ``[G]``.
        costs: What the target counts.
        target: Cost to reach.
    """
    # Scores of the baselines only order the groups: a strength in nats means nothing to them.
    is_evidence = recipe.prune.score == "evidence"
    strength = recipe.prior.strength if is_evidence else "auto"
    return select_within(
        sparse.grouping,
        score,
        sparse.graph() if needs_graph(dense) else None,
        costs,
        target=target,
        ceiling=strength if isinstance(strength, float) else float("inf"),
        max_removal=recipe.prune.max_removal,
        min_keep=recipe.prune.min_keep,
        round_to=recipe.prune.round_to,
        masks=lineage.masks,
    )


def cut(
    sparse: SparseModel, lineage: Lineage, origin: Tensor, selection: Selection, score: Tensor
) -> Removal | None:
    """Carry out a selection; None if no group goes.

    Args:
        sparse: The network and its groups as they stand.
        lineage: How it came from the dense one.
        origin: Dense number of each of its groups.
        selection: What stays of them.
        score: What it was made by, of shape ``[G]``.

    Raises:
        ModelError: If the network cannot be traced, or the cut one would not compute the same.
    """
    if bool(selection.on.all()):
        return None
    sparse.prune_(selection)
    done = sparse.compact()
    after = lineage.then(origin, selection.on, dict(done.masks), done.kept)
    return Removal(done.model, after, selection, score)


def needs_graph(grouping: Grouping) -> bool:
    """Whether what dies along with a group matters for the cost: for groups of more than single entries."""
    return grouping.num_groups < int(grouping.sizes().sum())


def _score(
    recipe: Recipe,
    sparse: SparseModel,
    images: Loader,
    example: Tensor,
    costs: EntryCosts,
    number: int,
    watch: Stopwatch,
) -> Tensor:
    """Score of every group, of shape ``[G]``; `costs` are the prices where the budget names them."""
    images.reseed_(derive_seed(recipe.seed, "curvature images", number))
    kind, curvature = recipe.prune.score, recipe.curvature
    if kind == "magnitude":
        return magnitude_score(sparse.model, sparse.grouping)
    if kind == "random":
        return random_score(sparse.grouping, derive_seed(recipe.seed, "random score", number))
    if kind == "taylor":
        count = -(-curvature.likely_images // images.batch_size)
        with watch.of("curvature"):
            return taylor_score(sparse.model, sparse.grouping, islice(images, count))
    prices = recipe_prices(recipe, sparse.model, sparse.grouping, example, costs)
    if recipe.prior.joint:
        with watch.of("curvature"):
            matrix = _joint_curvature(recipe, sparse, images, number)
        return joint_survival(matrix, prices)
    limit = curvature.num_images if isinstance(curvature.num_images, int) else None
    with watch.of("curvature"):
        posterior = sparse.update(
            own_images(images, limit),
            strength=1.0,
            num_images="auto" if limit is None else None,
            tolerance=curvature.tolerance,
            importance=curvature.importance,
            estimator=curvature.estimator,
            factor=curvature.factor,
            draws=curvature.draws,
        )
    survives = posterior.survives(recipe.prior.rule)
    return survives if prices is None else survives / prices


def _joint_curvature(recipe: Recipe, sparse: SparseModel, images: Loader, number: int) -> Tensor:
    """Curvature of the whole data's loss in all switches together, of shape ``[G, G]``, on the CPU.

    The decisions are made there: one group after the other, each read before the next, which on a GPU would be a wait
    for each group.
    """
    curvature = recipe.curvature
    rows = gate_rows(
        sparse.model,
        sparse.grouping,
        own_images(images, curvature.likely_images),
        estimator=curvature.estimator,
        factor=curvature.factor,
        draws=curvature.draws,
        seed=derive_seed(recipe.seed, "curvature", number) % 2**31,
    )
    # The rows of an image add up to its curvature, however many draws there are.
    rows = rows.double()
    matrix = torch.einsum("kng,knh->gh", rows, rows)
    num_images = matrix.new_tensor(rows.shape[1])
    add_up_(matrix, num_images)
    return (matrix * (images.num_data / int(num_images))).cpu()
