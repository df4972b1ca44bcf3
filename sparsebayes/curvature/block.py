"""Per-image derivatives of the parameters, for one block of images, from the cheapest source that is right.

A parameter whose uses were all recorded gets its derivatives from the records (`layers.py`), summed over its
uses; any other from `fallback.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn

from sparsebayes.curvature.capture import Capture
from sparsebayes.curvature.fallback import per_image_gradients
from sparsebayes.curvature.layers import Call, SliceCall
from sparsebayes.curvature.scaling import derivatives
from sparsebayes.curvature.squares import SquareSums, at_least_float32, slices, squared_passes

__all__ = ["Block"]

# Numbers that the fallback may keep at a time.
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
        self._parameters = dict(model.named_parameters())
        self._values = {name: p.detach() for name, p in self._parameters.items()}
        self._released = False
        self._kept: dict[str, Tensor] = {}
        self._range = slice(0, 0)  # of images whose gradients are kept
        volume = self.num_passes * sum(self._values[name].numel() for name in self._untracked)
        self._range_size = max(1, min(self.num_images, _FALLBACK_KEPT // max(volume, 1)))

    def value(self, name: str) -> Tensor:
        """A parameter, without gradients."""
        return self._values[name]

    def tracked(self, name: str) -> bool:
        """Whether the recorded calls explain this parameter completely."""
        return name not in self._untracked

    def calls(self, name: str) -> list[Call]:
        """The recorded calls of a tracked parameter; none if the outputs do not depend on it."""
        assert not self._released, "a block is valid until the next one is asked for"
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
        if not (self._range.start <= images.start and images.stop <= self._range.stop):
            self._fall_back(images)
        start = self._range.start
        return self._kept[name][:, images.start - start : images.stop - start]

    def ranges(self, images: slice) -> Iterator[slice]:
        """Split images so that the gradients of all untracked parameters can be kept for a range at a time.

        Whoever asks for all parameters range by range has the network run once for each image; in any other
        order it is run anew for each parameter.

        Args:
            images: a range of the block's.
        """
        start = images.start
        while start < images.stop:
            stop = min(images.stop, (start // self._range_size + 1) * self._range_size)
            yield slice(start, stop)
            start = stop

    def _fall_back(self, images: slice) -> None:
        """Compute the gradients of all untracked parameters, and keep them for the range that holds some images."""
        first = images.start // self._range_size * self._range_size
        self._range = slice(first, min(first + self._range_size, self.num_images))
        if images.stop > self._range.stop:  # asked for without regard to ranges
            self._range = images
        self._kept = {}  # before the next are made
        x, v = self._x[self._range], self._v[:, self._range]
        found = per_image_gradients(self._model, self._untracked, x, v)
        self._kept = {name: self._scaled(gradients, self._range) for name, gradients in found.items()}

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

    def add_squares_(self, sums: SquareSums, name: str, images: slice, *, tune: bool = False) -> None:
        """Add q = sum_k (gradient)^2, and q^2, of some images, entry by entry.

        Args:
            sums: of the parameter.
            name: the parameter.
            images: m of the block's images, at least one.
            tune: where there are several ways, time them.
        """
        if self.tracked(name) and len(self.calls(name)) == 1:
            self.calls(name)[0].add_squares_(sums, name, images, tune=tune)
        elif not self.tracked(name) or self.calls(name):  # else the outputs do not depend on it
            for part in slices(images, self.volume(name), self.device):
                sums.add_(squared_passes(self.entries(name, part)))

    def volume(self, name: str) -> int:
        """Numbers in the largest temporary that a parameter's derivatives of one image need."""
        own = self.num_passes * self._values[name].numel()
        calls = self.calls(name) if self.tracked(name) else []
        return max([own, *(call.volume(name) for call in calls)])

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

    def release(self) -> None:
        """Forget the activations and their gradients; nothing can be asked for from then on."""
        self._released = True
        self._capture.calls.clear()
        self._capture.scalings.clear()
        self._kept = {}

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
