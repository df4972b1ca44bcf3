"""Sizes in the code of a model: what follows a removal, what an attribute holds, and what stays by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.groups.exporting import Failure, exported
from sparsebayes.groups.tracing import trace_units
from sparsebayes.groups.unit_graph import apply_counts_, counts_left
from sparsebayes.groups.unit_rules import unit_grouping
from sparsebayes.prune.compaction import compact


class Middle(nn.Module):
    """fc1 (8 features) -> some code -> fc2, with attributes that the code may use."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.code, self.width, self.shape, self.other = code, 8, (2, 4), 3
        self.fc1, self.fc2 = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.code(self, self.fc1(x)))


IMAGE = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("code", "units", "counts"),
    [
        (lambda net, x: x.view(-1, x.shape[1]), 8, set()),
        (lambda net, x: x.view(x.shape[0], net.width), 8, {("", "width", None)}),
        (lambda net, x: x.view(x.shape[0], *net.shape).flatten(1), 4, {("", "shape", 1)}),
        (lambda net, x: x.view(x.shape[0], 8), 0, set()),
        (lambda net, x: x.view(x.shape[0], 2, x.shape[1] // 2).transpose(1, 2).flatten(1), 4, set()),
        (lambda net, x: x / x.shape[1] ** 0.5, 0, set()),
        (lambda net, x: x / 8**0.5, 8, set()),
        (lambda net, x: x.unsqueeze(1).expand(x.shape[0], 2, x.shape[1]).sum(1), 8, set()),
        (lambda net, x: x.unsqueeze(1).expand(-1, 2, 8).sum(1), 0, set()),
    ],
)
def test_the_trial_tells_what_the_code_follows(
    code: Callable[[nn.Module, Tensor], Tensor], units: int, counts: set[object]
) -> None:
    graph = trace_units(Middle(code), IMAGE)
    assert graph.num_units == units, graph.fixed
    assert {(count.module, count.attribute, count.position) for count in graph.counts} >= counts
    if not units:
        assert any("'fc1': 8 channels stay" in line for line in graph.fixed), graph.fixed


def test_attributes_follow_what_is_left() -> None:
    net = Middle(lambda net, x: x.view(x.shape[0], *net.shape).flatten(1))
    graph = trace_units(net, IMAGE)
    alive = torch.tensor([True, False, True, True])
    assert counts_left(graph, alive) == {("", "shape", 1): 3}
    apply_counts_(net, graph, alive)
    assert net.shape == (2, 3)


class Sizes(NamedTuple):
    """Two sizes by name."""

    parts: int
    width: int


@pytest.mark.parametrize("sizes", [Sizes(2, 4), torch.Size([2, 4]), [2, 4], (2, 4)])
def test_attributes_that_are_sequences_keep_their_kind(sizes: Sequence[int]) -> None:
    net = Middle(lambda net, x: x.view(x.shape[0], *net.shape).flatten(1))
    net.shape = sizes
    graph = trace_units(net, IMAGE)
    assert graph.num_units == 4, graph.fixed
    small = compact(
        net, unit_grouping(net, graph).masks(torch.tensor([True, False, True, True])), IMAGE
    ).model
    assert type(small.shape) is type(sizes) and list(small.shape) == [2, 3]
    assert list(net.shape) == [2, 4]


def test_a_sequence_of_a_kind_of_its_own_is_left_alone() -> None:
    class Own(list):
        """Two numbers, given one by one."""

        def __init__(self, parts: int, width: int) -> None:
            super().__init__([parts, width])

    net = Middle(lambda net, x: x.view(x.shape[0], *net.shape).flatten(1))
    net.shape = Own(2, 4)
    graph = trace_units(net, IMAGE)
    assert graph.num_units == 0
    assert graph.fixed[0].startswith("'fc1': 8 channels stay: view in the model's forward splits them")


def test_the_two_halves_of_a_list_share_one_attribute() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 2))
    graph = trace_units(net, IMAGE)
    # The ranks within both halves go together; a half cannot be told from the other.
    assert graph.num_units == 4
    assert [(c.module, c.attribute, c.position) for c in graph.counts] == [("1", "unflattened_size", 1)]


def test_a_failure_knows_the_line_that_failed() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            return x.view(5, 5)

    failure = exported(Broken(), IMAGE, train=False)
    assert isinstance(failure, Failure)
    assert failure.steps[-1].name == "view"
    assert "test_trial.py" in failure.steps[-1].line
    assert "shape '[5, 5]' is invalid" in failure.reason


def test_code_that_asks_for_values_is_refused_with_the_exporters_reason_and_the_way_out() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else self.fc(-x)

    with pytest.raises(
        ModelError, match=r"torch.export can trace, but it failed: .*[Dd]ata.*dependent"
    ) as error:
        trace_units(Asks(), IMAGE)
    assert "Rules that need no tracing: weights, rows, columns, filters" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_example_of_another_shape_is_refused_in_the_models_words() -> None:
    with pytest.raises(ModelError, match=r"it failed: .*2, 5.*3, 8"):
        trace_units(Middle(lambda net, x: x), torch.zeros(2, 5))
