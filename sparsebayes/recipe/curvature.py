"""What a recipe may say of the curvature: how it is estimated, and from which images.

>>> CurvatureSection(num_images="auto").likely_images
2048
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias, Union

from pydantic import Field, PlainValidator, WithJsonSchema

from sparsebayes.recipe.base import Section
from sparsebayes.recipe.names import MOST_IMAGES, check_num_images

__all__ = ["CurvatureSection"]

NumImages: TypeAlias = Annotated[
    Union[int, Literal["auto"]],  # noqa: UP007 - pydantic evaluates this at run time, and Python 3.10 must manage
    PlainValidator(check_num_images),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": MOST_IMAGES}]}),
]


class CurvatureSection(Section):
    """How the curvature of the loss in each switch is estimated."""

    estimator: Literal["monte_carlo", "exact"] = Field(
        default="monte_carlo", description="Random probes of the Gauss-Newton matrix, or all its columns."
    )
    factor: Literal["stick", "sampled_label", "rademacher"] = Field(
        default="stick", description="Random square root of the loss's curvature (monte_carlo only)."
    )
    num_images: NumImages = Field(
        default=2048,
        description="Training images of one estimate; auto: as many as tolerance takes (task: compress, with "
        "prior.joint false).",
    )
    tolerance: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="Relative standard error of the curvature at which num_images: auto stops.",
    )
    importance: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of those images that get a backward pass, mostly those that the network is least sure of; "
        "unbiased (task: compress, with prior.joint false).",
    )
    draws: int = Field(
        default=1, ge=1, le=1000, description="Random probes of each image (monte_carlo only)."
    )

    @property
    def likely_images(self) -> int:
        """Images of one estimate; with `auto`, which nobody knows beforehand, the default number."""
        if isinstance(self.num_images, int):
            return self.num_images
        return int(type(self).model_fields["num_images"].default)
