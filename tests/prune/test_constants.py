"""Masked filters whose bias or norm lives on: their constant moves into the next bias, where that is exact."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebayes.groups.rules import make_grouping
from sparsebayes.groups.tracing import trace_units
from sparsebayes.prune.compaction import compact
from sparsebayes.prune.constants import constant_units, fold_constants_

IMAGES = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(0)).double()


def conv(inputs: int, outputs: int, *, bias: bool = True, padding: int = 0, mode: str = "zeros") -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=padding, bias=bias, padding_mode=mode)


def prepared(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*layers).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(0.5, 1.5)
            module.running_var.uniform_(0.5, 1.5)
    return net


NETS = {
    "bias behind": ([conv(3, 6), nn.ReLU(), conv(6, 2)], 4),
    "norm between": ([conv(3, 6, bias=False), nn.BatchNorm2d(6), nn.Sigmoid(), conv(6, 2)], 4),
    "norm behind": ([conv(3, 6), nn.Tanh(), conv(6, 5, bias=False), nn.BatchNorm2d(5), conv(5, 2)], 4),
    "flatten and linear": ([conv(3, 6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 2)], 4),
    "padding that mirrors": ([conv(3, 6), conv(6, 2, padding=1, mode="reflect")], 4),
    # Exact only where the constant is 0; here it is not.
    "padding with zeros": ([conv(3, 6), conv(6, 2, padding=1)], 6),
    "no bias to take it": ([conv(3, 6), conv(6, 2, bias=False)], 6),
}


@pytest.mark.parametrize("name", NETS)
def test_filters_with_biases_shrink_where_it_is_exact(name: str) -> None:
    layers, left = NETS[name]
    net = prepared(*copy.deepcopy(layers))
    grouping = make_grouping(net, "filters", include=("0",))
    on = torch.tensor([True, False, True, True, False, True])
    masked = copy.deepcopy(net)
    masked[0].weight.data[~on] = 0
    done = compact(net, grouping.masks(on), IMAGES)
    torch.testing.assert_close(done.model(IMAGES), masked(IMAGES), atol=1e-12, rtol=1e-12)
    assert done.summary.units["0"] == (left, 6)


def test_rows_of_a_perceptron_shrink_with_their_biases_kept_behind() -> None:
    net = prepared(nn.Flatten(), nn.Linear(243, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))
    grouping = make_grouping(net, "rows", include=("1", "3"))
    on = torch.ones(12, dtype=torch.bool)
    on[[0, 3, 8]] = False
    done = compact(net, grouping.masks(on), IMAGES)
    assert done.summary.units == {"1": (5, 7), "3": (4, 5)}
    assert done.masks == {}


def test_a_channel_that_a_masked_mean_would_shift_is_found_by_its_weights_alone() -> None:
    net = prepared(conv(3, 4), nn.ReLU(), conv(4, 2))
    graph = trace_units(net, IMAGES)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    mask = torch.ones(4, 3, 3, 3, dtype=torch.bool)
    mask[1] = False
    mask[2, :, 1:] = False
    assert constant_units(graph, {"0.weight": mask}, shapes).tolist() == [False, True, False, False]


def test_folding_changes_the_bias_by_weight_times_constant() -> None:
    net = prepared(nn.Flatten(), nn.Linear(243, 3), nn.Linear(3, 2))
    graph = trace_units(net, IMAGES)
    mask = torch.ones(3, 243, dtype=torch.bool)
    mask[1] = False
    net[1].weight.data[1] = 0
    expected = net[2].bias.detach() + net[2].weight.detach()[:, 1] * net[1].bias.detach()[1]
    masks = fold_constants_(net, graph, {"1.weight": mask}, torch.ones(3, dtype=torch.bool), IMAGES)
    torch.testing.assert_close(net[2].bias.detach(), expected, atol=1e-15, rtol=1e-15)
    assert masks["2.weight"].tolist() == [[True, False, True]] * 2
    assert not net[2].weight[:, 1].any()


def test_folding_in_single_precision_rounds_and_passes() -> None:
    net = prepared(conv(3, 6, bias=False), nn.BatchNorm2d(6), nn.Sigmoid(), conv(6, 2)).float()
    grouping = make_grouping(net, "filters", include=("0",))
    done = compact(net, grouping.masks(torch.arange(6) > 1), IMAGES.float())
    assert done.summary.units["0"] == (4, 6)
    assert done.summary.error < 1e-6


class ReadTwice(nn.Module):
    """Something else than its norm, or than its layer, reads what would take the constant over."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.c, self.norm = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.other, self.head = nn.Linear(5, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        a = self.a(x).relu()
        y = self.c(a)
        if self.how == "norm and shortcut":
            y = self.norm(y).relu() + y
        elif self.how == "in place before the norm":
            y *= 2.0
            y = self.norm(y)
        else:
            z = self.norm(y).relu()
            if self.how == "norm and output":
                return self.head(z.mean((2, 3))), y
            y = z
        result = self.head(y.mean((2, 3)))
        if self.how == "weight in other code":
            a = a.mean((2, 3))
            result = result + self.other(a) + F.linear(a.tanh(), self.other.weight)
        return result


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ("norm alone", 4),
        ("norm and shortcut", 5),
        ("in place before the norm", 5),
        ("norm and output", 5),
        ("weight in other code", 5),
    ],
)
def test_a_constant_stays_where_something_else_reads_what_would_take_it(how: str, left: int) -> None:
    (net,) = prepared(ReadTwice(how))
    nn.init.constant_(net.a.bias, 2.0)
    masks = {"a.weight": torch.ones(5, 3, 1, 1, dtype=torch.bool)}
    masks["a.weight"][1] = False
    done = compact(net, masks, IMAGES)
    assert done.summary.units["a"] == (left, 5)
