"""Small nets that pruning tools get wrong: each couples its channels in a way of its own.

From each, about 40 % of all units are removed at once. The compacted net must equal the masked one: forward, in
evaluation and in training mode, and the gradients of all parameters that stay. What stays of a net although it is
a channel must be named, with the reason.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsebayes.groups.tracing import UnitGraph, trace_units
from sparsebayes.groups.unit_rules import unit_grouping
from sparsebayes.prune.architecture import Architecture, architecture_of
from sparsebayes.prune.compaction import compact, cut
from sparsebayes.prune.masking import prune_
from sparsebayes.prune.reshaping import reshape_
from sparsebayes.prune.selection import Selection


class Net(nn.Module):
    """Layers by name, and a forward given as a function of (net, x)."""

    def __init__(self, forward: Callable[[Net, Tensor], object], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)


def block(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, kernel, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def self_concat() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.head(torch.cat([x, F.relu(x), x.flip(1)], 1))

    return Net(forward, a=block(3, 6), head=conv(18, 2))


def concat_then_add() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        both = torch.cat([net.a(x), net.b(x)], 1)
        return net.head(F.relu(both + net.c(both)))

    return Net(forward, a=block(3, 5), b=block(3, 4), c=block(9, 9), head=conv(9, 2))


def squeeze_excite() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        batch, channels = x.shape[:2]
        gate = net.up(F.relu(net.down(x.mean((2, 3))))).sigmoid()
        return net.head(x * gate.view(batch, channels, 1, 1))

    return Net(forward, a=block(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), head=conv(8, 2))


def flatten_channels_first() -> nn.Module:
    return nn.Sequential(
        block(3, 6), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, 2)
    )


def flatten_channels_last() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.max_pool2d(net.a(x), 4).permute(0, 2, 3, 1)
        return net.fc2(F.relu(net.fc1(x.reshape(x.shape[0], -1))))

    return Net(forward, a=block(3, 6), fc1=nn.Linear(24, 7), fc2=nn.Linear(7, 2))


def reused_convolution() -> Net:
    return Net(lambda net, x: net.head(net.b(net.b(net.a(x)))), a=block(3, 6), b=conv(6, 6), head=conv(6, 2))


def layer_scale() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.head(x + net.scale * net.b(x))

    return Net(forward, a=block(3, 6), b=conv(6, 6), scale=parameter(6, 1, 1), head=conv(6, 2))


def chunked_gate() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        value, gate = net.a(x).chunk(2, 1)
        return net.head(value * gate.sigmoid())

    return Net(forward, a=conv(3, 12), head=conv(6, 2))


def functional_glu() -> Net:
    return Net(lambda net, x: net.head(F.glu(net.a(x), 1)), a=conv(3, 12), head=conv(6, 2))


class SplitByAttribute(nn.Module):
    """The C2f block of YOLO: one half passes by, its width is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.a, self.b, self.head = block(3, 12), block(6, 6), conv(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        kept, used = self.a(x).split((self.width, self.width), 1)
        return self.head(torch.cat([kept, used, self.b(used)], 1))


def split_at_numbers() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        first, second = net.b(net.a(x)).split([2, 6], 1)
        return net.head(torch.cat([first * second.mean(1, keepdim=True), F.relu(net.c(second))], 1))

    return Net(forward, a=block(3, 8), b=conv(8, 8), c=conv(6, 5), head=conv(7, 2))


def slice_in_half() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        half = x.shape[1] // 2
        return net.head(x[:, :half] * x[:, half:].sigmoid())

    return Net(forward, a=block(3, 12), head=conv(6, 2))


def slice_at_number() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.head(torch.cat([x[:, :3].relu(), net.b(x[:, 3:])], 1))

    return Net(forward, a=block(3, 10), b=conv(7, 4), head=conv(7, 2))


def transposed_convolution() -> nn.Module:
    up = nn.ConvTranspose2d(6, 5, 2, stride=2)
    return nn.Sequential(block(3, 6), nn.MaxPool2d(2), up, nn.BatchNorm2d(5), nn.ReLU(), conv(5, 2))


def recurrent(kind: type[nn.RNNBase] = nn.LSTM, layers: int = 1, both_ways: bool = False) -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).flatten(2).transpose(1, 2)
        return net.fc2(F.relu(net.fc1(net.rnn(x)[0][:, -1])))

    rnn = kind(6, 5, num_layers=layers, bidirectional=both_ways, batch_first=True)
    width = 10 if both_ways else 5
    return Net(forward, a=block(3, 6), rnn=rnn, fc1=nn.Linear(width, 6), fc2=nn.Linear(6, 2))


