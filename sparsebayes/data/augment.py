"""Random changes of a whole batch of images at once, on its device; pixels that come in from outside are black.

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

__all__ = ["AUGMENTATIONS", "affine", "crop_flip", "cutout", "shift"]

_MAX_SHIFT = 2  # pixels
_MAX_ANGLE = math.radians(10.0)
_MAX_SCALE = 0.1  # relative
_CROP = 4  # pixels of padding that a crop may reach into
_HOLE = 0.5  # side of a cut-out square, of the image's


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
    offsets = _onto(torch.randint(0, 2 * reach + 1, (2, len(images)), generator=generator), images)
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
    matrix = _onto(torch.stack(rows, dim=1), images).to(images.dtype)  # [B, 2, 3]
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)  # [B, H, W, 2]
    return functional.grid_sample(images, grid, align_corners=False)


def crop_flip(images: Tensor, generator: Generator) -> Tensor:
    """Move each image by up to 4 pixels along each axis, and mirror every second one left to right.

    The usual change for CIFAR (He et al. 2016, section 4.2): a random crop of the image padded by 4 pixels.

    Args:
        images: of shape `[B, C, H, W]`, any dtype and device.
        generator: on the CPU, so that the same seed changes the same images alike on every device.

    Returns:
        A new tensor like `images`.
    """
    moved = shift(images, generator, reach=_CROP)
    mirrored = _onto(torch.rand(len(images), generator=generator) < 0.5, images)
    return torch.where(mirrored[:, None, None, None], moved.flip(3), moved)


def cutout(images: Tensor, generator: Generator) -> Tensor:
    """Hide a square of half the image's side behind the image's mean colour, centred on any pixel.

    T. DeVries, G. W. Taylor, "Improved regularization of convolutional neural networks with cutout", arXiv 1708.04552,
    2017; 16 of 32 pixels are theirs for CIFAR-10. Near the border a part of the square lies outside.

    Args:
        images: of shape `[B, C, H, W]`, floating point, any device.
        generator: on the CPU, so that the same seed changes the same images alike on every device.

    Returns:
        A new tensor like `images`.
    """
    height, width = images.shape[2:]
    centres = torch.rand(2, len(images), 1, generator=generator)
    rows = _onto(_within((centres[0] * height).floor(), height), images)
    columns = _onto(_within((centres[1] * width).floor(), width), images)
    hidden = rows[:, None, :, None] & columns[:, None, None, :]  # [B, 1, H, W]
    return torch.where(hidden, images.mean((2, 3), keepdim=True), images)


def _within(centre: Tensor, size: int) -> Tensor:
    """Which pixels of an axis a hole covers: centres `[B, 1]` -> bool `[B, size]`."""
    start = centre - (round(size * _HOLE) // 2)
    pixels = torch.arange(size)
    return (pixels >= start) & (pixels < start + round(size * _HOLE))


def _onto(draws: Tensor, images: Tensor) -> Tensor:
    """The draws on the images' device; a GPU gets them from pinned memory, so that the program does not wait for it."""
    if images.device.type != "cuda":
        return draws.to(images.device)
    return draws.pin_memory().to(images.device, non_blocking=True)


def _crop_flip_cutout(images: Tensor, generator: Generator) -> Tensor:
    return cutout(crop_flip(images, generator), generator)


def _unchanged(images: Tensor, generator: Generator) -> Tensor:
    """The images themselves; draws nothing."""
    return images


AUGMENTATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "none": _unchanged,
    "shift": shift,
    "shift1": partial(shift, reach=1),
    "affine": affine,
    "crop_flip": crop_flip,
    "crop_flip_cutout": _crop_flip_cutout,
}
