"""The decision among several architectures, once the supernet is trained.

    natural_gradient     BaLeNAS-TF (Zhang et al., CVPR 2022, arXiv 2111.13204): draws of the Gaussian are built with
                         fresh weights and scored by training-free proxies; the best mean rank wins
    variational_dropout  PGNAS (Zhou et al., AAAI 2020, arXiv 1906.09557, section 3.3): draws are judged on held-out
                         images with the weights that they have in the supernet; the lowest loss wins. As many uniformly
                         random architectures beside them say what the guidance is worth
    laplace, magnitude   the architectures of the highest scores among what is left are judged on held-out images, with
                         the weights and switches that they have; another than the method's own wins only where it is
                         better, image by image, by more than two standard errors

The method's own decision is the first candidate in all of them. What was compared is one row of metrics.jsonl (phase
"sample"): held-out losses, from which the report draws the best of n against n, or the proxies' values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Generator, Tensor

from sparsebayes.errors import RecipeError
from sparsebayes.inference.sampling import Sampled, best_of, uniform_candidates
from sparsebayes.nas.decision import Decided, best_architectures, decide, living_scores
from sparsebayes.nas.genotype import Genotype
from sparsebayes.nas.methods import Method
from sparsebayes.nas.network import build_network
from sparsebayes.nas.posteriors import DropoutSearch, NaturalGradientSearch
from sparsebayes.nas.proxies import PROXIES, rank_average
from sparsebayes.nas.spaces import Decision
from sparsebayes.nas.supernet import Supernet
from sparsebayes.nas.switches import Switch, SwitchTable
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.train.batch_norm import reestimate_
from sparsebayes.train.evaluation import evaluate, image_losses
from sparsebayes.train.progress import Reporter
from sparsebayes.train.search import SearchLoaders, WithSwitches, decision_of
from sparsebayes.train.search_removal import alive_groups
from sparsebayes.train.seeding import derive_seed

__all__ = ["check_sampling", "choose_architecture", "clearly_better", "groups_of"]

NUM_ERRORS = 2.0
"""Standard errors by which another architecture must be better than the evidence's own."""


def check_sampling(recipe: SearchRecipe) -> None:
    """Refuse proxies where none are computed, and precisions that no Gaussian has.

    Raises:
        RecipeError: an option that would be ignored, or that contradicts another.
    """
    sampling, default = recipe.sampling, type(recipe.sampling)()
    asked = (sampling.proxies, sampling.proxy_images) != (default.proxies, default.proxy_images)
    if asked and recipe.search.baseline == "none" and recipe.posterior != "natural_gradient":
        raise RecipeError(
            f"sampling.proxies and sampling.proxy_images rank the architectures of posterior natural_gradient, but "
            f"posterior is {recipe.posterior}, which judges by held-out loss; leave them out"
        )
    gaussian = recipe.natural_gradient
    if gaussian.initial_precision < gaussian.prior_precision:
        raise RecipeError(
            f"natural_gradient.initial_precision is {gaussian.initial_precision}, below prior_precision "
            f"{gaussian.prior_precision}; data only add precision: lower one or raise the other"
        )


def choose_architecture(
    recipe: SearchRecipe,
    supernet: Supernet,
    method: Method,
    own: Decided,
    loaders: SearchLoaders,
    record: Callable[[dict[str, Any]], None],
    reporter: Reporter,
) -> Decided:
    """Compare architectures and take the best.

    Args:
        recipe: how many, and how they are judged.
        supernet: trained; as it was afterwards.
        method: what has learned its switches.
        own: its own decision.
        loaders: `plain` for proxies and batch norm, `heldout` for losses.
        record: called with what was found, one dictionary.
        reporter: told of it.

    Returns:
        The best candidate; `own` where all are the same, as there is nothing to choose then.

    Raises:
        NumericsError: no candidate has a finite loss, or a proxy is NaN.
    """
    rule = decision_of(recipe.search, supernet.space, method.decision)
    candidates = _candidates(recipe, supernet, method, own, rule)
    distinct = len({decided.genotype.to_json() for decided in candidates})
    row: dict[str, Any] = {"phase": "sample", "distinct": distinct, "best": 0}
    if distinct == 1:
        reporter.line("there is no other architecture to compare, so the method's own decision stays")
    elif isinstance(method, NaturalGradientSearch):
        row.update(_by_proxies(recipe, supernet, candidates, loaders))
    else:
        row.update(_by_loss(recipe, supernet, method, candidates, loaders, rule))
    record(row)
    if distinct > 1:
        reporter.line(
            f"number {row['best']} of {len(candidates)} architectures ({distinct} different) is the best"
        )
    best: int = row["best"]
    return candidates[best]


