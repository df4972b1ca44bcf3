from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparsebayes.curvature import Curvature, gate_curvature, gate_rows
from sparsebayes.curvature.exact import gate_matrix
from sparsebayes.curvature.factors import class_columns
from sparsebayes.errors import GroupingError, NumericsError, RecipeError
from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.groups.stacking import concatenate

LIKELIHOODS = ["cross_entropy", "mse", "binary_cross_entropy"]

# Which dims of a weight the groups vary along.
VARYING: dict[str, Sequence[int]] = {
    "tensors": (),
    "rows": (0,),
    "columns": (1,),
    "kernels": (0, 1),
    "shapes": (1, 2, 3, 4),
    "weights": (0, 1, 2, 3, 4),
}


def _sliced(model: nn.Module, name: str, dims: Sequence[int]) -> Grouping:
    """One group for each place along `dims` of one parameter."""
    shape = tuple(dict(model.named_parameters())[name].shape)
    sizes = [size if dim in dims else 1 for dim, size in enumerate(shape)]
    index = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
    return Grouping(
        name, (Labels(name, shape, index),), (name,), torch.zeros(index.numel(), dtype=torch.int64)
    )


def _all_slices(model: nn.Module, dims: Sequence[int]) -> Grouping:
    return concatenate([_sliced(model, name, dims) for name, _ in model.named_parameters()])


def _scattered(model: nn.Module) -> Grouping:
    """Groups that cross parameters and dims at random; some entries are in none, some parameters in two labels."""
    generator = torch.Generator().manual_seed(0)
    labels = []
    for position, (name, parameter) in enumerate(model.named_parameters()):
        shape = tuple(parameter.shape)
        if position % 2:
            index = torch.randint(-1, 6, shape, generator=generator)
        else:
            sizes = [shape[0]] + [1] * (len(shape) - 1) if shape else []
            index = torch.randint(-1, 6, sizes, generator=generator)
            labels.append(Labels(name, shape, torch.full([1] * len(shape), 9), gate=False))
            if len(shape) > 1:
                columns = torch.randint(-1, 9, [1, shape[1]] + [1] * (len(shape) - 2), generator=generator)
                labels.append(Labels(name, shape, columns))
        labels.append(Labels(name, shape, index))
    return Grouping("scattered", tuple(labels), ("all",), torch.zeros(10, dtype=torch.int64))


