"""Per-image derivatives of switches that are parameters: factors that multiply activations.

For y of one image, a switch s and the product o = s y, with g = dF/do:

    dF/ds = sum over the positions that s is spread over of  g y

A switch is the same for all images, so that autograd only knows the sum of this over the images. Here the
product is recorded instead, with s cut out of the graph: one product of activations and gradients per image
then gives the derivative of every image, and what leads from the parameters to s (picking one of many, a
softmax, a product of two switches) is differentiated once, apart from the network.

    >>> scaled, record = scale(y, z[3], True)                                # y: [n, C, H, W], z: a parameter
    >>> record.add_pass(g)                                               # g = dF/d scaled, [n, C, H, W]
    >>> derivatives([record], z).shape                                   # [K, n, *z.shape]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

__all__ = ["Scaling", "derivatives", "is_made_of", "scale"]


@final
@dataclass(eq=False)
class Scaling:
    """One product of an activation with a factor made of switches.

    Attributes:
        factor: s, with the graph that leads to the switches; it has no dim of the images.
        input: y, of shape `[n, ...]`.
        version: version counter of y at the time of the product.
        edge: place in the autograd graph where dF/do arrives.
        passes: dF/ds of shape `[n, *shape of s]`, one for each backward pass so far.
    """

    factor: Tensor
    input: Tensor
    version: int
    edge: GradientEdge
    passes: list[Tensor] = field(default_factory=list)

    @property
    def signature(self) -> tuple[torch.Size, torch.Size]:
        """Shapes that do not follow the number of images."""
        return self.input.shape[1:], self.factor.shape

    @property
    def input_intact(self) -> bool:
        """Whether nothing has overwritten y since."""
        return self.input._version == self.version

    def add_pass(self, gradient: Tensor | None) -> None:
        """Turn the gradient of one backward pass into derivatives.

        Args:
            gradient: dF/do, of the shape of y; None if the outputs do not depend on it.
        """
        n = len(self.input)
        if gradient is None:
            self.passes.append(self.factor.new_zeros(n, *self.factor.shape).float())
            return
        y = self.input.detach()
        if y.dtype in (torch.float16, torch.bfloat16):
            y, gradient = y.float(), gradient.float()
        if self.factor.numel() == 1:
            dots = torch.linalg.vecdot(gradient.reshape(n, -1), y.reshape(n, -1))
            self.passes.append(dots.reshape(n, *self.factor.shape))
            return
        sizes = (1,) * (y.ndim - 1 - self.factor.ndim) + tuple(self.factor.shape)
        if self.factor.ndim == y.ndim:
            sizes = tuple(self.factor.shape[1:])
        spread = [d + 1 for d, size in enumerate(sizes) if size == 1]
        if spread and spread == list(
            range(spread[0], y.ndim)
        ):  # over all that comes last: no temporary is needed
            product = torch.linalg.vecdot(gradient.flatten(spread[0]), y.flatten(spread[0]))
        else:
            product = gradient * y
            product = product.sum(spread, keepdim=True) if spread else product
        self.passes.append(product.reshape(n, *self.factor.shape))


def scale(first: Tensor, second: Tensor, factor_is_second: bool) -> tuple[Tensor, Scaling]:
    """Multiply an activation by a factor, and record it.

    Args:
        first: the left operand.
        second: the right operand.
        factor_is_second: which of the two is the factor.

    Returns:
        The product, in whose graph the factor is a constant, and the record.
    """
    factor, y = (second, first) if factor_is_second else (first, second)
    # Required to have gradients so that the product has a place in the graph, whatever y is.
    constant = factor.detach().requires_grad_()
    # Reading a number back would stall an accelerator.
    one = factor.device.type == "cpu" and factor.numel() == 1 and float(constant.detach()) == 1.0
    product: Tensor
    if one:
        pair = (y, constant) if factor_is_second else (constant, y)
        product = _TimesOne.apply(*pair, factor_is_second)  # type: ignore[no-untyped-call]
    else:
        product = y * constant if factor_is_second else constant * y
    return product, Scaling(factor, y, y._version, get_gradient_edge(product))


def derivatives(scalings: Sequence[Scaling], parameter: Tensor) -> Tensor:
    """Per-image derivatives of a switch parameter, summed over the products that it has a part in.

    Args:
        scalings: at least one, with K backward passes over n images each.
        parameter: the switches z; need not have a part in every product.

    Returns:
        dF/dz of shape `[K, n, *shape of z]`.
    """
    num_passes, n = len(scalings[0].passes), len(scalings[0].input)
    starts = []
    for scaling in scalings:
        stacked = torch.stack(scaling.passes).flatten(0, 1)  # [K * n, *shape of s]
        starts.append(stacked.to(scaling.factor.dtype))
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        [scaling.factor for scaling in scalings],
        [parameter],
        starts,
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=True,
    )
    gradient = gradients[0]
    if gradient is None:
        return parameter.new_zeros(num_passes, n, *parameter.shape)
    return gradient.detach().reshape(num_passes, n, *parameter.shape)


def is_made_of(tensor: Tensor, accumulators: frozenset[Node]) -> bool:
    """Whether the graph of a tensor ends in the given parameters, in at least one and in no others.

    Args:
        tensor: a factor; its graph is expected to be small.
        accumulators: the nodes at which the parameters' gradients arrive.
    """
    waiting, seen, found = [get_gradient_edge(tensor).node], set(), False
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in accumulators:
            found = True
            continue
        following = [next_node for next_node, _ in node.next_functions if next_node is not None]
        if not following:  # the gradient of some other tensor arrives here, or nobody knows what it does
            return False
        waiting.extend(following)
    return found


class _TimesOne(torch.autograd.Function):
    """A product with a factor that is 1: the gradient passes through untouched, which saves a pass over it."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, factor_is_second: bool) -> Tensor:
        ctx.factor_is_second = factor_is_second
        return first * second

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of a mean is one number spread over a map: what is upstream takes slow paths for that.
        gradient = gradient.contiguous()
        return (gradient, None, None) if ctx.factor_is_second else (None, gradient, None)
