"""Per-image derivatives of one layer call, from its input and the gradient of its output.

A call is one use of a weight w in a forward pass: y = w x + b for a linear layer or a convolution, and
y = w xhat + b for a batch norm. With g = dF/dy for a scalar F, image by image and summed over the
positions s of a sequence or a map:

    entries  dF/dw_oi              = sum_s g_os x_is      (x: the patch that the kernel sees at s)
    rows     sum_i w_oi dF/dw_oi   = sum_s g_os (y_os - b_o)
    columns  sum_o w_oi dF/dw_oi   = sum_s (dF/dx)_is x_is

Rows and columns are the derivatives with respect to switches that scale the weight's slices; they cost one
product of activations and gradients, where the entries cost as much as a weight gradient. Symbols: K backward
passes, n images in the call, m images asked for, O and I the weight's output and input width, S the number of
positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn import functional

from sparsebayes.curvature.kernels import Geometry, add_squared_gradients_, gradients, num_patches
from sparsebayes.curvature.products import add_squared_products_
from sparsebayes.curvature.squares import SquareSums, at_least_float32, slices, squared_passes

__all__ = ["Call", "ConvCall", "LayerNormCall", "LinearCall", "NormCall", "SliceCall"]


@dataclass(eq=False)
class Call(ABC):
    """One use of a layer's parameters in a forward pass.

    Attributes:
        weight: name of the weight; None where the layer's weight is of no interest.
        bias: name of the bias; None where there is none, or it is of no interest.
        values: the tensors that were passed, by role "weight" and "bias".
        input: of shape `[n, ...]`: what the layer read.
        output: of shape `[n, ...]`: what it returned.
        input_edge: place in the autograd graph where dF/dx of this call alone arrives; None if not asked for.
        output_edge: place where dF/dy arrives.
        versions: version counters of input and output when the layer returned.
        input_grad: of shape `[K, n, ...]`, once the backward passes are done; None if not asked for.
        output_grad: of shape `[K, n, ...]`, likewise.
        scale: of shape `[K, n]`: what the gradients have yet to be multiplied by; None: nothing.
    """

    weight: str | None
    bias: str | None
    values: dict[str, Tensor]
    input: Tensor
    output: Tensor
    input_edge: GradientEdge | None
    output_edge: GradientEdge
    versions: tuple[int, int]
    input_grad: Tensor | None = None
    output_grad: Tensor | None = None
    scale: Tensor | None = None

    @property
    def input_intact(self) -> bool:
        """Whether nothing has overwritten the input since."""
        return self.input._version == self.versions[0]

    def entries(self, name: str, images: slice) -> Tensor:
        """Per-image gradients of one parameter.

        Args:
            name: the weight's or the bias's name.
            images: m of the n images.

        Returns:
            dF/dw of shape `[K, m, *shape of the parameter]`.
        """
        if name == self.weight:
            return self._weight_entries(images)
        return self._over_positions(self._grad(images))

    @property
    def output_intact(self) -> bool:
        """Whether nothing has overwritten the output since."""
        return self.output._version == self.versions[1]

    def volume(self, name: str) -> int:
        """Numbers in the largest temporary that the derivatives of one image need.

        Args:
            name: the weight's or the bias's name.
        """
        assert self.output_grad is not None, "backward passes come before the algebra"
        value = self.values["weight" if name == self.weight else "bias"]
        passes = len(self.output_grad)
        return max(passes * value.numel(), passes * self.output[0].numel(), self.input[0].numel())

    def add_squares_(self, sums: SquareSums, name: str, images: slice, *, tune: bool = False) -> None:
        """Add q = sum_k (dF_k/dw)^2 of some images.

        Args:
            sums: of the parameter.
            name: the weight's or the bias's name.
            images: m of the n images.
            tune: where there are several ways, time them.
        """
        for part in slices(images, self.volume(name), self.input.device):
            sums.add_(squared_passes(self.entries(name, part)))

    @abstractmethod
    def _weight_entries(self, images: slice) -> Tensor: ...

    @abstractmethod
    def _over_positions(self, values: Tensor) -> Tensor:
        """Sum `[K, m, ...]`, shaped like the input or the output, over the positions: `[K, m, channels]`."""

    def _grad(self, images: slice) -> Tensor:
        assert self.output_grad is not None, "backward passes come before the algebra"
        return self._scaled(self.output_grad[:, images], images)

    def _scaled(self, gradient: Tensor, images: slice) -> Tensor:
        gradient = at_least_float32(gradient)
        if self.scale is None:
            return gradient
        ones = [1] * (gradient.ndim - 2)
        return gradient * self.scale[:, images].reshape(len(gradient), -1, *ones)

    def _read(self, images: slice) -> Tensor:
        return at_least_float32(self.input.detach()[images])


@dataclass(eq=False)
class SliceCall(Call):
    """A call whose weight has an output and an input dim, so that slices along them can have switches.

    Attributes:
        unbiased: the output without the bias, once it had to be computed anew.
    """

    unbiased: Tensor | None = field(default=None, init=False)

    def rows(self, images: slice) -> Tensor:
        """Derivatives with respect to switches of the weight's dim 0.

        Args:
            images: m of the n images.

        Returns:
            Of shape `[K, m, O]`.
        """
        g = self._grad(images)
        if self.unbiased is None and not self.output_intact:
            # An in-place activation has overwritten y. Its gradient is safe: the edge was taken before.
            self.unbiased = self._without_bias()
        bias = self.values.get("bias")
        if self.unbiased is not None:
            return self._dots(g, at_least_float32(self.unbiased[images]))
        total = self._dots(g, at_least_float32(self.output.detach()[images]))
        # Two sums of products rather than a product with y - b: a temporary less.
        return total if bias is None else total - self._over_positions(g) * bias.detach()

    def columns(self, images: slice) -> Tensor:
        """Derivatives with respect to switches of the weight's dim 1.

        Args:
            images: m of the n images.

        Returns:
            Of shape `[K, m, I]`.
        """
        assert self.input_grad is not None, "the call was not asked for its input gradient"
        return self._dots(self._scaled(self.input_grad[:, images], images), self._read(images))

    @abstractmethod
    def _dots(self, gradient: Tensor, values: Tensor) -> Tensor:
        """Sum products over the positions: `[K, m, ...]` and `[m, ...]` -> `[K, m, channels]`."""

    @abstractmethod
    def _without_bias(self) -> Tensor:
        """The layer's output without its bias, computed anew."""