def channel_shuffle() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return net.head(net.b(x.view(batch, channels, height, width)))

    return Net(forward, a=block(3, 12), b=conv(12, 12, groups=2), head=conv(12, 2))


def padded_shortcut() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        wide = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
        return net.head(F.relu(wide + net.c(F.relu(net.b(x)))))

    down = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    return Net(forward, a=block(3, 6), b=down, c=conv(8, 12), head=conv(12, 2))


def pixel_shuffle() -> Net:
    return Net(lambda net, x: net.head(F.pixel_shuffle(net.a(x), 2)), a=block(3, 24), head=conv(6, 2))


def pixel_unshuffle() -> Net:
    return Net(lambda net, x: net.head(F.pixel_unshuffle(net.a(x), 2)), a=block(3, 6), head=conv(24, 2))


def functional_parameter() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(F.conv2d(net.a(x), net.kernel, net.shift, padding=1)))

    return Net(forward, a=block(3, 6), kernel=parameter(5, 6, 3, 3), shift=parameter(5), head=conv(5, 2))


def depthwise_multiplier() -> nn.Module:
    return nn.Sequential(
        block(3, 6), conv(6, 12, groups=6), nn.BatchNorm2d(12), nn.ReLU6(), conv(12, 5, 1), conv(5, 2, 1)
    )


def grouped_convolution() -> nn.Module:
    return nn.Sequential(block(3, 12), conv(12, 18, groups=3), nn.BatchNorm2d(18), nn.ReLU(), conv(18, 2))


def mixed_edge() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        share = net.alpha.softmax(0)
        return net.head(share[0] * net.b(x) + share[1] * F.avg_pool2d(x, 3, 1, 1) + share[2] * x)

    return Net(forward, a=block(3, 6), b=block(6, 6), alpha=parameter(3), head=conv(6, 2))


def frozen_layers() -> nn.Module:
    net = nn.Sequential(block(3, 6), block(6, 7), conv(7, 2))
    net[0].requires_grad_(False)
    return net


def constant_permutation() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(net.b(net.a(x)[:, [2, 0, 1, 5, 4, 3]]))

    return Net(forward, a=block(3, 6), b=block(6, 5), head=conv(5, 2))


def weight_norm() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(conv(6, 5))
    return nn.Sequential(block(3, 6), conv(6, 6), normed, block(5, 4), conv(4, 2))


def spectral_norm() -> nn.Module:
    normed = nn.utils.parametrizations.spectral_norm(conv(6, 5))
    return nn.Sequential(block(3, 6), conv(6, 6), normed, block(5, 4), conv(4, 2))


def group_norm() -> nn.Module:
    return nn.Sequential(
        conv(3, 12), nn.GroupNorm(2, 12), nn.SiLU(), conv(12, 5), nn.GroupNorm(5, 5), conv(5, 2)
    )


def layer_norm() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2)
        x = x + net.down(F.gelu(net.up(net.norm(x))))
        return net.head(net.last(x).mean(1))

    return Net(
        forward, patch=nn.Conv2d(3, 8, 4, stride=4), norm=nn.LayerNorm(8), up=nn.Linear(8, 12),
        down=nn.Linear(12, 8), last=nn.LayerNorm(8), head=nn.Linear(8, 2),
    )  # fmt: skip