def _candidates(
    recipe: SearchRecipe, supernet: Supernet, method: Method, own: Decided, rule: Decision
) -> list[Decided]:
    """The method's own decision, and others that its posterior draws or that score highest behind it."""
    table, alive = supernet.table, alive_groups(supernet)
    if not isinstance(method, (NaturalGradientSearch, DropoutSearch)):
        on, scores = method.keep().cpu() & alive, living_scores(method.scores().cpu(), alive)
        return best_architectures(supernet.space, table, on, scores, recipe.num_draws, rule)
    generator = Generator().manual_seed(derive_seed(recipe.seed, "search", "architectures"))
    candidates = [own]
    for _ in range(recipe.num_draws - 1):
        on, scores = method.draw(generator)
        candidates.append(decide(supernet.space, table, on & alive, living_scores(scores, alive), rule))
    return candidates


def _by_proxies(
    recipe: SearchRecipe, supernet: Supernet, candidates: list[Decided], loaders: SearchLoaders
) -> dict[str, Any]:
    """Proxies of fresh networks of the size that is retrained; each different architecture is ranked once."""
    numbers: dict[str, int] = {}
    for number, decided in enumerate(candidates):
        numbers.setdefault(decided.genotype.to_json(), number)
    images, labels = _batch(recipe, loaders)
    values: dict[str, list[float]] = {name: [] for name in recipe.sampling.proxies}
    width, depth = recipe.network_size
    sizes = {**vars(supernet.shape), "width": width, "depth": depth}
    for number in numbers.values():
        # The same seed for all: architectures differ, their luck does not.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(recipe.seed, "search", "proxies"))
            network = build_network(candidates[number].genotype, **sizes).to(images.device)
        for name, found in values.items():
            found.append(PROXIES[name](network, images, labels))
    ranks = rank_average(list(values.values()))
    first = list(numbers.values())
    return {
        "best": first[max(range(len(first)), key=ranks.__getitem__)],
        "candidates": first,
        "mean_ranks": ranks,
        "proxies": {n: [v if math.isfinite(v) else None for v in found] for n, found in values.items()},
    }


def _by_loss(
    recipe: SearchRecipe,
    supernet: Supernet,
    method: Method,
    candidates: list[Decided],
    loaders: SearchLoaders,
    rule: Decision,
) -> dict[str, Any]:
    """Held-out losses with the supernet's weights, of the candidates and of random architectures beside them."""
    table, alive = supernet.table, alive_groups(supernet)
    values = method.inherited(supernet.switches).detach()

    def judge(decided: list[Decided]) -> Sampled:
        return best_of(torch.stack([groups_of(table, d.genotype) for d in decided]), loss)

    def loss(on: Tensor) -> float:
        with _only(recipe, supernet, values, on, loaders) as network:
            return evaluate(network, loaders.heldout).loss

    if isinstance(method, DropoutSearch):
        guided = judge(candidates)
        row = {"best": guided.best, "losses": list(guided.losses), "curve": guided.curve().tolist()}
    else:
        row = _by_paired_loss(recipe, supernet, values, candidates, loaders)
    if recipe.sampling.baseline:
        generator = Generator().manual_seed(derive_seed(recipe.seed, "search", "random architectures"))
        drawn = uniform_candidates(len(candidates), table.num_groups, generator) & alive
        scores = torch.rand(drawn.shape, generator=generator, dtype=torch.float64)
        blind = [
            decide(supernet.space, table, on, living_scores(worth, alive), rule)
            for on, worth in zip(drawn, scores, strict=True)
        ]
        if len({decided.genotype.to_json() for decided in blind}) > 1:
            judged = judge(blind)
            row.update(random_losses=list(judged.losses), random_curve=judged.curve().tolist())
    return row


