"""VGG-16 with batch normalisation, in the form that the pruning literature trains on CIFAR.

K. Simonyan, A. Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015,
configuration D: thirteen 3x3 convolutions in five stages. For images of 32x32 pixels the three large linear layers
give way to one, and every convolution is followed by batch normalisation (S. Ioffe, C. Szegedy, ICML 2015), whose shift
makes the convolution's bias superfluous.

    >>> sum(p.numel() for p in VGG16().parameters())
    14724042
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebayes.errors import ModelError
from sparsebayes.models.sizes import check_positive, scaled

__all__ = ["VGG16"]

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Thirteen convolutions with batch norm in five stages, each ended by 2x2 max pooling, and one linear layer.

    Args:
        in_channels: channels of the input image.
        num_classes: width of the output.
        input_size: height and width of the input image, in pixels; at least 32, which leaves one pixel.
        width: factor of the width of every convolution.
    """

    def __init__(
        self, *, in_channels: int = 3, num_classes: int = 10, input_size: int = 32, width: float = 1.0
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, num_classes=num_classes, input_size=input_size)
        if input_size < 32:
            raise ModelError(
                f"vgg16 needs an input_size of at least 32 pixels, got {input_size}; use larger images or resnet20"
            )
        self.stages = nn.ModuleList()
        channels = in_channels
        for widths in STAGES:
            stage = nn.Sequential()
            for number, full in enumerate(widths, 1):
                out = scaled(full, width)
                stage.add_module(f"conv{number}", nn.Conv2d(channels, out, 3, padding=1, bias=False))
                stage.add_module(f"bn{number}", nn.BatchNorm2d(out))
                stage.add_module(f"relu{number}", nn.ReLU())
                channels = out
            stage.add_module("pool", nn.MaxPool2d(2))
            self.stages.append(stage)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape `[B, C, H, W]` to logits of shape `[B, num_classes]`."""
        for stage in self.stages:
            x = stage(x)
        x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)  # [B, channels]; one pixel is left of 32
        logits: Tensor = self.fc(x)
        return logits
