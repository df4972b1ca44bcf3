"""The error found from two halves: of any sizes, and at entries of every place of a weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsebayes.curvature.halves import Halves
from sparsebayes.curvature.squares import SquareSums


def _error(sums: Tensor, counts: tuple[int, int], draws: int) -> float:
    """Root mean square of the error that is promised for a mean over `counts` images, over repeated draws."""
    squares = []
    for one in sums.view(draws, -1, sums.shape[1]):
        like = torch.zeros(sums.shape[1], dtype=torch.float64)
        halves, total = Halves({"w": like}), SquareSums(like, fourth=False)
        for half, part in enumerate(one.split(list(counts))):
            total.add_(part)
            halves.add(half, {"w": total})
            halves.count(half, slice(0, len(part)))
        squares.append(halves.error() ** 2)
    return float(torch.tensor(squares).mean().sqrt())


@pytest.mark.parametrize("counts", [(20, 20), (36, 4), (1, 39)])
def test_the_error_is_that_of_the_mean_for_halves_of_any_sizes(counts: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = 10 + torch.randn(400 * 40, 50, dtype=torch.float64, generator=generator)
    # 40 images of deviation 1 around 10.
    assert _error(images, counts, 400) == pytest.approx(0.1 / 40**0.5, rel=0.05)


@pytest.mark.parametrize("shape", [(64, 64, 3, 3), (256, 512, 5, 5), (60, 70, 7, 7), (128, 128, 1, 1)])
def test_entries_of_every_place_are_compared(shape: tuple[int, ...]) -> None:
    for dim, size in enumerate(shape):
        for place in {0, size // 2, size - 1}:
            q = torch.zeros(shape)
            q.select(dim, place).fill_(1.0)
            halves = Halves({"w": q})
            halves.count(0, slice(0, 3))
            halves.count(1, slice(0, 3))
            total = SquareSums(q, fourth=False)
            total.add_(q.unsqueeze(0))
            halves.add(0, {"w": total})
            assert halves.error() == pytest.approx(1.0), (dim, place)  # one half has all of it
