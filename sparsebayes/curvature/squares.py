"""Sums of squared per-image derivatives, added up a few images at a time so that no temporary grows large.

>>> sums = SquareSums(weight, fourth=False)
>>> sums.add_(gradients.square())                                    # [m, *shape of the weight]
>>> sums.result()[0].shape                                           # that of the weight
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import final

import torch
from torch import Tensor

__all__ = ["SquareSums", "at_least_float32", "slices", "squared_passes"]

# Numbers in one temporary of per-image gradients: about what a processor's caches hold in float32. An
# accelerator wants few large kernels instead.
_TEMPORARY_CPU = 1 << 20
_TEMPORARY_ELSEWHERE = 1 << 26


@final
class SquareSums:
    """Sums of q = sum_k g_k^2 over images, and of q^2 if wanted, for one parameter; kept for a whole sweep.

    A kernel adds to them in the layout that suits it. They are brought into the parameter's order once, when they
    are read, rather than with every block of images.

    Args:
        like: the parameter; sums are of its shape, on its device, of its dtype but at least float32.
        fourth: whether sums of q^2 are wanted too.
    """

    def __init__(self, like: Tensor, *, fourth: bool) -> None:
        self._like = at_least_float32(like.detach().new_empty(0))
        self._shape = like.shape
        self._fourth = fourth
        self._plain: list[Tensor] = []
        self._by_tap: list[Tensor] = []

    @property
    def fourth(self) -> bool:
        """Whether sums of q^2 are kept."""
        return self._fourth

    def plain(self) -> tuple[Tensor, Tensor | None]:
        """The sums in the parameter's own shape, to be added to."""
        if not self._plain:
            self._plain = [self._like.new_zeros(self._shape) for _ in range(1 + self._fourth)]
        return self._plain[0], self._plain[1] if self._fourth else None

    def by_tap(self) -> tuple[Tensor, Tensor | None]:
        """Those of a weight `[O, I, *kernel]` in the shape `[prod(kernel), O, I]`, to be added to."""
        if not self._by_tap:
            shape = (prod(self._shape[2:]), *self._shape[:2])
            self._by_tap = [self._like.new_zeros(shape) for _ in range(1 + self._fourth)]
        return self._by_tap[0], self._by_tap[1] if self._fourth else None

    def add_(self, q: Tensor) -> None:
        """Add q of some images.

        Args:
            q: of shape `[m, *shape of the parameter]`; overwritten.
        """
        first, second = self.plain()
        first.add_(q.sum(0))
        if second is not None:
            second.add_(q.square_().sum(0))

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Sums of q and of q^2 (or None), in the parameter's shape, none below 0."""
        return self._total(0), self._total(1) if self._fourth else None

    def sample(self, step: int) -> Tensor:
        """Every so manyth entry of the sums of q, in the parameter's order.

        Args:
            step: their distance.
        """
        found = self._like.new_zeros(len(range(0, prod(self._shape), step)))
        if self._plain:
            found = found + self._plain[0].view(-1)[::step]
        if self._by_tap:
            taps, width = len(self._by_tap[0]), prod(self._shape[:2])
            entries = torch.arange(0, taps * width, step, device=found.device)
            found = found + self._by_tap[0].view(-1).take(entries % taps * width + entries // taps)
        return found

    def _total(self, which: int) -> Tensor:
        total = self._like.new_zeros(self._shape)
        if self._plain:
            total += self._plain[which]
        if self._by_tap:
            total += self._by_tap[which].permute(1, 2, 0).view(self._shape)
        # Terms of both signs may have been added up: where they cancel, rounding may leave less than nothing.
        return total.clamp_(min=0)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision holds activations well enough, but neither their products nor sums of many."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def slices(images: slice, numbers_per_image: int, device: torch.device) -> Iterator[slice]:
    """Split images so that a temporary of per-image numbers stays small.

    Args:
        images: a range that starts and stops.
        numbers_per_image: how many numbers the temporary holds for one image.
        device: where the temporary will be.

    Yields:
        Slices that cover the range, of at least one image each.
    """
    temporary = _TEMPORARY_CPU if device.type == "cpu" else _TEMPORARY_ELSEWHERE
    size = max(1, temporary // max(numbers_per_image, 1))
    for start in range(images.start, images.stop, size):
        yield slice(start, min(start + size, images.stop))


def squared_passes(gradients: Tensor) -> Tensor:
    """Sum the squares over the K passes: `[K, m, ...]` -> `[m, ...]`."""
    return gradients[0].square() if len(gradients) == 1 else gradients.square().sum(0)
