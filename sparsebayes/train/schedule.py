"""Learning rates over one phase: a short linear warm-up, then half a cosine down to zero.

Every phase ends at rate 0, so that a network is judged, and its curvature measured, near a minimum of the loss, which
is where the Laplace approximation holds.

    >>> [round(one_cycle(step, 10, warmup=0.2), 2) for step in (0, 1, 5, 9)]
    [0.5, 1.0, 0.69, 0.04]
"""

from __future__ import annotations

import math

__all__ = ["one_cycle"]


def one_cycle(step: int, num_steps: int, *, warmup: float = 0.1) -> float:
    """Factor of the base rate at a step.

    Args:
        step: 0-based step within the phase.
        num_steps: Steps of the phase.
        warmup: Share of the phase over which the factor rises linearly to 1, in ``[0, 1)``.

    Returns:
        A factor in ``(0, 1]``.
    """
    rising = warmup * num_steps
    if step < rising:
        return min(1.0, (step + 1) / rising)
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(num_steps - rising, 1.0)))
