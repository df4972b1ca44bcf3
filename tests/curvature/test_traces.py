"""Sums over groups of squared gradients, against the diagonal of the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.curvature import entry_curvature, sum_curvature, traces
from sparsebayes.curvature.exact import ggn_diagonal
from sparsebayes.errors import GroupingError
from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.groups.rules import make_grouping


def _expected(model: nn.Module, grouping: Grouping, x: Tensor, y: Tensor) -> Tensor:
    names = list(dict.fromkeys(labels.parameter for labels in grouping.labels))
    diagonal = ggn_diagonal(model, names, x, y)
    total = torch.zeros(grouping.num_groups + 1, dtype=torch.float64)
    for labels in grouping.labels:
        if labels.gate:
            numbers = labels.index.expand(labels.shape).flatten()
            numbers = numbers % len(total)  # -1: the last, in no group
            total.index_add_(0, numbers, diagonal[labels.parameter].flatten())
    return total[:-1]


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    assert float(expected.max()) > 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.max()))


def _by(model: nn.Module, kind: str) -> Grouping:
    """Groups across all parameters: their rows, columns, or every third of their entries."""
    labels = []
    for name, p in model.named_parameters():
        if kind == "rows":
            index = torch.arange(len(p)).view(-1, *[1] * (p.ndim - 1)) % 3 - 1 if p.ndim else torch.tensor(0)
        elif kind == "tensors":
            index = torch.zeros([1] * p.ndim, dtype=torch.int64)
        else:
            index = torch.arange(p.numel()).view(p.shape) % 3 - 1
        labels.append(Labels(name, tuple(p.shape), index))
    return Grouping(kind, tuple(labels), ("all",), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("tap", [0, 10, 10**9])  # Grams wherever they can be, by rule, nowhere
@pytest.mark.parametrize("kind", ["rows", "tensors", "entries"])
def test_sums_equal_the_oracle(
    build, monkeypatch: pytest.MonkeyPatch, network_name: str, kind: str, tap: int
) -> None:
    monkeypatch.setattr(traces, "_TAP", tap)
    model, x = build(network_name, 5)
    y = torch.arange(5) % 3
    grouping = _by(model, kind)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    found = sum_curvature(model, grouping, batches, num_data=50, estimator="exact")
    assert (found.num_images, found.num_data) == (5, 50)
    _assert_equal(found.diagonal, 10 * _expected(model, grouping, x, y))


@pytest.mark.parametrize(
    ("options", "shape", "by_gram"),
    [
        ({"kernel_size": 3, "padding": 1}, (3, 3), True),
        ({"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}, (5, 7), True),
        ({"kernel_size": 1}, (3, 2), True),
        ({"kernel_size": 2, "padding": "same"}, (2, 2), True),
        ({"kernel_size": 3, "padding": 1}, (24, 24), False),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_filters_of_wide_convolutions(
    monkeypatch: pytest.MonkeyPatch, options: dict, shape: tuple[int, int], by_gram: bool
) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(60, 50, bias=False, **options), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(50, 3)).double()
    x, y = torch.randn(3, 60, *shape, dtype=torch.float64), torch.arange(3)
    used: list[str] = []
    gram, library = traces._gram, traces.library_gradients
    monkeypatch.setattr(traces, "_gram", lambda *a: used.append("gram") or gram(*a))
    monkeypatch.setattr(traces, "library_gradients", lambda *a: used.append("library") or library(*a))
    labels = Labels("0.weight", tuple(model[0].weight.shape), torch.arange(50).view(50, 1, 1, 1))
    grouping = Grouping("filters", (labels,), ("0",), torch.zeros(50, dtype=torch.int64))
    found = sum_curvature(model, grouping, [(x, y)], num_data=3, estimator="exact")
    assert used == ["gram" if by_gram else "library"]
    diagonal = entry_curvature(model, ["0.weight"], [(x, y)], num_data=3, estimator="exact")
    _assert_equal(found.diagonal, diagonal["0.weight"].flatten(1).sum(1))


@pytest.mark.parametrize("length", [3, 40])
def test_rows_of_linear_layers_over_a_sequence(length: int) -> None:
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(30, 20)
            self.leave = nn.Linear(20, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(self.enter(x).tanh().mean(1))

    model = Mixed().double()
    x, y = torch.randn(4, length, 30, dtype=torch.float64), torch.arange(4) % 3
    labels = Labels("enter.weight", (20, 30), torch.arange(20).view(20, 1))
    grouping = Grouping("rows", (labels,), ("enter",), torch.zeros(20, dtype=torch.int64))
    found = sum_curvature(model, grouping, [(x, y)], num_data=4, estimator="exact")
    _assert_equal(found.diagonal, _expected(model, grouping, x, y))


def test_standard_errors_are_those_of_the_mean_over_images(build) -> None:
    model, x = build("residual", 7)
    y = torch.arange(7) % 3
    grouping = make_grouping(model, "rows")

    def run(*batches: tuple[Tensor, Tensor]):
        return sum_curvature(model, grouping, batches, num_data=100, estimator="exact")

    singly = torch.stack([run((x[n : n + 1], y[n : n + 1])).diagonal for n in range(7)])
    found = run((x, y))
    _assert_equal(found.diagonal, singly.mean(0))
    _assert_equal(found.standard_error, singly.std(0) / 7**0.5)


def test_a_grouping_without_gates_is_refused(build) -> None:
    model, x = build("mlp", 2)
    own = Labels("0.weight", (6, 5), torch.zeros(1, 1, dtype=torch.int64), gate=False)
    grouping = Grouping("own", (own,), ("0",), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(GroupingError, match=r"expected a grouping with gate labels, .* 'own' has none"):
        sum_curvature(model, grouping, [(x, torch.tensor([0, 1]))], num_data=2)
