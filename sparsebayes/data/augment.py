"""Random changes of a whole batch of images at once; the pixels that come in from outside are black.

>>> AUGMENTATIONS["shift"](images, torch.Generator().manual_seed(0)).shape == images.shape
True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional

__all__ = ["AUGMENTATIONS", "affine", "shift"]

_MAX_SHIFT = 2  # pixels
_MAX_ANGLE = math.radians(10.0)
_MAX_SCALE = 0.1  # relative


def shift(images: Tensor, generator: Generator, *, reach: int = _MAX_SHIFT) -> Tensor:
    """Move each image by up to `reach` whole pixels along each axis.

    Args:
        images: of shape `[B, C, H, W]`, any dtype and device.
        generator: on the CPU, so that the same seed moves the same images on every device.
        reach: largest move, in pixels.

    Returns:
        A new tensor like `images`.
    """
    height, width = images.shape[2:]
    padded = functional.pad(images, (reach,) * 4)  # [B, C, H+2r, W+2r]
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, 2r+1, 2r+1, H, W], a view
    offsets = torch.randint(0, 2 * reach + 1, (2, len(images)), generator=generator).to(images.device)
    return windows[torch.arange(len(images), device=images.device), :, offsets[0], offsets[1]]


def affine(images: Tensor, generator: Generator) -> Tensor:
    """Turn each image by up to 10 degrees, scale it by up to 10 percent, and move it by up to 2 pixels.

    Args:
        images: of shape `[B, C, H, W]`, floating point, any device.
        generator: on the CPU, so that the same seed changes the same images alike on every device.

    Returns:
        A new tensor like `images`, interpolated linearly.
    """
    height, width = images.shape[2:]
    draws = torch.rand(4, len(images), generator=generator) * 2 - 1  # in [-1, 1)
    angle, scale = draws[0] * _MAX_ANGLE, 1 + draws[1] * _MAX_SCALE
    # The grid's coordinates run from -1 to 1: a turn in pixels is a turn in them only after undoing the
    # aspect.
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = [
        torch.stack([cosine, -sine * height / width, draws[2] * 2 * _MAX_SHIFT / width], dim=1),
        torch.stack([sine * width / height, cosine, draws[3] * 2 * _MAX_SHIFT / height], dim=1),
    ]
    matrix = torch.stack(rows, dim=1).to(images)  # [B, 2, 3]
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)  # [B, H, W, 2]
    return functional.grid_sample(images, grid, align_corners=False)


def _unchanged(images: Tensor, generator: Generator) -> Tensor:
    """The images themselves; draws nothing."""
    return images


AUGMENTATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "none": _unchanged,
    "shift": shift,
    "shift1": partial(shift, reach=1),
    "affine": affine,
}
