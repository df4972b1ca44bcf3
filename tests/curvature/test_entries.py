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


def _many(build, num_images: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model, x = build("mlp", num_images)
    return model, list(zip(x.split(64), (torch.arange(num_images) % 3).split(64), strict=True))


def test_the_relative_error_is_that_of_repeated_estimates(build) -> None:
    model, batches = _many(build, 4096)
    names = _names(model)
    truth = entry_curvature(model, names, batches, num_data=1, estimator="exact")
    squares, promised = [], []
    for seed, batch in enumerate(batches):
        found = entry_curvature(model, names, [batch], num_data=1, seed=seed)
        off = sum(float((found[name] - truth[name]).square().sum()) for name in names)
        squares.append(off / sum(float(truth[name].square().sum()) for name in names))
        promised.append(found.relative_error**2)
        assert set(found.errors) == set(names)
    assert 0.6 < sum(promised) / sum(squares) < 1.6


def test_auto_stops_when_the_error_is_small_enough(build) -> None:
    model, batches = _many(build, 8192)
    taken: list[int] = []

    def loader():
        for number, batch in enumerate(batches):
            taken.append(number)
            yield batch

    loose = entry_curvature(model, ["0.weight"], loader(), num_data=8192, num_images="auto", tolerance=0.2)
    assert loose.relative_error <= 0.2
    assert len(taken) == loose.num_images // 64 < 100
    tight = entry_curvature(model, ["0.weight"], batches, num_data=8192, num_images="auto", tolerance=0.1)
    assert tight.relative_error <= 0.1 and tight.num_images > loose.num_images
    assert "relative error 0." in repr(tight) and f"from {tight.num_images} of 8192 images" in repr(tight)


def test_auto_warns_when_the_images_end_before(build) -> None:
    model, batches = _many(build, 128)
    with pytest.warns(
        UserWarning, match=r"ended before .* relative error of 0.001: it is 0\.\d+ after 128 images"
    ):
        entry_curvature(model, ["0.weight"], batches, num_data=128, num_images="auto", tolerance=1e-3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tolerance": 0.0}, "expected a relative error above 0 and at most 1, got tolerance=0"),
        ({"num_images": "all"}, "expected a number of images, 'auto' or None, got num_images='all'"),
    ],
)
def test_bad_options_are_refused(build, options, text: str) -> None:
    model, batches = _many(build, 8)
    with pytest.raises(RecipeError, match=text):
        entry_curvature(model, ["0.weight"], batches, num_data=8, **options)


def test_one_image_has_no_error_to_speak_of(build) -> None:
    model, batches = _many(build, 1)
    assert entry_curvature(model, ["0.weight"], batches, num_data=8).relative_error == float("inf")


class Augmented(torch.utils.data.Dataset):
    """Images that change each time they are read, or not."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= 8:
            raise IndexError(index)
        image = torch.full((5,), float(index), dtype=torch.float64)
        return image + self.noise * torch.randn(5, dtype=torch.float64), index % 3


def test_augmentation_in_the_loader_is_warned_of(build) -> None:
    model, _ = build("mlp", 1)
    loader = torch.utils.data.DataLoader(Augmented(0.1), batch_size=4)
    with pytest.warns(UserWarning, match="images of the curvature's loader change each time they are read"):
        entry_curvature(model, ["0.weight"], loader, num_data=8)
    plain = torch.utils.data.DataLoader(Augmented(0.0), batch_size=4)
    entry_curvature(model, ["0.weight"], plain, num_data=8)
