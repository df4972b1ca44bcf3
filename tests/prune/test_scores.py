"""Baseline scores against loops written from their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsebayes.errors import DataError
from sparsebayes.groups import make_grouping
from sparsebayes.prune.scores import magnitude_score, random_score, taylor_score


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def test_magnitude_of_units_is_that_of_their_own_rows() -> None:
    model = network()
    grouping = make_grouping(model, "units", example=torch.zeros(2, 5, dtype=torch.float64))
    rows = torch.cat([model[0].weight, model[0].bias[:, None]], dim=1).detach()
    torch.testing.assert_close(magnitude_score(model, grouping), rows.square().mean(1).sqrt())


def test_magnitude_of_columns_and_weights() -> None:
    model = network()
    columns = torch.cat([layer.weight.detach().square().mean(0).sqrt() for layer in (model[0], model[2])])
    torch.testing.assert_close(magnitude_score(model, make_grouping(model, "columns")), columns)
    weights = torch.cat([layer.weight.detach().abs().flatten() for layer in (model[0], model[2])])
    torch.testing.assert_close(magnitude_score(model, make_grouping(model, "weights")), weights)


def test_taylor_is_the_mean_square_of_the_first_order_change() -> None:
    model = network().train()
    grouping = make_grouping(model, "units", example=torch.zeros(2, 5, dtype=torch.float64))
    batches = [(torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,))) for _ in range(3)]
    expected = torch.zeros(4, dtype=torch.float64)
    for x, y in batches:
        for unit in range(4):
            gate = torch.ones(4, dtype=torch.float64, requires_grad=True)
            loss = F.cross_entropy(model[2](torch.relu(model[0](x)) * gate), y)
            (gradient,) = torch.autograd.grad(loss, gate)
            expected[unit] += gradient[unit].square() / 3
    torch.testing.assert_close(taylor_score(model, grouping, batches), expected)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_that_is_held_in_evaluation_mode_stays_so() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().train()
    model[1].eval()
    grouping = make_grouping(model, "rows")
    taylor_score(
        model, grouping, [(torch.randn(6, 5, dtype=torch.float64), torch.zeros(6, dtype=torch.int64))]
    )
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_taylor_needs_batches() -> None:
    model = network()
    grouping = make_grouping(model, "rows")
    with pytest.raises(DataError, match="expected batches to score groups on, got none"):
        taylor_score(model, grouping, [])


def test_random_scores_follow_their_seed() -> None:
    grouping = make_grouping(network(), "weights")
    assert torch.equal(random_score(grouping, 1), random_score(grouping, 1))
    assert not torch.equal(random_score(grouping, 1), random_score(grouping, 2))
