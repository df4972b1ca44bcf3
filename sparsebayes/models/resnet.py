"""Residual networks for images of 32x32 pixels: ResNet-20 and ResNet-56, and ResNet-18 with a CIFAR stem.

K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016. ResNet-20 and -56 are those
of section 4.2: a 3x3 stem and three stages of n blocks with 16, 32 and 64 channels (n = 3 and 9). ResNet-18 has the
four stages of table 1, behind a 3x3 stem with stride 1 and without pooling, as is usual for CIFAR.

Where a stage halves the resolution and doubles the channels, the shortcut cannot be the identity. The paper's option A
takes every second pixel and appends zero channels, which needs no parameters; option B is a 1x1 convolution with batch
norm. Zero channels cannot be removed without moving the others, so with option A half of the channels of the later
stages always stay; option B leaves all of them free. It is the default here (855,770 parameters for ResNet-56 against
853,018, 0.3 % more) and `shortcut: A` is the paper's.

    >>> sum(p.numel() for p in resnet18().parameters())
    11173962
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebayes.errors import ModelError, unknown
from sparsebayes.models.sizes import check_positive, scaled

__all__ = ["BasicBlock", "ResNet", "resnet18", "resnet20", "resnet56"]


class PadShortcut(nn.Module):
    """Option A: every second pixel, and zero channels on both sides.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        stride: pixels from one that is kept to the next.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, out_channels, H/stride, W/stride]`."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the shortcut.

    Args:
        in_channels: channels that come in.
        out_channels: channels that go out.
        stride: of the first convolution.
        option: "A" or "B": the shortcut where it cannot be the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif option == "A":
            self.shortcut = PadShortcut(in_channels, out_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, out_channels, H/stride, W/stride]`."""
        branch = torch.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return torch.relu(branch + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem, stages of basic blocks, global average pooling and one linear layer.

    Args:
        blocks: number of blocks of each stage; all stages but the first halve the resolution.
        widths: channels of each stage at width 1.
        in_channels: channels of the input image.
        num_classes: width of the output.
        input_size: height and width of the input image, in pixels.
        width: factor of the width of every convolution.
        shortcut: "A" or "B", see the module.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        *,
        in_channels: int = 3,
        num_classes: int = 10,
        input_size: int = 32,
        width: float = 1.0,
        shortcut: str = "B",
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, num_classes=num_classes, input_size=input_size)
        if shortcut not in ("A", "B"):
            raise ModelError(unknown("shortcut", shortcut, ("A", "B")))
        channels = scaled(widths[0], width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.stages = nn.ModuleList()
        for number, (count, full) in enumerate(zip(blocks, widths, strict=True)):
            out = scaled(full, width)
            stage = nn.Sequential()
            for block in range(count):
                stride = 2 if number and not block else 1
                stage.append(BasicBlock(channels, out, stride, shortcut))
                channels = out
            self.stages.append(stage)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape `[B, C, H, W]` to logits of shape `[B, num_classes]`."""
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = stage(x)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)  # [B, channels]
        logits: Tensor = self.fc(x)
        return logits


resnet18 = partial(ResNet, (2, 2, 2, 2), (64, 128, 256, 512))
"""ResNet-18 with a CIFAR stem: four stages of two blocks, 64 to 512 channels. Options as in `ResNet`."""
resnet20 = partial(ResNet, (3, 3, 3), (16, 32, 64))
"""ResNet-20 for CIFAR: three stages of three blocks, 16 to 64 channels. Options as in `ResNet`."""
resnet56 = partial(ResNet, (9, 9, 9), (16, 32, 64))
"""ResNet-56 for CIFAR: three stages of nine blocks, 16 to 64 channels. Options as in `ResNet`."""
