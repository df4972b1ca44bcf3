"""The sampling error of large sums without their squares: two halves of the images, compared at some entries.

With means a and b over halves of m and n images, the estimate is (m a + n b) / (m + n), and
(a - b) sqrt(m n) / (m + n) has its standard error as its own standard deviation, whatever the noise came from: the
relative error is the ratio of their norms over entries, |a - b| / |a + b| for halves of one size.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from typing import final

import torch
from torch import Tensor

from sparsebayes.curvature.squares import SquareSums

__all__ = ["Halves"]

# Entries of a parameter that are compared: their norms speak for all, and cost no memory of the parameters' size.
_ENTRIES = 4096


@final
class Halves:
    """Sums at some entries of every parameter, over two halves of the images.

    Args:
        parameters: the parameters by name, at least one; their sums are where they are.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        for name, values in parameters.items():
            self._steps[name] = _step(values.numel())
            count = len(range(0, values.numel(), self._steps[name]))
            self._sums[name] = torch.zeros(2, count, dtype=torch.float64, device=values.device)
        self._counts = next(iter(self._sums.values())).new_zeros(2)

    def add(self, half: int, sums: Mapping[str, SquareSums]) -> None:
        """Add what sums have grown by since the last time.

        Args:
            half: 0 or 1.
            sums: over all images so far, of every parameter.
        """
        for name, step in self._steps.items():
            seen = sums[name].sample(step).double()
            # What the halves hold together is what the sums were.
            self._sums[name][half] = seen - self._sums[name][1 - half]

    def count(self, half: int, images: slice) -> None:
        """Count images whose sums are added to a half."""
        self._counts[half] += images.stop - images.start

    def tensors(self) -> list[Tensor]:
        """What workers add up."""
        return [*self._sums.values(), self._counts]

    def error(self, name: str | None = None) -> float:
        """Relative standard error of one parameter's sums, or of all together.

        Args:
            name: the parameter; None: all.

        Returns:
            Infinite if one half is empty; 0 where the sums are 0.
        """
        if not bool((self._counts > 0).all()):
            return float("inf")
        difference = norm = torch.zeros((), dtype=torch.float64, device=self._counts.device)
        for one in self._sums if name is None else [name]:
            sums, step = self._sums[one], self._steps[one]
            means = sums / self._counts.unsqueeze(1)
            difference = difference + (means[0] - means[1]).square().sum() * step
            norm = norm + sums.sum(0).square().sum() * step
        return float((difference * self._counts.prod() / norm).sqrt()) if float(norm) > 0 else 0.0


def _step(count: int) -> int:
    """Distance of the entries that are compared: it has no divisor in common with any dim, and so meets all places."""
    step = max(count // _ENTRIES, 1)
    while gcd(step, count) > 1:
        step += 1
    return step
