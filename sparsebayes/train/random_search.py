"""Baseline: random cells, trained for as many multiply-accumulates altogether as the search that they stand beside.

Each of n cells gets an n-th of that search's work, as many steps as that pays for, and the cell with the lowest
held-out loss wins (Li and Talwalkar, "Random search and reproducibility for neural architecture search", UAI 2019, is
the case for such a baseline).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from sparsebayes.cost import cost
from sparsebayes.errors import NumericsError
from sparsebayes.nas.decision import Decided, decide
from sparsebayes.nas.network import build_network
from sparsebayes.nas.spaces import Decision
from sparsebayes.nas.supernet import Supernet
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.train.evaluation import Evaluation, evaluate
from sparsebayes.train.fit import fast_layout_
from sparsebayes.train.progress import Reporter
from sparsebayes.train.schedule import one_cycle
from sparsebayes.train.search import SearchLoaders, decision_of
from sparsebayes.train.search_removal import search_macs
from sparsebayes.train.seeding import derive_seed

__all__ = ["random_cell", "random_search"]


def random_cell(supernet: Supernet, decision: Decision, generator: Generator) -> Decided:
    """A cell chosen blindly: operations get uniform scores, and the decision takes the best of them.

    Args:
        supernet: whose space it is.
        decision: how many operations stay; where that says nothing, one on each edge.
        generator: on the CPU.
    """
    table = supernet.table
    rule = decision if decision != Decision() else Decision(one_op_per_edge=True)
    scores = torch.rand(table.num_groups, generator=generator, dtype=torch.float64)
    return decide(supernet.space, table, torch.ones(table.num_groups, dtype=torch.bool), scores, rule)


def random_search(
    recipe: SearchRecipe,
    supernet: Supernet,
    loaders: SearchLoaders,
    record: Callable[[dict[str, Any]], None],
    reporter: Reporter,
) -> Decided:
    """Try random cells and return the best by held-out loss.

    Args:
        recipe: as of the search that this is the baseline of.
        supernet: of that search; only its space, its size and its cost matter.
        loaders: the images.
        record: called with one dictionary per cell.
        reporter: told of every cell.

    Raises:
        NumericsError: no cell has a finite loss.
    """
    section = recipe.search
    example = next(iter(loaders.plain))[0][:1]
    work = search_macs(recipe, supernet, len(loaders.train), example) / section.candidates
    decision = decision_of(section, supernet.space)
    reporter.phase("random search", section.candidates)
    best: tuple[Evaluation, Decided] | None = None
    for number in range(section.candidates):
        generator = Generator().manual_seed(derive_seed(recipe.seed, "random", number))
        decided = random_cell(supernet, decision, generator)
        shape = supernet.shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(recipe.seed, "random", number, "weights"))
            network: nn.Module = build_network(decided.genotype, **vars(shape)).to(example.device)
        steps = max(1, round(work / cost(network, example).macs))
        loaders.train.reseed_(derive_seed(recipe.seed, "random", number, "images"))
        held = _train(network, loaders, recipe, steps)
        record(
            {
                "phase": "random",
                "epoch": number + 1,
                "heldout_loss": held.loss,
                "heldout_error": held.error,
                "steps": steps,
            }
        )
        reporter.line(f"random cell {number + 1}: {steps} steps, held-out error {100 * held.error:.2f} %")
        reporter.step()
        if math.isfinite(held.loss) and (best is None or held.loss < best[0].loss):
            best = (held, decided)
    if best is None:
        raise NumericsError("no random cell has a held-out loss that is a number; lower search.lr")
    return best[1]


def _train(network: nn.Module, loaders: SearchLoaders, recipe: SearchRecipe, steps: int) -> Evaluation:
    """Train a fresh network for so many steps, under the search's settings.

    Args:
        network: trained in place.
        loaders: `train`, gone through as often as needed, and `heldout`.
        recipe: rate, momentum, weight decay and clipping of the search; the rate falls to 0.
        steps: batches.

    Returns:
        The network on the held-out images.
    """
    section = recipe.search
    fast_layout_(network).train()
    optimizer = torch.optim.SGD(
        network.parameters(), section.lr, section.momentum, weight_decay=section.weight_decay
    )
    batches = _endless(loaders)
    for step in range(steps):
        images, labels = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = section.lr * one_cycle(step, steps, warmup=0.02)
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
        if section.grad_clip is not None:
            nn.utils.clip_grad_norm_(network.parameters(), section.grad_clip)
        optimizer.step()
    return evaluate(network, loaders.heldout)


def _endless(loaders: SearchLoaders) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loaders.train
