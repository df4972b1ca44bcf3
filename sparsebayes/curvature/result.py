"""The curvature of every group's switch, with its sampling error.

>>> Curvature(torch.tensor([8.0, 0.5]), torch.tensor([0.3, 0.1]), num_images=256, num_data=60000)
Curvature(2 groups, 0.5 to 8 nats, relative error 0.039, from 256 of 60000 images)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["Curvature", "from_sums"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Curvature:
    """Gauss-Newton (GGN) curvature of the total loss in each group's switch.

    Attributes:
        diagonal: of shape `[G]`, nats of the whole data set: `num_data` times the mean over the images used.
        standard_error: of shape `[G]`, in the same unit: `num_data * std / sqrt(num_images)`, where std is
            that of the images' contributions, the random draws included. Infinite when only one image was
            used.
        num_images: how many images were used.
        num_data: how many images the data set holds.
        matrix: the full curvature matrix, of shape `[G, G]`, in the same unit; None where only its diagonal was
            computed.
    """

    diagonal: Tensor
    standard_error: Tensor
    num_images: int
    num_data: int
    matrix: Tensor | None = None

    @property
    def relative_error(self) -> float:
        """Norm of the standard errors over the norm of the diagonal; 0 where there is no curvature."""
        # Of the norms: groups whose curvature is 0 would make a mean of ratios meaningless.
        norm = float(self.diagonal.norm())
        return float(self.standard_error.norm()) / norm if norm > 0 else 0.0

    def __repr__(self) -> str:
        if self.diagonal.numel() == 0:
            return f"Curvature(0 groups, from {self.num_images} of {self.num_data} images)"
        low, high = float(self.diagonal.min()), float(self.diagonal.max())
        return (
            f"Curvature({self.diagonal.numel()} groups, {low:.3g} to {high:.3g} nats, "
            f"relative error {self.relative_error:.2g}, from {self.num_images} of {self.num_data} images)"
        )


def from_sums(
    first: Tensor, second: Tensor, used: int, num_data: int, dtype: torch.dtype, matrix: Tensor | None = None
) -> Curvature:
    """Turn sums over images into a curvature with its standard error.

    Args:
        first: sum of the images' contributions q, float64, of shape `[G]`.
        second: sum of q^2, likewise.
        used: how many images.
        num_data: images in the whole data set, to which the curvature is scaled.
        dtype: of the result.
        matrix: the full matrix, scaled already; None if it was not computed.
    """
    mean = first / used
    if used > 1:
        variance = (second / used - mean.square()).clamp(min=0) * (used / (used - 1))
        error = num_data * (variance / used).sqrt()
    else:
        error = torch.full_like(mean, torch.inf)
    return Curvature(
        (num_data * mean).to(dtype),
        error.to(dtype),
        num_images=used,
        num_data=num_data,
        matrix=None if matrix is None else matrix.to(dtype),
    )
