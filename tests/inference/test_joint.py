"""Joint survival against brute force, and what redundancy does to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebayes.errors import NumericsError
from sparsebayes.inference.joint import joint_survival


def gram(rows: int, groups: int, seed: int) -> torch.Tensor:
    factor = torch.randn(rows, groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor.T @ factor


def loss_of(curvature: torch.Tensor, gone: list[int]) -> float:
    """Twice the loss of switching off a set: z_S' H_SS z_S at z = 1."""
    return float(curvature[gone][:, gone].sum())


def brute_force(curvature: torch.Tensor, prices: torch.Tensor) -> list[float]:
    gone: list[int] = []
    survives, level = [0.0] * len(curvature), 0.0
    while len(gone) < len(curvature):
        left = [g for g in range(len(curvature)) if g not in gone]
        worth = {
            g: (loss_of(curvature, [*gone, g]) - loss_of(curvature, gone)) / float(prices[g]) for g in left
        }
        group = min(left, key=lambda g: worth[g])
        level = max(level, worth[group])
        survives[group] = level
        gone.append(group)
    return survives


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**31))
def test_greedy_order_is_that_of_a_loop_over_sets(groups: int, rows: int, seed: int) -> None:
    curvature = gram(rows, groups, seed)
    prices = torch.rand(groups, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) + 0.5
    expected = torch.tensor(brute_force(curvature, prices), dtype=torch.float64)
    torch.testing.assert_close(joint_survival(curvature, prices), expected, rtol=1e-6, atol=1e-8)


def test_a_diagonal_matrix_gives_the_evidence_itself() -> None:
    evidence = torch.tensor([3.0, 0.5, 7.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(joint_survival(evidence.diag()), evidence)
    prices = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(joint_survival(evidence.diag(), prices), evidence / prices)


def test_one_of_two_twins_is_worth_more_once_the_other_is_gone() -> None:
    twins = torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 9.0]])
    torch.testing.assert_close(joint_survival(twins), torch.tensor([4.0, 12.0, 9.0], dtype=torch.float64))


def test_no_two_groups_share_a_strength() -> None:
    assert len(joint_survival(torch.ones(6, 6)).unique()) == 6
    assert len(joint_survival(torch.eye(6)).unique()) == 6


@pytest.mark.parametrize(
    ("curvature", "text"),
    [
        (torch.ones(2, 3), r"square curvature matrix, got shape \[2, 3\]"),
        (torch.full((2, 2), float("nan")), "expected a finite curvature matrix"),
    ],
)
def test_bad_matrices_are_named(curvature: torch.Tensor, text: str) -> None:
    with pytest.raises(NumericsError, match=text):
        joint_survival(curvature)
