"""Axes: where a number stands on a line, and which round numbers are written beside it.

>>> Axis(1.0, 100.0, log=True).place(10.0)
0.5
>>> Axis(0.0, 0.5).ticks()
[0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Axis", "short_number"]


@dataclass(frozen=True)
class Axis:
    """The numbers from `low` to `high` on a line from 0 to 1, straight or logarithmic."""

    low: float
    high: float
    log: bool = False

    @staticmethod
    def around(values: Sequence[float], *, log: bool = False, from_zero: bool = False) -> Axis:
        """Choose an axis that shows all finite values (positive ones, if logarithmic).

        Args:
            values: what is to be shown.
            log: logarithmic axis.
            from_zero: a straight axis begins at 0.

        Returns:
            An axis of positive length, with a margin of 5 %.
        """
        shown = [value for value in values if _drawable(value, log)]
        if not shown:
            return Axis(1.0, 10.0, True) if log else Axis(0.0, 1.0)
        low, high = min(shown), max(shown)
        if log:
            margin = max((high / low) ** 0.05, 1.1)
            return Axis(low / margin, high * margin, True)
        low = min(low, 0.0) if from_zero else low
        margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
        return Axis(low if from_zero and low == 0 else low - margin, high + margin)

    def place(self, value: float) -> float | None:
        """Position of a value, 0 at `low` and 1 at `high`; None where it has none."""
        if not _drawable(value, self.log):
            return None
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values between `low` and `high`, three to eight of them where the range allows."""
        return self._log_ticks() if self.log else self._straight_ticks()

    def _straight_ticks(self) -> list[float]:
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
        for factor in (1, 2, 5, 10):
            if (self.high - self.low) / (step * factor) <= 6:
                step *= factor
                break
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _log_ticks(self) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        stride = max(1, math.ceil((last - first) / 7))
        for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            ticks = [f * 10.0**power for power in range(first, last + 1, stride) for f in factors]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) >= 3:
                return ticks
        return [self.low, self.high]


def _drawable(value: float, log: bool) -> bool:
    """Whether a value has a place; beyond 1e-100 and 1e100 the ratios on an axis could leave the floats."""
    return -1e100 < value < 1e100 and (value > 1e-100 or not log)


def short_number(value: float) -> str:
    """Write a number in at most about six characters: 0.01, 250, 1.2M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"
