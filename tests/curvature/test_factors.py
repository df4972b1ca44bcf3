from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsebayes.curvature.exact import output_hessian
from sparsebayes.curvature.factors import (
    FACTORS,
    LIKELIHOODS,
    Starts,
    class_columns,
    rademacher,
    sampled_label,
    stick,
)
from sparsebayes.errors import ModelError, RecipeError

LOGITS = {
    "flat": torch.zeros(2, 4, dtype=torch.float64),
    "ordinary": torch.tensor([[2.0, -1.0, 0.5, 0.3], [0.1, 0.2, 0.3, -2.0]], dtype=torch.float64),
    "ties": torch.tensor([[1.0, 1.0, -3.0, -3.0], [0.0, 5.0, 5.0, 5.0]], dtype=torch.float64),
    "confident": torch.tensor([[40.0, 0.0, -5.0, 3.0], [0.0, 900.0, 0.0, -900.0]], dtype=torch.float64),
    "two of four": torch.tensor([[0.3, 0.2, -80.0, -90.0], [-70.0, 1.0, -75.0, 1.5]], dtype=torch.float64),
}


def _outer(columns: Tensor) -> Tensor:
    """sum_k v_k v_k^T, from [K, B, C]."""
    return torch.einsum("kbi,kbj->bij", columns, columns)


def _hessian(logits: Tensor, likelihood: str) -> Tensor:
    y = (
        torch.zeros(len(logits), dtype=torch.int64)
        if likelihood == "cross_entropy"
        else torch.zeros_like(logits)
    )
    return output_hessian(logits, y, likelihood)


def _units(logits: Tensor) -> Tensor:
    """Complete probes: the unit vectors, of shape [C, B, C]."""
    num_classes = logits.shape[1]
    return torch.eye(num_classes, dtype=logits.dtype).unsqueeze(1).expand(-1, len(logits), -1)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", LOGITS)
