"""Convolutions, batch norms and max pools whose library versions are slow where only input gradients are wanted.

The input gradient of a convolution of stride 1 is a convolution itself: of the output gradient, with the
kernel flipped and its channel dims exchanged. On CPUs the library's backward of a dilated convolution takes 10
to 20 times as long as its forward pass (torch 2.13, depthwise 3x3 and 5x5 on 32 x 32 maps: 1.5 and 3.7 ms against
0.16 and 0.19 ms), and the backward of a 1x1 convolution twice as long: supernets consist of these.

A batch norm in evaluation mode multiplies each channel by a number. The library's backward sums its weight's and its
bias's gradients too, whether or not anyone asks for them.

A max pool that remembers its maxima is 5 times as fast on a processor where the channels come last; its backward is
the faster one where they come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, conv1d, conv2d, conv3d

from sparsebayes.curvature.kernels import Geometry
from sparsebayes.curvature.squares import at_least_float32

__all__ = ["convolve", "gains", "max_pool", "normalise"]

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


def normalise(
    run: Callable[[Tensor], Tensor], x: Tensor, variance: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """A batch norm in evaluation mode, whose weight and bias have no gradients.

    Args:
        run: the norm.
        x: what it reads, of shape `[n, C, ...]`.
        variance: running variance, of shape `[C]`.
        weight: of shape `[C]`; None: ones.
        eps: added to the variance.

    Returns:
        The output, of the shape of x, differentiable in x.
    """
    gain = (at_least_float32(variance) + eps).rsqrt()
    gain = gain if weight is None else gain * weight.detach()
    result: Tensor = _Normalise.apply(x, run, gain.to(x.dtype))  # type: ignore[no-untyped-call]
    return result


def max_pool(x: Tensor, options: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    """A max pool over two dims, on a processor.

    Args:
        x: of shape `[n, C, H, W]`.
        options: what `torch.max_pool2d` gets after x, by position.
        named: the same, by name.

    Returns:
        Its output, differentiable in x.
    """
    result: Tensor = _MaxPool.apply(x, tuple(options), dict(named))  # type: ignore[no-untyped-call]
    return result


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        last = x.contiguous(memory_format=torch.channels_last)
        y, places = torch.ops.aten.max_pool2d_with_indices(last, *options, **named)
        ctx.save_for_backward(x, places.contiguous())
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        given = dict(zip(names, options, strict=False)) | named
        defaults = {"stride": [], "padding": 0, "dilation": 1, "ceil_mode": False}
        ctx.options = [(defaults | given)[name] for name in names]
        result: Tensor = y.contiguous()
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, places = ctx.saved_tensors
        run = torch.ops.aten.max_pool2d_with_indices_backward
        return run(gradient.contiguous(), x, *ctx.options, places), None, None


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], gain: Tensor) -> Tensor:
        ctx.save_for_backward(gain)
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gain,) = ctx.saved_tensors
        return gradient * gain.view(-1, *[1] * (gradient.ndim - 2)), None, None


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
