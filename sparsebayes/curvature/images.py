"""The images that a curvature is computed from: what may come, and what is refused or warned of."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sparsebayes.curvature.importance import pool_size
from sparsebayes.errors import DataError, RecipeError

__all__ = [
    "Batches",
    "check_num_data",
    "check_num_images",
    "check_seen",
    "check_targets",
    "first_images",
    "pools",
    "warn_of_augmentation",
]

_ENOUGH_TO_SEE_ORDER = 64

Batches = Iterable[tuple[Tensor, Tensor]]
"""Pairs of images `[B, ...]` and targets."""


def check_num_data(num_data: int) -> None:
    """Refuse a data set without images.

    Raises:
        RecipeError: `num_data` is below 1.
    """
    if num_data < 1:
        raise RecipeError(
            f"expected the number of images in the data set, at least 1, got num_data={num_data}"
        )


def check_num_images(num_images: int | None) -> None:
    """Refuse to use no images.

    Raises:
        RecipeError: `num_images` is below 1.
    """
    if num_images is not None and num_images < 1:
        raise RecipeError(
            f"expected at least 1 image to compute the curvature from, got num_images={num_images}"
        )


def check_seen(num_images: int, num_data: int) -> None:
    """Refuse a loader with more images than the data set is said to have.

    Raises:
        DataError: that is so.
    """
    if num_images > num_data:
        raise DataError(
            f"the loader holds at least {num_images} images, but the training set was said to have {num_data}; give "
            "num_data=N with the right number"
        )


def first_images(batches: Batches, num_images: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches up to a number of images, none empty; asks for none that is not needed.

    Args:
        batches: pairs of images and targets.
        num_images: how many; None: all.

    Raises:
        RecipeError: `num_images` is below 1.
        DataError: a batch is no pair of tensors.
    """
    check_num_images(num_images)
    used, order, exhausted = 0, _Order(), False
    try:
        for batch in batches:
            x, y = _pair(batch)
            left = len(x) if num_images is None else min(len(x), num_images - used)
            if left > 0:
                order.see(y[:left])
                yield x[:left], y[:left]
            used += left
            if num_images is not None and used >= num_images:
                return
        exhausted = True
    finally:
        if not exhausted and order.sorted and used >= _ENOUGH_TO_SEE_ORDER:
            warnings.warn(
                f"the first {used} images of the curvature's loader are sorted by class, and no others were used; give "
                "it a loader that shuffles, or num_images=None for all",
                stacklevel=2,
            )


class _Order:
    """Whether class numbers have never fallen, batch after batch.

    Attributes:
        sorted: so far; False where targets are no class numbers.
    """

    def __init__(self) -> None:
        self.sorted = True
        self._last: int | None = None

    def see(self, y: Tensor) -> None:
        """Look at the targets of a batch, of which there is at least one."""
        if not self.sorted:
            return
        if y.ndim != 1 or y.is_floating_point() or y.is_complex():
            self.sorted = False
            return
        rising = bool((y[1:] >= y[:-1]).all())
        self.sorted = rising and (self._last is None or int(y[0]) >= self._last)
        self._last = int(y[-1])


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and targets of a batch.

    Raises:
        DataError: it is no pair of tensors of the same length.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        x, y = batch
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim > 0 and y.ndim > 0:
            if len(x) != len(y):
                raise DataError(f"expected as many targets as images, got {len(y)} for {len(x)}")
            return x, y
        got = f"a pair of {type(x).__name__} and {type(y).__name__}"
    elif isinstance(batch, tuple | list):
        got = f"a {type(batch).__name__} of {len(batch)}"
    else:
        got = f"a {type(batch).__name__}"
    raise DataError(
        f"expected batches (images, targets) of two tensors, got {got}; give a generator that makes them of what your "
        "loader has, such as ((batch['image'], batch['label']) for batch in loader)"
    )


def check_targets(logits: Tensor, y: Tensor, likelihood: str) -> None:
    """Refuse targets that the likelihood cannot have for these outputs.

    Args:
        logits: of shape `[n, C]`.
        y: targets.
        likelihood: one of `LIKELIHOODS`.

    Raises:
        DataError: they do not fit.
    """
    num_images, num_classes = logits.shape
    if likelihood == "cross_entropy" and num_classes < 2:
        raise DataError(
            "expected at least two outputs for cross_entropy, got one; give likelihood='binary_cross_entropy' and "
            "targets of the outputs' shape"
        )
    if likelihood != "cross_entropy":
        if y.shape != logits.shape:
            raise DataError(
                f"expected {likelihood} targets of the outputs' shape {list(logits.shape)}, got shape "
                f"{list(y.shape)}"
            )
        if likelihood == "binary_cross_entropy" and not bool(((y >= 0) & (y <= 1)).all()):
            raise DataError("expected binary_cross_entropy targets between 0 and 1, got others")
        return
    if y.shape != (num_images,) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise DataError(
            f"expected class numbers of shape [{num_images}] as cross_entropy targets, got {y.dtype} of "
            f"shape {list(y.shape)}; for other targets give likelihood='mse' or 'binary_cross_entropy'"
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"expected class numbers in 0..{num_classes - 1}, as the network has {num_classes} outputs, got "
            f"{low}..{high}"
        )


def pools(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Put batches together to pools of a fixed number of images; the last one is smaller.

    Args:
        batches: pairs of images and targets.

    Yields:
        Pairs of images and targets, in order.
    """
    held: list[tuple[Tensor, Tensor]] = []
    count = 0
    for images, targets in batches:
        x, y = images, targets
        if len(x) == 0:
            continue
        size = pool_size(x[0].numel())
        while count + len(x) >= size:
            need = size - count
            held.append((x[:need], y[:need]))
            yield _joined(held)
            held, count = [], 0
            x, y = x[need:], y[need:]
        if len(x):
            held.append((x, y))
            count += len(x)
    if held:
        yield _joined(held)


def warn_of_augmentation(batches: Batches) -> None:
    """Warn if a loader's images are changed at random each time they are read.

    Curvature belongs to the images themselves. Only a `DataLoader` over a map-style data set can be asked: its
    first image is read twice, and Python's, NumPy's and torch's random states are left as they were. A data set that
    is read by other processes is not asked, as it may be one that must not be opened in this one.

    Args:
        batches: pairs of images and targets.
    """
    if not isinstance(batches, DataLoader) or isinstance(batches.dataset, IterableDataset):
        return
    if batches.num_workers > 0:
        return
    states: tuple[Any, ...] = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        first, again = batches.dataset[0], batches.dataset[0]
    except (
        Exception
    ):  # a data set of the user's may raise anything; if something is the matter, iterating will tell
        return
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
    if isinstance(first, tuple | list) and isinstance(again, tuple | list):
        first, again = first[0], again[0]
    if isinstance(first, Tensor) and isinstance(again, Tensor) and not torch.equal(first, again):
        warnings.warn(
            "the images of the curvature's loader change each time they are read, as augmentation does; give it "
            "the images as they are",
            stacklevel=2,
        )


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
