"""Residual branches as groups: found in the graph, scaled by their last layer, removed as a whole."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.errors import GroupingError
from sparsebayes.groups.rules import make_grouping

IMAGES = torch.randn(2, 3, 8, 8)


class Block(nn.Module):
    """Two convolutions beside a shortcut, with or without a convolution of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        out += self.skip(x)
        return out.relu()


class Transformer(nn.Module):
    """A residual MLP with a layer scale, a sum of equals, and a sum whose branch is read elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.embed, self.norm, self.up, self.down = (
            nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 6)
        )  # fmt: skip
        self.left, self.right, self.open, self.head = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2))
        x = x + self.scale * self.down(self.up(self.norm(x)).relu())
        x = self.left(x) + self.right(x)
        opened = self.open(x)
        return self.head(x + opened) * opened


def test_each_residual_branch_is_a_group_named_after_its_last_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), Block(6, 6), Block(6, 8), nn.Flatten(), nn.Linear(512, 2))
    grouping = make_grouping(net, "branches", example=IMAGES)
    assert grouping.layers == ("1.bn2", "2.bn2")
    gates = {labels.parameter for labels in grouping.labels if labels.gate}
    assert gates == {"1.bn2.weight", "1.bn2.bias", "2.bn2.weight", "2.bn2.bias"}
    inside = {labels.parameter for labels in grouping.labels}
    assert not any("skip" in name or name.startswith(("0", "4")) for name in inside)
    assert len(inside) == 2 * 8


def test_a_switch_scales_what_the_branch_adds() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), Block(6, 6)).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                value.data.uniform_(0.5, 1.5)
    grouping = make_grouping(net, "branches", example=IMAGES.double())
    x = IMAGES.double()
    block = net[1]

    def branch(model: nn.Module) -> Tensor:
        return model.bn2(model.conv2(model.bn1(model.conv1(net[0](x))).relu()))

    scaled = copy.deepcopy(block)
    for name, factor in grouping.scales(torch.tensor([0.3], dtype=torch.float64)).items():
        scaled.get_parameter(name.removeprefix("1.")).data *= factor
    torch.testing.assert_close(branch(scaled), 0.3 * branch(block), atol=1e-12, rtol=1e-12)


def test_only_closed_branches_beside_a_shorter_path_count() -> None:
    grouping = make_grouping(Transformer(), "branches", example=IMAGES)
    assert grouping.layers == ("scale",)
    assert {labels.parameter for labels in grouping.labels} == {
        "scale", "norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias"
    }  # fmt: skip


def test_scopes_and_networks_without_branches() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), Block(6, 6), Block(6, 6))
    assert make_grouping(net, "branches", example=IMAGES, exclude=("1.*",)).layers == ("2.bn2",)
    with pytest.raises(GroupingError, match="no sum in the model joins a branch with a shortcut"):
        make_grouping(nn.Sequential(nn.Conv2d(3, 6, 1)), "branches", example=IMAGES)
    with pytest.raises(GroupingError, match="'branches' traces the model and needs an input"):
        make_grouping(net, "branches")
