"""Sums of squared per-image derivatives, formed a few images at a time so that no temporary grows large."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["slices", "squared_passes", "sum_squares"]

# Numbers in one temporary of per-image gradients: about what a processor's caches hold in float32. An
# accelerator wants few large kernels instead.
_TEMPORARY_CPU = 1 << 20
_TEMPORARY_ELSEWHERE = 1 << 26


def slices(num_images: int, numbers_per_image: int, device: torch.device) -> Iterator[slice]:
    """Split images so that a temporary of per-image numbers stays small.

    Args:
        num_images: how many images.
        numbers_per_image: how many numbers the temporary holds for one image.
        device: where the temporary will be.

    Yields:
        Slices that cover `range(num_images)`, of at least one image each.
    """
    temporary = _TEMPORARY_CPU if device.type == "cpu" else _TEMPORARY_ELSEWHERE
    size = max(1, temporary // max(numbers_per_image, 1))
    for start in range(0, num_images, size):
        yield slice(start, min(start + size, num_images))


def sum_squares(
    entries: Callable[[slice], Tensor],
    images: slice,
    volume: int,
    device: torch.device,
    *,
    fourth: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum q = sum_k g_k^2, and q^2, over images, a few images at a time.

    Args:
        entries: images -> per-image gradients g, of shape `[K, m, ...]`.
        images: which images; a range that starts and stops.
        volume: numbers in the K gradients of one image.
        device: where the gradients are.
        fourth: whether sum q^2 is wanted too.

    Returns:
        sum q and sum q^2 (or None), of shape `[...]`.
    """
    total: Tensor | None = None
    total_fourth: Tensor | None = None
    for part in slices(images.stop - images.start, volume, device):
        q = squared_passes(entries(slice(images.start + part.start, images.start + part.stop)))  # [m, ...]
        sums = q.sum(0)
        total = sums if total is None else total.add_(sums)
        if fourth:
            sums = q.square_().sum(0)
            total_fourth = sums if total_fourth is None else total_fourth.add_(sums)
    assert total is not None, "a block has at least one image"
    return total, total_fourth


def squared_passes(gradients: Tensor) -> Tensor:
    """Sum the squares over the K passes: `[K, m, ...]` -> `[m, ...]`."""
    return gradients[0].square() if len(gradients) == 1 else gradients.square().sum(0)
