"""Tiny float64 networks that between them use a parameter in every way the curvature must understand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional


class Residual(nn.Module):
    """Convolution, norm, in-place activation, depthwise and grouped convolutions, a skip, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4, padding="same", dilation=2)
        self.grouped = nn.Conv2d(4, 6, (3, 2), groups=2, bias=False)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.norm(self.conv1(x)), inplace=True)
        h = h + self.depthwise(h).sigmoid_()
        return self.fc(functional.avg_pool2d(self.grouped(h).relu_(), (2, 3)).flatten(1))


class Shared(nn.Module):
    """One layer called twice, and a parameter that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, 4)
        self.twice = nn.Linear(4, 4)
        self.leave = nn.Linear(4, 3, bias=False)
        self.scale = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(functional.gelu(self.enter(x)))
        return self.leave(self.twice(torch.tanh(h)) * self.scale)


class Sequence(nn.Module):
    """Linear layers and layer norms over a sequence, without batch dims folded away."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.whole = nn.LayerNorm((5, 4))
        self.mix = nn.Conv1d(4, 4, 2, padding=1, padding_mode="circular")
        self.leave = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(self.norm(self.enter(x))).transpose(1, 2)
        return self.leave(self.whole(functional.silu(self.mix(h)).transpose(1, 2))).mean(1)


class Gathered(nn.Module):
    """A linear layer that reads some columns of its input, without being an `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.weight = nn.Parameter(torch.randn(3, 5))
        self.register_buffer("columns", torch.tensor([0, 2, 3, 6, 7]))

    def forward(self, x: Tensor) -> Tensor:
        h = functional.max_pool2d(self.conv(x).relu(), 2).flatten(1)
        return functional.linear(h.index_select(-1, self.columns), self.weight)


class Fork(nn.Module):
    """A map that two convolutions and a mean read."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 3, 2)
        self.left = nn.Conv2d(3, 3, 1)
        self.right = nn.Conv2d(3, 3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        return self.left(h).sum((2, 3)) + self.right(h).tanh().sum((2, 3)) + h.mean((1, 2, 3)).unsqueeze(1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ELU(inplace=True), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 3))


def _volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 3, (1, 2, 2), dilation=(1, 2, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    )


_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (_mlp, (5,)),
    "residual": (Residual, (2, 8, 8)),
    "fork": (Fork, (1, 4, 4)),
    "shared": (Shared, (5,)),
    "sequence": (Sequence, (4, 3)),
    "gathered": (Gathered, (1, 6, 6)),
    "volume": (_volume, (1, 2, 3, 3)),
}

Build = Callable[[str, int], tuple[nn.Module, Tensor]]


def _build(name: str, num_images: int) -> tuple[nn.Module, Tensor]:
    kind, shape = _NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = kind().double()
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.normal_()
            elif buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
        return model.eval(), torch.randn(num_images, *shape, dtype=torch.float64)


@pytest.fixture(params=sorted(_NETWORKS))
def network_name(request: pytest.FixtureRequest) -> str:
    """Every network in turn."""
    name: str = request.param
    return name


@pytest.fixture
def build() -> Build:
    """(name, number of images) -> the network, in evaluation mode, and random images; always the same."""
    return _build


@pytest.fixture
def targets() -> Callable[[str, int], Tensor]:
    """(likelihood, number of images) -> targets for three outputs; always the same."""

    def make(likelihood: str, num_images: int) -> Tensor:
        numbers = torch.arange(num_images) % 3
        if likelihood == "cross_entropy":
            return numbers
        return functional.one_hot(numbers, 3).double()

    return make
