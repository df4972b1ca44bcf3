"""Whether a unit whose own entries are all zero is read as zero, so that it may go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebayes.groups.tracing import trace_units

IMAGE = torch.zeros(2, 1, 4, 4)


class Tail(nn.Module):
    """conv (4 channels) -> some operation, which decides about its units -> read (a 1x1 convolution)."""

    def __init__(self, operation: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 1)
        self.read = nn.Conv2d(channels, 2, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.operation(self.conv(x)))


@pytest.mark.parametrize(
    ("operation", "preserving"),
    [
        (F.relu, True),
        (F.gelu, True),
        (torch.tanh, True),
        (F.silu, True),
        (lambda x: 2 * x, True),
        (lambda x: x.clamp(-1, 1), True),
        (lambda x: F.max_pool2d(x, 2), True),
        (lambda x: F.adaptive_avg_pool2d(x, 1), True),
        (lambda x: x * x.sigmoid(), True),
        (lambda x: F.pad(x, (1, 1, 1, 1)), True),
        (torch.sigmoid, False),
        (torch.exp, False),
        (torch.cos, False),
        (lambda x: x + 1, False),
        (lambda x: F.relu(x) + x.sigmoid(), False),
        (lambda x: x.clamp(0.5, 1), False),
        (lambda x: 1 / (1 + x), False),
        (lambda x: x.clone().sigmoid_(), False),
        (lambda x: F.pad(x, (1, 1, 1, 1), value=1.0), False),
        (lambda x: x.flatten(2).softmax(2).unflatten(2, (4, 4)), False),
        (lambda x: x.flatten(2).logsumexp(2)[..., None, None], False),
    ],
)
def test_whether_a_dead_unit_is_read_as_zero(operation: Callable[[Tensor], Tensor], preserving: bool) -> None:
    net = Tail(operation)
    graph = trace_units(net, IMAGE)
    assert graph.zero_preserving.tolist() == [preserving] * 4
    # The claim itself: the operation on zeros.
    zeros = operation(torch.zeros(2, 4, 4, 4))
    assert bool((zeros == 0).all()) == preserving


def test_in_place_changes_reach_other_views() -> None:
    def operation(x: Tensor) -> Tensor:
        x = x.clone()
        view = x.transpose(2, 3)
        x.sigmoid_()
        return view

    assert trace_units(Tail(operation), IMAGE).zero_preserving.tolist() == [False] * 4


def test_zero_is_judged_where_it_is_read() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(4, 1)
            self.norm = nn.BatchNorm1d(4)
            self.normed = True

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([F.relu(self.a(x)), torch.sigmoid(self.b(x))], 1)
            return self.head(self.norm(x) if self.normed else x)

    net = Mixed()
    # With scale and shift at 0, a norm gives 0 whatever came before.
    assert trace_units(net, torch.zeros(2, 2)).zero_preserving.tolist() == [True] * 4
    net.normed = False
    assert trace_units(net, torch.zeros(2, 2)).zero_preserving.tolist() == [True, True, False, False]
    net.normed, net.norm = True, nn.BatchNorm1d(4, affine=False)
    assert trace_units(net, torch.zeros(2, 2)).zero_preserving.tolist() == [False] * 4
