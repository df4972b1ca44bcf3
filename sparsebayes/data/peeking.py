"""What a user's batches tell before they are used: how many images there are, and what the first ones look like.

>>> num_images(DataLoader(dataset, batch_size=100))
60000
>>> images, batches = first_images(batches)          # the same batches, from the first one on
"""

from __future__ import annotations

from collections.abc import Iterable, Sized
from itertools import chain, islice

from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler

from sparsebayes.errors import DataError

__all__ = ["first_images", "num_images"]

Batches = Iterable[tuple[Tensor, Tensor]]


def num_images(batches: Batches) -> int:
    """Number of images in the data set behind a loader.

    Raises:
        DataError: If the loader does not know it.
    """
    known, dataset = getattr(batches, "num_data", None), getattr(batches, "dataset", None)
    size: int | None = None
    if isinstance(known, int):
        size = known
    elif isinstance(batches, DataLoader) and isinstance(batches.sampler, SubsetRandomSampler):
        size = len(batches.sampler)
    elif isinstance(dataset, Sized) and not (
        isinstance(batches, DataLoader) and batches.batch_sampler is None  # its items may be batches
    ):
        size = len(dataset)
    if size is None:
        raise DataError(
            "the size of the training set is not known: give wrap(..., num_data=N), or update() a DataLoader"
        )
    return size


def first_images(batches: Batches) -> tuple[Tensor, Batches]:
    """The images of the first batch, of shape ``[B, ...]``, and all batches, that one included, to be read once.

    Raises:
        DataError: If there is no batch, or it holds no images.
    """
    iterator = iter(batches)
    first = list(islice(iterator, 1))
    if not first:
        raise DataError("expected images to estimate the curvature on, got an empty loader")
    images = first[0][0] if isinstance(first[0], (tuple, list)) and first[0] else first[0]
    if not isinstance(images, Tensor) or images.ndim == 0 or len(images) == 0:
        raise DataError(
            f"expected batches (images, labels) of two tensors, got a batch that begins with {type(images).__name__}; "
            "give a generator that makes them of what your loader has"
        )
    return images, chain(first, iterator)
