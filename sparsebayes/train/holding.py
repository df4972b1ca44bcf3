"""Entries that stay at zero through a whole phase of training.

`Masks.reapply_` checks the masks against the network whenever it is called; within a phase both stay what they are,
and a small network's step is so short that looking them up anew would be felt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sparsebayes.prune.masking import check_masks

__all__ = ["hold_at_zero"]


def hold_at_zero(model: nn.Module, masks: Mapping[str, Tensor]) -> Callable[[], None]:
    """What sets masked entries to zero, to be called after every step.

    Args:
        model: The network; its parameters may change their values, but must stay the same tensors.
        masks: Parameter name to bool of the parameter's shape, True where the entry stays.

    Raises:
        ModelError: If the masks do not fit.
    """
    check_masks(model, masks)
    parameters = dict(model.named_parameters())
    held = [(parameters[name], ~mask.to(parameters[name].device)) for name, mask in masks.items()]

    def hold() -> None:
        with torch.no_grad():
            for parameter, off in held:
                # Filled, not multiplied: a removed entry that overflowed to inf would otherwise become NaN.
                parameter.masked_fill_(off, 0)

    return hold
