"""The images that the phases of a run draw from."""

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
        plain: The same images as they are, in shuffled order, for curvature.
        heldout: For decisions.
        example: One input, of shape ``[1, ...]``.
    """

    train: Loader
    plain: Loader
    heldout: Loader
    example: Tensor
