"""Branches and units removed together: surgery leaves what was predicted, and the groups that are left follow."""

from __future__ import annotations

import pytest
import torch

from sparsebayes.cost import cost
from sparsebayes.curvature import gate_curvature
from sparsebayes.groups import make_grouping, trace_units
from sparsebayes.models import build
from sparsebayes.prune import compact
from sparsebayes.prune.carry import carry_grouping
from sparsebayes.prune.pricing import entry_costs, present_cost, remaining_cost

pytest.importorskip("sparsebayes.layers", reason="needs surgery that replaces dead branches")


@pytest.mark.parametrize(
    ("name", "options"), [("resnet18", {"width": 0.125}), ("resnet20", {"width": 0.25, "shortcut": "A"})]
)
@pytest.mark.parametrize("kind", ["params", "macs"])
def test_branches_and_units_go_together(name: str, options: dict[str, object], kind: str) -> None:
    model = build(name, options).eval()
    images = torch.randn(2, 3, 32, 32)
    grouping = make_grouping(model, "branches+units", example=images)
    on = torch.ones(grouping.num_groups, dtype=torch.bool)
    on[[1, 3, 10, 40]] = False  # two branches, a channel of a stage, one inside a block
    costs = entry_costs(model, images[:1], kind)
    predicted = remaining_cost(grouping, on, trace_units(model, images), costs)
    done = compact(model, grouping.masks(on), images)
    if kind == "macs":
        assert predicted == pytest.approx(cost(done.model, images[:1]).macs)
    assert predicted == pytest.approx(
        present_cost(entry_costs(done.model, images[:1], kind), done.masks), abs=64
    )
    carried, _ = carry_grouping(grouping, done.kept, on)
    parameters = dict(done.model.named_parameters())
    assert {labels.parameter for labels in carried.labels} <= set(parameters)
    found = gate_curvature(done.model, carried, [(images, torch.tensor([1, 2]))], num_data=100)
    assert found.diagonal.shape == (carried.num_groups,)