def functional_layer_norm() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.layer_norm(net.patch(x).flatten(2).transpose(1, 2), (8,))
        return net.head(F.relu(net.fc(x)).mean(1))

    return Net(forward, patch=nn.Conv2d(3, 8, 4, stride=4), fc=nn.Linear(8, 6), head=nn.Linear(6, 2))


def instance_norm() -> nn.Module:
    return nn.Sequential(
        conv(3, 6), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), conv(6, 5), nn.PReLU(5), conv(5, 2)
    )


class Attention(nn.Module):
    """Fused query, key and value; its sizes are attributes, or worked out from the width of the tokens."""

    def __init__(self, width: int, heads: int, *, attributes: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attributes = heads, width // heads, attributes
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        head_dim = self.head_dim if self.attributes else width // self.num_heads
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2)
        inner = self.num_heads * self.head_dim if self.attributes else width
        return self.proj(mixed.reshape(batch, length, inner))


def attention(*, attributes: bool = True) -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2)
        x = x + net.attend(x)
        return net.head(F.relu(net.fc(x)).mean(1))

    return Net(
        forward, patch=nn.Conv2d(3, 12, 4, stride=4), attend=Attention(12, 4, attributes=attributes),
        fc=nn.Linear(12, 6), head=nn.Linear(6, 2),
    )  # fmt: skip


