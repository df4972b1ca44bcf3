"""Which operations a search switches off between its cycles, and what a search that does so computes altogether."""

from __future__ import annotations

import copy

import torch
from torch import Generator, Tensor

from sparsebayes.cost import cost
from sparsebayes.nas.posteriors import METHODS
from sparsebayes.nas.supernet import Supernet
from sparsebayes.nas.switches import SwitchTable
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.train.search_methods import method_name
from sparsebayes.train.seeding import derive_seed

__all__ = ["alive_groups", "search_macs", "weakest_groups"]


def alive_groups(supernet: Supernet) -> Tensor:
    """Groups that were not switched off for good, bool of shape `[G]` on the CPU."""
    return supernet.table.sum_groups(supernet.alive.float().cpu()) > 0


def weakest_groups(table: SwitchTable, alive: Tensor, on: Tensor, scores: Tensor, share: float) -> Tensor:
    """Groups of operations to switch off: on every edge those that do not pay and a share of the others.

    The best operation of an edge stays until the decision, and so does a path through every cell.

    Args:
        table: what each group decides on.
        alive: groups that were not switched off before, bool of shape `[G]`.
        on: groups that pay, bool of shape `[G]`.
        scores: how much each group is worth, of shape `[G]`; larger is better.
        share: of the operations that are alive on an edge; one at least, unless it is 0.

    Returns:
        bool of shape `[G]`.
    """
    on = on & alive
    off = torch.zeros_like(on)
    edges: dict[tuple[str, int], list[int]] = {}
    for number, switch in enumerate(table.groups):
        if switch.op is not None and bool(alive[number]):
            edges.setdefault((switch.key, switch.edge), []).append(number)
    for members in edges.values():
        ordered = sorted(members, key=lambda number: float(scores[number]))
        goes = sum(not bool(on[number]) for number in members)
        if share:
            goes = max(goes, 1, int(share * len(members)))
        off[ordered[: min(goes, len(members) - 1)]] = True
    return off


def search_macs(recipe: SearchRecipe, supernet: Supernet, num_steps: int, example: Tensor) -> float:
    """Multiply-accumulates of a search's forward passes over one image of every batch: training and curvature.

    The operations that `search.removal` will have switched off are drawn at random, as a search is not needed to know
    how many these are. What the evidence switches off beyond that share is not known beforehand and not left out.

    Args:
        recipe: for baseline random its posterior says what the search would do.
        supernet: fresh; stays as it is.
        num_steps: batches of a pass.
        example: one image, of shape `[1, C, H, W]`.

    Returns:
        The sum over all steps, each with the operations that are then left. Held-out images are not counted.
    """
    section, name = recipe.search, method_name(recipe)
    method = METHODS[name]
    supernet = copy.deepcopy(supernet)
    macs = cost(supernet, example).macs
    total = float(section.warmup_epochs * num_steps * macs)
    # Switches with images of their own take a step beside every step of the weights: one pass, or four.
    own = (4 if section.second_order else 1) if method.bilevel else 0
    steps = section.epochs * num_steps * (1 + own)
    batch = section.batch_size or recipe.data.batch_size
    images = min(recipe.curvature.likely_images, num_steps * batch)  # of one pass at most
    measured = images / batch if name == "laplace" else 0.0
    generator = Generator().manual_seed(derive_seed(recipe.seed, "random", "removal"))
    every = torch.ones(supernet.table.num_groups, dtype=torch.bool)
    for cycle in range(1, section.cycles + 1):
        total += (steps + measured) * macs
        if method.removes and section.removal and cycle < section.cycles:
            scores = torch.rand(len(every), generator=generator, dtype=torch.float64)
            alive = alive_groups(supernet)
            supernet.switch_off_(weakest_groups(supernet.table, alive, every, scores, section.removal))
            macs = cost(supernet, example).macs
    return total
