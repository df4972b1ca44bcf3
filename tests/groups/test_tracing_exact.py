"""Removing units is exact: a net whose consumers read zeros equals the net that is cut by the slices.

The nets are the awkward ones: couplings through sums, concatenations, groups, gates, shuffles, shared layers.
The nets are run by their own code, so a wrong index, a missed coupling, or a size that the code takes for
granted shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebayes.groups.tracing import UnitGraph, trace_units

Surgery = Callable[..., Any]


class Net(nn.Module):
    """Layers by name, and a forward given as a function of (net, x)."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def chain() -> Net:
    layers = nn.Sequential(
        conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        conv(6, 5, bias=False), nn.BatchNorm2d(5), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Dropout(),
        nn.Flatten(), nn.Linear(20, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 4), nn.Softmax(1),
    )  # fmt: skip
    return Net(lambda net, x: net.layers(x), layers=layers)


def residual() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.bn(net.stem(x)))
        x = F.relu(x + net.b(F.relu(net.a(x))))
        x = F.relu(net.skip(x) + net.d(F.relu(net.c(x))))
        return net.head(x.mean((2, 3)))

    return Net(
        forward, stem=conv(3, 6), bn=nn.BatchNorm2d(6), a=conv(6, 4), b=conv(4, 6), c=conv(6, 5),
        d=conv(5, 8), skip=conv(6, 8, 1), head=nn.Linear(8, 3),
    )  # fmt: skip


def concat_then_add() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        both = torch.cat([net.a(x), net.b(x)], 1)
        return net.head((both + net.c(both)).flatten(1))

    return Net(forward, a=conv(3, 4), b=conv(3, 3), c=conv(7, 7), head=nn.Linear(7 * 64, 2))


def self_concat() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.head(torch.cat([x, F.relu(x), x.flip(1)], 1))

    return Net(forward, a=conv(3, 4), head=conv(12, 2))


def concat_over_space() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(torch.cat([net.a(x), net.b(x)], 3))

    return Net(forward, a=conv(3, 4), b=conv(3, 4), head=conv(4, 2))


def stacked() -> Net:
    return Net(
        lambda net, x: net.head(torch.stack([net.a(x), net.b(x)]).amax(0)),
        a=conv(3, 4),
        b=conv(3, 4),
        head=conv(4, 2),
    )


def depthwise() -> Net:
    layers = nn.Sequential(
        conv(3, 5, 1), nn.ReLU6(), conv(5, 5, 3, groups=5), nn.BatchNorm2d(5), nn.Hardswish(),
        conv(5, 10, 3, groups=5), conv(10, 4, 1), conv(4, 2, 1),
    )  # fmt: skip
    return Net(lambda net, x: net.layers(x), layers=layers)


def grouped() -> Net:
    layers = nn.Sequential(
        conv(3, 6), nn.ReLU(), conv(6, 9, 3, groups=3), nn.ELU(), conv(9, 4, 1), conv(4, 2, 1)
    )
    return Net(lambda net, x: net.layers(x), layers=layers)


def transposed() -> Net:
    layers = nn.Sequential(
        conv(3, 6), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2, stride=2), nn.BatchNorm2d(5), nn.LeakyReLU(),
        nn.ConvTranspose2d(5, 5, 3, groups=5), nn.ConvTranspose2d(5, 2, 1),
    )  # fmt: skip
    return Net(lambda net, x: net.layers(x), layers=layers)


def grouped_transposed() -> Net:
    layers = nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 8, 2, groups=2), conv(8, 2))
    return Net(lambda net, x: net.layers(x), layers=layers)


def squeeze_excite() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.silu(net.bn(net.a(x)))
        batch, channels = x.shape[:2]
        scale = x.mean((2, 3)).view(batch, channels)
        scale = torch.sigmoid(net.up(F.relu(net.down(scale)))).view(batch, channels, 1, 1)
        return net.head(x * scale)

    return Net(
        forward, a=conv(3, 6), bn=nn.BatchNorm2d(6), down=nn.Linear(6, 3), up=nn.Linear(3, 6), head=conv(6, 2)
    )  # fmt: skip


def spatial_attention() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.head(x * torch.sigmoid(net.attend(x)) + net.attend(x))

    return Net(forward, a=conv(3, 5), attend=conv(5, 1), head=conv(5, 2))


def gated() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.glu(net.a(x), 1)
        left, right = net.b(x).chunk(2, dim=1)
        return net.head(left * torch.sigmoid(right) / (1 + x.abs().mean()))

    return Net(forward, a=conv(3, 8), b=conv(4, 10), head=conv(5, 2))


