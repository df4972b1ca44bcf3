"""A user's network, copied or run without leaving a trace: the copy is refused in words, and modes come back.

>>> small = copied(model)
>>> with in_mode(model, train=False):
...     scores = model(images)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sparsebayes.errors import ModelError, one_line

__all__ = ["as_input", "copied", "frozen", "in_mode"]


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a network with its own tensors, modes and hooks.

    Args:
        model: Any network.
        memo: What stands in the copy for an object of the network, by the object's `id`: itself, where both share it.

    Raises:
        ModelError: The network holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as cause:
        reason = one_line((str(cause).strip().splitlines() or [type(cause).__name__])[0])
        raise ModelError(
            f"the {type(model).__name__} cannot be copied ({reason}); "
            "remove weight_norm hooks, non-leaf tensors, locks and open files from it first"
        ) from cause


@contextmanager
def in_mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Put a network into one mode, and each of its modules back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a network ask for gradients, and each as before afterwards.

    What a layer keeps for the gradients of its weights is not kept then.
    """
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def as_input(model: nn.Module, images: Tensor) -> Tensor:
    """Images on the device of a model, and in the floating-point type of its parameters where they have one."""
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else images.device
    types = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    if images.is_floating_point() and len(types) == 1:
        return images.to(device, types.pop())
    return images.to(device)