@pytest.mark.parametrize("factor", [stick, rademacher])
def test_factor_times_its_transpose_is_the_hessian(factor, case: str, likelihood: str) -> None:
    logits = LOGITS[case]
    columns = factor(logits, _units(logits), likelihood)
    expected = _hessian(logits, likelihood)
    torch.testing.assert_close(_outer(columns), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("case", LOGITS)
def test_class_columns_are_an_exact_root(case: str, likelihood: str) -> None:
    logits = LOGITS[case]
    columns = class_columns(logits, likelihood)
    assert columns.shape == (4, 2, 4)
    torch.testing.assert_close(_outer(columns), _hessian(logits, likelihood), rtol=1e-12, atol=1e-15)


def test_stick_keeps_tiny_entries_relatively_exact() -> None:
    # The second class has p = 1e-26, far below the rounding error of 1 - p of the first.
    logits = torch.tensor([[0.0, -60.0, -60.5, -200.0]], dtype=torch.float64)
    outer = _outer(stick(logits, _units(logits)))[0]
    p = logits.softmax(1)[0]
    torch.testing.assert_close(outer[0, 0], p[1:].sum(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(outer.diagonal()[1:], p[1:], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(outer[0, 1:], -p[1:], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("spread", ["even", "random"])
def test_saturated_logits_have_the_root_of_the_exact_columns(spread: str) -> None:
    # Probabilities down to subnormal numbers and 0: the rest that a stick is broken off from is next to nothing.
    if spread == "even":
        logits = torch.stack([torch.linspace(-1600, 1600, 10, dtype=torch.float64), torch.arange(10) * 372.4])
    else:
        generator = torch.Generator().manual_seed(0)
        logits = 300 * torch.randn(4000, 10, generator=generator, dtype=torch.float64)
        assert bool(((logits.softmax(1) > 0) & (logits.softmax(1) < 1e-308)).any())
    columns = stick(logits, _units(logits))
    assert bool(columns.isfinite().all())
    torch.testing.assert_close(_outer(columns), _outer(class_columns(logits)), rtol=1e-12, atol=1e-15)
    signs = torch.where(torch.arange(10) % 3 == 0, -1.0, 1.0).double().expand(len(logits), 10)
    drawn = torch.einsum("kbi,bk->bi", columns, signs)
    torch.testing.assert_close(stick(logits, signs), drawn, rtol=1e-12, atol=1e-30)


@pytest.mark.parametrize("case", LOGITS)
def test_stick_is_linear_in_the_signs(case: str) -> None:
    logits = LOGITS[case]
    signs = torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    columns = stick(logits, _units(logits))
    expected = torch.einsum("kbi,k->bi", columns, signs)
    torch.testing.assert_close(stick(logits, signs.expand(2, 4)), expected, rtol=1e-12, atol=1e-30)


def test_stick_matches_the_closed_form_written_as_loops() -> None:
    logits = LOGITS["ordinary"][:1]
    p, order = logits.softmax(1)[0].sort(descending=True)
    root = torch.zeros(4, 4, dtype=torch.float64)
    for k in range(3):
        before, after = 1 - p[:k].sum(), 1 - p[: k + 1].sum()
        root[k, k] = (p[k] * after / before).sqrt()
        for j in range(k + 1, 4):
            root[j, k] = -p[j] * (p[k] / (before * after)).sqrt()
    columns = stick(logits, _units(logits))[:, 0]  # [K, C]
    torch.testing.assert_close(columns[:, order], root.T, rtol=1e-12, atol=1e-15)


def test_stick_is_exact_with_one_draw_for_two_classes() -> None:
    logits = torch.tensor([[0.4, -1.1]], dtype=torch.float64)
    for sign in (-1.0, 1.0):
        v = stick(logits, torch.tensor([[sign, 1.0]], dtype=torch.float64))
        torch.testing.assert_close(
            _outer(v.unsqueeze(0)), _hessian(logits, "cross_entropy"), rtol=1e-12, atol=0.0
        )


def test_sampled_labels_average_to_the_hessian() -> None:
    logits = LOGITS["ordinary"]
    # Evenly spaced numbers instead of random ones: each label comes up as often as its probability says.
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    v = sampled_label(logits, grid.view(-1, 1, 1).expand(-1, 2, 4))
    torch.testing.assert_close(_outer(v) / 200_000, _hessian(logits, "cross_entropy"), rtol=0.0, atol=1e-5)
    counts = (v.argmin(-1) == 0).double().mean(0)  # p - onehot(y) is smallest at y
    torch.testing.assert_close(counts, logits.softmax(1)[:, 0], rtol=0.0, atol=1e-5)


def test_sampled_binary_labels_average_to_the_hessian() -> None:
    logits = LOGITS["ordinary"]
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    v = sampled_label(logits, grid.view(-1, 1, 1).expand(-1, 2, 4), "binary_cross_entropy")
    p = logits.sigmoid()
    torch.testing.assert_close(v.square().mean(0), p * (1 - p), rtol=0.0, atol=1e-4)


def test_sampled_label_stays_in_range_when_probabilities_round_below_one() -> None:
    logits = torch.zeros(1, 7, dtype=torch.float64)
    v = sampled_label(logits, torch.ones(1, 7, dtype=torch.float64))
    assert v.argmin().item() == 6


@pytest.mark.parametrize(
    ("factor", "likelihood"),
    [pair for pair in itertools.product(FACTORS, LIKELIHOODS) if pair != ("sampled_label", "mse")],
)
def test_draws_have_the_hessian_as_their_mean(factor: str, likelihood: str) -> None:
    logits = LOGITS["ordinary"]
    draws = 20_000
    v = Starts(likelihood, "monte_carlo", factor, draws, seed=1)(logits)
    assert v.shape == (draws, 2, 4)
    products = torch.einsum("kbi,kbj->kbij", v, v) * draws
    error = products.std(0) / draws**0.5
    deviation = (products.mean(0) - _hessian(logits, likelihood)).abs()
    assert bool((deviation <= 5 * error + 1e-12).all())


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("draws", [1, 3])
def test_split_of_the_images_does_not_change_the_numbers(factor: str, draws: int) -> None:
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    whole = Starts("cross_entropy", "monte_carlo", factor, draws, seed=4)(logits)
    starts = Starts("cross_entropy", "monte_carlo", factor, draws, seed=4)
    parts = torch.cat([starts(part) for part in logits.split([1, 7, 30, 2])], dim=1)
    assert whole.dtype == torch.float32
    assert torch.equal(whole, parts)
    other = Starts("cross_entropy", "monte_carlo", factor, draws, seed=5)(logits)
    assert not torch.equal(whole, other)


def test_number_of_passes() -> None:
    assert Starts("mse", "exact", "stick", 3, 0).num_passes(7) == 7
    assert Starts("cross_entropy", "exact", "stick", 3, 0).num_passes(7) == 6
    assert Starts("mse", "monte_carlo", "stick", 3, 0).num_passes(7) == 3


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("cross_entrop", "exact", "stick", 1),
            "unknown likelihood 'cross_entrop'; did you mean 'cross_entropy'",
        ),
        (("mse", "exakt", "stick", 1), "unknown curvature estimator 'exakt'; did you mean 'exact'"),
        (("mse", "exact", "sticks", 1), "unknown factor 'sticks'; did you mean 'stick'"),
        (
            ("mse", "monte_carlo", "sampled_label", 1),
            "which likelihood 'mse' does not have; use factor 'stick'",
        ),
        (("mse", "monte_carlo", "stick", 0), "expected at least 1 draw per image, got draws=0"),
    ],
)
def test_options_that_cannot_be_carried_out(options: tuple[str, str, str, int], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        Starts(*options, seed=0)


def test_functions_refuse_an_unknown_likelihood() -> None:
    logits = LOGITS["flat"]
    for call in (
        lambda: class_columns(logits, "poisson"),
        lambda: stick(logits, torch.ones_like(logits), "poisson"),
        lambda: rademacher(logits, torch.ones_like(logits), "poisson"),
        lambda: sampled_label(logits, torch.ones_like(logits), "poisson"),
        lambda: output_hessian(logits, logits, "poisson"),
    ):
        with pytest.raises(RecipeError, match="unknown likelihood 'poisson'"):
            call()
    with pytest.raises(RecipeError, match="draws class labels"):
        sampled_label(logits, torch.ones_like(logits), "mse")


def test_own_vectors_of_a_wrong_shape_are_refused() -> None:
    starts = Starts("mse", "monte_carlo", lambda logits, generator: logits, 1, 0)
    with pytest.raises(ModelError, match=r"vectors of shape \[K, 2, 4\], got \[2, 4\]"):
        starts(LOGITS["flat"])
