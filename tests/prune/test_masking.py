"""Masks: exact zeros that stay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sparsebayes.errors import GroupingError, ModelError
from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.prune.masking import Masks, apply_masks_, prune_
from sparsebayes.prune.selection import select


def grouping_of_rows() -> Grouping:
    return Grouping(
        "rows", (Labels("0.weight", (3, 2), torch.arange(3)[:, None]),), ("0",), torch.zeros(3).long()
    )


def test_pruning_zeros_the_entries_and_keeps_them_there() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = model[0].weight.detach().clone()
    selection = select(grouping_of_rows(), torch.tensor([2.0, 0.0, 2.0]))
    masks = prune_(model, grouping_of_rows(), selection)
    assert set(masks.masks) == {"0.weight"}
    assert model[0].weight[1].tolist() == [0.0, 0.0]
    assert torch.equal(model[0].weight[[0, 2]], before[[0, 2]])
    assert repr(masks) == "Masks(2 of 6 entries of 1 parameters are zero)"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).sum().backward()
        optimizer.step()
    assert model[0].weight[1].abs().sum() > 0  # the step revives what is masked
    masks.reapply_(model)
    assert model[0].weight[1].tolist() == [0.0, 0.0]


def test_masked_infinities_become_zero() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    apply_masks_(model, {"weight": torch.tensor([[False, True]])})
    assert model.weight[0, 0] == 0


def test_masks_that_do_not_fit_are_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    before = model[0].weight.detach().clone()
    off = torch.zeros(3, 2, dtype=torch.bool)
    with pytest.raises(ModelError, match=r"unknown masked parameter '0.weigt'; did you mean '0.weight'"):
        apply_masks_(model, {"0.weight": off, "0.weigt": off})
    with pytest.raises(
        ModelError, match=r"mask of '0.weight' to be bool of shape \[3, 2\], got bool of shape \[2, 3\]"
    ):
        apply_masks_(model, {"0.weight": off.T})
    with pytest.raises(ModelError, match=r"got float32 of shape \[3, 2\]"):
        Masks({"0.weight": off.float()}).reapply_(model)
    assert torch.equal(model[0].weight, before)


def test_a_selection_of_another_grouping_is_refused() -> None:
    other = Grouping(
        "rows", (Labels("1.weight", (3, 2), torch.arange(3)[:, None]),), ("1",), torch.zeros(3).long()
    )
    with pytest.raises(
        GroupingError, match="this selection was made for the grouping 'rows' of 3 groups over 1, not"
    ):
        prune_(nn.Sequential(nn.Linear(2, 3)), grouping_of_rows(), select(other, torch.ones(3)))
    with pytest.raises(ModelError, match=r"unknown masked parameter '1.weight'"):
        prune_(nn.Sequential(nn.Linear(2, 3)), other, select(other, torch.ones(3)))
