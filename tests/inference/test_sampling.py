"""Sampling sub-networks: the curve of the best of n, random baselines, planted best candidates, and bad input."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from sparsebayes.errors import GroupingError, NumericsError, RecipeError
from sparsebayes.inference import VariationalDropout
from sparsebayes.inference.sampling import (
    best_of,
    draw_candidates,
    expected_best,
    shuffled_candidates,
    uniform_candidates,
)

DOUBLE = torch.float64


def test_the_curve_is_the_average_over_all_subsets() -> None:
    losses = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    curve = expected_best(losses)
    for k in range(1, 7):
        subsets = [min(subset) for subset in combinations(losses, k)]
        assert float(curve[k - 1]) == pytest.approx(sum(subsets) / len(subsets))
    assert float(expected_best([1.0, math.inf])[1]) == 1.0


def test_guided_sampling_beats_random_sampling_of_the_same_size() -> None:
    needed = torch.arange(20) % 2 == 0  # what a planted network needs
    p = torch.where(needed, 0.1, 0.8).double()
    posterior = VariationalDropout(20, num_data=10, initial=p)

    def loss(on: Tensor) -> float:
        return float((needed & ~on).sum() + 0.1 * (on & ~needed).sum())

    generator = torch.Generator().manual_seed(0)
    candidates = draw_candidates(posterior, 50, generator)
    layers = torch.arange(20) // 10
    guided = best_of(candidates, loss)
    baseline = shuffled_candidates(candidates, layers, generator)
    for layer in (0, 1):
        assert torch.equal(baseline[:, layers == layer].sum(1), candidates[:, layers == layer].sum(1))
    random = best_of(baseline, loss)
    uniform = best_of(uniform_candidates(50, 20, generator), loss)
    assert guided.losses[guided.best] == min(guided.losses) < min(random.losses)
    assert min(guided.losses) < min(uniform.losses)
    curve = guided.curve()
    assert bool((curve.diff() <= 1e-12).all()) and float(curve[-1]) == min(guided.losses)
    assert float(curve[0]) == pytest.approx(sum(guided.losses) / 50)


def test_every_place_of_a_layer_is_as_likely_in_the_baseline() -> None:
    candidates = torch.tensor([[True, True, False, False, False, True]]).expand(6000, -1)
    layers = torch.tensor([0, 0, 0, 0, 1, 1])
    shares = shuffled_candidates(candidates, layers, torch.Generator().manual_seed(0)).double().mean(0)
    assert shares.tolist() == pytest.approx([0.5] * 6, abs=0.03)


def test_equal_candidates_are_measured_once() -> None:
    seen = []

    def loss(on: Tensor) -> float:
        seen.append(on)
        return float(on.sum())

    candidates = torch.tensor([[True, True], [True, False], [True, True]])
    sampled = best_of(candidates, loss)
    assert len(seen) == 2 and sampled.losses == (2.0, 1.0, 2.0) and sampled.best == 1
    assert best_of(candidates[:1], loss).best == 0


def test_bad_input() -> None:
    posterior = VariationalDropout(3, num_data=10)
    generator = torch.Generator()
    for num in (0, -1):
        with pytest.raises(RecipeError, match=f"expected at least one sample, got {num}"):
            draw_candidates(posterior, num, generator)
    with pytest.raises(RecipeError, match="expected at least one sample, got 0"):
        uniform_candidates(0, 3, generator)
    with pytest.raises(RecipeError, match="expected at least one sample, got 0"):
        best_of(torch.ones(0, 3, dtype=torch.bool), lambda on: 0.0)
    with pytest.raises(RecipeError, match="expected at least one sample, got 0"):
        expected_best([])
    with pytest.raises(NumericsError, match="all 4 sampled sub-networks are the same"):
        best_of(torch.ones(4, 3, dtype=torch.bool), lambda on: 0.0)
    with pytest.raises(NumericsError, match="none of 2 sampled sub-networks has a finite loss"):
        best_of(torch.tensor([[True], [False]]), lambda on: math.nan)
    with pytest.raises(GroupingError, match="one layer number per group"):
        shuffled_candidates(torch.ones(2, 3, dtype=torch.bool), torch.zeros(2), generator)
