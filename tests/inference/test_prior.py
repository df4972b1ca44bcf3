"""Entropy, effective variances and temperatures of the HARD prior."""

from __future__ import annotations

import math

import pytest
import torch

from sparsebayes.errors import GroupingError, NumericsError, RecipeError
from sparsebayes.groups.hierarchy import Hierarchy
from sparsebayes.inference.prior import (
    ENTROPY_THRESHOLD,
    effective_variance,
    entropy,
    group_temperatures,
)


def test_entropy_is_that_of_a_normal_distribution() -> None:
    gamma = torch.tensor([0.01, ENTROPY_THRESHOLD, 3.0], dtype=torch.float64)
    expected = torch.distributions.Normal(0, gamma.sqrt()).entropy()
    torch.testing.assert_close(entropy(gamma), expected, rtol=0, atol=1e-14)
    assert entropy(gamma)[1] == 0
    assert pytest.approx(0.05855, abs=5e-6) == ENTROPY_THRESHOLD
    assert float(entropy(torch.tensor(0.0))) == -math.inf


def test_variances_are_combined_only_where_there_is_a_hierarchy() -> None:
    own = torch.tensor([1.0, 2.0])
    assert effective_variance(own, None).tolist() == [1.0, 2.0]
    chain = Hierarchy.build(predecessors=[[], [0]])
    assert effective_variance(own, chain).tolist() == pytest.approx([1.0, 2 / 3])
    with pytest.raises(GroupingError, match="each of the 2 groups, got float32 of shape"):
        effective_variance(torch.ones(3), chain)


def test_temperatures_are_strength_times_price() -> None:
    assert group_temperatures(2, 3.0, None).tolist() == [3.0, 3.0]
    assert group_temperatures(2, 3.0, torch.tensor([0.5, 2.0])).tolist() == [1.5, 6.0]
    assert group_temperatures(2, 3.0, torch.tensor([1, 2])).dtype == torch.float64


@pytest.mark.parametrize("strength", [0.0, -1.0, math.inf, math.nan])
def test_strengths_that_mean_nothing_are_refused(strength: float) -> None:
    with pytest.raises(
        RecipeError, match=f"expected a positive finite strength, got {strength}: 1 is plain Bayes"
    ):
        group_temperatures(2, strength, None)


def test_prices_that_mean_nothing_are_refused() -> None:
    with pytest.raises(NumericsError, match=r"one price for each of the 2 groups, got shape \[3\]"):
        group_temperatures(2, 1.0, torch.ones(3))
    for price in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(
            NumericsError, match=f"positive finite prices, got {price} for group 1: a group without"
        ):
            group_temperatures(2, 1.0, torch.tensor([1.0, price]))
