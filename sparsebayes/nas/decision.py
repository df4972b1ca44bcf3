"""From switches that are on to a genotype whose every operation lies on a path from an input to the output.

Operations that nothing reaches go (the hierarchy, BayesNAS eqs. 6 and 8), and so do those whose result nobody reads:
what is left is connected. Several operations on an edge, or none, are results like any other; benchmark spaces ask for
one operation per edge or a number of edges per node, which `Decision` and `CellSpec.keep` say.

    >>> decide(space, table, on, scores).genotype
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass
from typing import final

from torch import Tensor

from sparsebayes.errors import NumericsError
from sparsebayes.nas.catalogue import SPACES
from sparsebayes.nas.genotype import Genotype, Op
from sparsebayes.nas.spaces import CellSpec, Decision, Edge, Space
from sparsebayes.nas.switches import Switch, SwitchTable

__all__ = ["Decided", "best_architectures", "connected", "decide", "living_scores"]


@final
@dataclass(frozen=True)
class Decided:
    """A genotype and how it came about.

    Attributes:
        genotype: what was found.
        rescued: cells of which nothing was left; they keep their best path, and the strength was too high.
    """

    genotype: Genotype
    rescued: tuple[str, ...]


def decide(
    space: Space, table: SwitchTable, on: Tensor, scores: Tensor, decision: Decision | None = None
) -> Decided:
    """Choose the operations of every cell.

    Args:
        space: the search space.
        table: what each group decides on.
        on: which groups stay, bool of shape `[G]`.
        scores: how much each group is worth, finite, of shape `[G]`; larger is better. Only the order counts.
        decision: None: the space's own.

    Returns:
        The genotype; no cell of it is empty.

    Raises:
        NumericsError: scores that are not finite.
    """
    if not bool(scores.isfinite().all()):
        raise NumericsError(
            "expected finite scores of the operations, got others; lower the learning rate of the search"
        )
    rule = space.decision if decision is None else decision
    known = SPACES.get(space.name)
    flags = dict(zip(table.groups, on.tolist(), strict=True))
    worth = dict(zip(table.groups, scores.tolist(), strict=True))
    cells: dict[str, tuple[Op, ...]] = {}
    rescued = []
    for key, spec in dict(table.cells).items():
        wanted = {
            (edge, op): worth[Switch(key, edge, op)]
            for edge, op in spec.places()
            if flags[Switch(key, edge, op)] and flags.get(Switch(key, edge, None), True)
        }
        every = {(edge, op): worth[Switch(key, edge, op)] for edge, op in spec.places()}
        chosen = connected(spec, _restrict(spec, wanted, every, rule))
        if not chosen:
            chosen = _best_path(spec, every)
            rescued.append(key)
        edges = spec.edges
        cells[key] = tuple((edges[edge].source, edges[edge].target, op) for edge, op in chosen)
    name = space.name if known == space else space.to_dict()
    return Decided(Genotype(name, cells), tuple(rescued))


def best_architectures(
    space: Space, table: SwitchTable, on: Tensor, scores: Tensor, count: int, decision: Decision | None = None
) -> list[Decided]:
    """The decision and the architectures of the highest sum of scores behind it.

    Each comes of one before it by forbidding one of that one's operations and deciding again, the highest sum first.
    Where edges are decided one by one, as with one operation per edge, the sums never rise along the list.

    Args:
        space: see `decide`.
        table: see `decide`.
        on: see `decide`; no architecture has an operation that is not on, unless the space asks for it.
        scores: see `decide`.
        count: architectures to return, at least 1.
        decision: see `decide`.

    Returns:
        Different ones, the decision first; fewer than `count` where there are no more. None but the decision itself has
        a cell of which nothing was left.

    Raises:
        NumericsError: scores that are not finite.
    """
    number = {switch: position for position, switch in enumerate(table.groups)}
    specs = dict(table.cells)

    def members(decided: Decided) -> list[int]:
        places = {
            key: {(e.source, e.target): n for n, e in enumerate(spec.edges)} for key, spec in specs.items()
        }
        return [
            number[Switch(key, places[key][source, target], op)]
            for key, ops in decided.genotype.cells.items()
            for source, target, op in ops
        ]

    found: list[Decided] = []
    first = decide(space, table, on, scores, decision)
    heap: list[tuple[float, int, frozenset[int], Decided]] = [(0.0, 0, frozenset(), first)]
    seen = {first.genotype.to_json()}
    while heap and len(found) < count:
        _, _, banned, best = heapq.heappop(heap)
        found.append(best)
        for member in members(best):
            without = banned | {member}
            allowed = on.new_ones(on.shape)
            allowed[list(without)] = False
            other = decide(space, table, on & allowed, living_scores(scores, allowed), decision)
            key = other.genotype.to_json()
            if key in seen or other.rescued:
                continue
            seen.add(key)
            worth = sum(float(scores[position]) for position in members(other))
            heapq.heappush(heap, (-worth, len(seen), without, other))
    return found


def living_scores(scores: Tensor, alive: Tensor) -> Tensor:
    """Scores in which what was switched off for good stands behind all that was not: a rescued path has none of it.

    Args:
        scores: of shape `[G]`.
        alive: bool of shape `[G]`.
    """
    return scores.where(alive, scores.min() - 1)


def connected(spec: CellSpec, ops: Collection[tuple[int, str]]) -> set[tuple[int, str]]:
    """The largest part in which every operation is on a path from an input to the output.

    Args:
        spec: the cell.
        ops: (number of the edge, operation).
    """
    edges = sorted({spec.edges[edge] for edge, _ in ops}, key=lambda edge: edge.target)
    fed = set(range(spec.num_inputs))
    for edge in edges:  # by target: when an edge is looked at, all that ends in its source has been
        if edge.source in fed:
            fed.add(edge.target)
    read = set(spec.outputs)
    for edge in sorted(edges, key=lambda edge: -edge.source):
        if edge.target in read and edge.source in fed:
            read.add(edge.source)
    return {(n, op) for n, op in ops if spec.edges[n].source in fed and spec.edges[n].target in read}


def _restrict(
    spec: CellSpec, wanted: dict[tuple[int, str], float], every: dict[tuple[int, str], float], rule: Decision
) -> set[tuple[int, str]]:
    """What a benchmark's rules leave: the best operation of an edge, the best edges into a node."""
    by_edge: dict[int, list[str]] = {}
    fixed = dict(spec.keep)
    for number, edge in enumerate(spec.edges):
        # A benchmark that fixes a node's number of inputs wants exactly so many, worth their variance or not.
        source = every if edge.target in fixed else wanted
        ops = sorted((op for op in edge.ops if (number, op) in source), key=lambda op: -every[number, op])
        by_edge[number] = ops[:1] if rule.one_op_per_edge else ops
    for node in range(spec.num_inputs, spec.num_nodes):
        limit = fixed.get(node, rule.top_k_edges)
        into = [n for n, edge in enumerate(spec.edges) if edge.target == node and by_edge[n]]
        into.sort(key=lambda n: -max(every[n, op] for op in by_edge[n]))
        for number in into[limit:] if limit is not None else ():
            by_edge[number] = []
    return {(number, op) for number, ops in by_edge.items() for op in ops}


def _best_path(spec: CellSpec, worth: dict[tuple[int, str], float]) -> set[tuple[int, str]]:
    """The path from an input to the output whose least valuable operation is worth the most."""
    infinite = float("inf")
    reach: dict[int, tuple[float, set[tuple[int, str]]]] = {
        n: (infinite, set()) for n in range(spec.num_inputs)
    }
    numbers: list[tuple[int, Edge]] = sorted(enumerate(spec.edges), key=lambda item: item[1].target)
    for number, edge in numbers:
        if edge.source not in reach:
            continue
        op = max(edge.ops, key=lambda op: worth[number, op])
        least = min(reach[edge.source][0], worth[number, op])
        if edge.target not in reach or least > reach[edge.target][0]:
            reach[edge.target] = (least, reach[edge.source][1] | {(number, op)})
    return max((reach[node] for node in spec.outputs), key=lambda found: found[0])[1]
