"""Layers as the tracer wants to see them: equal in coupling and parameter names, plain in their operations.

`nn.MultiheadAttention` hides its heads in a function of PyTorch, and the layers of a compacted network count channels
that are gone. For tracing, and only for that, a copy of the model that shares all tensors holds others in their place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsebayes.layers.attention import HeadAttention
from sparsebayes.layers.norms import PartialGroupNorm, PartialLayerNorm, PartialRMSNorm
from sparsebayes.networks import copied

__all__ = ["ImageLayerNorm", "is_layer_norm_of_images", "traceable"]


class ImageLayerNorm(nn.LayerNorm):
    """A layer norm over dim 1 of ``[B, C, H, W]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def is_layer_norm_of_images(module: nn.Module | None) -> bool:
    """Whether this is a layer norm over dim 1 of ``[B, C, H, W]``: ours, or torchvision's ``LayerNorm2d``."""
    kind = type(module)
    return kind is ImageLayerNorm or (
        kind.__name__ == "LayerNorm2d" and kind.__module__.startswith("torchvision.")
    )


def traceable(model: nn.Module) -> nn.Module:
    """The model itself, or a copy of it with stand-ins, which shares parameters and buffers.

    Raises:
        ModelError: If it needs stand-ins, and cannot be copied.
    """
    kinds = (nn.MultiheadAttention, PartialGroupNorm, PartialLayerNorm, PartialRMSNorm)
    if not any(isinstance(module, kinds) for module in model.modules()):
        return model
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copied(model, memo)
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            other = _stand_in(child)
            if other is not None:
                setattr(parent, name, other.train(child.training))
    return twin


def _stand_in(layer: nn.Module) -> nn.Module | None:
    if HeadAttention.fits(layer):
        assert isinstance(layer, nn.MultiheadAttention)
        return HeadAttention.like(layer)
    if isinstance(layer, PartialLayerNorm):
        other: nn.Module = (
            ImageLayerNorm(layer.num_channels) if layer.dim == 1 else nn.LayerNorm(layer.num_channels)
        )
    elif isinstance(layer, PartialGroupNorm):
        other = nn.GroupNorm(layer.num_groups, layer.num_channels)
    elif isinstance(layer, PartialRMSNorm):
        other = nn.RMSNorm(layer.num_channels)
    else:
        return None
    for name, parameter in layer._parameters.items():
        other.register_parameter(name, parameter)
    return other
