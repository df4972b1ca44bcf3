"""Setting the entries of removed groups to zero, and keeping them there while training goes on.

    >>> masks = prune_(model, grouping, selection)
    >>> optimizer.step()
    >>> masks.reapply_(model)          # momentum and weight noise would revive the entries otherwise

Masking changes no shape: it is the reference that a compacted network must equal (`prune.compaction`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError, unknown
from sparsebayes.groups.grouping import Grouping
from sparsebayes.prune.selection import Selection

__all__ = ["Masks", "apply_masks_", "check_masks", "prune_"]


@dataclass(frozen=True, eq=False, repr=False)
class Masks:
    """Which entries of which parameters stay.

    Args:
        masks: parameter name to bool of the parameter's shape, True where the entry stays. Parameters that
            are not named keep all their entries.
    """

    masks: dict[str, Tensor]

    @property
    def num_zeros(self) -> int:
        """Number of entries that are held at zero."""
        return sum(int((~mask).sum()) for mask in self.masks.values())

    def reapply_(self, model: nn.Module) -> None:
        """Set the masked entries to zero again; call it after each optimizer step.

        Args:
            model: the network that was pruned, or a copy of it.

        Raises:
            ModelError: the network has no such parameters.
        """
        apply_masks_(model, self.masks)

    def __repr__(self) -> str:
        total = sum(mask.numel() for mask in self.masks.values())
        return f"Masks({self.num_zeros} of {total} entries of {len(self.masks)} parameters are zero)"


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Refuse masks that do not fit a network.

    Args:
        model: the network.
        masks: parameter name to bool of the parameter's shape.

    Raises:
        ModelError: a name is unknown, a shape differs, or a mask is not boolean.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters:
            raise ModelError(unknown("masked parameter", name, parameters))
        if mask.shape != parameters[name].shape or mask.dtype != torch.bool:
            raise ModelError(
                f"expected the mask of {name!r} to be bool of shape {list(parameters[name].shape)}, "
                f"got {str(mask.dtype).removeprefix('torch.')} of shape {list(mask.shape)}; "
                "make the masks from the model as it is now"
            )


def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set masked entries to zero.

    Args:
        model: the network; gradients and optimizer states stay as they are.
        masks: parameter name to bool of the parameter's shape, True where the entry stays.

    Raises:
        ModelError: the masks do not fit; then nothing is changed.
    """
    check_masks(model, masks)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            # Filled, not multiplied: a removed entry that overflowed to inf would otherwise become NaN.
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def prune_(model: nn.Module, grouping: Grouping, selection: Selection) -> Masks:
    """Set every entry of every group that is off to zero.

    Args:
        model: the network.
        grouping: the groups of its parameters.
        selection: which of them stay.

    Returns:
        The masks, on the devices of the parameters; those of parameters that the grouping does not mention
        are absent.

    Raises:
        GroupingError: the selection was made for another grouping.
        ModelError: the grouping was made for another network.
    """
    selection.check_grouping(grouping)
    masks = grouping.masks(selection.on)
    check_masks(model, masks)
    parameters = dict(model.named_parameters())
    placed = Masks({name: mask.to(parameters[name].device) for name, mask in masks.items()})
    placed.reapply_(model)
    return placed