class SeparateAttention(nn.Module):
    """Query, key and value by a layer each, products written out, scaled by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 3, 4
        self.q, self.k, self.v = nn.Linear(9, 12), nn.Linear(9, 12), nn.Linear(9, 12)
        self.out = nn.Linear(12, 9)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = (q @ k.transpose(-2, -1) / self.size**0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def separate_attention() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2)
        return net.head((x + net.attend(x)).mean(1))

    return Net(forward, patch=nn.Conv2d(3, 9, 4, stride=4), attend=SeparateAttention(), head=nn.Linear(9, 2))


def multihead_attention() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2)
        y = net.norm(x)
        x = x + net.attend(y, y, y, need_weights=False)[0]
        return net.head(x.mean(1))

    return Net(
        forward, patch=nn.Conv2d(3, 12, 4, stride=4), norm=nn.LayerNorm(12),
        attend=nn.MultiheadAttention(12, 4, batch_first=True), head=nn.Linear(12, 2),
    )  # fmt: skip


def cross_attention() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        image = net.patch(x).flatten(2).transpose(1, 2)
        asked = net.query.expand(x.shape[0], -1, -1)
        return net.head(net.attend(asked, image, image)[0].mean(1))

    return Net(
        forward, patch=nn.Conv2d(3, 12, 4, stride=4), query=parameter(1, 3, 12),
        attend=nn.MultiheadAttention(12, 3, batch_first=True), head=nn.Linear(12, 2),
    )  # fmt: skip


def transformer_layer() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(net.layer(net.patch(x).flatten(2).transpose(1, 2)).mean(1))

    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=True)
    return Net(forward, patch=nn.Conv2d(3, 8, 4, stride=4), layer=layer, head=nn.Linear(8, 2))


def embedding() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.head(F.relu(net.fc(net.table(x))).mean(1))

    return Net(forward, table=nn.Embedding(11, 7), fc=nn.Linear(7, 6), head=nn.Linear(6, 2))


def tied_embedding() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.table(x)
        return net.head(x + net.down(F.relu(net.up(x))))

    table, head = nn.Embedding(11, 7), nn.Linear(7, 11, bias=False)
    head.weight = table.weight
    return Net(forward, table=table, up=nn.Linear(7, 9), down=nn.Linear(9, 7), head=head)


def auxiliary_head() -> Net:
    def forward(net: Net, x: Tensor) -> object:
        x = net.a(x)
        main = net.head(net.b(x))
        return (main, net.aux(F.relu(net.side(x)))) if net.training else main

    return Net(forward, a=block(3, 8), b=block(8, 6), side=conv(8, 5), aux=conv(5, 2), head=conv(6, 2))


def branch_on_shape() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        if x.shape[2] > 4:
            x = F.avg_pool2d(x, 2)
        return net.head(net.a(x) if x.shape[1] == 3 else net.b(x))

    return Net(forward, a=block(3, 6), b=block(4, 6), head=conv(6, 2))


def unused_parameters() -> Net:
    return Net(
        lambda net, x: net.head(net.a(x)), a=block(3, 6), head=conv(6, 2), spare=conv(6, 3), bare=parameter(4)
    )


def einsum() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = torch.einsum("bchw,oc->bohw", net.a(x), net.mix).relu()
        return torch.einsum("bchw,cd->bd", x, net.last)

    return Net(forward, a=block(3, 6), mix=parameter(5, 6), last=parameter(5, 2))


def matmul() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).mean((2, 3)) @ net.first
        return torch.addmm(net.shift, x.relu(), net.last)

    return Net(forward, a=block(3, 6), first=parameter(6, 5), last=parameter(5, 2), shift=parameter(2))


def group_reaches_output() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return x + net.c(F.relu(net.b(x)))

    return Net(forward, a=conv(3, 5), b=conv(5, 7), c=conv(7, 5))


def two_outputs() -> Net:
    def forward(net: Net, x: Tensor) -> object:
        x = net.a(x)
        hidden = net.b(x)
        return {"features": hidden, "logits": net.head(F.relu(net.c(hidden + net.d(x))))}

    return Net(forward, a=block(3, 6), b=conv(6, 4), c=block(4, 5), d=conv(6, 4), head=conv(5, 2))


def channel_dropout() -> nn.Module:
    return nn.Sequential(block(3, 6), nn.Dropout2d(0.3), block(6, 5), nn.Dropout(), conv(5, 2))


def u_net() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        left = net.a(x)
        low = net.b(F.max_pool2d(left, 2))
        up = F.interpolate(low, size=left.shape[2:], mode="bilinear", align_corners=False)
        return net.head(net.c(torch.cat([left, up], 1)))

    return Net(forward, a=block(3, 6), b=block(6, 7), c=block(13, 5), head=conv(5, 2))


def inception() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        parts = [net.a(x), net.c(net.b(x)), net.d(F.max_pool2d(x, 3, 1, 1)), x]
        return net.head(torch.cat(parts, 1).mean((2, 3)))

    return Net(
        forward, stem=block(3, 6), a=block(6, 4, 1), b=block(6, 5, 1), c=block(5, 4), d=block(6, 3, 1),
        head=nn.Linear(17, 2),
    )  # fmt: skip


class ResidualBlock(nn.Module):
    """The basic block of a ResNet, with its sum in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


