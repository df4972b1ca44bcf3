"""Removing units is exact: a net whose consumers read zeros equals the net that is cut by the slices.

The nets are the awkward ones: couplings through sums, concatenations, groups, gates, shuffles, shared layers.
The nets are run by their own code, so a wrong index, a missed coupling, or a size that the code takes for
granted shows.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        nn.Flatten(), nn.Linear(20, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6),
        nn.Sigmoid(), nn.Linear(6, 4), nn.Softmax(1),
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
        lambda net, x: net.head(torch.stack([net.a(x), net.b(x)], 1).amax(1)),
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
    "padded_shortcut": (padded_shortcut, 4),
    "channels_last_flatten": (channels_last_flatten, 4 + 5),
    "pixel_shuffled": (pixel_shuffled, 3),
    "shuffled": (shuffled, 2 + 4),
    "in_place": (in_place, 5),
    "sequence": (sequence, 6 + 4),
    "upsampled": (upsampled, 5),
}


@pytest.mark.parametrize("name", NETS)
def test_removal_is_exact(name: str, check_removal: Callable[[nn.Module, int], object]) -> None:
    build, num_units = NETS[name]
    check_removal(build(), num_units)
