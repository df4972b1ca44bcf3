"""The decision among several architectures, once the supernet is trained.

    natural_gradient     BaLeNAS-TF (Zhang et al., CVPR 2022, arXiv 2111.13204): draws of the Gaussian are built with
                         fresh weights and scored by training-free proxies; the best mean rank wins
    variational_dropout  PGNAS (Zhou et al., AAAI 2020, arXiv 1906.09557, section 3.3): draws are judged on held-out
                         images with the weights that they have in the supernet; the lowest loss wins. As many random
                         architectures beside them, each with as many operations, say what the guidance is worth
    laplace, magnitude   the architectures of the highest scores among what is left are judged on held-out images, with
                         the weights and switches that they have; another than the method's own wins only where it is
                         better, image by image, by more than two standard errors

Any method but natural_gradient may be judged either way (`sampling.judge`), and what the search found the operations to
be worth may be one of the scores that are ranked (`posterior` in `sampling.proxies`).

The method's own decision is the first candidate in all of them. What was compared is one row of metrics.jsonl (phase
"sample"): held-out losses, from which the report draws the best of n against n, or the proxies' values. The
architectures themselves are in candidates.json of the run folder.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, final

import torch
from torch import Generator, Tensor, nn

from sparsebayes.inference.sampling import Sampled, best_of
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

__all__ = ["Compared", "choose_architecture", "clearly_better", "estimate_norms_", "groups_of"]

MOST_ORDERS = 20
"""Random orders that are tried for an architecture of a given size."""
NUM_ERRORS = 2.0
"""Standard errors by which another architecture must be better than the evidence's own."""


@final
@dataclass(frozen=True)
class Compared:
    """Architectures that were compared, and which one is the best.

    Attributes:
        candidates: the method's own decision first; an architecture that was drawn several times is there as often.
        best: number of the one that wins; 0 where all are the same.
    """

    candidates: tuple[Decided, ...]
    best: int

    @property
    def winner(self) -> Decided:
        """The best candidate."""
        return self.candidates[self.best]

    def to_json(self) -> str:
        """The number of the best, and every candidate as `Genotype.to_dict` has it, one a line."""
        lines = (json.dumps(decided.genotype.to_dict()) for decided in self.candidates)
        return f'{{"best": {self.best}, "candidates": [\n' + ",\n".join(lines) + "\n]}\n"


