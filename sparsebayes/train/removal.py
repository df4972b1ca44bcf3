"""One removal: score the groups that are left, raise the strength just far enough, cut, and check the cut.

The score of a group is the strength up to which it survives, so that one comparison serves every decision; baselines
(magnitude, Taylor, random) give scores that only order the groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from torch import Tensor, nn

from sparsebayes.api import SparseModel
from sparsebayes.data import Loader
from sparsebayes.groups import Grouping
from sparsebayes.prune.carry import Lineage
from sparsebayes.prune.masking import Masks
from sparsebayes.prune.pricing import EntryCosts, entry_costs, group_prices, select_within
from sparsebayes.prune.scores import magnitude_score, random_score, taylor_score
from sparsebayes.prune.selection import Selection
from sparsebayes.recipe.schema import Recipe
from sparsebayes.train.seeding import derive_seed

__all__ = ["Removal", "remove"]


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
    score = _score(recipe, sparse, images, number)
    # Scores of the baselines only order the groups: a strength or a price in nats means nothing to them.
    is_evidence = recipe.prune.score == "evidence"
    if recipe.prior.price != "none" and is_evidence:
        score = score / group_prices(grouping, entry_costs(model, example, recipe.prior.price))
    strength = recipe.prior.strength if is_evidence else "auto"
    selection = select_within(
        grouping,
        score,
        sparse.graph() if needs_graph(dense) else None,
        costs,
        target=target,
        ceiling=strength if isinstance(strength, float) else float("inf"),
        max_removal=recipe.prune.max_removal,
        min_keep=recipe.prune.min_keep,
        masks=lineage.masks,
    )
    if bool(selection.on.all()):
        return None
    sparse.prune_(selection)
    done = sparse.compact()
    after = lineage.then(origin, selection.on, dict(done.masks), done.kept)
    return Removal(done.model, after, selection, score)


def needs_graph(grouping: Grouping) -> bool:
    """Whether what dies along with a group matters for the cost: for groups of more than single entries."""
    return grouping.num_groups < int(grouping.sizes().sum())


def _score(recipe: Recipe, sparse: SparseModel, images: Loader, number: int) -> Tensor:
    """Score of every group, of shape ``[G]``."""
    images.reseed_(derive_seed(recipe.seed, "curvature images", number))
    kind, curvature = recipe.prune.score, recipe.curvature
    if kind == "magnitude":
        return magnitude_score(sparse.model, sparse.grouping)
    if kind == "random":
        return random_score(sparse.grouping, derive_seed(recipe.seed, "random score", number))
    if kind == "taylor":
        count = -(-curvature.num_images // images.batch_size)
        return taylor_score(sparse.model, sparse.grouping, islice(images, count))
    posterior = sparse.update(
        images,
        strength=1.0,
        num_images=curvature.num_images,
        estimator=curvature.estimator,
        factor=curvature.factor,
        draws=curvature.draws,
    )
    return posterior.survives(recipe.prior.rule)
