"""The two LeNets that the pruning literature reports on.

LeNet-300-100 and LeNet-5 are from Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning
applied to document recognition", Proc. IEEE 86(11), 1998. The second has the sizes of the Caffe example (20 and
50 filters, 500 hidden units, max pooling), which pruning papers mean when they write "LeNet-5". The Caffe example
itself rectifies behind fc1 only; here, as in the implementations of those papers (Louizos, Welling, Kingma 2018,
say), the convolutions are rectified too.

    >>> sum(p.numel() for p in LeNet5Caffe().parameters())
    431080
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.models.sizes import check_positive

__all__ = ["LeNet5Caffe", "LeNet300100"]


class LeNet300100(nn.Module):
    """Perceptron with two hidden layers, 784-300-100-10 as built by default: 266,610 parameters.

    Args:
        in_channels: channels of the input image.
        num_classes: width of the output.
        input_size: height and width of the input image, in pixels.
    """

    def __init__(self, *, in_channels: int = 1, num_classes: int = 10, input_size: int = 28) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, num_classes=num_classes, input_size=input_size)
        self.fc1 = nn.Linear(in_channels * input_size**2, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape `[B, C, H, W]` to logits of shape `[B, num_classes]`."""
        x = torch.flatten(x, 1)  # [B, C*H*W]
        x = torch.relu(self.fc1(x))
        x = torch.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


class LeNet5Caffe(nn.Module):
    """Two convolutions with max pooling and two linear layers, 20-50-500-10 as built by default.

    Args:
        in_channels: channels of the input image.
        num_classes: width of the output.
        input_size: height and width of the input image, in pixels; at least 16, which leaves one pixel.
    """

    def __init__(self, *, in_channels: int = 1, num_classes: int = 10, input_size: int = 28) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, num_classes=num_classes, input_size=input_size)
        side = ((input_size - 4) // 2 - 4) // 2  # each 5x5 convolution takes 4 pixels, each pooling halves
        if side < 1:
            raise ModelError(
                f"lenet5_caffe needs an input_size of at least 16 pixels, got {input_size}; "
                "use larger images or lenet_300_100"
            )
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * side**2, 500)
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape `[B, C, H, W]` to logits of shape `[B, num_classes]`."""
        # Rectifying after pooling gives what rectifying before it gives, on a quarter of the values.
        x = torch.relu(nn.functional.max_pool2d(self.conv1(x), 2))
        x = torch.relu(nn.functional.max_pool2d(self.conv2(x), 2))
        x = torch.flatten(x, 1)  # [B, 50*side*side]
        x = torch.relu(self.fc1(x))
        logits: Tensor = self.fc2(x)
        return logits