def residual() -> nn.Module:
    return nn.Sequential(
        block(3, 6),
        ResidualBlock(6, 6),
        ResidualBlock(6, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def darts_cell() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        first, second = net.a(x), net.b(x)
        third = net.c(first) + F.max_pool2d(second, 3, 1, 1)
        fourth = net.d(third) + first
        return net.head(torch.cat([third, fourth], 1).mean((2, 3)))

    separable = nn.Sequential(
        nn.ReLU(), conv(6, 6, groups=6, bias=False), conv(6, 6, 1, bias=False), nn.BatchNorm2d(6)
    )
    return Net(forward, a=block(3, 6), b=block(3, 6), c=separable, d=block(6, 6), head=nn.Linear(12, 2))


# Builder, and how many units the net has: fewer would refuse too much, more would be wrong.
NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "self concat": (self_concat, 6),
    "concat then add": (concat_then_add, 9),
    "squeeze excite": (squeeze_excite, 12),
    "flatten, channels first": (flatten_channels_first, 13),
    "flatten, channels last": (flatten_channels_last, 13),
    "reused convolution": (reused_convolution, 6),
    "layer scale": (layer_scale, 6),
    "chunked gate": (chunked_gate, 6),
    "functional glu": (functional_glu, 6),
    "split by attribute": (SplitByAttribute, 12),
    "split at numbers": (split_at_numbers, 13),
    "slice in half": (slice_in_half, 6),
    "slice at number": (slice_at_number, 11),
    "transposed convolution": (transposed_convolution, 11),
    "lstm": (recurrent, 17),
    "two-layer bidirectional gru": (lambda: recurrent(nn.GRU, 2, True), 17),
    "rnn": (lambda: recurrent(nn.RNN), 17),
    "channel shuffle": (channel_shuffle, 9),
    "padded shortcut": (padded_shortcut, 14),
    "pixel shuffle": (pixel_shuffle, 6),
    "pixel unshuffle": (pixel_unshuffle, 6),
    "functional parameter": (functional_parameter, 11),
    "depthwise multiplier": (depthwise_multiplier, 11),
    "grouped convolution": (grouped_convolution, 10),
    "mixed edge": (mixed_edge, 6),
    "frozen layers": (frozen_layers, 13),
    "constant permutation": (constant_permutation, 5),
    "weight norm": (weight_norm, 10),
    "spectral norm": (spectral_norm, 10),
    "group norm": (group_norm, 11),
    "layer norm": (layer_norm, 20),
    "functional layer norm": (functional_layer_norm, 6),
    "instance norm": (instance_norm, 11),
    "attention by attributes": (attention, 22),
    "attention by arithmetic": (lambda: attention(attributes=False), 6),
    "separate attention": (separate_attention, 12),
    "multi-head attention": (multihead_attention, 16),
    "cross attention": (cross_attention, 27),
    "transformer layer": (transformer_layer, 22),
    "embedding": (embedding, 13),
    "tied embedding": (tied_embedding, 16),
    "auxiliary head": (auxiliary_head, 19),
    "branch on shape": (branch_on_shape, 6),
    "unused parameters": (unused_parameters, 6),
    "einsum": (einsum, 11),
    "matmul": (matmul, 11),
    "group reaches output": (group_reaches_output, 7),
    "two outputs": (two_outputs, 11),
    "channel dropout": (channel_dropout, 11),
    "u-net": (u_net, 18),
    "inception": (inception, 22),
    "residual": (residual, 28),
    "darts cell": (darts_cell, 12),
}
# These take token numbers [B, 6], all others images [B, 3, 8, 8].
TOKENS = {"embedding", "tied embedding"}
# In training mode other random numbers are drawn for other widths.
RANDOM = {"channel dropout"}
# What a net refuses to give, by name and with the reason.
REFUSED = {
    "split at numbers": "'b': 8 channels stay: mean in the model's forward works over channels",
    "slice at number": "'a.0': 3 channels stay: slice in the model's forward cuts them at a fixed position",
    "padded shortcut": "'c': 6 channels stay: they are combined with values that stay by add",
    "mixed edge": "'alpha': 3 channels stay: softmax in the model's forward works over channels",
    "constant permutation": "'a.0': 6 channels stay: index in the model's forward reads them at fixed positions",
    "weight norm": "'1': 6 channels stay: the weight of conv2d at '2' is computed by other operations",
    "spectral norm": "'1': 6 channels stay: the weight of conv2d at '2' is computed by other operations",
    "functional layer norm": "'patch': 8 channels stay: the statistics of layer_norm in the model's forward",
    "attention by arithmetic": "'patch': 12 channels stay: the code of 'attend' works sizes out of their number",
    "tied embedding": "'table': 11 channels stay",
    "unused parameters": "'spare' is never used by the model's forward",
    "group reaches output": "'a': 5 channels stay: they are outputs of the model",
    "two outputs": "'b': 4 channels stay: they are outputs of the model",
}


def example_for(name: str) -> Tensor:
    return torch.randint(0, 11, (3, 6)) if name in TOKENS else torch.randn(3, 3, 8, 8).double()


def built(name: str) -> nn.Module:
    """The net in float64 and evaluation mode, with norms that are not the identity."""
    torch.manual_seed(0)
    net = NETS[name][0]().double().eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
            for key in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, key, None)
                if value is not None:
                    value.data.uniform_(0.5, 1.5)
    return net


