"""Procedural colour images of ten shapes: a data set without a file, for trying things out and for tests.

Every image shows one bright or dark shape of random colour, size and place on a random background, under noise. The
classes are disc, ring, square, frame, triangle, plus, diagonal cross, horizontal stripes, vertical stripes and
checkerboard. A linear classifier does poorly on them and a small convolutional network well, within an epoch or two.

    >>> make_shapes(num_train=5000, num_test=1000, seed=0)
    Dataset('shapes', train=Images(5,000 of 3x32x32, labels 0 to 9), test=Images(1,000 of 3x32x32, ...), 10 classes)
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from sparsebayes.data.images import Dataset, Images
from sparsebayes.errors import DataError

__all__ = ["CLASSES", "make_shapes"]

CLASSES = (
    "disc", "ring", "square", "frame", "triangle", "plus", "cross", "rows", "columns", "checkerboard",
)  # fmt: skip

_SIZE = 32
_NOISE = 6.0  # standard deviation, of 0..255
_CONTRAST = 90.0  # least difference of the two colours, in one channel


def make_shapes(*, num_train: int = 5000, num_test: int = 1000, seed: int = 0) -> Dataset:
    """Draw the data set anew; the same arguments give the same pixels.

    Args:
        num_train: training images, in equal numbers of each class as far as they divide.
        num_test: test images, likewise.
        seed: of the one generator that everything is drawn from.

    Returns:
        RGB images of 32x32 pixels.

    Raises:
        DataError: a count below 1.
    """
    if min(num_train, num_test) < 1:
        raise DataError(f"shapes needs at least one image in each part, got {num_train} and {num_test}")
    generator = Generator().manual_seed(seed)
    train, test = _draw(num_train, generator), _draw(num_test, generator)
    pixels = train.images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    centre = (float(mean[0]), float(mean[1]), float(mean[2]))
    spread = (float(std[0]), float(std[1]), float(std[2]))
    return Dataset("shapes", train, test, len(CLASSES), centre, spread)


def _draw(count: int, generator: Generator) -> Images:
    """Images with the classes in turn."""
    labels = torch.arange(count) % len(CLASSES)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    radius = uniform(6, 11, 1, 1)
    grid = torch.arange(_SIZE) + 0.5
    y = grid[:, None] - uniform(12, 20, 1, 1)  # [N, 32, 1]
    x = grid[None, :] - uniform(12, 20, 1, 1)  # [N, 1, 32]
    masks = _masks(x / radius, y / radius)  # ten of [N, 32, 32]
    inside = torch.stack(masks, dim=1)[torch.arange(count), labels]  # [N, 32, 32]
    background = uniform(0, 255, 3)
    difference = uniform(_CONTRAST, 150, 3)
    shape = torch.where(background > 127.5, background - difference, background + difference)
    colours = torch.where(inside[:, None], shape[:, :, None, None], background[:, :, None, None])
    noise = torch.randn(count, 3, _SIZE, _SIZE, generator=generator) * _NOISE
    return Images((colours + noise).clamp(0, 255).round().to(torch.uint8), labels)


def _masks(x: Tensor, y: Tensor) -> list[Tensor]:
    """Where each shape is, in the order of `CLASSES`; x and y are in units of the shape's radius."""
    distance = (x.square() + y.square()).sqrt()
    across = torch.maximum(x.abs(), y.abs())
    along = torch.minimum(x.abs(), y.abs())
    square = across < 0.85
    tilted = (x.abs() - y.abs()).abs()
    rows, columns = (3 * y).floor() % 2 == 0, (3 * x).floor() % 2 == 0
    return [
        distance < 1,
        (distance < 1) & (distance > 0.6),
        square,
        square & (across > 0.5),
        (y < 0.8) & (x.abs() < (y + 1) * 0.55),
        (across < 1) & (along < 0.25),
        (across < 0.9) & (tilted < 0.35),
        square & rows,
        square & columns,
        square & (rows ^ columns),
    ]
