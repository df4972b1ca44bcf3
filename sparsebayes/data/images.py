"""The two nouns of this folder: labelled images, and a data set made of a training and a test part.

>>> Images(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([3, 7]))
Images(2 of 1x28x28, labels 3 to 7)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebayes.errors import DataError

__all__ = ["Dataset", "Images"]


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Images with one class label each, at least one.

    Attributes:
        images: pixels from 0 to 255, uint8 of shape `[N, C, H, W]`.
        labels: class numbers from 0, int64 of shape `[N]`.

    Raises:
        DataError: another dtype or shape, no image at all, or a negative label.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        """Refuse what the loader could not feed."""
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(
                f"images must be uint8 of shape [N, C, H, W], "
                f"got {images.dtype} of shape {list(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"labels must be int64 of shape [{len(images)}], one for each image, "
                f"got {labels.dtype} of shape {list(labels.shape)}"
            )
        if images.numel() == 0:
            raise DataError(f"a data set needs at least one image, got shape {list(images.shape)}")
        if labels.min() < 0:
            raise DataError(f"labels must be class numbers from 0, got {int(labels.min())}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        channels, height, width = self.images.shape[1:]
        low, high = int(self.labels.min()), int(self.labels.max())
        return f"Images({len(self):,} of {channels}x{height}x{width}, labels {low} to {high})"

    def subset(self, index: Tensor) -> Images:
        """The images at the positions `index` (int64 of shape `[M]`), in that order; copies.

        Raises:
            DataError: `index` is empty.
        """
        return Images(self.images.index_select(0, index), self.labels.index_select(0, index))


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A training and a test part, and what it takes to normalise them.

    Attributes:
        name: what reports call it.
        train: the training images; hold some out with `sparsebayes.data.split`.
        test: images that nothing is chosen on.
        num_classes: how many classes there are; every label is below it.
        mean: of each channel's pixels scaled to 0..1.
        std: standard deviation of the same.

    Raises:
        DataError: the parts differ in image shape, a label is too large, or mean and std do not fit the
            channels.
    """

    name: str
    train: Images
    test: Images
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        shape = self.train.images.shape[1:]
        if self.test.images.shape[1:] != shape:
            raise DataError(
                f"data set {self.name!r}: training images have shape {list(shape)}, "
                f"test images {list(self.test.images.shape[1:])}; both must be the same"
            )
        for part, images in (("training", self.train), ("test", self.test)):
            if (largest := int(images.labels.max())) >= self.num_classes:
                raise DataError(
                    f"data set {self.name!r}: {part} labels must be below num_classes = {self.num_classes}, "
                    f"got {largest}"
                )
        check_normalisation(self.mean, self.std, shape[0])

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, train={self.train}, test={self.test}, {self.num_classes} classes)"


def check_normalisation(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> None:
    """Refuse a mean or std that does not have one finite number for each channel, std above zero.

    Raises:
        DataError: as said.
    """
    if len(mean) != channels or len(std) != channels:
        raise DataError(f"mean and std need {channels} numbers, one for each channel, got {mean} and {std}")
    if not all(math.isfinite(value) for value in (*mean, *std)) or min(std) <= 0:
        raise DataError(f"mean and std must be finite and std above zero, got {mean} and {std}")
