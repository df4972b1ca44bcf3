"""Networks run with their groups scaled: equal to scaled weights, image by image, with the right derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsebayes.errors import GroupingError
from sparsebayes.groups import Grouping, make_grouping
from sparsebayes.groups.grouping import Labels
from sparsebayes.models import LeNet5Caffe
from sparsebayes.prune.gating import check_gates, gates_images, run_gated, scale_gates_


class Normed(nn.Module):
    """Convolutions with batch norm, a depthwise one, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depth = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.point = nn.Conv2d(4, 6, 1, bias=False)
        self.twice = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.point(self.depth(x))).mean((2, 3))
        return self.out(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def case(name: str, rule: str | list[str]) -> tuple[nn.Module, Grouping, Tensor]:
    torch.manual_seed(0)
    if name == "lenet":
        model, images = LeNet5Caffe(input_size=20), torch.randn(5, 1, 20, 20)
    else:
        model, images = Normed(), torch.randn(5, 1, 6, 6)
        model.norm.running_mean.uniform_(-1, 1)
    model = model.double().eval()
    images = images.double()
    return model, make_grouping(model, rule, example=images[:2]), images


CASES = [
    ("lenet", "units"),
    ("lenet", "filters"),
    ("lenet", "rows"),
    ("lenet", ["units", "features"]),
    ("normed", "units"),
    ("normed", "rows"),
]


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_images_with_switches_of_their_own_are_networks_of_their_own(
    name: str, rule: str | list[str]
) -> None:
    model, grouping, images = case(name, rule)
    assert gates_images(model, grouping, images)
    switches = torch.rand(5, grouping.num_groups, dtype=torch.float64, requires_grad=True)
    outputs = run_gated(model, grouping, images, switches)
    parameters = dict(model.named_parameters())
    for number in range(5):  # the definition: multiply the weights
        scaled = {
            key: parameters[key].detach() * scale
            for key, scale in grouping.scales(switches[number].detach()).items()
        }
        expected = functional_call(model, scaled, (images[number : number + 1],))
        torch.testing.assert_close(outputs[number : number + 1], expected)
    outputs.square().sum().backward()
    one = switches[2].detach().requires_grad_()
    run_gated(model, grouping, images[2:3], one).square().sum().backward()
    assert switches.grad is not None and one.grad is not None and float(one.grad.abs().max()) > 0
    torch.testing.assert_close(switches.grad[2], one.grad)


@pytest.mark.parametrize("rule", ["weights", "kernels"])
def test_groups_that_are_no_slices_share_one_draw(rule: str) -> None:
    model, grouping, images = case("lenet", rule)
    assert not gates_images(model, grouping, images)
    switches = torch.rand(grouping.num_groups, dtype=torch.float64, requires_grad=True)
    outputs = run_gated(model, grouping, images, switches)
    (gradient,) = torch.autograd.grad(outputs.sum(), switches)
    scale_gates_(model, grouping, switches.detach())
    torch.testing.assert_close(model(images), outputs)
    assert gradient.shape == switches.shape


class Hidden(nn.Module):
    """Reads a weight without calling a layer, so that the mode cannot see it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) @ self.second.weight.T


def test_what_the_mode_cannot_see_is_found_out() -> None:
    model = Hidden()
    columns = Labels("second.weight", (2, 3), torch.arange(3).view(1, 3))
    grouping = Grouping("columns", (columns,), ("first",), torch.zeros(3, dtype=torch.int64))
    assert not gates_images(model, grouping, torch.randn(2, 4))
    assert model.training


def test_a_layer_that_is_held_in_evaluation_mode_stays_so() -> None:
    model, grouping, images = case("normed", "units")
    model.train()
    model.norm.eval()
    assert gates_images(model, grouping, images)
    assert [path for path, module in model.named_modules() if not module.training] == ["norm"]


def test_bad_input() -> None:
    model = Hidden()
    own = Labels("first.weight", (3, 4), torch.arange(3).view(3, 1), gate=False)
    gate = Labels("second.weight", (2, 3), torch.tensor([[0, 1, -1]]))
    grouping = Grouping("units", (own, gate), ("first",), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(GroupingError, match=r"nothing reads first\[2\], nor 0 others of 'units'"):
        check_gates(grouping)
    check_gates(make_grouping(model, "rows"))
    with pytest.raises(GroupingError, match=r"expected switches of shape \[3\] or \[2, 3\], got \[4, 3\]"):
        run_gated(model, grouping, torch.ones(2, 4), torch.ones(4, 3))
