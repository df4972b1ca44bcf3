"""The decision among architectures drawn from a posterior, once the supernet is trained.

    natural_gradient     BaLeNAS-TF (Zhang et al., CVPR 2022, arXiv 2111.13204): draws of the Gaussian are built with
                         fresh weights and scored by training-free proxies; the best mean rank wins
    variational_dropout  PGNAS (Zhou et al., AAAI 2020, arXiv 1906.09557, section 3.3): draws are judged on held-out
                         images with the weights that they have in the supernet; the lowest loss wins. As many uniformly
                         random architectures beside them say what the guidance is worth

The posterior's own decision is the first candidate in both. What was drawn is one row of metrics.jsonl (phase
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
from sparsebayes.nas.decision import Decided, decide, living_scores
from sparsebayes.nas.genotype import Genotype
from sparsebayes.nas.network import build_network
from sparsebayes.nas.posteriors import DropoutSearch, NaturalGradientSearch
from sparsebayes.nas.proxies import PROXIES, rank_average
from sparsebayes.nas.spaces import Decision
from sparsebayes.nas.supernet import Supernet
from sparsebayes.nas.switches import Switch, SwitchTable
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.train.batch_norm import reestimate_
from sparsebayes.train.evaluation import evaluate
from sparsebayes.train.progress import Reporter
from sparsebayes.train.search import SearchLoaders, WithSwitches, decision_of
from sparsebayes.train.seeding import derive_seed

__all__ = ["check_sampling", "choose_architecture", "groups_of"]

Drawing = NaturalGradientSearch | DropoutSearch


def check_sampling(recipe: SearchRecipe) -> None:
    """Refuse sampling where nothing is drawn, and precisions that no Gaussian has.

    Raises:
        RecipeError: an option that would be ignored, or that contradicts another.
    """
    baseline = recipe.search.baseline
    if recipe.sampling != type(recipe.sampling)() and (baseline != "none" or recipe.posterior == "laplace"):
        what = "posterior is laplace" if baseline == "none" else f"search.baseline is {baseline}"
        raise RecipeError(
            f"sampling draws from a posterior that is learned along with the weights, but {what}; leave out sampling, "
            "or set posterior to variational_dropout or natural_gradient"
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
    method: Drawing,
    own: Decided,
    loaders: SearchLoaders,
    record: Callable[[dict[str, Any]], None],
    reporter: Reporter,
) -> Decided:
    """Draw architectures and take the best.

    Args:
        recipe: how many, and how they are judged.
        supernet: trained; as it was afterwards.
        method: the posterior.
        own: its own decision.
        loaders: `plain` for proxies and batch norm, `heldout` for losses.
        record: called with what was found, one dictionary.
        reporter: told of it.

    Returns:
        The best candidate; `own` where all are the same, as there is nothing to choose then.

    Raises:
        NumericsError: no candidate has a finite loss, or a proxy is NaN.
    """
    count, table = recipe.num_draws, supernet.table
    rule = decision_of(recipe.search, supernet.space, method)
    alive = table.sum_groups(supernet.alive.float().cpu()) > 0
    generator = Generator().manual_seed(derive_seed(recipe.seed, "search", "architectures"))
    candidates = [own]
    for _ in range(count - 1):
        on, scores = method.draw(generator)
        candidates.append(decide(supernet.space, table, on & alive, living_scores(scores, alive), rule))
    distinct = len({decided.genotype.to_json() for decided in candidates})
    row: dict[str, Any] = {"phase": "sample", "distinct": distinct, "best": 0}
    if distinct == 1:
        reporter.line(f"all {count} drawn architectures are the same, so the posterior's own decision stays")
    elif isinstance(method, NaturalGradientSearch):
        row.update(_by_proxies(recipe, supernet, candidates, loaders))
    else:
        row.update(_by_loss(recipe, supernet, candidates, loaders, rule, alive))
    record(row)
    if distinct > 1:
        reporter.line(
            f"candidate {row['best']} of {count} drawn architectures ({distinct} different) is the best"
        )
    best: int = row["best"]
    return candidates[best]


def _by_proxies(
    recipe: SearchRecipe, supernet: Supernet, candidates: list[Decided], loaders: SearchLoaders
) -> dict[str, Any]:
    """Proxies of fresh networks; each different architecture is built and ranked once."""
    numbers: dict[str, int] = {}
    for number, decided in enumerate(candidates):
        numbers.setdefault(decided.genotype.to_json(), number)
    images, labels = _batch(recipe, loaders)
    values: dict[str, list[float]] = {name: [] for name in recipe.sampling.proxies}
    for number in numbers.values():
        # The same seed for all: architectures differ, their luck does not.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(recipe.seed, "search", "proxies"))
            network = build_network(candidates[number].genotype, **vars(supernet.shape)).to(images.device)
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
    candidates: list[Decided],
    loaders: SearchLoaders,
    rule: Decision,
    alive: Tensor,
) -> dict[str, Any]:
    """Held-out losses with the supernet's weights, of the candidates and of random architectures beside them."""
    table = supernet.table

    def judge(decided: list[Decided]) -> Sampled:
        return best_of(torch.stack([groups_of(table, d.genotype) for d in decided]), loss)

    def loss(on: Tensor) -> float:
        with _only(recipe, supernet, on, loaders):
            ones = torch.ones_like(supernet.switches)
            return evaluate(WithSwitches(supernet, ones), loaders.heldout).loss

    guided = judge(candidates)
    row = {"best": guided.best, "losses": list(guided.losses), "curve": guided.curve().tolist()}
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
def _only(recipe: SearchRecipe, supernet: Supernet, on: Tensor, loaders: SearchLoaders) -> Iterator[None]:
    """The supernet with these groups alone, batch norm estimated anew if asked for; afterwards as it was."""
    saved = {name: value.detach().clone() for name, value in supernet.state_dict().items()}
    try:
        # A benchmark that fixes a node's number of inputs may want one that was switched off for good.
        supernet.alive.fill_(True)
        supernet.switch_off_(~on)
        if recipe.sampling.norm_batches:
            loaders.plain.reseed_(derive_seed(recipe.seed, "search", "norm images"))
            batches = islice(loaders.plain, recipe.sampling.norm_batches)
            network = WithSwitches(supernet, torch.ones_like(supernet.switches))
            reestimate_(network, batches, num_images=loaders.plain.num_data)
        yield
    finally:
        supernet.load_state_dict(saved)


def _batch(recipe: SearchRecipe, loaders: SearchLoaders) -> tuple[Tensor, Tensor]:
    """Training images for the proxies."""
    loaders.plain.reseed_(derive_seed(recipe.seed, "search", "proxy images"))
    images, labels = next(iter(loaders.plain))
    number = recipe.sampling.proxy_images
    return images[:number], labels[:number]
