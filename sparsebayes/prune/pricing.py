"""What groups cost, what a selection leaves, and the strength that leaves a wanted share.

Every parameter entry has a cost: 1 for ``params``, the multiply-accumulates it takes part in for ``macs`` (those of its
layer divided by the entries of the layer's weight). The cost of a group is the sum over its entries, and the cost of
what a selection leaves the sum over the entries that still live:

    >>> costs = entry_costs(model, example, "params")
    >>> prices = group_prices(grouping, costs)              # mean 1: evidence / (strength * price) is compared with 1
    >>> select_within(grouping, evidence, graph, costs, target=0.75 * total).strength
    12.4
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsebayes.cost import cost
from sparsebayes.errors import RecipeError, unknown
from sparsebayes.groups.grouping import Grouping
from sparsebayes.groups.tracing import UnitGraph
from sparsebayes.prune.liveness import kept_indices, living_units
from sparsebayes.prune.selection import Selection, select

__all__ = [
    "KINDS",
    "EntryCosts",
    "entry_costs",
    "group_prices",
    "present_cost",
    "remaining_cost",
    "select_within",
]

KINDS = ("params", "macs")


@dataclass(frozen=True)
class EntryCosts:
    """Cost of one entry of each parameter.

    Attributes:
        kind: ``"params"`` or ``"macs"`` (multiply-accumulates for one input).
        per_entry: Parameter name to the cost of each of its entries.
        shapes: Parameter name to its shape.
    """

    kind: str
    per_entry: Mapping[str, float]
    shapes: Mapping[str, tuple[int, ...]]


def entry_costs(model: nn.Module, example: Tensor, kind: str) -> EntryCosts:
    """Measure what an entry of each parameter costs.

    Args:
        model: The network.
        example: One input, of shape ``[1, ...]``.
        kind: ``"params"`` or ``"macs"``.

    Raises:
        RecipeError: If `kind` is neither.
    """
    if kind not in KINDS:
        raise RecipeError(unknown("cost", kind, KINDS))
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    if kind == "params":
        return EntryCosts(kind, dict.fromkeys(shapes, 1.0), shapes)
    per_entry = dict.fromkeys(shapes, 0.0)
    for layer in cost(model, example).layers:
        weight = f"{layer.name}.weight" if layer.name else "weight"
        if weight in parameters:
            per_entry[weight] += layer.macs / parameters[weight].numel()
    return EntryCosts(kind, per_entry, shapes)


def group_prices(grouping: Grouping, costs: EntryCosts) -> Tensor:
    """Cost of each group relative to the mean group.

    Args:
        grouping: G groups.
        costs: Of the same model.

    Returns:
        Positive numbers of shape ``[G]``; all 1 where no group costs anything. A group that costs less than a
        thousandth of the mean gets a thousandth, so that its evidence still decides in the end.
    """
    total = torch.zeros(grouping.num_groups, dtype=torch.float64)
    for labels in grouping.distinct_labels:
        # An index entry stands for all the parameter entries that it is broadcast to.
        spread = torch.tensor(labels.shape).prod().item() / max(labels.index.numel(), 1)
        counts = torch.bincount((labels.index + 1).flatten(), minlength=grouping.num_groups + 1)[1:]
        total += counts * spread * costs.per_entry[labels.parameter]
    mean = float(total.mean()) if grouping.num_groups else 0.0
    return (total / mean).clamp(min=1e-3) if mean > 0 else torch.ones_like(total)


def present_cost(costs: EntryCosts, masks: Mapping[str, Tensor]) -> float:
    """Cost of a network as it stands: of all entries that are not masked.

    Args:
        costs: Of this network.
        masks: Parameter name to bool, True where an entry stays.
    """
    return sum(
        each * (int(masks[name].sum()) if name in masks else math.prod(costs.shapes[name]))
        for name, each in costs.per_entry.items()
    )


def remaining_cost(
    grouping: Grouping,
    on: Tensor,
    graph: UnitGraph | None,
    costs: EntryCosts,
    masks: Mapping[str, Tensor] | None = None,
) -> float:
    """Cost of the network that a selection leaves: of all entries neither masked nor cut.

    Args:
        grouping: G groups.
        on: Bool of shape ``[G]``.
        graph: Traced units, to follow what dies with the masked entries; None: count masked entries only.
        costs: Of the same model.
        masks: Entries masked before, True where an entry stays.
    """
    joint = grouping.masks(on.cpu())
    for name, mask in (masks or {}).items():
        joint[name] = joint[name] & mask.cpu() if name in joint else mask.cpu()
    kept = {} if graph is None else kept_indices(graph, living_units(graph, joint, costs.shapes))
    total = 0.0
    for name, shape in costs.shapes.items():
        if name in joint:
            mask = joint[name]
            for dim, positions in kept.get(name, {}).items():
                mask = mask.index_select(dim, positions)
            count = int(mask.sum())
        else:
            count = 1
            for dim, size in enumerate(shape):
                cut = kept.get(name, {}).get(dim)
                count *= size if cut is None else len(cut)
        total += costs.per_entry[name] * count
    return total


def select_within(
    grouping: Grouping,
    evidence: Tensor,
    graph: UnitGraph | None,
    costs: EntryCosts,
    *,
    target: float,
    ceiling: float = float("inf"),
    max_removal: float = 0.6,
    min_keep: int = 1,
    round_to: int = 1,
    masks: Mapping[str, Tensor] | None = None,
) -> Selection:
    """Find the weakest strength that leaves no more than a target cost, but no strength above a ceiling.

    Args:
        grouping: G groups.
        evidence: z^2 h divided by the group's price, in nats at strength 1, of shape ``[G]``.
        graph: Traced units; None: masks only.
        costs: Of the same model.
        target: Cost to reach.
        ceiling: Largest strength.
        max_removal: As in `select`; where it binds, the target may not be reached.
        min_keep: As in `select`.
        round_to: As in `select`.
        masks: Entries masked before.

    Returns:
        The selection, with the strength that made it.
    """
    candidates = torch.unique(evidence.detach().double().cpu())
    candidates = torch.cat([candidates[candidates < ceiling], candidates.new_tensor([ceiling])])
    candidates = candidates[candidates.isfinite()]

    def at(strength: float) -> Selection:
        return select(
            grouping,
            evidence,
            threshold=strength,
            max_removal=max_removal,
            min_keep=min_keep,
            round_to=round_to,
            strength=strength,
        )

    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if remaining_cost(grouping, at(float(candidates[middle])).on, graph, costs, masks) <= target:
            high = middle
        else:
            low = middle + 1
    return at(float(candidates[low]) if len(candidates) else 0.0)
