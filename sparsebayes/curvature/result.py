"""The curvature of every group's switch, with its sampling error.

>>> Curvature(torch.tensor([8.0, 0.5]), torch.tensor([0.3, 0.1]), num_images=256, num_data=60000)
Curvature(2 groups, 0.5 to 8 nats, relative error 0.039, from 256 of 60000 images)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

__all__ = ["Curvature"]


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
    """

    diagonal: Tensor
    standard_error: Tensor
    num_images: int
    num_data: int

    def __repr__(self) -> str:
        if self.diagonal.numel() == 0:
            return f"Curvature(0 groups, from {self.num_images} of {self.num_data} images)"
        low, high = float(self.diagonal.min()), float(self.diagonal.max())
        # Of the norm: groups whose curvature is 0 would make a mean of ratios meaningless.
        norm = float(self.diagonal.norm())
        error = float(self.standard_error.norm()) / norm if norm > 0 else 0.0
        return (
            f"Curvature({self.diagonal.numel()} groups, {low:.3g} to {high:.3g} nats, "
            f"relative error {error:.2g}, from {self.num_images} of {self.num_data} images)"
        )