def gated_by_channel() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        left, right = net.a(x).chunk(2, dim=1)
        return net.head(F.glu(torch.cat([left + right, right], 1), 1))

    return Net(forward, a=conv(3, 8), head=conv(4, 2))


def reused() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.head(net.twice(F.relu(net.twice(x))) + x)

    return Net(forward, stem=conv(3, 5), twice=conv(5, 5), head=conv(5, 2))


def raw_parameters() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x) * net.scale + net.shift.view(1, -1, 1, 1)
        x = F.relu(F.conv2d(x, net.kernel, padding=1))
        x = F.prelu(x, net.slope) + net.offset
        return torch.tanh(x.mean((2, 3)) @ net.matrix) @ net.last

    layers = {
        "scale": (5, 1, 1),
        "shift": (5,),
        "kernel": (6, 5, 3, 3),
        "slope": (6,),
        "offset": (1,),
        "matrix": (6, 4),
    }
    return Net(
        forward, a=conv(3, 5), last=parameter(4, 2), **{name: parameter(*s) for name, s in layers.items()}
    )


def raw_buffer() -> Net:
    net = Net(lambda net, x: net.head(torch.sigmoid(net.a(x) + net.table)), a=conv(3, 5), head=conv(5, 2))
    net.register_buffer("table", torch.randn(5, 1, 1))
    return net


def padded_shortcut() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        wide = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return net.head(F.relu(wide + net.down(x)))

    return Net(forward, a=conv(3, 4), down=nn.Conv2d(4, 8, 3, stride=2, padding=1), head=conv(8, 2))


def channels_last_flatten() -> Net:
    return Net(
        lambda net, x: net.fc2(F.relu(net.fc1(net.a(x).permute(0, 2, 3, 1).flatten(1)))), a=conv(3, 4),
        fc1=nn.Linear(256, 5), fc2=nn.Linear(5, 2),
    )  # fmt: skip


def tokens() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2) + net.position  # [B, L, D]
        x = x + net.mix(x.transpose(1, 2)).transpose(1, 2)
        x = torch.cat([net.token.expand(x.shape[0], -1, -1), x], 1)
        return net.head(F.gelu(net.fc(x))[:, 0])

    return Net(
        forward, patch=nn.Conv2d(3, 6, 4, stride=4), position=parameter(1, 4, 6), token=parameter(1, 1, 6),
        mix=nn.Linear(4, 4), fc=nn.Linear(6, 5), head=nn.Linear(5, 2),
    )  # fmt: skip


def pixel_shuffled() -> Net:
    return Net(lambda net, x: net.head(F.pixel_shuffle(net.a(x), 2)), a=conv(3, 12), head=conv(3, 2))


def shuffled() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return net.head(net.b(x))

    return Net(forward, a=conv(3, 8), b=conv(8, 8, groups=2), head=conv(8, 2))


def in_place() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        kept = x
        x.add_(net.b(x)).mul_(0.5)
        return net.head(kept.relu_() + x)

    return Net(forward, a=conv(3, 5), b=conv(5, 5), head=conv(5, 2))


def sequence() -> Net:
    layers = nn.Sequential(
        nn.Conv1d(2, 6, 3), nn.InstanceNorm1d(6, affine=True), nn.PReLU(), nn.AvgPool1d(2), nn.Conv1d(6, 4, 2)
    )
    return Net(
        lambda net, x: net.fc(net.layers(x.flatten(2)[:, :2]).mean(2)), layers=layers, fc=nn.Linear(4, 2)
    )


def upsampled() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        small = net.a(F.avg_pool2d(x, 2))
        return net.head(
            F.interpolate(small, scale_factor=2.0, mode="bilinear") + F.interpolate(small, size=(8, 8))
        )

    return Net(forward, a=conv(3, 5), head=conv(5, 2))


def cut_by_constants() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        x = x[:, [2, 0, 1, 3]] + x[:, :4].softmax(1)
        return net.head(net.b(x))

    return Net(forward, a=conv(3, 4), b=conv(4, 5), head=conv(5, 2))


def attention() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2)
        x = x + net.attention(x, x, x, need_weights=False)[0]
        x = net.norm(x)
        return net.fc2(F.gelu(net.fc1(x))).mean(1)

    return Net(
        forward, patch=nn.Conv2d(3, 8, 4, stride=4), attention=nn.MultiheadAttention(8, 2, batch_first=True),
        norm=nn.LayerNorm(8), fc1=nn.Linear(8, 6), fc2=nn.Linear(6, 2),
    )  # fmt: skip


