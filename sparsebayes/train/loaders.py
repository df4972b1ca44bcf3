"""The images of a run, each set fed as its use wants it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsebayes.data.loader import Loader

__all__ = ["Loaders"]


@dataclass(frozen=True)
class Loaders:
    """The images of a run.

    Attributes:
        train: Shuffled and augmented.
        plain: The same images as they are, in shuffled order, for curvature and batch norm statistics.
        heldout: For decisions.
        example: One input, of shape ``[1, ...]``.
    """

    train: Loader
    plain: Loader
    heldout: Loader
    example: Tensor
