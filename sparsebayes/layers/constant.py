"""What stands in the place of a branch that is off: its last layer emits a constant, the others hand on a size.

A residual branch without units still adds what its last layers make of nothing: a bias, the shift of a norm. That is
one number per channel, so `Constant` keeps just these. It needs the size of the images, which the layers in front of
it tell it: `Passage` has no parameters and computes nothing.

    >>> Constant(torch.tensor([1.0, 2.0]))(torch.zeros(3, 7, 4, 4)).shape
    torch.Size([3, 2, 4, 4])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Constant", "Passage"]


def _blank(x: Tensor, dim: int, stride: tuple[int, ...]) -> Tensor:
    """Zeros of the size of ``x`` with one channel, every ``stride``-th position along the last dimensions."""
    sizes = list(x.shape)
    sizes[dim] = 1
    for rank, step in enumerate(reversed(stride)):
        sizes[-1 - rank] = (sizes[-1 - rank] + step - 1) // step
    # Made from numbers alone: no channel of `x` is read, and nothing that works in place can reach it.
    return torch.zeros(sizes, dtype=x.dtype, device=x.device)


class Passage(nn.Module):
    """Hands on the size of its input, as one channel of zeros.

    Args:
        dim: where the channels lie: 1, or -1 for tokens and features.
        stride: of the convolution that stood here, for each dimension of space; empty: none.
    """

    def __init__(self, *, dim: int = 1, stride: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.dim, self.stride = dim, stride

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of shape ``[B, 1, ...]``, or ``[..., 1]``."""
        return _blank(x, self.dim, self.stride)

    def extra_repr(self) -> str:
        """Name the stride, for `print(model)`."""
        return f"stride={self.stride}" if self.stride else ""


class Constant(nn.Module):
    """One number per channel, at every position of its input.

    Args:
        value: of shape ``[C]``.
        dim: where the channels of the result lie: 1, or -1 for tokens and features.
        stride: as for `Passage`.

    Attributes:
        value: the parameter ``[C]``.
    """

    def __init__(self, value: Tensor, *, dim: int = 1, stride: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.value = nn.Parameter(value)
        self.dim, self.stride = dim, stride

    def forward(self, x: Tensor) -> Tensor:
        """The constant in the size of ``x``, of which neither the channels nor their number matter."""
        after = x.dim() - 1 - self.dim % x.dim()
        # A sum, not an expanded view: what follows may work in place.
        return _blank(x, self.dim, self.stride) + self.value.view([-1] + [1] * after)

    def extra_repr(self) -> str:
        """Name the width, for `print(model)`."""
        return f"{self.value.numel()} channels, dim={self.dim}"