@final
@dataclass(eq=False)
class LinearCall(SliceCall):
    """`y = x @ w.T + b` with x of shape `[n, ..., I]`, w of shape `[O, I]`."""

    def add_squares_(self, sums: SquareSums, name: str, images: slice, *, tune: bool = False) -> None:
        """See `Call.add_squares_`."""
        if name != self.weight:
            super().add_squares_(sums, name, images)
            return
        first, second = sums.plain()
        # Images that fit a cache where they are many positions; of one position no gradient is ever formed.
        numbers = 1 if self.input.ndim == 2 else max(self.input[0].numel(), self.output[0].numel())
        for part in slices(images, numbers, self.input.device):
            add_squared_products_(first, second, *self.factors(part))

    def _weight_entries(self, images: slice) -> Tensor:
        g, x = self.factors(images)
        return g.transpose(-1, -2) @ x

    def factors(self, images: slice) -> tuple[Tensor, Tensor]:
        """Gradients and inputs by position, of shape `[K, m, S, O]` and `[m, S, I]`."""
        g, x = self._grad(images), self._read(images)
        if x.ndim == 2:
            return g.unsqueeze(2), x.unsqueeze(1)
        return g.flatten(2, -2), x.flatten(1, -2)

    def _over_positions(self, values: Tensor) -> Tensor:
        return values if values.ndim == 3 else values.flatten(2, -2).sum(2)

    def _dots(self, gradient: Tensor, values: Tensor) -> Tensor:
        if values.ndim == 2:
            return gradient * values
        # Without a temporary of the size of the sequence.
        dots: Tensor = torch.linalg.vecdot(gradient.flatten(2, -2), values.flatten(1, -2), dim=-2)
        return dots

    def _without_bias(self) -> Tensor:
        with torch.no_grad():
            return functional.linear(self.input, self.values["weight"])


