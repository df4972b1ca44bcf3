"""What all sections of a recipe share."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Epochs", "Rate", "Section"]

Rate: TypeAlias = Annotated[float, Field(gt=0, le=100)]
"""A learning rate."""
Epochs: TypeAlias = Annotated[int, Field(ge=0, le=100_000)]
"""Passes over the training images."""


class Section(BaseModel):
    """Frozen, no unknown keys, no silent conversion, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
