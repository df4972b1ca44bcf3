"""Sums over images of squared sums of outer products: what a weight's squared per-image gradients are.

With g of shape `[K, m, S, O]` and x of shape `[m, S, I]`, wanted is  sum_kn (sum_s g_kns x_ns^T)^2  of shape
`[O, I]`, squared entry by entry. A linear layer of a sequence is one such sum, a convolution one for each tap of its
kernel.

| positions S | what is done                                                                                  |
| ----------- | --------------------------------------------------------------------------------------------- |
| 1           | the square of an outer product is the outer product of the squares: one matrix product         |
| a few       | the square is expanded into pairs of positions (s, s'): (g_s g_s')^T (x_s x_s')                |
| more        | image by image, a tile of the weight at a time that stays in the cache while it is squared     |

The first two never form a per-image gradient, so that images cost nothing extra.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebayes.curvature.squares import slices, squared_passes

__all__ = ["add_squared_products_"]

# Numbers in a tile: it and its sums fit into one core's own cache.
_TILE = 1 << 17
# Entries of a matrix up to which many images' are formed at once.
_SMALL = 1 << 14
# Positions up to which pairs of them are few.
_FEW = 4


def add_squared_products_(first: Tensor, second: Tensor | None, g: Tensor, x: Tensor) -> None:
    """Add sum_n q, q = sum_k (sum_s g_kns x_ns^T)^2, and sum_n q^2 if wanted.

    Args:
        first: what sum q is added to, of shape `[O, I]`.
        second: what sum q^2 is added to, likewise; None: not wanted.
        g: of shape `[K, m, S, O]`, S at least 1.
        x: of shape `[m, S, I]`.
    """
    if x.shape[1] == 1:
        left, right = squared_passes(g[:, :, 0]), x[:, 0].square()  # [m, O], [m, I]
        first.addmm_(left.T, right)
        if second is not None:
            second.addmm_(left.square_().T, right.square_())
    elif x.shape[1] <= _FEW and second is None:
        _add_pairs_(first, g, x)
    elif x.device.type == "cpu" and first.numel() > _SMALL:
        _add_tiles_(first, second, g, x)
    else:
        for images in slices(slice(0, len(x)), len(g) * first.numel(), x.device):
            q = squared_passes(g[:, images].transpose(-1, -2) @ x[images])  # [m, O, I]
            first.add_(q.sum(0))
            if second is not None:
                second.add_(q.square_().sum(0))


def _add_pairs_(first: Tensor, g: Tensor, x: Tensor) -> None:
    """(sum_s a_s)^2 = sum_s a_s^2 + 2 sum_{s<s'} a_s a_s'."""
    one, other = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    twice = torch.where(one == other, 1.0, 2.0).to(x.dtype).view(-1, 1, 1)
    here = x.transpose(0, 1)  # [S, m, I]
    right = (here[one] * here[other] * twice).flatten(0, 1)
    there = g.transpose(1, 2)  # [K, S, m, O]
    left = (there[:, one] * there[:, other]).sum(0).flatten(0, 1)
    first.addmm_(left.T, right)


def _add_tiles_(first: Tensor, second: Tensor | None, g: Tensor, x: Tensor) -> None:
    """Squares a tile of an image's product while it is in the cache: in memory that costs more than the product."""
    num_rows, num_columns = first.shape
    height = max(1, min(num_rows, _TILE // num_columns))
    buffer, sums = first.new_empty(2, height, num_columns)
    turned = g.transpose(-1, -2).contiguous()  # [K, m, O, S]
    right = x.unbind()
    for start in range(0, num_rows, height):
        rows = slice(start, min(start + height, num_rows))
        tile, tile_q, target = buffer[: rows.stop - start], sums[: rows.stop - start], first[rows]
        left = turned[:, :, rows].unbind(1)
        for passes, factor in zip(left, right, strict=True):
            if len(passes) == 1 and second is None:
                torch.mm(passes[0], factor, out=tile)
                target.addcmul_(tile, tile)
                continue
            tile_q.zero_()
            for one_pass in passes:
                torch.mm(one_pass, factor, out=tile)
                tile_q.addcmul_(tile, tile)
            target.add_(tile_q)
            if second is not None:
                second[rows].addcmul_(tile_q, tile_q)
