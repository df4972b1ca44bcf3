"""Input gradients of convolutions, where the library's own are slow.

The input gradient of a convolution of stride 1 is a convolution itself: of the output gradient, with the
kernel flipped and its channel dims exchanged. On CPUs the library's backward of a dilated convolution takes 10
to 20 times as long as its forward pass (torch 2.13, depthwise 3x3 and 5x5 on 32 x 32 maps: 1.5 and 3.7 ms against
0.16 and 0.19 ms), and the backward of a 1x1 convolution twice as long: supernets consist of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, conv1d, conv2d, conv3d

from sparsebayes.curvature.kernels import Geometry

__all__ = ["convolve", "gains"]

_CONVOLUTIONS = (conv1d, conv2d, conv3d)


def gains(x: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution's input gradient is better computed as a convolution.

    Args:
        x: what the layer reads.
        geometry: of the layer.
    """
    each = zip(geometry.kernel, geometry.padding, geometry.dilation, strict=True)
    return (
        x.device.type == "cpu"
        and x.requires_grad
        and all(step == 1 for step in geometry.stride)
        and (max(geometry.dilation) > 1 or max(geometry.kernel) == 1)
        and all(front == behind <= d * (k - 1) for k, (front, behind), d in each)
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve where `gains` says so; the weight and the bias have no gradients.

    Args:
        x: of shape `[n, I, *spatial]`.
        weight: of shape `[O, I / groups, *kernel]`.
        bias: of shape `[O]`, or None.
        geometry: of the layer.

    Returns:
        The output, of shape `[n, O, *spatial]`, differentiable in x.
    """
    result: Tensor = _Convolve.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
    return result


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = geometry
        front = [pair[0] for pair in geometry.padding]
        return _CONVOLUTIONS[x.ndim - 3](x, weight, bias, 1, front, geometry.dilation, geometry.groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        shape: Geometry = ctx.geometry
        turned = weight.view(shape.groups, -1, *weight.shape[1:]).transpose(
            1, 2
        )  # [groups, I / groups, O / groups, ...]
        turned = turned.flatten(0, 1).flip(*range(2, weight.ndim)).contiguous()
        each = zip(shape.kernel, shape.padding, shape.dilation, strict=True)
        front = [d * (k - 1) - pair[0] for k, pair, d in each]
        run = _CONVOLUTIONS[weight.ndim - 3]
        return run(gradient, turned, None, 1, front, shape.dilation, shape.groups), None, None, None
