"""Images and data sets refuse what does not fit together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparsebayes.data import Dataset, Images
from sparsebayes.errors import DataError


def make(count: int = 6, size: int = 4, channels: int = 1) -> Images:
    pixels = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(count, channels, size, size)
    return Images(pixels.contiguous(), torch.arange(count) % 3)


def test_length_and_repr() -> None:
    assert len(make()) == 6
    assert repr(make()) == "Images(6 of 1x4x4, labels 0 to 2)"
    dataset = Dataset("toy", make(), make(3), 3, (0.5,), (0.2,))
    assert repr(dataset) == f"Dataset('toy', train={make()}, test={make(3)}, 3 classes)"


def test_subset_keeps_images_and_labels_together() -> None:
    part = make().subset(torch.tensor([4, 1]))
    assert part.images[:, 0, 0, 0].tolist() == [4, 1]
    assert part.labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: Images(torch.zeros(2, 1, 4, 4), torch.zeros(2).long()),
            r"must be uint8 of shape \[N, C, H, W\]",
        ),
        (
            lambda: Images(torch.zeros(2, 4, 4).byte(), torch.zeros(2).long()),
            r"got torch.uint8 of shape \[2, 4, 4\]",
        ),
        (
            lambda: Images(make().images, torch.zeros(6)),
            r"labels must be int64 of shape \[6\].*torch.float32",
        ),
        (
            lambda: Images(make().images, torch.zeros(5).long()),
            r"one for each image, got torch.int64 of shape \[5\]",
        ),
        (
            lambda: Images(make().images[:0], make().labels[:0]),
            r"at least one image, got shape \[0, 1, 4, 4\]",
        ),
        (lambda: Images(make().images, make().labels - 1), "class numbers from 0, got -1"),
        (lambda: make().subset(torch.zeros(0).long()), "at least one image"),
        (
            lambda: Dataset("toy", make(), make(size=5), 3, (0.5,), (0.2,)),
            r"\[1, 4, 4\], test images \[1, 5, 5\]",
        ),
        (
            lambda: Dataset("toy", make(), make(), 2, (0.5,), (0.2,)),
            "training labels must be below num_classes = 2",
        ),
        (
            lambda: Dataset("toy", make(2), make(), 2, (0.5,), (0.2,)),
            "test labels must be below num_classes = 2, got 2",
        ),
        (lambda: Dataset("toy", make(), make(), 3, (0.5, 0.5), (0.2,)), "mean and std need 1 numbers"),
        (lambda: Dataset("toy", make(), make(), 3, (0.5,), (0.0,)), "std above zero"),
        (lambda: Dataset("toy", make(), make(), 3, (float("nan"),), (0.2,)), "must be finite"),
    ],
)
def test_every_misfit_is_refused(build: Callable[[], object], text: str) -> None:
    with pytest.raises(DataError, match=text):
        build()
