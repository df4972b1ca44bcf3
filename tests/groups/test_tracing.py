"""Tracing by hand: units of tiny nets, reasons why channels stay, and that the model comes back as it was."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.groups.channel_ids import Trace
from sparsebayes.groups.exporting import Exported, exported, step_of
from sparsebayes.groups.tracing import UnitGraph, trace_units

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


def table(graph: UnitGraph) -> dict[tuple[str, int, bool], list[int]]:
    return {(part.parameter, part.dim, part.reads): part.unit.tolist() for part in graph.slices}


def test_an_mlp_by_hand() -> None:
    graph = trace_units(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(5, 4))
    assert table(graph) == {
        ("0.weight", 0, False): [0, 1, 2],
        ("0.bias", 0, False): [0, 1, 2],
        ("2.weight", 1, True): [0, 1, 2],
    }
    assert graph.layers == ("0",)
    assert graph.num_units == 3
    assert graph.layer_index.tolist() == [0, 0, 0]
    assert graph.fixed == ("'2': 2 channels stay: they are outputs of the model",)
    assert graph.zero_preserving.tolist() == [True] * 3
    assert repr(graph) == "UnitGraph(3 units; 0: 3)"


def test_a_cnn_with_norm_pool_and_flatten_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 2), nn.LogSoftmax(1),
    )  # fmt: skip
    graph = trace_units(net, IMAGE)
    assert table(graph) == {
        ("0.weight", 0, False): [0, 1],
        ("0.bias", 0, False): [0, 1],
        ("1.weight", 0, False): [0, 1],
        ("1.bias", 0, False): [0, 1],
        ("6.weight", 1, True): [0] * 4 + [1] * 4,
        ("6.weight", 0, False): [2, 3, 4],
        ("6.bias", 0, False): [2, 3, 4],
        ("8.weight", 1, True): [2, 3, 4],
    }
    assert {(part.parameter, tuple(part.unit.tolist())) for part in graph.buffers} == {
        ("1.running_mean", (0, 1)),
        ("1.running_var", (0, 1)),
    }
    assert graph.layers == ("0", "6")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.conv1(x)))
        return self.head(x.mean((2, 3)))


def test_a_residual_sum_is_one_unit_per_channel() -> None:
    graph = trace_units(Residual(), IMAGE)
    assert graph.layers == ("stem", "conv1")
    found = table(graph)
    assert found["stem.weight", 0, False] == found["conv2.weight", 0, False] == [0, 1]
    assert found["conv1.weight", 1, True] == found["head.weight", 1, True] == [0, 1]
    assert found["conv1.weight", 0, False] == found["conv2.weight", 1, True] == [2, 3, 4]


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 3, 1), nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), x, self.right(x)], dim=1))


def test_concatenated_channels_line_up() -> None:
    graph = trace_units(Concat(), IMAGE)
    assert table(graph)["head.weight", 1, True] == [0, 1, -1, 2, 3, 4]
    assert graph.layers == ("left", "right")


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depth, self.head = (
            nn.Conv2d(1, 2, 1),
            nn.Conv2d(2, 4, 3, groups=2),
            nn.Conv2d(4, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depth(self.conv(x)))


def test_a_depthwise_convolution_belongs_to_its_input_channel() -> None:
    graph = trace_units(Depthwise(), IMAGE)
    assert table(graph) == {
        ("conv.weight", 0, False): [0, 1],
        ("conv.bias", 0, False): [0, 1],
        ("depth.weight", 0, False): [0, 0, 1, 1],
        ("depth.bias", 0, False): [0, 0, 1, 1],
        ("head.weight", 1, True): [0, 0, 1, 1],
    }


def test_a_grouped_convolution_ties_equal_ranks() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 1, 1))
    found = table(trace_units(net, IMAGE))
    assert found["0.weight", 0, False] == [0, 1, 0, 1]
    assert found["1.weight", 1, True] == [0, 1]
    assert found["1.weight", 0, False] == found["2.weight", 1, True] == [2, 3, 4, 2, 3, 4]


def test_a_shared_module_ties_its_uses() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.twice(F.relu(self.twice(self.first(x)))))

    graph = trace_units(Shared(), torch.zeros(1, 2))
    found = table(graph)
    assert found["twice.weight", 0, False] == found["twice.weight", 1, True] == [0, 1, 2]
    assert graph.num_units == 3


def test_shared_parameters_go_by_their_first_name() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
    net[2].weight = net[0].weight
    graph = trace_units(net, torch.zeros(1, 3))
    assert {part.parameter for part in graph.slices} <= {name for name, _ in net.named_parameters()}
    # The weight reads the input in its first use, so what it reads stays, and with it the units of that rank.
    assert graph.num_units == 0
    assert any("'0.weight' is used twice, once with channels that stay" in line for line in graph.fixed)


@pytest.mark.parametrize(
    ("operation", "channels", "reason"),
    [
        (lambda x: x.sort(1).values, 4, "they reach sort in the model's forward, which the tracer does not"),
        (lambda x: x[:, ::2], 2, "slice in the model's forward cuts them at a fixed position"),
        (lambda x: x.split(2, 1)[0], 2, "split in the model's forward cuts them at a fixed position"),
        (lambda x: x[:, 3].unsqueeze(1), 1, "select in the model's forward cuts them at a fixed position"),
        (lambda x: x.roll(1, 1), 4, "roll in the model's forward cuts them at a fixed position"),
        (lambda x: x.roll(1), 4, "roll in the model's forward cuts them at a fixed position"),
        (lambda x: x.softmax(1), 4, "softmax in the model's forward works over channels"),
        (lambda x: x.mean(1, keepdim=True), 1, "mean in the model's forward works over channels"),
        (lambda x: x - x.amax(), 4, "amax in the model's forward works over channels"),
        (lambda x: F.layer_norm(x, x.shape[1:]), 4, "statistics of layer_norm .* are taken over channels"),
        (lambda x: F.group_norm(x, 2), 4, "the statistics of group_norm .* are taken over channels"),
        (lambda x: x + torch.ones(4, 1, 1), 4, "they are combined with values that stay by add"),
        (lambda x: torch.cat([x, torch.ones(2, 4, 4, 4)], 2), 4, "they are joined with values that stay"),
        (lambda x: x.reshape(2, 2, 2, 4, 4).mT.flatten(1, 2), 4, "reshape .* splits them over several"),
        (lambda x: F.pad(x, (0, 0, 0, 0, -1, 0)), 3, "pad in the model's forward cuts or mirrors them"),
        (lambda x: x.chunk(3, 1)[0], 2, "chunk in the model's forward cuts them into unequal parts"),
        (lambda x: x.permute(0, 2, 1, 3), 4, "channels and positions are mixed before conv2d at 'read'"),
        (lambda x: F.max_pool1d(x.flatten(2).mT, 2, 1)[:, None], 1, "max_pool1d .* mixes them along"),
        (lambda x: x.mT @ x.transpose(1, 3), 4, "they reach matmul in the model's forward, a product of two"),
        (lambda x: torch.cat([x, x.transpose(1, 2)], 3), 4, "cat .* joins channels that lie along"),
        (lambda x: torch.full_like(x, 2.0).new_zeros(2, 4, 4, 4) + x, 4, "new_zeros .* copies their size"),
        (lambda x: F.conv2d(x, torch.eye(4).view(4, 4, 1, 1)), 4, "the weight of conv2d .* is computed"),
        (lambda x: x.repeat_interleave(torch.ones(4).long(), 1, output_size=4), 4, "numbers from a tensor"),
    ],
)  # fmt: skip
def test_channels_that_meet_an_obstacle_stay_and_the_report_says_why(
    operation: Callable[[Tensor], Tensor], channels: int, reason: str
) -> None:
    graph = trace_units(Tail(operation, channels), IMAGE)
    assert graph.num_units == 0
    assert graph.slices == ()
    (line,) = [line for line in graph.fixed if line.startswith("'conv': 4 channels stay: ")]
    assert re.search(reason, line), line


def test_the_place_of_an_unknown_operation_is_named() -> None:
    class Sort(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(1).values

    net = nn.Sequential(nn.Linear(2, 3), Sort(), nn.Linear(3, 1))
    assert (
        "they reach sort at '1', which the tracer does not know"
        in trace_units(net, torch.zeros(1, 2)).fixed[0]
    )


@pytest.mark.parametrize(
    ("view", "stays"),
    [
        (lambda x: x.view(-1, 64), True),
        (lambda x: x.view(x.size(0), 64), True),
        (lambda x: x.amax((2, 3)).view(-1, 4).repeat_interleave(16, 1), True),
        (lambda x: x.view(x.size(0), -1), False),
        (lambda x: x.reshape(x.size(0), -1), False),
        (lambda x: torch.flatten(x, 1), False),
        (lambda x: x.view(x.size(0), x.size(1), -1).flatten(1), False),
    ],
)
def test_a_size_written_into_a_view_does_not_shrink(view: Callable[[Tensor], Tensor], stays: bool) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 1), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(view(self.conv(x)))

    graph = trace_units(Flat(), IMAGE)
    assert graph.num_units == (0 if stays else 4)
    reason = r"view in the model's forward gives them the size (64|4); flatten\(1\) or -1 would adapt"
    assert bool(re.search(f"'conv': 4 channels stay: {reason}", "\n".join(graph.fixed))) == stays


def test_outputs_in_containers_stay() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> dict[str, object]:
            hidden = self.a(x)
            return {"hidden": hidden, "rest": [self.c(self.b(hidden))]}

    graph = trace_units(Two(), torch.zeros(1, 2))
    assert graph.layers == ("b",)
    assert "'a': 3 channels stay: they are outputs of the model" in graph.fixed


def test_a_frozen_transformer_layer_is_not_hidden_in_a_fused_operation() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=6, batch_first=True).requires_grad_(False).eval()
    graph = trace_units(nn.Sequential(layer), torch.zeros(2, 3, 8))
    # Two heads and the hidden features; the width of the tokens is the model's output.
    assert (graph.layers, graph.num_units) == (("0.self_attn", "0.linear1"), 2 + 6)


@pytest.mark.parametrize(
    ("cut", "units"),
    [
        (lambda x: x[:, 1:], 3),
        (lambda x: x[:, :-1], 3),
        (lambda x: x[:, : x.shape[1] // 2], 2),
        (lambda x: torch.cat([x[:, :1], x[:, 1:] * 2], 1), 3),
        (lambda x: x[:, 1].unsqueeze(1) * x, 2),
    ],
)
def test_only_channels_up_to_a_fixed_position_stay(cut: Callable[[Tensor], Tensor], units: int) -> None:
    channels = cut(torch.zeros(2, 4, 1, 1)).shape[1]
    assert trace_units(Tail(cut, channels), IMAGE).num_units == units


class Aux(nn.Module):
    """An auxiliary head that only training mode uses, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)
        self.norm = nn.BatchNorm1d(3)
        self.aux, self.idle = nn.Linear(3, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        x = self.norm(self.a(x))
        return (self.b(x), self.aux(x)) if self.training else self.b(x)


def test_layers_of_training_mode_are_read_too() -> None:
    graph = trace_units(Aux(), torch.zeros(2, 2))
    assert table(graph)["aux.weight", 1, True] == table(graph)["b.weight", 1, True] == [0, 1, 2]
    assert graph.fixed[-1] == "'idle' is never used by the model's forward"


def test_the_model_and_the_random_state_come_back() -> None:
    net = Aux()
    net.norm.eval()
    net.a.weight.grad = torch.ones(3, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    random_state = torch.get_rng_state()
    trace_units(net, torch.zeros(2, 2))
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(net.a.weight.grad, torch.ones(3, 2))
    assert net.b.weight.grad is None
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_export_failure_is_one_sentence() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("needs a pair of images.\nmore lines")

    net = Odd()
    with pytest.raises(
        ModelError, match=r"it failed: needs a pair of images\. Rules that need no tracing: weights"
    ):
        trace_units(net, torch.zeros(1, 2))
    assert net.training


def test_models_without_parameters_or_shapes_are_refused() -> None:
    with pytest.raises(ModelError, match="units need a model with parameters, but this one has none"):
        trace_units(nn.ReLU(), torch.zeros(1))
    with pytest.raises(ModelError, match="the lazy parameter 'weight' has no shape yet"):
        trace_units(nn.LazyLinear(2), torch.zeros(1, 2))


def test_many_merges_keep_classes_and_reasons() -> None:
    trace = Trace()
    ids = trace.fresh(1000)
    order = torch.randperm(1000)
    # A chain in random order: every neighbour pair at once, with a reason at its far end only.
    trace.fix(ids[order[-1:]], "end of the chain")
    trace.unify(ids[order[:-1]], ids[order[1:]], "")
    assert trace.classes(ids).unique().tolist() == [0]
    assert trace.reason(int(trace.roots(ids)[0])) == "end of the chain"


def test_a_deep_wide_net_has_one_unit_per_hidden_channel() -> None:
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Conv2d(256, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU()]
    graph = trace_units(nn.Sequential(*layers, nn.Conv2d(256, 1, 1)), torch.zeros(1, 256, 64, 64))
    assert graph.num_units == 12 * 256
    # Ids follow channels, not the two million positions of the activations.
    assert max(part.unit.numel() for part in graph.slices) == 256


def test_one_image_suffices_for_a_head_that_trains_on_single_pixels() -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(1, 4, 1), nn.Linear(4, 2)
            self.head = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2)
            )

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = self.conv(x)
            out = self.out(y.mean((2, 3)))
            return (out, self.head(y)) if self.training else out

    net = WithHead()
    one, two = trace_units(net, IMAGE[:1]), trace_units(net, IMAGE)
    assert table(one) == table(two)
    assert one.fixed == two.fixed
    assert ("head.2.weight", 0, False) in table(one)


def test_steps_are_those_of_the_model_and_options_of_the_exporter_come_back() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    options = dict(vars(torch.fx.config))
    hooks = [len(net._forward_hooks), len(net._forward_pre_hooks)]
    found = exported(net, torch.zeros(2, 4), train=False)
    assert isinstance(found, Exported)
    assert [(step.name, step.shapes) for step in found.steps] == [
        ("linear", ((2, 3),)),
        ("relu", ((2, 3),)),
        ("linear", ((2, 2),)),
    ]
    assert [step_of(node) for node in found.calls] == [0, 1, 2]
    assert vars(torch.fx.config) == options
    assert [len(net._forward_hooks), len(net._forward_pre_hooks)] == hooks


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_split_at_a_number_is_blamed_also_where_it_returns_fewer_parts(parts: int) -> None:
    """The copy stops behind the split; what the split returned differs before."""
    graph = trace_units(Tail(lambda x: torch.cat(x.split(2, 1)[:1] * parts, 1), 2 * parts), IMAGE)
    assert graph.num_units == 0
    assert any("split in the model's forward cuts them at a fixed position" in line for line in graph.fixed)
