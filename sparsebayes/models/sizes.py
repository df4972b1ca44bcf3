"""Checks of the options that the reference networks share.

>>> scaled(64, 0.25)
16
"""

from __future__ import annotations

import math

from sparsebayes.errors import ModelError

__all__ = ["check_positive", "scaled"]


def check_positive(**sizes: int) -> None:
    """Refuse a size that is not a positive whole number.

    Raises:
        ModelError: as said, by the name of the option.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ModelError(
                f"{name} must be a positive whole number, got {size!r}; change the model's options"
            )


def scaled(channels: int, width: float) -> int:
    """Channels of a layer in a network of another width; at least 1.

    Args:
        channels: those of the full-width network.
        width: factor of all widths, in (0, 8].

    Raises:
        ModelError: `width` is out of range.
    """
    number = isinstance(width, int | float) and not isinstance(width, bool) and math.isfinite(width)
    if not number or not 0 < width <= 8:
        raise ModelError(
            f"width must be a number above 0 and at most 8, got {width!r}; change the model's options"
        )
    return max(1, round(channels * width))