def weight_normed() -> Net:
    norm = nn.utils.parametrizations.weight_norm
    return Net(
        lambda net, x: net.head(net.b(F.relu(net.a(x)))), a=conv(3, 5), b=norm(conv(5, 4)), head=conv(4, 2)
    )


def recurrent() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).flatten(2).transpose(1, 2)
        return net.head(net.fc(net.lstm(x)[0][:, -1]))

    return Net(
        forward, a=conv(3, 4), lstm=nn.LSTM(4, 3, batch_first=True), fc=nn.Linear(3, 5), head=nn.Linear(5, 2)
    )


# Net, and how many units it has: too few would prove nothing, too many would be wrong.
NETS: dict[str, tuple[Callable[[], Net], int]] = {
    "chain": (chain, 6 + 5 + 7 + 6),
    "residual": (residual, 6 + 4 + 5 + 8),
    "concat_then_add": (concat_then_add, 7),
    "self_concat": (self_concat, 4),
    "concat_over_space": (concat_over_space, 4),
    "stacked": (stacked, 4),
    "depthwise": (depthwise, 5 + 4),
    "grouped": (grouped, 2 + 3 + 4),
    "transposed": (transposed, 6 + 5),
    "grouped_transposed": (grouped_transposed, 3 + 4),
    "squeeze_excite": (squeeze_excite, 6 + 3),
    "spatial_attention": (spatial_attention, 5),
    "gated": (gated, 0 + 5),
    "gated_by_channel": (gated_by_channel, 4),
    "reused": (reused, 5),
    "raw_parameters": (raw_parameters, 5 + 6 + 4),
    "raw_buffer": (raw_buffer, 5),
    "padded_shortcut": (padded_shortcut, 4),
    "channels_last_flatten": (channels_last_flatten, 4 + 5),
    "tokens": (tokens, 6 + 5),
    "pixel_shuffled": (pixel_shuffled, 3),
    "shuffled": (shuffled, 2 + 4),
    "in_place": (in_place, 5),
    "sequence": (sequence, 6 + 4),
    "upsampled": (upsampled, 5),
    "cut_by_constants": (cut_by_constants, 5),
    "attention": (attention, 6),
    "weight_normed": (weight_normed, 0),
    "recurrent": (recurrent, 5),
}


def prepared(name: str) -> tuple[Net, UnitGraph, Tensor]:
    """The net in float64 with norms that are not the identity, its units, and a batch of inputs."""
    net = NETS[name][0]().double().eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.InstanceNorm1d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                if value is not None:
                    value.data.uniform_(0.5, 1.5)
    x = torch.randn(3, 3, 8, 8).double()
    return net, trace_units(net, x), x


@pytest.mark.parametrize("name", NETS)
def test_masked_equals_cut(name: str, masked: Surgery, cut: Surgery, random_subset: Surgery) -> None:
    net, graph, x = prepared(name)
    assert graph.num_units == NETS[name][1], graph.fixed
    for seed in range(3 if graph.num_units else 0):
        on = random_subset(graph, seed)
        small = cut(net, graph, on)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
        expected = masked(net, graph, on, reads=True)(x)
        torch.testing.assert_close(small(x), expected, atol=1e-11, rtol=1e-11)
        assert not torch.allclose(expected, net(x), atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_units_without_entries_are_read_as_zero_where_the_graph_says_so(
    name: str, masked: Surgery, random_subset: Surgery
) -> None:
    net, graph, x = prepared(name)
    for seed in range(3):
        on = random_subset(graph, seed) | ~graph.zero_preserving
        dead = masked(net, graph, on, reads=False)
        torch.testing.assert_close(dead(x), masked(dead, graph, on, reads=True)(x), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", ["chain", "raw_buffer"])
def test_units_that_are_read_as_non_zero_are_told_apart(name: str, masked: Surgery) -> None:
    net, graph, x = prepared(name)
    assert not bool(graph.zero_preserving.all())
    on = graph.zero_preserving.clone()
    dead = masked(net, graph, on, reads=False)
    assert not torch.allclose(dead(x), masked(dead, graph, on, reads=True)(x), atol=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_every_unit_has_own_entries_and_a_reader(name: str) -> None:
    _, graph, _ = prepared(name)
    for reads in (False, True):
        found = [part.unit for part in graph.slices if part.reads == reads]
        units = torch.cat([*found, torch.tensor([-1])]).unique().tolist()
        assert units[-graph.num_units :] == list(range(graph.num_units)) or not graph.num_units
    assert not any("no layer reads them" in line for line in graph.fixed)