def _by_paired_loss(
    recipe: SearchRecipe,
    supernet: Supernet,
    values: Tensor,
    candidates: list[Decided],
    loaders: SearchLoaders,
) -> dict[str, Any]:
    """Held-out losses of all candidates, and the first one unless another is clearly better on the same images."""
    found: list[Tensor] = []
    for decided in candidates:
        on = groups_of(supernet.table, decided.genotype)
        with _only(recipe, supernet, values, on, loaders) as network:
            found.append(image_losses(network, loaders.heldout))
    losses = torch.stack(found)  # [n, N]
    return {"best": clearly_better(losses), "heldout_losses": losses.mean(1).tolist()}


def clearly_better(losses: Tensor) -> int:
    """The number of the lowest mean loss among those that beat the first by more than two standard errors.

    The standard error is that of the mean difference on the same images, which is smaller than that of either mean.

    Args:
        losses: of n candidates on N images, of shape `[n, N]`; no candidate with a loss that is no number is taken.

    Returns:
        0 where none is clearly better.
    """
    gains = losses[0] - losses
    means = gains.mean(1)
    errors = gains.std(1, correction=0) / max(losses.shape[1] - 1, 1) ** 0.5
    clear = (means > NUM_ERRORS * errors) | ~losses[0].mean().isfinite()
    worth = torch.where(clear & losses.mean(1).isfinite(), -losses.mean(1), -math.inf)
    return int(worth.argmax()) if bool(worth.isfinite().any()) else 0


def groups_of(table: SwitchTable, genotype: Genotype) -> Tensor:
    """Groups that a genotype has on: its operations, and the gates of their edges.

    Args:
        table: of the supernet.
        genotype: of the same space.

    Returns:
        bool of shape `[G]`.
    """
    specs = dict(table.cells)
    wanted: set[Switch] = set()
    for key, ops in genotype.cells.items():
        number = {(edge.source, edge.target): n for n, edge in enumerate(specs[key].edges)}
        for source, target, op in ops:
            wanted |= {Switch(key, number[source, target], o) for o in (op, None)}
    return torch.tensor([switch in wanted for switch in table.groups])


@contextmanager
def _only(
    recipe: SearchRecipe, supernet: Supernet, values: Tensor, on: Tensor, loaders: SearchLoaders
) -> Iterator[WithSwitches]:
    """The supernet with these switches of these groups alone, batch norm estimated anew if asked for.

    The supernet is as it was afterwards.
    """
    saved = {name: value.detach().clone() for name, value in supernet.state_dict().items()}
    network = WithSwitches(supernet, values)
    try:
        # A benchmark that fixes a node's number of inputs may want one that was switched off for good.
        supernet.alive.fill_(True)
        supernet.switch_off_(~on)
        if recipe.sampling.norm_batches:
            loaders.plain.reseed_(derive_seed(recipe.seed, "search", "norm images"))
            batches = islice(loaders.plain, recipe.sampling.norm_batches)
            reestimate_(network, batches, num_images=loaders.plain.num_data)
        yield network
    finally:
        supernet.load_state_dict(saved)


def _batch(recipe: SearchRecipe, loaders: SearchLoaders) -> tuple[Tensor, Tensor]:
    """Training images for the proxies."""
    loaders.plain.reseed_(derive_seed(recipe.seed, "search", "proxy images"))
    images, labels = next(iter(loaders.plain))
    number = recipe.sampling.proxy_images
    return images[:number], labels[:number]
