"""Networks whose code does something odd beside its layers: what is removed changes nothing, and nothing is lost to it.

As in `test_awkward_nets`, about 40 % of all units are removed at once. What is left is traced once more, and must have
the very units that stayed: else a run would stop to shrink after its first cycle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsebayes.groups import tracing
from sparsebayes.groups.exporting import Exported, Failure, exported
from sparsebayes.groups.tracing import UnitGraph, trace_units
from sparsebayes.groups.unit_rules import unit_grouping
from sparsebayes.prune.architecture import Architecture
from sparsebayes.prune.compaction import compact
from sparsebayes.prune.masking import apply_masks_
from sparsebayes.prune.reshaping import reshape_


class Net(nn.Module):
    """Layers by name, and a forward given as a function of (net, x)."""

    def __init__(self, forward: Callable[[Net, Tensor], object], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def block(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, kernel), nn.BatchNorm2d(outputs), nn.ReLU())


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(net: nn.Module) -> nn.Module:
    """The net in float64 and evaluation mode, with norms that are not the identity."""
    for module in net.double().eval().modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
            for key in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, key, None)
                if value is not None:
                    value.data.uniform_(0.5, 1.5)
    return net


def outputs(result: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def check_removal(net: nn.Module, x: Tensor, num_units: int) -> UnitGraph:
    """Count the units, remove some of each layer that has two, compare in both modes, and count what is left."""
    net, x = prepared(net), x.double()
    graph = trace_units(net, x)
    assert graph.num_units == num_units, (graph, graph.fixed)
    on = torch.rand(num_units, generator=torch.Generator().manual_seed(1)) > 0.4
    for layer in range(len(graph.layers)):
        members = (graph.layer_index == layer).nonzero().flatten()
        on[members[0]] = True
        on[members[1:2]] = False
    masks = unit_grouping(net, graph).masks(on)
    done = compact(net, masks, x, units=graph)
    masked = copy.deepcopy(net)
    apply_masks_(masked, masks)
    for train in (False, True):
        expected, actual = outputs(masked.train(train)(x)), outputs(done.model.train(train)(x))
        for y, z in zip(expected, actual, strict=True):
            torch.testing.assert_close(z, y, atol=1e-9, rtol=1e-9)
    again = trace_units(done.model.eval(), x)
    assert again.num_units == int(on.sum()), (again, again.fixed)
    rebuilt = copy.deepcopy(net)
    reshape_(rebuilt, Architecture.from_json(done.architecture.to_json()))
    rebuilt.load_state_dict(done.model.state_dict())
    for y, z in zip(outputs(done.model(x)), outputs(rebuilt(x)), strict=True):
        assert torch.equal(y, z)
    return graph


class Attention(nn.Module):
    """Heads by two attributes, or by one of them and -1, brought back into one dimension by `merge`."""

    def __init__(self, heads: int, merge: Callable[[Attention, Tensor], Tensor], *, infer: bool) -> None:
        super().__init__()
        self.heads, self.size, self.infer, self.merge = heads, 4, infer, merge
        self.q, self.k, self.v = (nn.Linear(12, 4 * heads) for _ in range(3))
        self.o = nn.Linear(4 * heads, 12)

    def forward(self, x: Tensor) -> Tensor:
        heads = -1 if self.infer else self.heads
        q, k, v = (
            layer(x).view(*x.shape[:2], heads, self.size).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(2, 3) / 2.0).softmax(3)
        return self.o(self.merge(self, (weights @ v).transpose(1, 2)))


@pytest.mark.parametrize(
    ("merge", "infer"),
    [
        (lambda net, x: x.contiguous().view(*x.shape[:2], net.heads * net.size), False),
        (lambda net, x: x.contiguous().reshape(*x.shape[:2], -1), True),
        (lambda net, x: x.clone().flatten(2), False),
    ],
)
def test_heads_may_go_until_one_is_left_which_lies_in_memory_as_its_copy_would(
    merge: Callable[[Attention, Tensor], Tensor], infer: bool
) -> None:
    def net(heads: int) -> nn.Module:
        attend = Attention(heads, merge, infer=infer)
        return nn.Sequential(nn.Linear(5, 12), attend, nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 2))

    x = torch.randn(2, 6, 5)
    graph = check_removal(net(3), x, 34)
    assert torch.bincount(graph.layer_index)[graph.layers.index("1.q")] == 3
    graph = trace_units(net(2), x)
    assert graph.num_units == 33, graph.fixed


@pytest.mark.parametrize("norm", [False, True])
def test_layers_whose_results_nobody_uses_follow_what_they_read(norm: bool) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        net.c(F.relu(net.b(x)))
        return net.head(x)

    net = Net(forward, a=block(3, 6) if norm else conv(3, 6), b=conv(6, 5), c=conv(5, 4), head=conv(6, 2))
    graph = check_removal(net, IMAGES, 11)
    assert {"b.weight", "head.weight"} <= {piece.parameter for piece in graph.slices if piece.reads}
    assert "'c': 4 channels stay: no layer reads them" in graph.fixed


@pytest.mark.parametrize(
    ("unused", "units"),
    [
        (lambda net, x: x.mean(1), 6),
        (lambda net, x: x / x.shape[1], 6),
        (lambda net, x: net.a[0].weight.square().sum(), 6),
        (lambda net, x: x.view(x.shape[0], 6 * 64), 0),
        (lambda net, x: x + torch.zeros(6, 1, 1), 0),
    ],
)
def test_unused_results_let_channels_stay_only_where_they_need_their_number(
    unused: Callable[[Net, Tensor], Tensor], units: int
) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        unused(net, x)
        return net.head(x)

    net = Net(forward, a=block(3, 6), head=conv(6, 2))
    graph = trace_units(net, IMAGES)
    assert graph.num_units == units, graph.fixed
    if units:
        check_removal(net, IMAGES, units)
    else:
        assert "'a.0': 6 channels stay: the model's forward works sizes out of their number" in graph.fixed


@pytest.mark.parametrize(
    ("more", "units"),
    [
        (lambda y, early, late: (y, early.mean((2, 3))), 6),
        (lambda y, early, late: {"y": y, "features": [early]}, 6),
        (lambda y, early, late: late, 8),
    ],
)
def test_features_that_only_training_mode_returns_are_outputs(
    more: Callable[[Tensor, Tensor, Tensor], object], units: int
) -> None:
    def forward(net: Net, x: Tensor) -> object:
        early = net.a(x)
        late = net.b(early)
        y = net.head(late.mean((2, 3)))
        return more(y, early, late) if net.training else y

    net = Net(forward, a=block(3, 8), b=block(8, 6), head=nn.Linear(6, 2))
    graph = check_removal(net, IMAGES, units)
    assert any("channels stay: they are outputs of the model" in line for line in graph.fixed[:1]), (
        graph.fixed
    )
    assert trace_units(net.float(), IMAGES[:1]).num_units == units


def test_training_mode_is_exported_only_where_it_returns_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        net.kept = x if net.training else None
        return net.head(F.dropout(x, 0.5, net.training))

    modes: list[bool] = []

    def counted(model: nn.Module, example: Tensor, *, train: bool) -> Exported | Failure:
        modes.append(train)
        return exported(model, example, train=train)

    monkeypatch.setattr(tracing, "exported", counted)
    net = Net(forward, a=block(3, 8), head=conv(8, 2)).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert trace_units(net, IMAGES).num_units == 8
    assert modes == [False]
    assert net.kept is None and not net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_what_training_mode_returns_is_told_where_it_cannot_be_traced() -> None:
    class Own:
        """Something that the exporter cannot return."""

    def forward(net: Net, x: Tensor) -> object:
        x = net.head(net.a(x))
        return Own() if net.training else x

    graph = trace_units(Net(forward, a=block(3, 8), head=conv(8, 2)).eval(), IMAGES)
    assert graph.num_units == 8
    assert graph.fixed[-1].startswith("training mode cannot be traced: "), graph.fixed


@pytest.mark.parametrize(
    ("spread", "units"),
    [
        (lambda net, one, x: one, 8),
        (lambda net, one, x: one.expand_as(x), 8),
        (lambda net, one, x: one.mean((2, 3), keepdim=True).expand_as(x), 8),
        (lambda net, one, x: one.expand(-1, x.shape[1], -1, -1), 8),
        (lambda net, one, x: one.expand(x.shape), 8),
        (lambda net, one, x: one.repeat(1, x.shape[1], 1, 1), 8),
        (lambda net, one, x: one.repeat(1, net.width, 1, 1), 8),
        (lambda net, one, x: one.repeat(1, 8, 1, 1), 0),
        (lambda net, one, x: one.repeat_interleave(x.shape[1], 1), 0),
    ],
)
def test_one_channel_that_is_spread_over_others_does_not_tie_them(
    spread: Callable[[Net, Tensor, Tensor], Tensor], units: int
) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.head(x * spread(net, net.one(x).sigmoid(), x))

    net = Net(forward, a=block(3, 8), one=conv(8, 1), head=conv(8, 2))
    net.width = 8
    if units:
        graph = check_removal(net, IMAGES, units)
        assert graph.fixed[0].startswith("'one': 1 channels stay: they are spread over other channels by ")
    else:
        graph = trace_units(net, IMAGES)
        reason = "one channel is copied to the number of others before mul in the model's forward"
        assert graph.num_units == 0 and graph.fixed[0] == f"'a.0': 8 channels stay: {reason}"


@pytest.mark.parametrize(
    ("norm", "units"),
    [
        (nn.LayerNorm(8, elementwise_affine=False), 8),
        (nn.Sequential(nn.LayerNorm(8), nn.Sigmoid()), 8),
        (nn.GroupNorm(2, 8, affine=False), 4),
        (nn.GroupNorm(8, 8, affine=False), 8),
    ],
)
def test_a_channel_that_a_norm_makes_nonzero_goes_only_with_those_who_read_it(
    norm: nn.Module, units: int
) -> None:
    net = nn.Sequential(nn.Linear(5, 8), norm, nn.Linear(8, 3))
    x = torch.randn(4, 5)
    graph = check_removal(net, x, units)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    masks["0.weight"][2] = masks["0.bias"][2] = False
    done = compact(net, masks, x.double(), units=graph)
    alone = isinstance(norm, nn.GroupNorm) and norm.num_groups == 8  # its mean is 0, so it stays 0
    assert done.summary.units["0"] == (units - alone, units)


@pytest.mark.parametrize(
    ("layer", "units"),
    [
        (nn.Upsample(scale_factor=2, mode="nearest-exact"), 8),
        (nn.ChannelShuffle(2), 4),
    ],
)
def test_layers_without_weights_pass_units_on(layer: nn.Module, units: int) -> None:
    net = nn.Sequential(block(3, 8), layer, conv(8, 5, 1), nn.ReLU(), conv(5, 2))
    check_removal(net, IMAGES, units + 5)


def test_norms_without_tensors_follow_by_their_number_of_channels() -> None:
    norm = nn.InstanceNorm2d(8)
    net = nn.Sequential(conv(3, 8), norm, nn.ReLU(), conv(8, 2))
    graph = check_removal(net, IMAGES, 8)  # a warning of the norm would be an error here
    assert [(count.module, count.attribute) for count in graph.counts] == [("1", "num_features")]


def test_a_norm_without_tensors_does_not_tie_what_it_is_used_for() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(torch.cat([net.norm(net.a(x)), net.norm(net.b(x))], 1))

    net = Net(forward, a=conv(3, 8), b=conv(3, 8), norm=nn.InstanceNorm2d(8), head=conv(16, 2))
    assert trace_units(net, IMAGES).num_units == 16


@pytest.mark.parametrize("affine", [True, False])
def test_rms_norms_count_the_channels_of_a_residual_stream_that_are_gone(affine: bool) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.embed(x)
        x = x + net.down(F.silu(net.up(net.norm(x))))
        return net.head(net.last(x))

    net = Net(
        forward,
        embed=nn.Linear(5, 8),
        norm=nn.RMSNorm(8, elementwise_affine=affine),
        up=nn.Linear(8, 6),
        down=nn.Linear(6, 8),
        last=nn.RMSNorm(8, eps=1e-3, elementwise_affine=affine),
        head=nn.Linear(8, 2),
    )
    graph = check_removal(net, torch.randn(4, 3, 5), 14)
    assert graph.joint is not None and graph.joint.sum() == 8
    assert bool(graph.zero_preserving.all())
