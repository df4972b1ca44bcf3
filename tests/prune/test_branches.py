"""A branch without units goes; what it still adds stays as a constant, and the network computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.groups.rules import make_grouping
from sparsebayes.groups.tracing import trace_units
from sparsebayes.groups.unit_rules import unit_grouping
from sparsebayes.layers import Constant, Passage
from sparsebayes.prune.architecture import Architecture
from sparsebayes.prune.carry import carry_grouping
from sparsebayes.prune.compaction import Compaction, compact
from sparsebayes.prune.cutting import carry_tensors
from sparsebayes.prune.optimizer import carry_optimizer_state
from sparsebayes.prune.reshaping import reshape_

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


class Block(nn.Module):
    """The bottleneck of a ResNet, with its sum and its rectifiers in place."""

    def __init__(self, inputs: int, width: int, outputs: int, stride: int = 1, *, bias: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=bias), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=bias), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=bias), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.skip = (
            nn.Conv2d(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))
        out = self.bn3(self.conv3(out))
        out += self.skip(x)
        return self.relu(out)


def network(*, bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), Block(6, 4, 6, bias=bias), Block(6, 5, 8, 2, bias=bias),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    ).double().eval()  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                value.data.uniform_(0.5, 1.5)
    return net


def without(net: nn.Module, *layers: str) -> tuple[Compaction, nn.Module]:
    """The compacted network without the units of these layers, and the masked one."""
    graph = trace_units(net, IMAGES)
    grouping = unit_grouping(net, graph)
    off = torch.tensor([graph.layers[int(layer)] in layers for layer in graph.layer_index])
    masks = grouping.masks(~off)
    masked = copy.deepcopy(net)
    for name, mask in masks.items():
        masked.get_parameter(name).data *= mask
    return compact(net, masks, IMAGES, units=graph), masked


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", ["1.conv1", "1.conv2", "2.conv1"])
def test_a_residual_branch_goes_as_a_whole_when_one_of_its_layers_is_off(layer: str, bias: bool) -> None:
    done, masked = without(network(bias=bias), layer)
    small, block = done.model, layer[0]
    torch.testing.assert_close(small(IMAGES), masked(IMAGES), atol=1e-12, rtol=1e-12)
    outputs = 6 if block == "1" else 8
    left = {name: p.numel() for name, p in small.named_parameters() if name.startswith(f"{block}.")}
    skip = {} if block == "1" else {"2.skip.weight": 48, "2.skip.bias": 8}
    assert left == {f"{block}.bn3.value": outputs, **skip}
    # Both layers that lost their units are named as empty.
    assert done.summary.units[f"{block}.conv1"][0] == done.summary.units[f"{block}.conv2"][0] == 0
    assert isinstance(small.get_submodule(f"{block}.bn3"), Constant)
    assert isinstance(small.get_submodule(f"{block}.conv1"), Passage)
    # Other sizes of images, which the check at compaction did not see.
    for side in (9, 12):
        wider = torch.randn(2, 3, side, side).double()
        torch.testing.assert_close(small(wider), masked(wider), atol=1e-12, rtol=1e-12)


def test_several_branches_go_and_the_rest_shrinks_on() -> None:
    done, masked = without(network(), "1.conv1", "2.conv2")
    torch.testing.assert_close(done.model(IMAGES), masked(IMAGES), atol=1e-12, rtol=1e-12)
    assert {path.partition(".")[0] for path in done.architecture.substitutes} == {"1", "2"}
    again = trace_units(done.model, IMAGES)
    grouping = unit_grouping(done.model, again)
    on = torch.arange(again.num_units) % 3 > 0
    smaller = compact(done.model, grouping.masks(on), IMAGES, units=again)
    assert smaller.summary.params_after < done.summary.params_after
    assert smaller.model.get_parameter("1.bn3.value").numel() == int(on[again.layer_index == 0].sum())


def test_a_network_without_branches_is_rebuilt_from_its_description() -> None:
    done, _ = without(network(), "2.conv1")
    rebuilt = network()
    reshape_(rebuilt, Architecture.from_json(done.architecture.to_json()))
    rebuilt.load_state_dict(done.model.state_dict())
    assert torch.equal(rebuilt(IMAGES), done.model(IMAGES))


def test_what_was_frozen_stays_frozen_and_modes_stay() -> None:
    net = network()
    net[1].requires_grad_(False)
    net[2].train()
    done, _ = without(net, "1.conv1", "2.conv1")
    flags = {name: p.requires_grad for name, p in done.model.named_parameters()}
    assert not flags["1.bn3.value"]
    assert flags["2.bn3.value"]
    assert not done.model[1].bn3.training
    assert done.model[2].bn3.training


def test_grouping_and_optimizer_follow_and_the_constant_is_trained() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(IMAGES).sum().backward()
    optimizer.step()
    graph = trace_units(net, IMAGES)
    grouping = unit_grouping(net, graph)
    on = graph.layer_index != graph.layers.index("1.conv1")
    done = compact(net, grouping.masks(on), IMAGES, units=graph)

    smaller, origin = carry_grouping(grouping, done.kept, on)
    shapes = {name: tuple(p.shape) for name, p in done.model.named_parameters()}
    assert all(shapes[labels.parameter] == labels.shape for labels in smaller.labels)
    gone = ("1.conv1", "1.conv2")  # nothing feeds the second one any more
    assert {grouping.layers[int(grouping.layer_index[g])] for g in origin}.isdisjoint(gone)

    carried = carry_optimizer_state(
        optimizer, net, done.model, done.kept, lambda groups: torch.optim.SGD(groups, lr=0.1)
    )
    held = {id(p) for group in carried.param_groups for p in group["params"]}
    assert held == {id(p) for p in done.model.parameters()}
    value = done.model.get_parameter("1.bn3.value")
    before = value.detach().clone()
    done.model(IMAGES).sum().backward()
    carried.step()
    assert not torch.equal(value, before)


def test_averages_of_the_weights_follow() -> None:
    net = network()
    average = {name: value.clone() for name, value in net.state_dict().items()}
    graph = trace_units(net, IMAGES)
    on = torch.arange(graph.num_units) % 3 > 0
    on[graph.layer_index == graph.layers.index("1.conv1")] = False
    done = compact(net, unit_grouping(net, graph).masks(on), IMAGES, units=graph)
    assert done.model.get_parameter("1.bn3.value").numel() == done.summary.units["0"][0] < 6
    carried = carry_tensors(average, done.kept)
    state = done.model.state_dict()
    assert {name: value.shape for name, value in carried.items()} == {
        name: value.shape for name, value in state.items() if name in average
    }
    assert set(state) - set(carried) == {"1.bn3.value"}
    with pytest.raises(
        ModelError, match=r"in the shape that the network had before compaction, got \[3, 3, 3, 3\]"
    ):
        carry_tensors({"0.weight": carried["0.weight"][:3]}, done.kept)


def test_a_dead_branch_of_a_concatenation_keeps_one_channel_of_zeros() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3), nn.Conv2d(9, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.a(x), self.b(x)], 1))

    torch.manual_seed(0)
    done, masked = without(Joined().double().eval(), "b")
    torch.testing.assert_close(done.model(IMAGES), masked(IMAGES), atol=1e-12, rtol=1e-12)
    assert done.summary.units == {"a": (4, 4), "b": (1, 5)}
    assert not done.model.b.weight.any()


def test_strides_that_change_sizes_in_another_way_keep_one_channel() -> None:
    class Valid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3, padding=2), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.b(self.a(x)))

    torch.manual_seed(0)
    done, masked = without(Valid().double().eval(), "a")
    torch.testing.assert_close(done.model(IMAGES), masked(IMAGES), atol=1e-12, rtol=1e-12)
    assert done.summary.units["a"] == (1, 4)


def test_a_layer_that_everything_passes_through_cannot_be_emptied() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).double().eval()
    with pytest.raises(ModelError, match="the layer '0' would be emptied, and with it every path"):
        without(net, "0")


def test_a_branch_that_its_switch_turns_off_goes_without_a_trace() -> None:
    net = network()
    grouping = make_grouping(net, "branches", example=IMAGES)
    assert grouping.num_groups == 2
    done = compact(net, grouping.masks(torch.tensor([False, True])), IMAGES)
    masked = copy.deepcopy(net)
    for name, mask in grouping.masks(torch.tensor([False, True])).items():
        masked.get_parameter(name).data *= mask
    torch.testing.assert_close(done.model(IMAGES), masked(IMAGES), atol=1e-12, rtol=1e-12)
    assert not done.model.get_parameter("1.bn3.value").any()
    assert [name for name, _ in done.model.named_parameters() if name.startswith("1.")] == ["1.bn3.value"]
