"""What a recipe of `task: search` may say of the network that is built of what was found, and of its training.

>>> RetrainSection(epochs=100, lr=0.1).settings().lr
0.1
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from sparsebayes.recipe.base import Epochs, Rate, Section
from sparsebayes.recipe.schema import TrainSection

__all__ = ["Depth", "RetrainSection", "Width"]

Width: TypeAlias = Annotated[int, Field(ge=1, le=4096)]
Depth: TypeAlias = Annotated[int, Field(ge=1, le=100)]


class RetrainSection(Section):
    """The network that is built from the genotype, and how it is trained."""

    width: Width | None = Field(
        default=None, description="Channels in the first stage; null: those of the search."
    )
    depth: Depth | None = Field(default=None, description="Cells of a stage; null: those of the search.")
    inherit: bool = Field(
        default=False, description="Start from the supernet's weights; at its width and depth only."
    )
    epochs: Epochs = Field(default=10, description="Passes over the training images.")
    lr: Rate = Field(default=0.05, description="Learning rate at the start.")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum.")
    weight_decay: float = Field(default=3e-4, ge=0, le=10, description="Weight decay.")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="Share of a label spread over all classes."
    )
    grad_clip: float | None = Field(
        default=5.0, gt=0, le=1e6, description="Largest norm of a gradient; null: any."
    )
    augment: Literal["none", "shift", "shift1", "affine", "crop_flip", "crop_flip_cutout"] | None = Field(
        default=None, description="Random change of each training image; null: data.augment."
    )
    drop_path: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Probability of dropping an operation's result, reached at the end.",
    )
    auxiliary: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="Weight of a second classifier's loss at two thirds of the depth.",
    )

    def settings(self) -> TrainSection:
        """The same in the form that training takes."""
        return TrainSection(
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            lr=self.lr,
            label_smoothing=self.label_smoothing,
            grad_clip=self.grad_clip,
        )