def _batches(x: Tensor, y: Tensor, *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("slicing", VARYING)
def test_exact_equals_the_oracle(build, targets, network_name: str, slicing: str, likelihood: str) -> None:
    model, x = build(network_name, 5)
    y = targets(likelihood, 5)
    grouping = _all_slices(model, VARYING[slicing])
    found = gate_curvature(
        model, grouping, _batches(x, y, 3, 2), num_data=50, likelihood=likelihood, estimator="exact"
    )
    assert (found.num_images, found.num_data) == (5, 50)
    expected = gate_matrix(model, grouping, x, y, likelihood).diagonal() * 10
    assert float(expected.max()) > 0
    _assert_equal(found.diagonal, expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_exact_equals_the_oracle_for_groups_across_layers(
    build, targets, network_name: str, likelihood
) -> None:
    model, x = build(network_name, 5)
    y = targets(likelihood, 5)
    grouping = _scattered(model)
    expected = gate_matrix(model, grouping, x, y, likelihood)
    batches = _batches(x, y, 4, 1)
    found = gate_curvature(model, grouping, batches, num_data=5, likelihood=likelihood, estimator="exact")
    _assert_equal(found.diagonal, expected.diagonal())
    assert found.diagonal[9] == 0  # only in a label that is no gate

    rows = gate_rows(model, grouping, batches, likelihood=likelihood, estimator="exact")
    assert rows.shape == (2 if likelihood == "cross_entropy" else 3, 5, 10)
    _assert_equal(torch.einsum("kng,knh->gh", rows, rows), expected)


def test_a_unit_read_by_two_layers_is_summed_before_it_is_squared(build) -> None:
    model, x = build("fork", 4)
    y = torch.tensor([0, 1, 1, 2])
    units = torch.arange(3)
    labels = (
        Labels("enter.weight", (3, 1, 2, 2), units.view(3, 1, 1, 1), gate=False),
        Labels("enter.bias", (3,), units, gate=False),
        Labels("left.weight", (3, 3, 1, 1), units.view(1, 3, 1, 1)),
        Labels("right.weight", (3, 3, 2, 2), units.view(1, 3, 1, 1)),
    )
    grouping = Grouping("units", labels, ("enter",), torch.zeros(3, dtype=torch.int64))
    found = gate_curvature(model, grouping, [(x, y)], num_data=4, estimator="exact")
    _assert_equal(found.diagonal, gate_matrix(model, grouping, x, y).diagonal())
    apart = [
        gate_curvature(
            model,
            Grouping("one", (label,), ("enter",), grouping.layer_index),
            [(x, y)],
            num_data=4,
            estimator="exact",
        ).diagonal
        for label in labels[2:]
    ]
    assert not torch.allclose(found.diagonal, apart[0] + apart[1], rtol=1e-3)


def test_groups_in_any_order_and_shared_with_other_labels(build) -> None:
    model, x = build("mlp", 5)
    y = torch.arange(5) % 3
    backwards = torch.arange(12).flip(0).view(3, 4)
    with_gaps = torch.arange(24).view(6, 4).T.reshape(4, 6).clone()
    with_gaps[1, ::2] = -1
    with_gaps = torch.where(with_gaps < 0, -1, 12 + with_gaps)
    rows = torch.tensor([36, -1, 38, 36])  # as many entries as groups and gaps together
    one_by_one = torch.arange(40, 52).view(3, 4)
    layers = ("all",)
    for labels in (
        (Labels("4.weight", (3, 4), backwards),),
        (Labels("2.weight", (4, 6), with_gaps),),
        (Labels("2.weight", (4, 6), rows.view(4, 1)),),
        (Labels("4.weight", (3, 4), one_by_one), Labels("4.bias", (3,), torch.tensor([41, 50, 41]))),
        (
            Labels("4.bias", (3,), torch.tensor([41, 50, 41])),
            Labels("4.weight", (3, 4), one_by_one),
        ),
        (
            Labels("4.bias", (3,), torch.tensor([2, 0, 1])),
            Labels("4.weight", (3, 4), torch.zeros(1, 1).long()),
        ),
    ):
        grouping = Grouping("odd", labels, layers, torch.zeros(60, dtype=torch.int64))
        found = gate_curvature(model, grouping, [(x, y)], num_data=5, estimator="exact")
        _assert_equal(found.diagonal, gate_matrix(model, grouping, x, y).diagonal())


@pytest.mark.parametrize("slicing", ["rows", "columns", "weights"])
def test_injected_complete_probes_make_the_monte_carlo_estimator_exact(
    build, network_name: str, slicing: str
) -> None:
    model, x = build(network_name, 5)
    y = torch.arange(5) % 3
    grouping = _all_slices(model, VARYING[slicing])
    found = gate_curvature(
        model, grouping, [(x, y)], num_data=5, factor=lambda logits, generator: class_columns(logits)
    )
    _assert_equal(found.diagonal, gate_matrix(model, grouping, x, y).diagonal())


@pytest.mark.parametrize("factor", ["stick", "rademacher", "sampled_label"])
@pytest.mark.parametrize("slicing", ["columns", "weights"])
def test_estimates_lie_within_five_standard_errors(build, factor: str, slicing: str) -> None:
    model, x = build("residual", 8)
    y = torch.arange(8) % 3
    grouping = _all_slices(model, VARYING[slicing])
    expected = gate_matrix(model, grouping, x, y).diagonal()
    # The same eight images many times, with fresh draws: only the random factor is left to err.
    found = gate_curvature(
        model, grouping, [(x.repeat(250, 1, 1, 1), y.repeat(250))], num_data=8, factor=factor, seed=7
    )
    # Errors below rounding belong to groups that have no curvature.
    assert bool(((found.diagonal - expected).abs() <= 5 * found.standard_error + 1e-12).all())
    assert float((found.diagonal - expected).norm() / expected.norm()) < 0.15


def test_standard_error_is_that_of_the_mean_over_images(build) -> None:
    model, x = build("residual", 7)
    y = torch.arange(7) % 3
    grouping = concatenate([_all_slices(model, VARYING["columns"]), _all_slices(model, VARYING["weights"])])
    singly = torch.stack(
        [
            gate_curvature(
                model, grouping, [(x[n : n + 1], y[n : n + 1])], num_data=100, estimator="exact"
            ).diagonal
            for n in range(7)
        ]
    )
    found = gate_curvature(model, grouping, [(x, y)], num_data=100, estimator="exact")
    _assert_equal(found.diagonal, singly.mean(0))
    _assert_equal(found.standard_error, singly.std(0) / 7**0.5)
    one = gate_curvature(model, grouping, [(x[:1], y[:1])], num_data=100)
    assert bool(torch.isinf(one.standard_error).all())


def _run(model: nn.Module, batches: list[tuple[Tensor, Tensor]], seed: int = 0) -> Curvature:
    return gate_curvature(
        model, _all_slices(model, (0,)), batches, num_data=9, draws=2, seed=seed, factor="sampled_label"
    )


def test_split_into_batches_does_not_matter(build, network_name: str) -> None:
    model, x = build(network_name, 9)
    y = torch.arange(9) % 3
    whole = _run(model, _batches(x, y, 9))
    for sizes in [(4, 5), (1, 1, 7), (2, 0, 7)]:
        parts = _run(model, _batches(x, y, *sizes))
        _assert_equal(parts.diagonal, whole.diagonal)
        _assert_equal(parts.standard_error, whole.standard_error)
    assert not torch.equal(_run(model, [(x, y)], seed=1).diagonal, whole.diagonal)


def test_large_batches_are_taken_in_blocks(build) -> None:
    model, x = build("mlp", 300)
    y = torch.arange(300) % 3
    grouping = _all_slices(model, (0, 1))
    found = gate_curvature(model, grouping, [(x, y)], num_data=300, estimator="exact")
    _assert_equal(found.diagonal, gate_matrix(model, grouping, x, y).diagonal())
    assert gate_rows(model, grouping, [(x, y)]).shape == (1, 300, grouping.num_groups)


def test_order_of_the_images_does_not_matter(build, network_name: str) -> None:
    model, x = build(network_name, 8)
    y = torch.arange(8) % 3
    grouping = _all_slices(model, (0,))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    first = gate_curvature(model, grouping, [(x, y)], num_data=8, estimator="exact")
    second = gate_curvature(
        model, grouping, _batches(x[order], y[order], 3, 5), num_data=8, estimator="exact"
    )
    _assert_equal(second.diagonal, first.diagonal)
    _assert_equal(second.standard_error, first.standard_error)


def test_num_images_uses_the_first_ones_and_stops_the_loader(build) -> None:
    model, x = build("mlp", 9)
    y = torch.arange(9) % 3
    grouping = _all_slices(model, (0,))
    taken: list[int] = []

    def loader():
        for start in range(0, 9, 3):
            taken.append(start)
            yield x[start : start + 3], y[start : start + 3]

    found = gate_curvature(model, grouping, loader(), num_data=90, num_images=5)
    assert (found.num_images, taken) == (5, [0, 3])
    expected = gate_curvature(model, grouping, [(x[:5], y[:5])], num_data=90)
    _assert_equal(found.diagonal, expected.diagonal)


def test_float32_results_come_in_float32(build) -> None:
    model, x = build("residual", 6)
    y = torch.arange(6) % 3
    grouping = _all_slices(model, (0,))
    exact = gate_matrix(model, grouping, x, y).diagonal()
    found = gate_curvature(model.float(), grouping, [(x.float(), y)], num_data=6, estimator="exact")
    assert found.diagonal.dtype == found.standard_error.dtype == torch.float32
    torch.testing.assert_close(found.diagonal.double(), exact, rtol=1e-4, atol=1e-6 * float(exact.max()))


@pytest.mark.parametrize(("dtype", "precision"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
@pytest.mark.parametrize("slicing", ["rows", "columns", "kernels", "weights"])
def test_half_precision_is_summed_in_float32(
    build, slicing: str, dtype: torch.dtype, precision: float
) -> None:
    model, x = build("residual", 32)
    y = torch.arange(32) % 3
    with torch.no_grad():
        model.fc.weight.mul_(20.0)  # sure of many images: gradients that float16 could not hold
    half = copy.deepcopy(model).to(dtype)
    same = copy.deepcopy(half).double()  # the very same rounded weights
    grouping = _all_slices(model, VARYING[slicing])
    x = x.to(dtype)
    found = gate_curvature(half, grouping, [(x, y)], num_data=32, estimator="exact").diagonal
    expected = gate_curvature(same, grouping, [(x.double(), y)], num_data=32, estimator="exact").diagonal
    assert found.dtype == torch.float32
    assert float((found.double() - expected).norm() / expected.norm()) < precision


def test_a_layer_before_an_activation_in_place_is_run_once(build) -> None:
    class Counting(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.conv2d, functional.conv2d)
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 2), nn.ELU(inplace=True)]
    model = nn.Sequential(*layers, nn.Flatten()).double()
    x, y = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.arange(5) % 3
    for dims in ((0,), ()):
        grouping = concatenate([_sliced(model, name, dims) for name in ("0.weight", "2.weight")])
        with Counting() as counting:
            found = gate_curvature(model, grouping, [(x, y)], num_data=5, estimator="exact")
        assert counting.count == 4  # both layers, for two images and for all
        _assert_equal(found.diagonal, gate_matrix(model, grouping, x, y).diagonal())


def test_gates_of_a_network_that_ignores_a_weight_are_zero() -> None:
    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(2, 3)
            self.unused = nn.Linear(2, 3)
            self.cut = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.cut(x).detach()

    torch.manual_seed(0)
    model = Ignoring().double()
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    for dims in ((0,), (1,), (0, 1)):
        grouping = concatenate([_sliced(model, f"{name}.weight", dims) for name in ("used", "unused", "cut")])
        found = gate_curvature(model, grouping, [(x, y)], num_data=4, estimator="exact")
        _assert_equal(found.diagonal, gate_matrix(model, grouping, x, y).diagonal())
        assert float(found.diagonal[: grouping.num_groups // 3].min()) > 0
        cut = concatenate([_sliced(model, "cut.weight", dims)])
        assert bool((gate_curvature(model, cut, [(x, y)], num_data=4).diagonal == 0).all())


def test_grouping_without_gates_is_refused(build) -> None:
    model, x = build("mlp", 2)
    own = Labels("0.weight", (6, 5), torch.zeros(1, 1, dtype=torch.int64), gate=False)
    grouping = Grouping("own", (own,), ("0",), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(GroupingError, match=r"expected a grouping with gate labels, .* 'own' has none"):
        gate_curvature(model, grouping, [(x, torch.tensor([0, 1]))], num_data=2)


def test_grouping_of_another_model_is_refused(build) -> None:
    model, x = build("mlp", 2)
    batches = [(x, torch.tensor([0, 1]))]
    for name, shape, text in [
        ("0.weight", (7, 5), r"made for '0.weight' of shape \[7, 5\], but the model's is \[6, 5\]"),
        ("9.weight", (6, 5), r"expected a parameter of the model, got '9.weight'; it has \['0.bias'"),
    ]:
        grouping = Grouping(
            "g", (Labels(name, shape, torch.zeros(1, 1).long()),), ("0",), torch.zeros(1).long()
        )
        with pytest.raises(GroupingError, match=text):
            gate_rows(model, grouping, batches)


def test_overflowing_gradients_are_refused_by_layer() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(1e-30)
        model[2].weight.fill_(1e30)
        model[1].weight.fill_(1e30)
    x, y = torch.full((2, 2), 1e-30), torch.zeros(2, 2)
    grouping = concatenate([_sliced(model, "2.weight", (0,)), _sliced(model, "0.weight", (0, 1))])
    with pytest.raises(NumericsError, match=r"nan or inf for 4 of 6 groups, first in layer '0.weight'"):
        gate_curvature(model, grouping, [(x, y)], num_data=2, likelihood="mse")


@pytest.mark.parametrize("dims", [(0,), (0, 1)], ids=["rows", "weights"])
def test_auto_stops_when_the_error_is_small_enough(build, dims) -> None:
    model, x = build("mlp", 4096)
    batches = list(zip(x.split(64), (torch.arange(4096) % 3).split(64), strict=True))
    grouping = _sliced(model, "0.weight", dims)
    options = {"num_data": 4096, "seed": 5}
    found = [
        gate_curvature(model, grouping, batches, num_images="auto", tolerance=tolerance, **options)
        for tolerance in (0.2, 0.1)
    ]
    assert found[0].num_images < found[1].num_images < 4096
    for one, tolerance in zip(found, (0.2, 0.1), strict=True):
        assert one.relative_error <= tolerance
        same = gate_curvature(model, grouping, batches, num_images=one.num_images, **options)
        torch.testing.assert_close(one.diagonal, same.diagonal, rtol=0, atol=0)
        torch.testing.assert_close(one.standard_error, same.standard_error, rtol=0, atol=0)


def test_auto_warns_when_the_images_end_before(build) -> None:
    model, x = build("mlp", 32)
    with pytest.warns(UserWarning, match=r"relative error of 0.001: it is 0\.\d+ after 32 images") as found:
        gate_curvature(
            model,
            _all_slices(model, (0,)),
            [(x, torch.arange(32) % 3)],
            num_data=32,
            num_images="auto",
            tolerance=1e-3,
        )
    assert found[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_data": 5, "tolerance": 2.0}, "relative error above 0 and at most 1, got tolerance=2"),
        (
            {"num_data": 5, "num_images": "all"},
            "expected a number of images, 'auto' or None, got num_images='all'",
        ),
        ({"num_data": 0}, "at least 1, got num_data=0"),
        (
            {"num_data": 5, "num_images": 0},
            "at least 1 image to compute the curvature from, got num_images=0",
        ),
        ({"num_data": 5, "estimator": "mc"}, "unknown curvature estimator 'mc'"),
    ],
)
def test_bad_options_are_refused(build, options, text: str) -> None:
    model, x = build("mlp", 2)
    with pytest.raises(RecipeError, match=text):
        gate_curvature(model, _all_slices(model, (0,)), [(x, torch.tensor([0, 1]))], **options)
