"""What a measured number must be before it changes a belief: finite, of the right shape and sign."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebayes.errors import GroupingError, NumericsError


def vector(name: str, values: Tensor, num_groups: int) -> Tensor:
    """Check one number per group.

    Args:
        name: what the numbers are, for the message.
        values: of any type and device.
        num_groups: G.

    Returns:
        The values as float64 on the CPU, of shape ``[G]``, detached.

    Raises:
        GroupingError: another shape than ``[G]``.
        NumericsError: a value that is not finite.
    """
    if values.shape != (num_groups,):
        raise GroupingError(
            f"expected a {name} of shape [{num_groups}], one number per group, got {list(values.shape)}: "
            "reduce it with the grouping that this posterior was made for."
        )
    return finite(name, values)


def finite(name: str, values: Tensor) -> Tensor:
    """Check that all values are finite.

    Args:
        name: what the numbers are, for the message.
        values: of any shape, type and device.

    Returns:
        The values as float64 on the CPU, detached.

    Raises:
        NumericsError: a value that is not finite.
    """
    values = values.detach().to("cpu", torch.float64)
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise NumericsError(
            f"expected a finite {name}, got {float(values[tuple(place)])} at {place}: lower the learning "
            "rate or check the loss."
        )
    return values


def non_negative(name: str, values: Tensor) -> Tensor:
    """Check that no value is negative.

    Args:
        name: what the numbers are, for the message.
        values: of any shape.

    Returns:
        ``values``.

    Raises:
        NumericsError: a negative value.
    """
    bad = values < 0
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise NumericsError(
            f"expected a {name} >= 0, got {float(values[tuple(place)]):g} at {place}: use a Gauss-Newton or "
            "Fisher estimator, a Hessian can be negative."
        )
    return values