def choose_architecture(
    recipe: SearchRecipe,
    supernet: Supernet,
    method: Method,
    own: Decided,
    loaders: SearchLoaders,
    record: Callable[[dict[str, Any]], None],
    reporter: Reporter,
) -> Compared:
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
        What was compared; `own` wins where all are the same, as there is nothing to choose then.

    Raises:
        NumericsError: no candidate has a finite loss, or a proxy is NaN.
    """
    rule = decision_of(recipe.search, supernet.space, method.decision)
    candidates = _candidates(recipe, supernet, method, own, rule)
    distinct = len({decided.genotype.to_json() for decided in candidates})
    row: dict[str, Any] = {"phase": "sample", "distinct": distinct, "best": 0}
    if distinct == 1:
        reporter.line("there is no other architecture to compare, so the method's own decision stays")
    elif recipe.judge == "proxies":
        row.update(_by_proxies(recipe, supernet, method, candidates, loaders))
    else:
        row.update(_by_loss(recipe, supernet, method, candidates, loaders, rule))
    record(row)
    if distinct > 1:
        reporter.line(
            f"number {row['best']} of {len(candidates)} architectures ({distinct} different) is the best"
        )
    return Compared(tuple(candidates), row["best"])


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
    recipe: SearchRecipe,
    supernet: Supernet,
    method: Method,
    candidates: list[Decided],
    loaders: SearchLoaders,
) -> dict[str, Any]:
    """Proxies of fresh networks of the size that is retrained; each different architecture is ranked once.

    The posterior's own score is the sum over the groups that are on, by which the candidates of laplace are found.
    """
    numbers: dict[str, int] = {}
    for number, decided in enumerate(candidates):
        numbers.setdefault(decided.genotype.to_json(), number)
    images, labels = _batch(recipe, loaders)
    values: dict[str, list[float]] = {name: [] for name in recipe.sampling.proxies}
    width, depth = recipe.network_size
    sizes = {**vars(supernet.shape), "width": width, "depth": depth}
    scores = living_scores(method.scores().cpu(), alive_groups(supernet))
    for number in numbers.values():
        # The same seed for all: architectures differ, their luck does not.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(recipe.seed, "search", "proxies"))
            network = build_network(candidates[number].genotype, **sizes).to(images.device)
        for name, found in values.items():
            if name == "posterior":
                found.append(float(scores[groups_of(supernet.table, candidates[number].genotype)].sum()))
            else:
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
    if recipe.sampling.baseline and isinstance(method, DropoutSearch):
        generator = Generator().manual_seed(derive_seed(recipe.seed, "search", "random architectures"))
        blind = [
            random_architecture(supernet, alive, rule, decided.genotype.num_ops, generator)
            for decided in candidates
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


def random_architecture(
    supernet: Supernet, alive: Tensor, rule: Decision, num_ops: int, generator: Generator
) -> Decided:
    """An architecture of so many operations, chosen blindly: a control for one that was chosen as large.

    Operations are allowed one after the other in a random order, until what is connected of them is large enough.

    Args:
        supernet: whose space it is.
        alive: groups that it may have, bool of shape `[G]`.
        rule: how many operations stay.
        num_ops: operations to have.
        generator: of the CPU.

    Returns:
        Of exactly so many operations where one of `MOST_ORDERS` orders leads to one, else as close as these came.
    """
    table = supernet.table
    is_op = torch.tensor([switch.op is not None for switch in table.groups])
    ops = (alive & is_op).nonzero().flatten()
    found: list[Decided] = []

    def first_of(order: Tensor, scores: Tensor, number: int) -> Decided:
        on = alive & ~is_op
        on[order[:number]] = True
        return decide(supernet.space, table, on, scores, rule)

    for _ in range(MOST_ORDERS):
        order = ops[torch.randperm(len(ops), generator=generator)]
        scores = torch.rand(table.num_groups, generator=generator, dtype=torch.float64)
        nested = partial(first_of, order, living_scores(scores, alive))
        # The more are allowed, the more stay.
        found.append(nested(1 + bisect_left(range(1, len(ops)), num_ops, key=lambda n: _size(nested(n)))))
        if found[-1].genotype.num_ops == num_ops:
            break
    return min(found, key=lambda one: abs(one.genotype.num_ops - num_ops))


def _size(decided: Decided) -> int:
    """Operations; 0 where a cell has only what was put back into it."""
    return 0 if decided.rescued else decided.genotype.num_ops


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
        estimate_norms_(recipe, network, loaders)
        yield network
    finally:
        supernet.load_state_dict(saved)


def estimate_norms_(recipe: SearchRecipe, network: nn.Module, loaders: SearchLoaders) -> None:
    """Estimate batch norm anew as `sampling.norm_batches` says, always on the same images.

    Args:
        recipe: how many batches; 0 changes nothing.
        network: a supernet with some of its operations, or the network that inherits from it.
        loaders: `plain` is used.
    """
    loaders.plain.reseed_(derive_seed(recipe.seed, "search", "norm images"))
    batches = islice(loaders.plain, recipe.sampling.norm_batches)
    reestimate_(network, batches, num_images=loaders.plain.num_data)


def _batch(recipe: SearchRecipe, loaders: SearchLoaders) -> tuple[Tensor, Tensor]:
    """Training images for the proxies."""
    loaders.plain.reseed_(derive_seed(recipe.seed, "search", "proxy images"))
    images, labels = next(iter(loaders.plain))
    number = recipe.sampling.proxy_images
    return images[:number], labels[:number]
