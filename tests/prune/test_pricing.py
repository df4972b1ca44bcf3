"""Costs of entries, groups and selections, against counting what surgery really leaves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsebayes.cost import cost
from sparsebayes.errors import RecipeError
from sparsebayes.groups import make_grouping, trace_units
from sparsebayes.prune import compact
from sparsebayes.prune.pricing import (
    entry_costs,
    group_prices,
    present_cost,
    remaining_cost,
    select_within,
)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 16, 7), nn.ReLU(), nn.Linear(7, 3),
    )  # fmt: skip


EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_entry_costs_sum_to_the_cost_of_the_network(kind: str) -> None:
    model = network()
    spent = cost(model, EXAMPLE)
    costs = entry_costs(model, EXAMPLE, kind)
    assert present_cost(costs, {}) == pytest.approx(spent.params if kind == "params" else spent.macs)


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("rule", ["units", "units+features"])
@pytest.mark.parametrize("seed", range(5))
def test_predicted_cost_is_what_surgery_leaves(kind: str, rule: str, seed: int) -> None:
    model = network()
    grouping = make_grouping(model, rule, example=EXAMPLE)
    on = torch.rand(grouping.num_groups, generator=torch.Generator().manual_seed(seed)) > 0.4
    for layer in range(len(grouping.layers)):  # no layer may be emptied
        on[(grouping.layer_index == layer).nonzero()[:2]] = True
    costs = entry_costs(model, EXAMPLE, kind)
    predicted = remaining_cost(grouping, on, trace_units(model, EXAMPLE), costs)
    done = compact(model, grouping.masks(on), EXAMPLE)
    spent = cost(done.model, EXAMPLE)
    assert predicted == pytest.approx(spent.params if kind == "params" else spent.macs)


def test_masked_entries_are_not_paid_for() -> None:
    model = network()
    grouping = make_grouping(model, "weights")
    on = torch.arange(grouping.num_groups) % 4 == 0
    costs = entry_costs(model, EXAMPLE, "params")
    biases = 6 + 5 + 7 + 3
    assert remaining_cost(grouping, on, None, costs) == int(on.sum()) + biases
    assert present_cost(costs, grouping.masks(on)) == int(on.sum()) + biases


def test_prices_by_hand() -> None:
    model = network()
    grouping = make_grouping(model, "units", example=EXAMPLE)
    prices = group_prices(grouping, entry_costs(model, EXAMPLE, "params"))
    own_and_reads = [9 + 1 + 5 * 9] * 6 + [6 * 9 + 1 + 16 * 7] * 5 + [80 + 1 + 3] * 7
    expected = torch.tensor(own_and_reads, dtype=torch.float64)
    torch.testing.assert_close(prices, expected / expected.mean())


def test_groups_without_cost_keep_a_small_price() -> None:
    model = network()
    grouping = make_grouping(model, "weights")
    costs = entry_costs(model, EXAMPLE, "macs")
    free = type(costs)("macs", dict.fromkeys(costs.per_entry, 0.0), costs.shapes)
    assert torch.equal(group_prices(grouping, free), torch.ones(grouping.num_groups, dtype=torch.float64))
    half = type(costs)("macs", {**free.per_entry, "0.weight": 1.0}, costs.shapes)
    assert float(group_prices(grouping, half).min()) == 1e-3


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_weakest_strength_that_meets_the_target(share: float) -> None:
    model = network()
    grouping = make_grouping(model, "units", example=EXAMPLE)
    graph = trace_units(model, EXAMPLE)
    costs = entry_costs(model, EXAMPLE, "params")
    evidence = torch.rand(
        grouping.num_groups, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    target = share * present_cost(costs, {})
    chosen = select_within(grouping, evidence, graph, costs, target=target, max_removal=1.0)
    assert remaining_cost(grouping, chosen.on, graph, costs) <= target
    weaker = evidence[evidence < chosen.strength].max()
    one_less = select_within(
        grouping, evidence, graph, costs, target=target, ceiling=float(weaker), max_removal=1.0
    )
    assert remaining_cost(grouping, one_less.on, graph, costs) > target
    assert torch.equal(chosen.on | (evidence <= chosen.strength), torch.ones_like(chosen.on))


def test_ceiling_is_never_exceeded() -> None:
    model = network()
    grouping = make_grouping(model, "units", example=EXAMPLE)
    costs = entry_costs(model, EXAMPLE, "params")
    evidence = torch.linspace(1.0, 18.0, grouping.num_groups, dtype=torch.float64)
    chosen = select_within(grouping, evidence, trace_units(model, EXAMPLE), costs, target=0.0, ceiling=4.5)
    assert chosen.strength == 4.5
    assert bool(chosen.on[evidence > 4.5].all())


def test_unknown_cost_is_named() -> None:
    with pytest.raises(RecipeError, match="unknown cost 'flops'"):
        entry_costs(network(), EXAMPLE, "flops")
