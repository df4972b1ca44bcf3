"""Batches from a set that lives on the device: no worker processes, no Python work for single images.

>>> for x, y in Loader(images, batch_size=100, mean=(0.1307,), std=(0.3081,), shuffle=True, augment="shift"):
...     ...  # x float32 [100, 1, 28, 28], y int64 [100]

Pixels stay uint8 (MNIST: 47 MB) until a batch is cut out; then they are augmented and normalised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Generator, Tensor

from sparsebayes.data.augment import AUGMENTATIONS
from sparsebayes.data.images import Images, check_normalisation
from sparsebayes.errors import DataError, unknown

__all__ = ["Loader", "split"]


def split(images: Images, *, holdout: int, seed: int) -> tuple[Images, Images]:
    """Hold some training images out, in the proportions of the classes.

    Args:
        images: what there is, N images.
        holdout: how many to hold out, from 1 to N - 1. Each class gives its share, rounded so that the sum is
            `holdout` (largest remainder first).
        seed: of the choice within each class.

    Returns:
        (remaining images, held-out images), each in original order; copies.

    Raises:
        DataError: `holdout` is out of range.
    """
    if not 1 <= holdout < len(images):
        raise DataError(
            f"holdout must be between 1 and {len(images) - 1}, as there are {len(images)} training images, "
            f"got {holdout}"
        )
    counts = torch.bincount(images.labels.cpu())  # [K]
    exact = counts * holdout  # in units of 1/N image: whole numbers, so that no share depends on rounding
    shares, remainders = exact // len(images), exact % len(images)
    extra = torch.argsort(remainders, descending=True, stable=True)[: holdout - int(shares.sum())]
    shares[extra] += 1
    generator = Generator().manual_seed(seed)
    held = torch.zeros(len(images), dtype=torch.bool)
    for label, share in enumerate(shares.tolist()):
        positions = torch.nonzero(images.labels.cpu() == label).flatten()
        held[positions[torch.randperm(len(positions), generator=generator)[:share]]] = True
    device = images.labels.device
    remaining, held_out = torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()
    return images.subset(remaining.to(device)), images.subset(held_out.to(device))


class Loader:
    """One pass over the images each time it is iterated: batches `(x, y)` on the device.

    x is float32 of shape `[B, C, H, W]`, normalised to (pixel / 255 - mean) / std; y is int64 of shape `[B]`.
    The last batch is smaller where the batch size does not divide the number of images. Each pass draws one
    number from the loader's own generator, and all its random choices from that: a pass that is broken off
    changes nothing in the next, and nobody else's random numbers change.

    Args:
        images: what to feed.
        batch_size: images in a batch.
        mean: of each channel, for pixels scaled to 0..1.
        std: standard deviation of the same.
        shuffle: draw a new order for each pass; False: original order.
        augment: a key of `AUGMENTATIONS`: "none", "shift" (up to 2 pixels) or "affine" (small turn, scale,
            shift).
        seed: of the loader's generator.
        device: where the images are kept and the batches come out.
        drop_last: leave the smaller last batch out.

    Attributes:
        num_data: number of images in the set, N.
        mean: as given.
        std: as given.

    Raises:
        DataError: batch_size below 1, or above N with `drop_last`; unknown augmentation; mean and std that do
            not fit the channels.
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        shuffle: bool,
        augment: str = "none",
        seed: int = 0,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        if drop_last and batch_size > len(images):
            raise DataError(
                f"batch_size {batch_size} is larger than the {len(images)} images there are, and drop_last "
                "leaves incomplete batches out: nothing would come; lower batch_size"
            )
        if augment not in AUGMENTATIONS:
            raise DataError(unknown("augmentation", augment, AUGMENTATIONS))
        check_normalisation(tuple(mean), tuple(std), images.images.shape[1])
        self.mean, self.std = tuple(mean), tuple(std)
        self.num_data = len(images)
        self.batch_size = batch_size
        self._images = images.images.to(device)
        self._labels = images.labels.to(device)
        spread = torch.tensor(std, dtype=torch.float64).reshape(1, -1, 1, 1)
        centre = torch.tensor(mean, dtype=torch.float64).reshape(1, -1, 1, 1)
        # (pixel / 255 - mean) / std as one multiply-add
        self._factor = (1 / (255 * spread)).to(device, torch.float32)
        self._offset = (-centre / spread).to(device, torch.float32)
        self._shuffle = shuffle
        self._augment = AUGMENTATIONS[augment]
        self._drop_last = drop_last
        self._generator = Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Number of batches in a pass."""
        whole, rest = divmod(self.num_data, self.batch_size)
        return whole if self._drop_last or rest == 0 else whole + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass; a random one starts from the next number of the loader's generator."""
        return ((x, y) for _, x, y in self.indexed())

    def indexed(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One pass like that of `iter`, as triples (positions, x, y).

        Positions are those of the images in the set, int64 of shape `[B]` on the device, to look up what is
        known of each image.
        """
        seed = int(torch.randint(2**62, (), generator=self._generator))
        return self._batches(Generator().manual_seed(seed))

    def reseed_(self, seed: int) -> None:
        """Start the loader's generator anew: the passes from here on depend on `seed` alone."""
        self._generator.manual_seed(seed)

    def _batches(self, generator: Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of one pass, with the images' positions."""
        order = (
            torch.randperm(self.num_data, generator=generator)
            if self._shuffle
            else torch.arange(self.num_data)
        )
        order = order.to(self._labels.device)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            positions = order[start : start + self.batch_size]
            pixels = self._images.index_select(0, positions)
            changed = self._augment(pixels.to(torch.float32), generator)
            yield positions, torch.addcmul(self._offset, changed, self._factor), self._labels[positions]

    def state_dict(self) -> dict[str, Tensor]:
        """The generator's state, from which the passes that are still to come follow."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue with the passes that would have followed when `state` was taken.

        Raises:
            DataError: `state` is not what `state_dict` returns.
        """
        if set(state) != {"generator"}:
            raise DataError(f"a loader's state has the one entry 'generator', got {sorted(state)}")
        try:
            self._generator.set_state(state["generator"].cpu())
        except (RuntimeError, TypeError) as error:
            raise DataError(f"a loader's state must be a generator's state: {error}") from error
