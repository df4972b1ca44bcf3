"""Layer, group and RMS norms over channels of which some are gone: the statistics still count these, as zeros.

With ``T`` channels before removal, of which ``K`` stay and the others are 0,

    mean = sum(x) / T        variance = (sum((x - mean)^2) + (T - K) * mean^2) / T

which are the statistics of the network in which the others are masked, so that removal changes no output; an RMS norm
(Zhang & Sennrich 2019, eq 4) needs sum(x^2) / T alone. In half
precision they are taken in single precision, as PyTorch's norms do: a sum of squares soon exceeds 65504.

    >>> full = nn.LayerNorm(4)
    >>> part = PartialLayerNorm(2, total=4)
    >>> torch.allclose(part(torch.tensor([1.0, 3.0])), full(torch.tensor([1.0, 3.0, 0.0, 0.0]))[:2])
    True
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

__all__ = ["PartialGroupNorm", "PartialLayerNorm", "PartialRMSNorm"]


_HALF = (torch.float16, torch.bfloat16)


def _standardized(x: Tensor, dims: tuple[int, ...], missing: float, total: float, eps: float) -> Tensor:
    """``x`` minus mean over deviation along ``dims``, where ``missing`` of the ``total`` entries are absent zeros.

    Half precision gives single precision: see `_scaled`.
    """
    x = x.float() if x.dtype in _HALF else x
    mean = x.sum(dims, keepdim=True) / total
    centred = x - mean
    variance = (centred.square().sum(dims, keepdim=True) + missing * mean.square()) / total
    return centred * torch.rsqrt(variance + eps)


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int], x: Tensor) -> Tensor:
    """Scale and shift standardized values, in the type in which the input and the parameters meet."""
    held = [x.dtype, *(part.dtype for part in (weight, bias) if part is not None)]
    y = y if weight is None else y * weight.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y.to(functools.reduce(torch.promote_types, held)) if x.dtype in _HALF else y


class PartialLayerNorm(nn.Module):
    """`nn.LayerNorm` over one dimension, of whose ``total`` channels some are gone.

    Args:
        channels: number K of channels that stay.
        total: number T of channels of the dense layer.
        dim: where the channels lie: -1, or 1 for images ``[B, C, H, W]``.
        eps: added to the variance.
        affine: whether there is a scale, of shape ``[K]``.
        bias: whether there is a shift, of shape ``[K]``.

    Attributes:
        weight: the scale, or None.
        bias: the shift, or None.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        channels: int,
        *,
        total: int,
        dim: int = -1,
        eps: float = 1e-5,
        affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.total, self.dim, self.eps = total, dim, eps
        self.num_channels = channels
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine and bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, scale and shift; ``x`` holds its K channels along ``dim``."""
        y = _standardized(x, (self.dim,), self.total - self.num_channels, self.total, self.eps)
        shape = [-1] + [1] * (x.dim() - 1 - self.dim if self.dim >= 0 else -1 - self.dim)
        return _scaled(y, self.weight, self.bias, shape, x)

    def extra_repr(self) -> str:
        """Name the widths, for `print(model)`."""
        return f"{self.num_channels} of {self.total} channels, dim={self.dim}, eps={self.eps}"


class PartialGroupNorm(nn.Module):
    """`nn.GroupNorm` of whose ``total`` channels some are gone, the same number from each group.

    Args:
        num_groups: number of groups.
        channels: number K of channels that stay.
        total: number T of channels of the dense layer.
        eps: added to the variance.
        affine: whether there are a scale and a shift, of shape ``[K]``.

    Attributes:
        weight: the scale, or None.
        bias: the shift, or None.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self, num_groups: int, channels: int, *, total: int, eps: float = 1e-5, affine: bool = True
    ) -> None:
        super().__init__()
        self.num_groups, self.total, self.eps = num_groups, total, eps
        self.num_channels = channels
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, scale and shift ``x`` of shape ``[B, K, ...]``."""
        grouped = x.reshape(x.shape[0], self.num_groups, self.num_channels // self.num_groups, -1)
        positions = grouped.shape[3]
        total = self.total // self.num_groups * positions
        missing = (self.total - self.num_channels) // self.num_groups * positions
        y = _standardized(grouped, (2, 3), missing, total, self.eps).reshape(x.shape)
        shape = [-1] + [1] * (x.dim() - 2)
        return _scaled(y, self.weight, self.bias, shape, x)

    def extra_repr(self) -> str:
        """Name the widths, for `print(model)`."""
        return f"{self.num_groups} groups, {self.num_channels} of {self.total} channels, eps={self.eps}"


class PartialRMSNorm(nn.Module):
    """`nn.RMSNorm` over the last dimension, of whose ``total`` channels some are gone.

    Args:
        channels: number K of channels that stay.
        total: number T of channels of the dense layer.
        eps: added to the mean square; None: the smallest step from 1 in the type of the input.
        affine: whether there is a scale, of shape ``[K]``.

    Attributes:
        weight: the scale, or None.
    """

    weight: Tensor | None

    def __init__(self, channels: int, *, total: int, eps: float | None = None, affine: bool = True) -> None:
        super().__init__()
        self.total, self.eps = total, eps
        self.num_channels = channels
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize and scale; ``x`` holds its K channels along the last dimension."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        wide = x.float() if x.dtype in _HALF else x
        y = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.total + eps)
        return _scaled(y, self.weight, None, [-1], x)

    def extra_repr(self) -> str:
        """Name the widths, for `print(model)`."""
        return f"{self.num_channels} of {self.total} channels, eps={self.eps}"
