"""Input gradients of convolutions, where the library's own are slow.

The input gradient of a convolution of stride 1 is a convolution itself: of the output gradient, with the
kernel flipped and its channel dims exchanged. On CPUs the library's backward of a dilated convolution takes 10
to 20 times as long as its forward pass (torch 2.13, depthwise 3x3 and 5x5 on 32 x 32 maps: 1.5 and 3.7 ms against
0.16 and 0.19 ms), and the backward of a 1x1 convolution twice as long: supernets consist of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, conv1d, conv2d, conv3d

__all__ = ["convolve", "gains"]

_CONVOLUTIONS = (conv1d, conv2d, conv3d)


def gains(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> bool:
    """Whether a convolution's input gradient is better computed as a convolution.

    Args:
        x: what the layer reads.
        weight: of shape `[O, I / groups, *kernel]`.
        stride: per spatial dim.
        padding: zeros in front and behind, per spatial dim.
        dilation: per spatial dim.
    """
    kernel = weight.shape[2:]
    return (
        x.device.type == "cpu"
        and x.requires_grad
        and all(step == 1 for step in stride)
        and (max(dilation) > 1 or max(kernel) == 1)
        and all(
            front == behind <= d * (k - 1)
            for (front, behind), d, k in zip(padding, dilation, kernel, strict=True)
        )
    )


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Convolve with stride 1; the weight and the bias have no gradients.

    Args:
        x: of shape `[n, I, *spatial]`.
        weight: of shape `[O, I / groups, *kernel]`.
        bias: of shape `[O]`, or None.
        padding: zeros in front and behind, as many, at most `dilation * (kernel - 1)`.
        dilation: per spatial dim.
        groups: how many parts the channels are split into.

    Returns:
        The output, of shape `[n, O, *spatial]`, differentiable in x.
    """
    front = tuple(pair[0] for pair in padding)
    result: Tensor = _Convolve.apply(x, weight, bias, front, tuple(dilation), groups)  # type: ignore[no-untyped-call]
    return result


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = padding, dilation, groups
        return _CONVOLUTIONS[x.ndim - 3](x, weight, bias, 1, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        padding, dilation, groups = ctx.geometry
        kernel = weight.shape[2:]
        turned = weight.view(groups, -1, *weight.shape[1:]).transpose(
            1, 2
        )  # [groups, I / groups, O / groups, ...]
        turned = turned.flatten(0, 1).flip(*range(2, weight.ndim))
        behind = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        run = _CONVOLUTIONS[weight.ndim - 3]
        return (
            run(gradient, turned.contiguous(), None, 1, behind, dilation, groups),
            None,
            None,
            None,
            None,
            None,
        )
