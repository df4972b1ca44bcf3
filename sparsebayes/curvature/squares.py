"""Sums of squared per-image derivatives, formed a few images at a time so that no temporary grows large."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["slices", "squared_passes", "sum_squared_products", "sum_squares"]

# Numbers in one temporary of per-image gradients: about what a processor's caches hold in float32. An
# accelerator wants few large kernels instead.
_TEMPORARY_CPU = 1 << 20
_TEMPORARY_ELSEWHERE = 1 << 26
# Numbers in a tile of `sum_squared_products`: the tile, its sums and its factors fit into one core's own
# cache.
_TILE = 1 << 16


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
    num_images: int,
    volume: int,
    device: torch.device,
    *,
    fourth: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sum q = sum_k g_k^2, and q^2, over images, a few images at a time.

    Args:
        entries: images -> per-image gradients g, of shape `[K, m, ...]`.
        num_images: how many images.
        volume: numbers in the K gradients of one image.
        device: where the gradients are.
        fourth: whether sum q^2 is wanted too.

    Returns:
        sum q and sum q^2 (or None), of shape `[...]`.
    """
    total: Tensor | None = None
    total_fourth: Tensor | None = None
    for images in slices(num_images, volume, device):
        q = squared_passes(entries(images))  # [m, ...]
        part = q.sum(0)
        total = part if total is None else total.add_(part)
        if fourth:
            part = q.square_().sum(0)
            total_fourth = part if total_fourth is None else total_fourth.add_(part)
    assert total is not None, "a block has at least one image"
    return total, total_fourth


def sum_squared_products(g: Tensor, x: Tensor, *, fourth: bool) -> tuple[Tensor, Tensor | None]:
    """Sum q = sum_k (g_kn x_n^T)^2, and q^2, over images, tile by tile.

    A large weight's per-image gradient does not fit into a processor's cache, and squaring it there costs
    more than the matrix product; a tile of a few rows is squared and added while it is still in the cache.

    Args:
        g: of shape `[K, n, O, S]`, on the CPU.
        x: of shape `[n, P, S]`.
        fourth: whether sum q^2 is wanted too.

    Returns:
        sum_n q and sum_n q^2 (or None), of shape `[O, P]`.
    """
    total = g.new_zeros(g.shape[2], x.shape[1])
    total_fourth = torch.zeros_like(total) if fourth else None
    height = max(1, _TILE // x.shape[1])
    product, q = total.new_empty(2, height, x.shape[1])
    for start in range(0, len(total), height):
        rows = slice(start, min(start + height, len(total)))
        tile, tile_q = product[: rows.stop - start], q[: rows.stop - start]
        for image, columns in enumerate(x):
            for k, one_pass in enumerate(g):
                torch.mm(one_pass[image, rows], columns.T, out=tile)
                if k == 0:
                    torch.mul(tile, tile, out=tile_q)
                else:
                    tile_q.addcmul_(tile, tile)
            total[rows].add_(tile_q)
            if total_fourth is not None:
                total_fourth[rows].addcmul_(tile_q, tile_q)
    return total, total_fourth


def squared_passes(gradients: Tensor) -> Tensor:
    """Sum the squares over the K passes: `[K, m, ...]` -> `[m, ...]`."""
    return gradients[0].square() if len(gradients) == 1 else gradients.square().sum(0)
