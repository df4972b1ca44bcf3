"""Entries held at zero through a phase."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsebayes.errors import ModelError
from sparsebayes.train.holding import hold_at_zero


def test_masked_entries_go_to_zero_whatever_they_became() -> None:
    model = nn.Linear(3, 2)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    hold = hold_at_zero(model, {"weight": mask})
    model.load_state_dict({"weight": torch.full((2, 3), float("inf")), "bias": torch.ones(2)})
    hold()
    assert torch.equal(model.weight == 0, ~mask)
    assert bool((model.weight[mask] == float("inf")).all()) and torch.equal(model.bias, torch.ones(2))


def test_masks_of_another_network_are_refused() -> None:
    with pytest.raises(ModelError, match="expected the mask of 'weight' to be bool of shape"):
        hold_at_zero(nn.Linear(3, 2), {"weight": torch.ones(3, 2, dtype=torch.bool)})
