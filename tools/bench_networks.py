"""Networks that the curvature is measured on: VGG-16 and ResNet-18 for small images, and a DARTS-like cell."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Cell", "resnet18", "vgg16"]


def vgg16(num_classes: int = 10) -> nn.Module:
    """VGG-16 with batch norm for 32 x 32 images, one linear layer: 14.7 million parameters."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if width == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, num_classes)).eval()


class Block(nn.Module):
    """Two convolutions and a skip."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        same = before == width and stride == 1
        self.skip = nn.Sequential() if same else nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, before, H, W]` to `[n, width, H / stride, W / stride]`."""
        h = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(h)) + self.skip(x))


def resnet18(width: int, in_channels: int) -> nn.Module:
    """ResNet-18 for small images."""
    blocks: list[nn.Module] = []
    before = width
    for stage in range(4):
        for number in range(2):
            blocks.append(Block(before, width << stage, 2 if stage and not number else 1))
            before = width << stage
    stem = [nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def _separable(width: int, kernel: int, dilation: int, times: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(times):
        padding = dilation * (kernel // 2)
        layers += [
            nn.ReLU(),
            nn.Conv2d(width, width, kernel, 1, padding, dilation, groups=width, bias=False),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        ]
    return nn.Sequential(*layers)


class Cell(nn.Module):
    """A DARTS-like cell: 4 nodes, 14 edges, 7 operations on each, 98 switches, 16 channels."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.edges = nn.ModuleList(
            nn.ModuleList(
                [
                    _separable(width, 3, 1, 2),
                    _separable(width, 5, 1, 2),
                    _separable(width, 3, 2, 1),
                    _separable(width, 5, 2, 1),
                    nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(width)),
                    nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(width)),
                    nn.Identity(),
                ]
            )
            for _ in range(14)
        )
        self.switches = nn.Parameter(torch.ones(14, 7))
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[n, 3, H, W]` to logits."""
        h = self.stem(x)
        states, edge = [h, h], 0
        for _ in range(4):
            total = torch.zeros_like(h)
            for state in list(states):
                for number, operation in enumerate(self.edges[edge].children()):
                    total = total + self.switches[edge, number] * operation(state)
                edge += 1
            states.append(total)
        logits: Tensor = self.classifier(torch.cat(states[2:], 1).mean((2, 3)))
        return logits