def about_sixty_percent(graph: UnitGraph) -> Tensor:
    """Which units stay: at least one of each layer, and not all of a layer that has two."""
    generator = torch.Generator().manual_seed(1)
    on = torch.rand(graph.num_units, generator=generator) > 0.4
    for layer in range(len(graph.layers)):
        members = (graph.layer_index == layer).nonzero().flatten()
        if not bool(on[members].any()):
            on[members[0]] = True
        if bool(on[members].all()) and len(members) > 1:
            on[members[-1]] = False
    return on


def outputs(result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [tensor for value in values for tensor in outputs(value)]


def gradients(net: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradient of a weighted sum of them in each parameter."""
    net.zero_grad()
    results = outputs(net(x))
    generator = torch.Generator().manual_seed(2)
    total = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in results)
    total.backward()
    return results, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@functools.cache
def traced(name: str) -> tuple[nn.Module, Tensor, UnitGraph]:
    net, x = built(name), example_for(name)
    return net, x, trace_units(net, x)


@pytest.mark.parametrize("name", NETS)
def test_what_is_removed_from_an_awkward_net_changes_nothing(name: str) -> None:
    net, x, graph = traced(name)
    assert graph.num_units == NETS[name][1], graph
    if name in REFUSED:
        assert any(line.startswith(REFUSED[name]) for line in graph.fixed), graph.fixed
    grouping = unit_grouping(net, graph)
    on = about_sixty_percent(graph)
    selection = Selection(grouping.name, on, grouping.layers, grouping.layer_index, grouping.fingerprint())
    masked = copy.deepcopy(net)
    masks = prune_(masked, grouping, selection).masks
    done = compact(net, masks, x, units=graph)

    before = sum(p.numel() for p in net.parameters())
    assert sum(p.numel() for p in done.model.parameters()) < before
    entries = sum(int(mask.sum()) for mask in masks.values())
    assert done.summary.params_after <= entries + before - sum(mask.numel() for mask in masks.values())
    for train in (False,) if name in RANDOM else (False, True):
        expected, slopes = gradients(masked.train(train), x)
        actual, small_slopes = gradients(done.model.train(train), x)
        for y, z in zip(expected, actual, strict=True):
            torch.testing.assert_close(z, y, atol=1e-9, rtol=1e-9)
        assert small_slopes.keys() == slopes.keys()
        for key, slope in slopes.items():
            torch.testing.assert_close(
                small_slopes[key], cut(slope, done.kept.get(key, {})), atol=1e-9, rtol=1e-9
            )


@pytest.mark.parametrize("name", NETS)
def test_a_compacted_awkward_net_is_rebuilt_from_its_description(name: str) -> None:
    net, x, graph = traced(name)
    grouping = unit_grouping(net, graph)
    small = compact(net, grouping.masks(about_sixty_percent(graph)), x, units=graph)
    rebuilt = built(name)
    reshape_(rebuilt, Architecture.from_json(small.architecture.to_json()))
    rebuilt.load_state_dict(small.model.state_dict())
    for y, z in zip(outputs(small.model(x)), outputs(rebuilt(x)), strict=True):
        assert torch.equal(y, z)
    assert architecture_of(rebuilt) == small.architecture
    # And it is a network like any other: traced and compacted once more.
    again = trace_units(rebuilt, x)
    if again.num_units:
        grouping = unit_grouping(rebuilt, again)
        on = about_sixty_percent(again)
        twice = compact(rebuilt, grouping.masks(on), x, units=again)
        assert twice.summary.params_after <= small.summary.params_after


def test_enough_nets_give_units_and_the_rest_is_refused_by_name() -> None:
    assert len(NETS) >= 50
    assert sum(units > 0 for _, units in NETS.values()) >= 50
