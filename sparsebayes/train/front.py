"""The trade-off that one run traces: a list of networks, from the dense one down, and the choice among them.

>>> dense = Point(0, params=1000, macs=9000, heldout_loss=0.030, standard_error=0.004, heldout_error=0.008)
>>> small = Point(1, params=100, macs=800, heldout_loss=0.033, standard_error=0.004, heldout_error=0.009)
>>> tiny = Point(2, params=10, macs=90, heldout_loss=0.090, standard_error=0.008, heldout_error=0.025)
>>> round(band_limit([dense, small, tiny]), 3), [p.point for p in (dense, small, tiny) if p.heldout_loss <= 0.034]
(0.034, [0, 1])
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from sparsebayes.errors import RunError
from sparsebayes.files import write_atomically
from sparsebayes.report.files import parse_json, read_text

__all__ = ["Point", "band_limit", "choose", "read_front", "write_front"]


@dataclass(frozen=True)
class Point:
    """One network of a run.

    Attributes:
        point: Its number; 0 is the dense network.
        params: Parameter entries that are not held at zero.
        macs: Multiply-accumulates for one input, physical.
        heldout_loss: Mean held-out loss in nats.
        standard_error: Of that mean.
        heldout_error: Share of held-out images that are wrong.
        strength: Temperature that made it; None for the dense network.
        widths: Layer to groups left.
        finetuned: Whether the final training was done on it.
        chosen: Whether it is the run's result.
        untuned_loss: Held-out loss before the final training; None if that was not done.
        latency_ms: Milliseconds for one image in onnxruntime; None if the run's budget does not ask for it.
    """

    point: int
    params: int
    macs: int
    heldout_loss: float
    standard_error: float
    heldout_error: float
    strength: float | None = None
    widths: Mapping[str, int] = field(default_factory=dict)
    finetuned: bool = False
    chosen: bool = False
    untuned_loss: float | None = None
    latency_ms: float | None = None

    @property
    def limit(self) -> float:
        """Largest loss within one standard error of this point's."""
        return self.heldout_loss + self.standard_error

    def describe(self) -> str:
        """Size and held-out figures in words."""
        return (
            f"{self.params:,} parameters, {self.macs:,} MACs, held-out loss {self.heldout_loss:.4f} "
            f"± {self.standard_error:.4f}, error {100 * self.heldout_error:.2f} %"
        )


def band_limit(points: Sequence[Point]) -> float:
    """Largest held-out loss within one standard error of the best point's (Breiman et al. 1984, the 1-SE rule)."""
    return min(points, key=lambda p: p.heldout_loss).limit


def choose(points: Sequence[Point], *, point: int | None = None, max_params: int | None = None) -> Point:
    """Pick a point by number, by size, or by the run's own choice.

    Args:
        points: The front.
        point: Its number.
        max_params: The best held-out loss among the points with at most so many parameters.

    Raises:
        RunError: If no point fits.
    """
    if point is not None:
        found = [p for p in points if p.point == point]
        if not found:
            raise RunError(f"the run has no point {point}; it has points 0 to {len(points) - 1}")
        return found[0]
    if max_params is not None:
        fitting = [p for p in points if p.params <= max_params]
        if not fitting:
            smallest = min(p.params for p in points)
            raise RunError(
                f"no point of the run has at most {max_params} parameters; the smallest has {smallest}"
            )
        return min(fitting, key=lambda p: p.heldout_loss)
    chosen = [p for p in points if p.chosen]
    if not chosen:
        raise RunError("the run has not chosen a point yet; resume it, or name one with --point")
    return chosen[0]


def write_front(path: Path, points: Sequence[Point]) -> None:
    """Write the front as JSON, a list of points.

    Raises:
        RunError: If the file cannot be written.
    """
    write_atomically(path, json.dumps([asdict(point) for point in points], indent=1) + "\n")


def read_front(path: Path) -> list[Point]:
    """Read what `write_front` wrote; no file is an empty front.

    Raises:
        RunError: If the file is damaged.
    """
    if not path.is_file():
        return []
    points = parse_json(list[Point], read_text(path), path)
    if [p.point for p in points] != list(range(len(points))):
        raise RunError(f"{path} is damaged: its points are not numbered from 0; start the run anew")
    return points


def replace_point(points: Sequence[Point], new: Point) -> list[Point]:
    """The front with one point replaced by another of the same number; a chosen point unchooses the others."""
    others = [replace(p, chosen=False) if new.chosen else p for p in points]
    return [new if p.point == new.point else p for p in others]
