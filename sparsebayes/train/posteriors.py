"""Removal by a posterior that is learned along with the weights, guided by draws.

Before each removal the network trains with its groups scaled by switches drawn from the posterior (PGNAS: a relaxed
drop; BaLeNAS: a Gaussian), image by image where its groups allow it; every step updates weights and posterior. Then
sub-networks of the target's size are drawn from the posterior, judged on held-out images with the weights they have,
and the best one is cut out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from sparsebayes.api import SparseModel
from sparsebayes.data import Loader
from sparsebayes.errors import NumericsError
from sparsebayes.groups import Grouping
from sparsebayes.inference import NaturalGradient, Posterior
from sparsebayes.inference.sampling import best_of, shuffled_candidates
from sparsebayes.prune.carry import Lineage
from sparsebayes.prune.masking import Masks, apply_masks_
from sparsebayes.prune.pricing import EntryCosts
from sparsebayes.prune.selection import Selection
from sparsebayes.recipe.schema import Recipe, TrainSection
from sparsebayes.train.batch_norm import reestimate_
from sparsebayes.train.evaluation import evaluate
from sparsebayes.train.fit import Phase
from sparsebayes.train.loaders import Loaders
from sparsebayes.train.removal import Removal, choose_groups, cut, recipe_prices, remove
from sparsebayes.train.seeding import derive_seed
from sparsebayes.train.stopwatch import Stopwatch
from sparsebayes.train.switched import Switched, make_posterior

__all__ = ["phase_and_settings", "remove_next"]


Fit = Callable[[nn.Module, Phase, dict[str, Tensor], TrainSection], object]
"""Trains a network for a phase, with entries held at zero, under some settings."""

_GENTLER = {
    "variational_dropout": "lower variational_dropout.length_scale or prior.strength",
    "natural_gradient": "raise natural_gradient.initial_precision or lower prior.strength",
}


def phase_and_settings(recipe: Recipe, number: int) -> tuple[Phase, TrainSection]:
    """How the network trains while its switches are drawn.

    Args:
        recipe: Epochs of the posterior; rates and losses of the cycles.
        number: Number of the cycle.

    Returns:
        The phase, and its settings: variational dropout brings a weight decay of its own.
    """
    train, is_dropout = recipe.train, recipe.posterior == "variational_dropout"
    section = recipe.variational_dropout if is_dropout else recipe.natural_gradient
    # Groups that go take loss with them, which is no collapse short of guessing: there is no reference.
    phase = Phase(
        name=f"posterior {number}", epochs=section.epochs, lr=train.rate(train.cycles), seed=recipe.seed
    )
    return phase, train.model_copy(update={"weight_decay": 0.0}) if is_dropout else train


def remove_next(
    recipe: Recipe,
    model: nn.Module,
    lineage: Lineage,
    dense: Grouping,
    loaders: Loaders,
    fit_: Fit,
    record: Callable[[dict[str, Any]], None],
    *,
    costs: EntryCosts,
    target: float,
    number: int,
    watch: Stopwatch,
) -> Removal | None:
    """Remove groups by the posterior that the recipe names, until the network costs no more than a target.

    The Laplace posterior is measured; the others are learned first, then sub-networks that meet the target are drawn,
    and the best is cut out.

    Args:
        recipe: Posterior, sampling, prior and bounds.
        model: The network as it stands; learning a posterior trains it.
        lineage: How it came from the dense one.
        dense: The groups of the dense network.
        loaders: Images to estimate on, and to judge by.
        fit_: Trains a network for a phase, entries at zero held there, under some settings.
        record: Called with what was drawn and how good it was.
        costs: What the target counts.
        target: Cost to reach; bounds and the recipe's strength may prevent it.
        number: Number of the cycle, for its random streams.
        watch: Told which time went into which kind of work.

    Returns:
        The removal; None if no group may go.

    Raises:
        GroupingError: If nothing reads a group.
        ModelError: If the network cannot be traced, or the cut one would not compute the same.
        NumericsError: If training collapses, or the curvature is not finite.
    """
    plain, example = loaders.plain, loaders.example
    if recipe.posterior == "laplace":
        return remove(
            recipe,
            model,
            lineage,
            dense,
            plain,
            example,
            costs=costs,
            target=target,
            number=number,
            watch=watch,
        )
    grouping, origin = lineage.grouping(dense)
    prices = recipe_prices(recipe, model, grouping, example, costs)
    posterior = _learned_(recipe, model, lineage, grouping, prices, loaders, fit_, number)
    sparse = SparseModel(model, grouping, example=example, num_data=plain.num_data)
    sparse.masks = Masks(lineage.masks) if lineage.masks else None
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "draws", number))
    scores = [posterior.survives()]
    scores += [posterior.sample_survival(generator) for _ in range(recipe.sampling.count - 1)]
    selections = [
        choose_groups(recipe, sparse, lineage, dense, score, costs=costs, target=target) for score in scores
    ]
    record({"phase": "posterior state", "cycle": number, **_describe(posterior)})
    best = 0
    if len(selections) > 1:
        plain.reseed_(derive_seed(recipe.seed, "norm images", number))
        with watch.of("evaluation"):
            judged = _judge(recipe, model, grouping, lineage, selections, loaders, generator)
        record({"phase": "sample", "cycle": number, **judged})
        best = judged["best"]
    with watch.of("compaction"):
        return cut(sparse, lineage, origin, selections[best], scores[best])


def _learned_(
    recipe: Recipe,
    model: nn.Module,
    lineage: Lineage,
    grouping: Grouping,
    prices: Tensor | None,
    loaders: Loaders,
    fit_: Fit,
    number: int,
) -> Posterior:
    """Train the network with its switches drawn; the posterior that came of it."""
    posterior = make_posterior(recipe, model, grouping, loaders.plain.num_data, prices)
    switched = Switched(model, grouping, posterior, loaders.example)
    phase, settings = phase_and_settings(recipe, number)
    try:
        fit_(switched, phase, lineage.masks, settings)
    except NumericsError as error:
        raise NumericsError(f"{error}; or drop less: {_GENTLER[recipe.posterior]}") from None
    switched.absorb_()
    return posterior


def _judge(
    recipe: Recipe,
    model: nn.Module,
    grouping: Grouping,
    lineage: Lineage,
    selections: list[Selection],
    loaders: Loaders,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Held-out losses of drawn sub-networks and, if asked for, of random ones; which drawn one is the best."""

    def loss(on: Tensor) -> float:
        with _masked(model, grouping.masks(on), lineage, loaders.plain, recipe.sampling.norm_batches):
            return evaluate(model, loaders.heldout).loss

    candidates = torch.stack([selection.on for selection in selections])
    distinct = torch.unique(candidates, dim=0)
    if len(distinct) == 1:  # late in a run the bounds may leave one choice
        return {"best": 0, "losses": [loss(distinct[0])], "distinct": 1}
    guided = best_of(candidates, loss)
    result: dict[str, Any] = {"best": guided.best, "losses": list(guided.losses), "distinct": len(distinct)}
    if recipe.sampling.baseline:
        shuffled = shuffled_candidates(candidates, grouping.layer_index, generator)
        result["random_losses"] = [loss(on) for on in shuffled]
    return result


@contextmanager
def _masked(
    model: nn.Module, masks: dict[str, Tensor], lineage: Lineage, images: Loader, norm_batches: int
) -> Iterator[None]:
    """The network with entries at zero, batch norm estimated anew if asked for; afterwards as it was."""
    saved = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        apply_masks_(model, masks)
        apply_masks_(model, lineage.masks)
        reestimate_(model, islice(images, norm_batches), num_images=images.num_data)
        yield
    finally:
        model.load_state_dict(saved)


def _describe(posterior: Posterior) -> dict[str, float]:
    """What a report may show of a posterior."""
    figures = {"mean_relevance": float(posterior.relevance.mean())}
    if isinstance(posterior, NaturalGradient):
        figures.update(exploration_noise=posterior.noise, curvature_trace=posterior.curvature_trace)
    return figures