@final
@dataclass(eq=False)
class ConvCall(SliceCall):
    """A convolution over x of shape `[n, C, *spatial]`, w of shape `[O, C / groups, *kernel]`.

    Attributes:
        geometry: its shape.
    """

    geometry: Geometry = field(kw_only=True)

    def volume(self, name: str) -> int:
        """See `Call.volume`."""
        least = super().volume(name)
        return (
            max(least, num_patches(self.output.unsqueeze(0), self.geometry)) if name == self.weight else least
        )

    def add_squares_(self, sums: SquareSums, name: str, images: slice, *, tune: bool = False) -> None:
        """See `Call.add_squares_`."""
        if name == self.weight:
            add_squared_gradients_(sums, *self.factors(images), self.geometry, tune=tune)
        else:
            super().add_squares_(sums, name, images)

    def columns(self, images: slice) -> Tensor:
        """See `SliceCall.columns`."""
        per_channel = super().columns(images)  # [K, m, C]
        # A grouped weight's column i reads the i-th channel of every group.
        return per_channel.reshape(*per_channel.shape[:2], self.geometry.groups, -1).sum(2)

    def factors(self, images: slice) -> tuple[Tensor, Tensor]:
        """Gradients of the output and inputs, of shape `[K, m, O, *out]` and `[m, I, *spatial]`."""
        return self._grad(images), self._read(images)

    def _weight_entries(self, images: slice) -> Tensor:
        return gradients(*self.factors(images), self.geometry)

    def _over_positions(self, values: Tensor) -> Tensor:
        return values.flatten(3).sum(-1)

    def _dots(self, gradient: Tensor, values: Tensor) -> Tensor:
        # Without a temporary of the size of the map.
        dots: Tensor = torch.linalg.vecdot(gradient.flatten(3), values.flatten(2))
        return dots

    def _without_bias(self) -> Tensor:
        run = (torch.conv1d, torch.conv2d, torch.conv3d)[self.input.ndim - 3]
        shape = self.geometry
        with torch.no_grad():
            # The last dim comes first.
            x = functional.pad(self.input, [size for pair in reversed(shape.padding) for size in pair])
            return run(x, self.values["weight"], None, shape.stride, 0, shape.dilation, shape.groups)


@final
@dataclass(eq=False)
class NormCall(Call):
    """A batch norm in evaluation mode: `y = w xhat + b` with x of shape `[n, C, ...]`, w of shape `[C]`.

    Attributes:
        mean: running mean, of shape `[C]`.
        inverse_std: 1 / sqrt(running variance + eps), of shape `[C]`.
    """

    mean: Tensor | None = None
    inverse_std: Tensor | None = None

    def _weight_entries(self, images: slice) -> Tensor:
        assert self.mean is not None and self.inverse_std is not None, "recorded with its statistics"
        ones = [1] * (self.input.ndim - 2)
        centred = self._read(images) - self.mean.view(-1, *ones)
        return self._over_positions(self._grad(images) * centred) * self.inverse_std

    def _over_positions(self, values: Tensor) -> Tensor:
        return values if values.ndim == 3 else values.flatten(3).sum(-1)


@final
@dataclass(eq=False)
class LayerNormCall(Call):
    """A layer norm: `y = w xhat + b` with x of shape `[n, ..., *shape of w]`.

    Attributes:
        eps: added to the variance.
    """

    eps: float = 1e-5

    def _weight_entries(self, images: slice) -> Tensor:
        shape = self.values["weight"].shape
        normed = functional.layer_norm(self._read(images), shape, None, None, self.eps)
        return self._over_positions(self._grad(images) * normed)

    def _over_positions(self, values: Tensor) -> Tensor:
        num_dims = self.values["weight"].ndim
        return values if values.ndim == num_dims + 2 else values.flatten(2, -1 - num_dims).sum(2)
