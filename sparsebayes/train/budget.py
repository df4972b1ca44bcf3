"""What the removal cycles aim at: shares of the dense network's parameters and MACs, and a measured latency.

Parameters and MACs of a selection are known before it is made, so a cycle can aim at them. Latency is not: a cycle aims
at the MACs that the last measurement predicts (latency proportional to MACs), measures the network that came out in
onnxruntime, and so on until it is fast enough. Small networks are slower than their MACs say, so that the prediction is
approached from above and the result is not smaller than it has to be. Of several limits, a cycle works on the one that
the network exceeds most.

    >>> goal = Goal("latency_ms", 2.0)
    >>> goal.target(present=8e6, latency_ms=4.0, shrink=0.25)         # a cycle goes a quarter of the way at most
    6000000.0
    >>> goal.target(present=8e6, latency_ms=2.2, shrink=0.25)
    7054545.45...
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsebayes.export import export_onnx, latency_ms
from sparsebayes.prune.pricing import EntryCosts, entry_costs, present_cost
from sparsebayes.recipe.schema import Recipe
from sparsebayes.train.front import Point

__all__ = ["Aim", "Goal", "budget_outcome", "goals_of", "network_latency_ms", "next_aim"]

AIM = 0.97
"""Share of a latency limit that a cycle aims at, so that noise does not cost another one."""
LEAST_STEP = 0.05
"""Share of what is left that a cycle removes at least on the way to a latency limit."""


@dataclass(frozen=True)
class Goal:
    """Where the cycles end.

    Attributes:
        kind: ``"params"``, ``"macs"`` or ``"latency_ms"``.
        limit: Largest value of that kind: entries, multiply-accumulates for one input, or milliseconds; 0: no limit,
            the cycles end otherwise.
    """

    kind: str
    limit: float

    @property
    def unit(self) -> str:
        """What entries are counted in on the way: ``"params"`` or ``"macs"``."""
        return "macs" if self.kind == "latency_ms" else self.kind

    def is_met(self, present: float, latency_ms: float | None) -> bool:
        """Whether a network is small or fast enough.

        Args:
            present: Its cost, in `unit`.
            latency_ms: Its latency, if it was measured.
        """
        if self.kind == "latency_ms":
            return latency_ms is not None and latency_ms <= self.limit
        return present <= self.limit

    def excess(self, present: float, latency_ms: float | None) -> float:
        """How many times the limit a network is; infinite without a limit. Arguments as in `is_met`."""
        value = latency_ms if self.kind == "latency_ms" else present
        return float("inf") if value is None or self.limit == 0 else value / self.limit

    def target(self, *, present: float, latency_ms: float | None, shrink: float) -> float:
        """Cost that the next cycle aims at, in `unit`.

        Args:
            present: Cost of the network as it is.
            latency_ms: Its latency, if it was measured.
            shrink: Largest share of what is left that one cycle removes.
        """
        goal = self.limit
        if self.kind == "latency_ms":
            predicted = present * AIM * self.limit / latency_ms if latency_ms else 0.0
            goal = min(predicted, present * (1 - min(LEAST_STEP, shrink)))
        return max(present * (1 - shrink), goal)


def goals_of(recipe: Recipe, dense: Point) -> tuple[Goal, ...]:
    """The limits of a recipe's budget; without one, a goal without a limit, in the price's unit or in parameters.

    Args:
        recipe: Its budget and its price.
        dense: The dense network, whose shares the budget names.
    """
    budget, price = recipe.prune.budget, recipe.prior.price
    if budget is None:
        return (Goal("macs" if price == "macs" else "params", 0.0),)
    limits = {
        "params": (budget.params or 0.0) * dense.params,
        "macs": (budget.macs or 0.0) * dense.macs,
        "latency_ms": budget.latency_ms or 0.0,
    }
    return tuple(Goal(kind, limit) for kind, limit in limits.items() if limit > 0)


@dataclass(frozen=True)
class Aim:
    """What one cycle works towards.

    Attributes:
        costs: Cost of the network's entries, in the unit that the cycle counts in.
        target: Cost that the network should have after it.
    """

    costs: EntryCosts
    target: float


def next_aim(
    goals: Sequence[Goal],
    model: nn.Module,
    example: Tensor,
    masks: Mapping[str, Tensor],
    *,
    latency_ms: float | None,
    shrink: float,
) -> Aim | None:
    """What the next cycle works towards: the goal that the network misses by the largest factor.

    Args:
        goals: Those of the recipe.
        model: The network as it is.
        example: One input.
        masks: Entries of it that are held at zero, and cost nothing.
        latency_ms: Its latency, if it was measured.
        shrink: Largest share of what is left that one cycle removes.

    Returns:
        None once all goals are met.
    """
    aims: list[tuple[float, Aim]] = []
    for goal in goals:
        costs = entry_costs(model, example, goal.unit)
        present = present_cost(costs, masks)
        if not goal.is_met(present, latency_ms):
            target = goal.target(present=present, latency_ms=latency_ms, shrink=shrink)
            aims.append((goal.excess(present, latency_ms), Aim(costs, target)))
    return max(aims, key=lambda pair: pair[0])[1] if aims else None


def network_latency_ms(model: nn.Module, example: Tensor, *, legacy: bool = False) -> float:
    """Milliseconds for one input in onnxruntime on one CPU thread.

    Args:
        model: The network, on any device.
        example: One input, of shape ``[1, ...]``.
        legacy: Use the TorchScript-based exporter.

    Raises:
        ModelError: If the network cannot be exported.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = export_onnx(model, example.cpu(), Path(folder) / "model.onnx", legacy=legacy)
        return latency_ms(written.path, batch=1, threads=1)


def budget_outcome(
    recipe: Recipe,
    dense: Point,
    chosen: Point,
    model: nn.Module,
    example: Tensor,
    masks: Mapping[str, Tensor],
) -> dict[str, Any] | None:
    """What report.json says of the budget: each limit with what was reached, and whether all are met.

    Args:
        recipe: What was asked for.
        dense: The dense network's point.
        chosen: The point that is exported.
        model: Its network.
        example: One input.
        masks: Entries of that network that are held at zero, and cost nothing.

    Returns:
        None for a recipe without a budget. Limits and values are counts, or milliseconds.
    """
    if recipe.prune.budget is None:
        return None
    limits = []
    for goal in goals_of(recipe, dense):
        present = present_cost(entry_costs(model, example, goal.unit), masks)
        reached = chosen.latency_ms if goal.kind == "latency_ms" else present
        met = goal.is_met(present, chosen.latency_ms)
        limits.append({"kind": goal.kind, "limit": goal.limit, "reached": reached, "met": met})
    return {"met": all(limit["met"] for limit in limits), "limits": limits}
