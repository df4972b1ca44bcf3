"""The sampling error of large sums without their squares: two halves of the images, compared at some entries.

With means a and b of the two halves, (a + b) / 2 is the estimate and (a - b) / 2 has its standard error as its own
standard deviation, whatever the noise came from: |a - b| / |a + b| is the relative error, in norms over entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

__all__ = ["Halves"]

# Entries of a parameter that are compared: their norms speak for all, and cost no memory of the parameters' size.
_ENTRIES = 4096


@final
class Halves:
    """Sums of some entries of every parameter, over two halves of the images.

    Args:
        names: the parameters.
        device: where the sums are.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._sizes: dict[str, float] = {}
        self._names = list(names)
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, name: str, half: int, q: Tensor) -> None:
        """Add the sum over some images.

        Args:
            name: the parameter.
            half: 0 or 1.
            q: the sum, of the parameter's shape.
        """
        # An odd step, so that it falls on all places of dims that are powers of two.
        step = q.numel() // _ENTRIES | 1
        some = q.flatten()[::step]
        if name not in self._sums:
            self._sums[name] = torch.zeros(2, some.numel(), dtype=torch.float64, device=q.device)
            self._sizes[name] = q.numel() / max(some.numel(), 1)
        self._sums[name][half] += some

    def count(self, half: int, images: slice) -> None:
        """Count images whose sums are added to a half."""
        self._counts[half] += images.stop - images.start

    def tensors(self) -> list[Tensor]:
        """What workers add up."""
        return [*(self._sums[name] for name in self._names if name in self._sums), self._counts]

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
        for one in self._names if name is None else [name]:
            means = self._sums[one] / self._counts.unsqueeze(1)
            difference = difference + (means[0] - means[1]).square().sum() * self._sizes[one]
            norm = norm + (means[0] + means[1]).square().sum() * self._sizes[one]
        return float((difference / norm).sqrt()) if float(norm) > 0 else 0.0
