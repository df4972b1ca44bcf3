"""The evidence updates against the printed equations, closed forms and scikit-learn's ARD regression."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import ARDRegression
from torch import Tensor

from sparsebayes.errors import GroupingError
from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.inference import updates

DOUBLE = torch.float64
# Wanted values and curvatures with z^2 h from 0.09 to 900: both sides of the relevance threshold 1.
WANTED = torch.tensor([0.3, 0.5, 0.9, 1.2, 1.5, 3.0, -3.0], dtype=DOUBLE)
CURVED = torch.tensor([1.0, 3.0, 1.0, 1.0, 4.0, 100.0, 0.2], dtype=DOUBLE)


def soft_threshold(wanted: Tensor, curvature: Tensor, omega: Tensor) -> Tensor:
    """Minimiser of h/2 (z - wanted)^2 + omega |z|."""
    return wanted.sign() * (wanted.abs() - omega / curvature).clamp(min=0)


def ridge(wanted: Tensor, curvature: Tensor, gamma: Tensor) -> Tensor:
    """Minimiser of h/2 (z - wanted)^2 + z^2/(2 gamma)."""
    return wanted * gamma * curvature / (1 + gamma * curvature)


def rows(num_groups: int, size: int, parameter: str = "weight") -> Grouping:
    """Each row of one matrix is a group."""
    label = Labels(parameter, (num_groups, size), torch.arange(num_groups)[:, None])
    return Grouping("rows", (label,), ("layer",), torch.zeros(num_groups, dtype=torch.int64))


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(-10, 10))
@settings(deadline=None)  # the first call of a torch op takes long
def test_stable_forms_are_the_printed_equations(h: float, gamma: float, z: float) -> None:
    variance = 1 / (1 / gamma + h)  # eq. 17
    printed_omega = math.sqrt(gamma - variance) / gamma  # eq. 18
    omega, own = updates.reweighted(*(torch.tensor(value, dtype=DOUBLE) for value in (z, h, gamma)))
    assert float(omega) == pytest.approx(printed_omega, rel=1e-9)
    assert float(own) == pytest.approx(abs(z / printed_omega), rel=1e-9)  # eq. 19
    share = updates.relevance(torch.tensor(h, dtype=DOUBLE), torch.tensor(gamma, dtype=DOUBLE))
    assert float(share) == pytest.approx(1 - variance / gamma, rel=1e-9)


def test_everything_is_defined_where_variance_or_curvature_is_zero() -> None:
    z = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    h = torch.tensor([0.0, 4.0, 0.0, 4.0, 0.0])
    gamma = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    omega, own = updates.reweighted(z, h, gamma)
    assert omega.tolist() == pytest.approx([0.0, 2.0, 0.0, math.sqrt(0.8), 0.0])
    assert own.tolist() == [0.0, 0.5, 0.0, 0.0, 0.0]
    assert updates.mackay(z, h, gamma).tolist() == [0.0] * 5
    assert updates.fixed_point(z, h).tolist() == [0.0, 0.75, 0.0, 0.0, 0.0]
    grouping = rows(5, 2)
    entries = {"weight": torch.stack([h, torch.zeros(5)], dim=1)}
    assert updates.reweighted_entries(z, entries, grouping, gamma)[1].tolist() == [0.0, 0.5, 0.0, 0.0, 0.0]
    assert updates.mackay_entries(z, entries, grouping, gamma).tolist() == [0.0] * 5


def test_nothing_cancels_in_single_precision() -> None:
    # 1/gamma - C/gamma^2 in float32 loses every digit of h here.
    gamma, h = torch.tensor(1e-4), torch.tensor(1e-4)
    printed = 1 / gamma - 1 / (1 / gamma + h) / gamma**2
    assert abs(float(printed) - 1e-4) > 1e-5
    assert float(updates.log_det_slope(h, gamma)) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("penalty", ["lasso", "ridge"])
@pytest.mark.parametrize("update", ["reweighted", "mackay"])
def test_every_iteration_rests_at_the_closed_form(penalty: str, update: str) -> None:
    gamma = torch.ones_like(WANTED)
    for _ in range(1000):
        omega = updates.log_det_slope(CURVED, gamma).sqrt()
        if penalty == "lasso":
            z = soft_threshold(WANTED, CURVED, omega)
        else:
            z = ridge(WANTED, CURVED, gamma)
        if update == "reweighted":
            gamma = updates.reweighted(z, CURVED, gamma)[1]
        else:
            gamma = updates.mackay(z, CURVED, gamma)
    expected = updates.fixed_point(WANTED, CURVED)
    assert expected.tolist() == pytest.approx([0, 0, 0, 1.44 - 1, 2.25 - 0.25, 9 - 0.01, 9 - 5])
    torch.testing.assert_close(gamma, expected, rtol=1e-10, atol=1e-10)


def test_both_orders_of_the_update_rest_at_the_same_point() -> None:
    """Order A: gamma -> omega -> gamma (the paper); order B: omega -> gamma -> omega (later code)."""
    gamma_a, omega_a = torch.ones_like(WANTED), torch.ones_like(WANTED)
    omega_b = torch.ones_like(WANTED)
    first: dict[str, Tensor] = {}
    for step in range(400):
        omega_a, gamma_a = updates.reweighted(soft_threshold(WANTED, CURVED, omega_a), CURVED, gamma_a)
        gamma_b = updates.switch_variance(soft_threshold(WANTED, CURVED, omega_b), omega_b)
        omega_b = updates.log_det_slope(CURVED, gamma_b).sqrt()
        if step == 0:
            first = {"a": gamma_a, "b": gamma_b}
    assert not torch.allclose(first["a"], first["b"])  # other transients ...
    expected = updates.fixed_point(WANTED, CURVED)
    torch.testing.assert_close(gamma_a, expected, rtol=1e-10, atol=1e-10)  # ... same end
    torch.testing.assert_close(gamma_b, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("temper", [0.01, 1.0, 30.0])
def test_a_weighted_penalty_is_a_divided_curvature(temper: float) -> None:
    """Minimising E + lambda sum omega |z| goes with the curvature H/lambda: lambda is a temperature."""
    gamma = torch.ones_like(WANTED)
    for _ in range(300):
        omega = updates.log_det_slope(CURVED / temper, gamma).sqrt()
        z = soft_threshold(WANTED, CURVED, temper * omega)
        gamma = updates.reweighted(z, CURVED / temper, gamma)[1]
    expected = (WANTED.square() - temper / CURVED).clamp(min=0)
    torch.testing.assert_close(gamma, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("update", ["reweighted", "mackay"])
def test_groups_rest_at_the_closed_form(update: str) -> None:
    size = 25
    grouping = rows(3, size)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(3, size, dtype=DOUBLE, generator=generator)
    wanted = direction / direction.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [2.0], [0.45]])
    h = torch.tensor([100.0, 10.0, 100.0], dtype=DOUBLE)
    curvature = {"weight": h[:, None].expand(3, size).contiguous()}
    gamma = torch.ones(3, dtype=DOUBLE)
    for _ in range(500):
        omega, _ = updates.reweighted_entries(wanted.norm(dim=1), curvature, grouping, gamma)
        norm = (wanted.norm(dim=1) - omega / h).clamp(min=0)  # group lasso on a round bowl
        if update == "reweighted":
            gamma = updates.reweighted_entries(norm, curvature, grouping, gamma)[1]
        else:
            gamma = updates.mackay_entries(norm, curvature, grouping, gamma)
    assert gamma.tolist() == pytest.approx([1 / size - 0.01, 4 / size - 0.1, 0.0], rel=1e-9, abs=1e-12)
    closed = updates.fixed_point(wanted.norm(dim=1) / grouping.sizes().sqrt(), h)
    torch.testing.assert_close(gamma, closed, rtol=1e-9, atol=1e-12)


def overlapping() -> Grouping:
    """Rows and columns of one matrix, a row-wise bias, and a vector with entries in no group."""
    labels = (
        Labels("weight", (3, 2), torch.tensor([[0], [1], [2]])),
        Labels("weight", (3, 2), torch.tensor([[3, 4]])),
        Labels("bias", (3,), torch.tensor([0, 1, 2])),
        Labels("other", (3,), torch.tensor([4, -1, 5])),
    )
    return Grouping("mixed", labels, ("layer",), torch.zeros(6, dtype=torch.int64))


def test_entries_form_is_a_loop_over_eqs_17_to_19() -> None:
    grouping = overlapping()
    generator = torch.Generator().manual_seed(1)
    curvature = {
        name: torch.rand(shape, dtype=DOUBLE, generator=generator)
        for name, shape in grouping.parameters.items()
    }
    curvature["weight"][0, 0] = 0.0
    norm, gamma = torch.rand(2, 6, dtype=DOUBLE, generator=generator)
    # entry -> its groups, written out by hand
    members: dict[tuple[str, tuple[int, ...]], list[int]] = {
        ("weight", (row, column)): [row, 3 + column] for row in range(3) for column in range(2)
    }
    members |= {("bias", (row,)): [row] for row in range(3)}
    members |= {("other", (0,)): [4], ("other", (2,)): [5]}
    slopes, shares = [0.0] * 6, [0.0] * 6
    for (name, place), groups in members.items():
        variance = 1 / sum(1 / float(gamma[group]) for group in groups)
        posterior = 1 / (1 / variance + float(curvature[name][place]))  # eq. 17
        for group in groups:
            slopes[group] += 1 / variance - posterior / variance**2  # eq. 18, summed over the group
            shares[group] += 1 - posterior / variance
    omega, own = updates.reweighted_entries(norm, curvature, grouping, gamma)
    assert omega.tolist() == pytest.approx([math.sqrt(slope) for slope in slopes], rel=1e-12)
    printed = [float(norm[group]) / math.sqrt(slope) for group, slope in enumerate(slopes)]  # eq. 19
    assert own.tolist() == pytest.approx(printed, rel=1e-12)
    mackay = [float(norm[group]) ** 2 / share for group, share in enumerate(shares)]
    assert updates.mackay_entries(norm, curvature, grouping, gamma).tolist() == pytest.approx(
        mackay, rel=1e-12
    )


def test_entries_in_no_group_have_no_variance() -> None:
    gamma = torch.tensor([0.5, 1.0, 0.0, 1.0, 4.0, 2.0], dtype=DOUBLE)
    variances = updates.entry_variances(overlapping(), gamma)
    assert variances["other"].tolist() == [4.0, 0.0, 2.0]
    expected = torch.tensor([[1 / 3, 4 / 9], [0.5, 0.8], [0.0, 0.0]], dtype=DOUBLE)
    torch.testing.assert_close(variances["weight"], expected)


def test_entries_of_size_one_are_switches() -> None:
    grouping = rows(7, 1)
    gamma = torch.linspace(0, 2, 7, dtype=DOUBLE)
    curvature = {"weight": CURVED[:, None]}
    for found, expected in zip(
        updates.reweighted_entries(WANTED.abs(), curvature, grouping, gamma),
        updates.reweighted(WANTED, CURVED, gamma),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    found = updates.mackay_entries(WANTED.abs(), curvature, grouping, gamma)
    torch.testing.assert_close(found, updates.mackay(WANTED, CURVED, gamma), rtol=1e-14, atol=0)


@pytest.mark.parametrize("update", [updates.reweighted_entries, updates.mackay_entries])
def test_curvatures_that_do_not_fit_are_refused(update: Callable[..., object]) -> None:
    grouping, ones = rows(3, 2), torch.ones(3)
    with pytest.raises(
        GroupingError, match=r"the curvature of 'weight' with shape \[3, 2\], got none: compute it"
    ):
        update(ones, {"bias": ones}, grouping, ones)
    with pytest.raises(
        GroupingError, match=r"the curvature of 'weight' with shape \[3, 2\], got shape \[1, 2\]"
    ):
        update(ones, {"weight": torch.ones(1, 2)}, grouping, ones)


@pytest.mark.parametrize("truth", [(2, -1, 0.5, 3, -0.7, 1), (2, -1, 0.5, 0, 0, 0)], ids=["dense", "sparse"])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_mackay_is_scikit_learns_ard_regression(iterations: int, truth: tuple[float, ...]) -> None:
    threshold = 1e4  # beyond it scikit-learn drops a weight and leaves its precision as it is
    generator = np.random.default_rng(0)
    # Columns at right angles: the Hessian is diagonal.
    design = np.linalg.qr(generator.normal(size=(80, len(truth))))[0] * 9.0
    target = design @ np.array(truth) + 0.3 * generator.normal(size=80)
    oracle = ARDRegression(
        max_iter=iterations, tol=0, alpha_1=0, alpha_2=0, lambda_1=0, lambda_2=0,
        threshold_lambda=threshold, fit_intercept=False,
    ).fit(design, target)  # fmt: skip

    x, y = torch.from_numpy(design), torch.from_numpy(target)
    noise_precision = 1 / (y.var(correction=0) + torch.finfo(DOUBLE).eps)
    gamma = torch.ones(len(truth), dtype=DOUBLE)
    kept = torch.ones(len(truth), dtype=torch.bool)
    for _ in range(iterations):
        curvature = noise_precision * x[:, kept].square().sum(0)
        mean = noise_precision * (x[:, kept].T @ y) / (curvature + 1 / gamma[kept])
        residual = y - x[:, kept] @ mean
        determined = updates.relevance(curvature, gamma[kept]).sum()
        gamma[kept] = updates.mackay(mean, curvature, gamma[kept])
        noise_precision = (len(y) - determined) / residual.square().sum()
        kept = 1 / gamma < threshold
    np.testing.assert_allclose((1 / gamma).numpy(), oracle.lambda_, rtol=1e-10)
    np.testing.assert_allclose(float(noise_precision), oracle.alpha_, rtol=1e-10)
    if iterations == 10:
        assert bool(kept.all()) == (0 not in truth)  # with and without dropped weights
