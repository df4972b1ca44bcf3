"""Removing units is exact where parameters are raw, shared, tied or computed, and for tokens."""

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


def tokens() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.patch(x).flatten(2).transpose(1, 2) + net.position  # [B, L, D]
        x = x + net.mix(x.transpose(1, 2)).transpose(1, 2)
        x = torch.cat([net.token.expand(x.shape[0], -1, -1), x], 1)
        return net.head(F.gelu(net.fc(x)).mean(1))

    return Net(
        forward, patch=nn.Conv2d(3, 6, 4, stride=4), position=parameter(1, 4, 6), token=parameter(1, 1, 6),
        mix=nn.Linear(4, 4), fc=nn.Linear(6, 5), head=nn.Linear(5, 2),
    )  # fmt: skip


def weight_normed() -> Net:
    norm = nn.utils.parametrizations.weight_norm
    return Net(
        lambda net, x: net.head(net.b(F.relu(net.a(x)))), a=conv(3, 5), b=norm(conv(5, 4)), head=conv(4, 2)
    )


def without_gradient() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(net.a(x))
        return net.head(net.b(x))

    return Net(forward, a=conv(3, 4), b=conv(4, 5), head=conv(5, 2))


def cut_by_constants() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        x = x[:, [2, 0, 1, 3]] + x[:, :4].softmax(1)
        return net.head(net.b(x))

    return Net(forward, a=conv(3, 4), b=conv(4, 5), head=conv(5, 2))


def reused() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.stem(x)
        return net.head(net.twice(F.relu(net.twice(x))) + x)

    return Net(forward, stem=conv(3, 5), twice=conv(5, 5), head=conv(5, 2))


def tied_transpose() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.code(F.relu(net.a(x.flatten(1)))))
        return net.head(F.relu(F.linear(x, net.code.weight.t())))

    return Net(forward, a=nn.Linear(192, 5), code=nn.Linear(5, 4), head=nn.Linear(5, 2))


def tied_embedding() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        words = net.words((x.flatten(1)[:, :3] > 0).long())
        return net.out(net.logits(net.fc(words)).mean(1))

    net = Net(
        forward, words=nn.Embedding(2, 4), fc=nn.Linear(4, 4), logits=nn.Linear(4, 2), out=nn.Linear(2, 2)
    )
    net.logits.weight = net.words.weight
    return net


def shared_over_positions() -> Net:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x).flatten(2)[:, :, :4]  # [B, 4 channels, 4 positions]
        return net.head(net.both(net.both(x).amax(2)))

    return Net(forward, a=conv(3, 4), both=nn.Linear(4, 4), head=nn.Linear(4, 2))


# Net, and how many units it has: too few would prove nothing, too many would be wrong.
NETS: dict[str, tuple[Callable[[], Net], int]] = {
    "raw_parameters": (raw_parameters, 5 + 6 + 4),
    "raw_buffer": (raw_buffer, 5),
    "tokens": (tokens, 6 + 5),
    "weight_normed": (weight_normed, 0),
    "without_gradient": (without_gradient, 9),
    "cut_by_constants": (cut_by_constants, 5),
    "reused": (reused, 5),
    "tied_transpose": (tied_transpose, 0),
    "tied_embedding": (tied_embedding, 4),
    "shared_over_positions": (shared_over_positions, 0),
}


@pytest.mark.parametrize("name", NETS)
def test_removal_is_exact(name: str, check_removal: Callable[[nn.Module, int], object]) -> None:
    build, num_units = NETS[name]
    check_removal(build(), num_units)
