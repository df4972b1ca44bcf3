"""What stands in the place of a branch that is off: its layers let their input pass, the last one emits a constant.

A residual branch without units still adds what its last layers make of nothing: a bias, the shift of a norm. That is one
number per channel, so `Constant` keeps just these. It needs the size of the images, for which the layers in front of it
are replaced by `Passage`, which has no parameters and costs nothing:

    >>> Constant(torch.tensor([1.0, 2.0]))(torch.zeros(3, 7, 4, 4)).shape
    torch.Size([3, 2, 4, 4])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Constant", "Passage"]


class Passage(nn.Module):
    """Hands its input on; with a stride it skips positions, as the convolution that stood here did.

    Args:
        stride: one for each dimension of space; empty: none.
    """

    def __init__(self, stride: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Keep every ``stride``-th position."""
        for rank, step in enumerate(reversed(self.stride)):
            if step != 1:
                dim = x.dim() - 1 - rank
                x = x[(slice(None),) * dim + (slice(None, None, step),)]
        return x

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
        self.dim, self.passage = dim, Passage(stride)

    def forward(self, x: Tensor) -> Tensor:
        """The constant in the shape of ``x``, whose channels do not matter."""
        x = self.passage(x)
        dim = self.dim % x.dim()
        blank = torch.zeros_like(x.narrow(dim, 0, 1), dtype=self.value.dtype)
        # A sum, not an expanded view: what follows may work in place.
        return blank + self.value.view([-1] + [1] * (x.dim() - 1 - dim))

    def extra_repr(self) -> str:
        """Name the width, for `print(model)`."""
        return f"{self.value.numel()} channels, dim={self.dim}"
