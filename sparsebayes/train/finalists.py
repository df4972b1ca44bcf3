"""The last word among architectures that were compared cheaply: the best few are trained for a short while.

Proxies and inherited weights say little about which of several good cells is the better one. Here each finalist is
built with fresh weights in the size of the supernet and trained alike, on the images that the supernet learned from and
under the search's settings; the lowest held-out loss wins. Seed, batches and schedule are those of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from sparsebayes.errors import NumericsError
from sparsebayes.nas.decision import Decided
from sparsebayes.nas.network import build_network
from sparsebayes.nas.supernet import Supernet
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.train.progress import Reporter
from sparsebayes.train.random_search import train_cell
from sparsebayes.train.search import SearchLoaders
from sparsebayes.train.seeding import derive_seed

__all__ = ["finalists_of", "train_finalists"]


def finalists_of(candidates: Sequence[Decided], worth: Sequence[float], number: int) -> list[int]:
    """The best different architectures, and the method's own decision.

    Args:
        candidates: the method's own decision first; the same architecture may be there several times.
        worth: of each, larger is better; NaN is worst.
        number: how many.

    Returns:
        Their places in `candidates`, the own decision first and then from the best on; at most `number` of them.
    """

    def descending(place: int) -> tuple[bool, float]:
        return math.isnan(worth[place]), -worth[place]

    order = [0, *sorted(range(1, len(candidates)), key=descending)]
    places: dict[str, int] = {}
    for place in order:
        places.setdefault(candidates[place].genotype.to_json(), place)
    return list(places.values())[:number]


def train_finalists(
    recipe: SearchRecipe,
    supernet: Supernet,
    candidates: Sequence[Decided],
    places: Sequence[int],
    loaders: SearchLoaders,
    reporter: Reporter,
) -> dict[str, Any]:
    """Train some of the candidates and take the best.

    Args:
        recipe: `sampling.finalist_epochs` passes each.
        supernet: whose size they have.
        candidates: what was compared.
        places: which of them.
        loaders: the images.
        reporter: told of every finalist.

    Returns:
        `best`, its place; `finalists`, as given; `finalist_losses` and `finalist_errors`, on held-out images.

    Raises:
        NumericsError: no finalist has a finite loss.
    """
    steps = recipe.sampling.finalist_epochs * len(loaders.train)
    device = supernet.switches.device
    seed = recipe.seed
    losses, errors = [], []
    reporter.phase("finalists", len(places))
    for number, place in enumerate(places, start=1):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(seed, "search", "finalists"))
            network = build_network(candidates[place].genotype, **vars(supernet.shape)).to(device)
            loaders.train.reseed_(derive_seed(seed, "search", "finalist images"))
            held = train_cell(network, loaders, recipe, steps)
        losses.append(held.loss)
        errors.append(held.error)
        reporter.line(f"finalist {number} of {len(places)}: held-out error {100 * held.error:.2f} %")
        reporter.step()
    finite = [number for number, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        raise NumericsError("no finalist has a held-out loss that is a number; lower search.lr")
    best = places[min(finite, key=losses.__getitem__)]
    return {
        "best": best,
        "finalists": list(places),
        "finalist_losses": losses,
        "finalist_errors": errors,
    }
