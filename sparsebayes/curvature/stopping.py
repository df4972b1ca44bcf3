"""When to stop looking at images: at a number of them, or when the curvature is known well enough.

>>> stop = Stopping("auto", tolerance=0.05)
>>> stop.reached(256, lambda: 0.12), stop.reached(320, lambda: 0.04)
(False, True)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, final

from sparsebayes.curvature.workers import number_of_workers
from sparsebayes.errors import RecipeError

__all__ = ["Stopping"]

# Between two looks at the error lies this share of the images so far: each look waits for an accelerator.
_PATIENCE = 0.25


@final
class Stopping:
    """The rule by which one estimate stops.

    Args:
        num_images: the first so many images; "auto": until the relative error is small enough; None: all.
        tolerance: relative error at which "auto" stops.

    Attributes:
        limit: images at most; None: all.
        tolerance: the relative error; None where it does not matter.

    Raises:
        RecipeError: `num_images` is another text, or `tolerance` is not above 0 and at most 1.
    """

    def __init__(self, num_images: int | Literal["auto"] | None, tolerance: float) -> None:
        if not 0 < tolerance <= 1:
            raise RecipeError(f"expected a relative error above 0 and at most 1, got tolerance={tolerance:g}")
        if isinstance(num_images, str) and num_images != "auto":
            raise RecipeError(f"expected a number of images, 'auto' or None, got num_images={num_images!r}")
        self.limit = num_images if isinstance(num_images, int) else None
        self.tolerance = tolerance if num_images == "auto" else None
        self._stopped = False
        self._next_look = 1.0
        # Every worker decides for itself, without waiting for others: with W of them it needs 1/W of the precision.
        self._enough = tolerance * number_of_workers() ** 0.5

    def reached(self, num_images: int, error: Callable[[], float]) -> bool:
        """Whether the images so far are enough; never without "auto".

        Args:
            num_images: seen so far, all of them in the sums that the error is computed from.
            error: computes the relative error; not asked for after every block.
        """
        if self.tolerance is None or num_images < self._next_look:
            return False
        self._next_look = num_images * (1 + _PATIENCE)
        self._stopped = error() <= self._enough
        return self._stopped

    def warn_if_short(self, error: float, num_images: int) -> None:
        """Warn if the images ended first; to be called by the very function that a user calls.

        Args:
            error: relative error of the estimate, over all workers.
            num_images: images that were used.
        """
        if self.tolerance is not None and not self._stopped and error > self.tolerance:
            warnings.warn(
                f"the images ended before the curvature was known to a relative error of {self.tolerance:g}: it is "
                f"{error:.2g} after {num_images} images; give more images or draws, or be content with it",
                stacklevel=3,
            )
