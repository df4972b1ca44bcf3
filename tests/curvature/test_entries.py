from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.curvature import entry_curvature
from sparsebayes.curvature.exact import ggn_diagonal
from sparsebayes.curvature.factors import class_columns
from sparsebayes.errors import GroupingError, ModelError, NumericsError, RecipeError


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _assert_equal(found: Mapping[str, Tensor], expected: dict[str, Tensor], scale: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        largest = float(values.abs().max())
        assert largest > 0, name
        torch.testing.assert_close(found[name], values * scale, rtol=1e-10, atol=1e-10 * largest)


@pytest.mark.parametrize("likelihood", ["cross_entropy", "mse", "binary_cross_entropy"])
def test_exact_equals_the_oracle(build, targets, network_name: str, likelihood: str) -> None:
    model, x = build(network_name, 5)
    y = targets(likelihood, 5)
    names = _names(model)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    found = entry_curvature(
        model, names, batches, num_data=50, likelihood=likelihood, estimator="exact", num_images=5
    )
    _assert_equal(found, ggn_diagonal(model, names, x, y, likelihood), scale=10)


def test_injected_complete_probes_make_the_monte_carlo_estimator_exact(build, network_name: str) -> None:
    model, x = build(network_name, 5)
    y = torch.arange(5) % 3
    names = _names(model)
    found = entry_curvature(model, names, [(x, y)], num_data=5, factor=lambda f, generator: class_columns(f))
    _assert_equal(found, ggn_diagonal(model, names, x, y))


@pytest.mark.parametrize("draws", [1, 4])
def test_draws_average_to_the_oracle(build, draws: int) -> None:
    model, x = build("residual", 4)
    y = torch.arange(4) % 3
    names = _names(model)
    expected = ggn_diagonal(model, names, x, y)
    batches = [(x.repeat(250, 1, 1, 1), y.repeat(250))]
    found = entry_curvature(model, names, batches, num_data=4, draws=draws, seed=3)
    for name in names:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        # Stick noise: a relative variance of at most 2 per image and draw.
        assert float(error) < 5 * (2 / (250 * draws)) ** 0.5, name
    again = entry_curvature(model, names, batches, num_data=4, draws=draws, seed=3)
    assert all(torch.equal(again[name], found[name]) for name in names)


def test_one_parameter_has_the_same_diagonal_as_among_all(build, network_name: str) -> None:
    model, x = build(network_name, 5)
    y = torch.arange(5) % 3
    everything = entry_curvature(model, _names(model), [(x, y)], num_data=5)
    for name in _names(model):
        alone = entry_curvature(model, [name], [(x, y)], num_data=5)
        _assert_equal(alone, {name: everything[name]})


def test_dtype_follows_the_parameter(build) -> None:
    model, x = build("residual", 6)
    y = torch.arange(6) % 3
    exact = ggn_diagonal(model, _names(model), x, y)
    found = entry_curvature(model.float(), _names(model), [(x.float(), y)], num_data=6, estimator="exact")
    for name, values in exact.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), values, rtol=1e-4, atol=1e-5 * float(values.max()))


def test_unknown_parameter_is_refused(build) -> None:
    model, x = build("mlp", 2)
    with pytest.raises(
        GroupingError, match=r"expected a parameter of the model, got 'fc'; it has \['0.bias'"
    ):
        entry_curvature(model, ["fc"], [(x, torch.tensor([0, 1]))], num_data=2)


def test_no_parameter_is_refused(build) -> None:
    model, x = build("mlp", 2)
    with pytest.raises(ModelError, match="expected at least one parameter"):
        entry_curvature(model, [], [(x, torch.tensor([0, 1]))], num_data=2)


def test_integer_parameters_are_refused(build) -> None:
    model, x = build("mlp", 2)
    model.table = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"float16, bfloat16, .* parameters, got torch.int8 in 'table'"):
        entry_curvature(model, ["table"], [(x, torch.tensor([0, 1]))], num_data=2)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_accumulated_in_float32(build, dtype: torch.dtype, precision: float) -> None:
    model, x = build("residual", 64)
    y = torch.arange(64) % 3
    with torch.no_grad():
        model.fc.weight.mul_(20.0)  # sure of many images: gradients that float16 could not hold
    names = _names(model)
    half = copy.deepcopy(model).to(dtype)
    same = copy.deepcopy(half).double()  # the very same rounded weights
    x = x.to(dtype)
    found = entry_curvature(half, names, [(x, y)], num_data=64, estimator="exact")
    expected = entry_curvature(same, names, [(x.double(), y)], num_data=64, estimator="exact")
    for name in names:
        assert found[name].dtype == torch.float32
        error = float((found[name].double() - expected[name]).norm() / expected[name].norm())
        assert error < precision, name


def test_empty_data_set_is_refused(build) -> None:
    model, x = build("mlp", 2)
    with pytest.raises(RecipeError, match="at least 1, got num_data=-3"):
        entry_curvature(model, ["0.weight"], [(x, torch.tensor([0, 1]))], num_data=-3)


def test_overflowing_gradients_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.fill_(1e30)
    batches = [(torch.ones(2, 2), torch.zeros(2, 2))]
    with pytest.raises(NumericsError, match=r"nan or inf in '0.weight'; gradients overflow"):
        entry_curvature(model, ["0.weight", "1.weight"], batches, num_data=2, likelihood="mse")
