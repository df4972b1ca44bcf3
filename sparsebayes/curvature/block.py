"""Per-image derivatives of the parameters, for one block of images, from the cheapest source that is right.

A parameter whose uses were all recorded gets its derivatives from the records (`layers.py`), summed over its
uses; any other from `fallback.py`.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from sparsebayes.curvature.capture import Capture
from sparsebayes.curvature.fallback import per_image_gradients
from sparsebayes.curvature.layers import Call, SliceCall, at_least_float32
from sparsebayes.curvature.scaling import derivatives
from sparsebayes.curvature.squares import sum_squares

__all__ = ["Block"]

# Numbers that the fallback may keep for a whole block, so that it runs once rather than once per question.
_FALLBACK_KEPT = 1 << 26


@final
class Block:
    """Per-image derivatives for one block of images: of v_k . f, for each of K starting vectors per image.

    Attributes:
        num_images: n, the images in the block.
        num_passes: K, the backward passes.
        device: where the derivatives are.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        v: Tensor,
        capture: Capture,
        untracked: set[str],
        scale: Tensor | None = None,
    ) -> None:
        self.num_images = len(x)
        self.num_passes = len(v)
        self.device = v.device
        self._model = model
        self._x = x
        self._v = v
        self._capture = capture
        self._untracked = sorted(untracked)
        self._scale = scale
        self._kept: dict[str, Tensor] = {}
        self._parameters = dict(model.named_parameters())
        self._values = {name: p.detach() for name, p in self._parameters.items()}

    def value(self, name: str) -> Tensor:
        """A parameter, without gradients."""
        return self._values[name]

    def tracked(self, name: str) -> bool:
        """Whether the recorded calls explain this parameter completely."""
        return name not in self._untracked

    def calls(self, name: str) -> list[Call]:
        """The recorded calls of a tracked parameter; none if the outputs do not depend on it."""
        return self._capture.calls_of(name)

    def sliceable(self, name: str) -> bool:
        """Whether `rows` and `columns` can be had: all uses are recorded, and are of the right kind."""
        return self.tracked(name) and all(isinstance(call, SliceCall) for call in self.calls(name))

    def entries(self, name: str, images: slice) -> Tensor:
        """Gradients with respect to a parameter's entries.

        Args:
            name: the parameter.
            images: m of the block's images.

        Returns:
            Of shape `[K, m, *shape of the parameter]`.
        """
        if self.tracked(name):
            return self._add(name, [call.entries(name, images) for call in self.calls(name)], images)
        volume = sum(self._values[other].numel() for other in self._untracked)
        if self.num_passes * self.num_images * volume > _FALLBACK_KEPT:
            found = per_image_gradients(self._model, [name], self._x[images], self._v[:, images])[name]
            return self._scaled(found, images)
        if not self._kept:
            found_all = per_image_gradients(self._model, self._untracked, self._x, self._v)
            self._kept = {other: self._scaled(found, self.whole) for other, found in found_all.items()}
        return self._kept[name][:, images]

    def switches(self, name: str) -> Tensor:
        """Derivatives with respect to a parameter that multiplies activations.

        Args:
            name: one of the sweep's switches.

        Returns:
            Of shape `[K, n, *shape of the parameter]`.
        """
        # A layer may read it too, as its weight or bias: uses are summed.
        found = self.entries(name, self.whole)
        if not self.tracked(name) or not self._capture.scalings:
            return found
        return found + self._scaled(derivatives(self._capture.scalings, self._parameters[name]), self.whole)

    def squares(
        self, name: str, images: slice, *, fourth: bool, tune: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Sum q = sum_k (gradient)^2, and q^2, over images, entry by entry.

        Args:
            name: the parameter.
            images: m of the block's images, at least one.
            fourth: whether sum q^2 is wanted too.
            tune: where there are several ways, time them.

        Returns:
            sum_n q and sum_n q^2 (or None), of the parameter's shape.
        """
        if self.tracked(name) and len(self.calls(name)) == 1:
            return self.calls(name)[0].squares(name, images, fourth=fourth, tune=tune)
        volume = self.num_passes * self._values[name].numel()
        return sum_squares(lambda part: self.entries(name, part), images, volume, self.device, fourth=fourth)

    @property
    def whole(self) -> slice:
        """All images of the block."""
        return slice(0, self.num_images)

    def halves(self, number: int) -> list[tuple[int, slice]]:
        """Which of two halves of all images the block's belong to: blocks take turns, the first has both.

        Args:
            number: of the block, from 0.

        Returns:
            Pairs of a half (0 or 1) and images, no part empty.
        """
        if number > 0 or self.num_images == 1:
            return [(number % 2, self.whole)]
        middle = self.num_images // 2
        return [(0, slice(0, middle)), (1, slice(middle, self.num_images))]

    def rows(self, name: str, images: slice) -> Tensor:
        """Derivatives with respect to switches of a tracked weight's slices along dim 0: `[K, m, O]`."""
        return self._add(name, [call.rows(images) for call in self._slice_calls(name)], images, dim=0)

    def columns(self, name: str, images: slice) -> Tensor:
        """Derivatives with respect to switches of a tracked weight's slices along dim 1: `[K, m, I]`."""
        return self._add(name, [call.columns(images) for call in self._slice_calls(name)], images, dim=1)

    def _scaled(self, gradients: Tensor, images: slice) -> Tensor:
        """Derivatives `[K, m, ...]` of scaled starting vectors -> those of the vectors themselves."""
        gradients = at_least_float32(gradients)
        if self._scale is None:
            return gradients
        return gradients * self._scale[:, images].reshape(len(gradients), -1, *[1] * (gradients.ndim - 2))

    def _slice_calls(self, name: str) -> list[SliceCall]:
        found: list[SliceCall] = []
        for call in self.calls(name):
            assert isinstance(call, SliceCall), "only linear layers and convolutions have weights of two dims"
            found.append(call)
        return found

    def _add(self, name: str, parts: list[Tensor], images: slice, dim: int | None = None) -> Tensor:
        """Sum over the calls: a weight that is used twice has one derivative."""
        if parts:
            return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        shape = self._values[name].shape
        shape = shape if dim is None else shape[dim : dim + 1]
        num_images = len(range(self.num_images)[images])
        return self._v.new_zeros(self.num_passes, num_images, *shape)
