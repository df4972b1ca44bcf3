"""Positions that stay of each tensor, and the tensors cut to them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsebayes.errors import ModelError

__all__ = ["Kept", "carry_tensors", "cut", "is_gone"]

# For each parameter and buffer that shrinks: dimension to the int64 positions that stay. No position: it is gone.
Kept = dict[str, dict[int, Tensor]]


def cut(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Select the positions that stay along some dimensions.

    Args:
        tensor: of any shape.
        kept: dimension to the int64 positions that stay.

    Returns:
        A new tensor, also where nothing is cut.
    """
    result = tensor.detach()
    for dim, index in kept.items():
        result = result.index_select(dim, index.to(result.device))
    return result if kept else result.clone()


def is_gone(name: str, kept: Kept) -> bool:
    """Whether a parameter or buffer went as a whole, with the branch that it was in."""
    return any(index.numel() == 0 for index in kept.get(name, {}).values())


def carry_tensors(tensors: Mapping[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Cut tensors that follow the parameters of a network: an average of its weights, say.

    Args:
        tensors: by the name of the parameter or buffer whose shape they have; other names are copied as they are.
        kept: from the `Compaction`.

    Returns:
        The same for the compacted network, without those of parameters that are gone. A constant that stands for a
        branch is new: it has no history.

    Raises:
        ModelError: a tensor is too small for the positions that stay, or none has the name of one that was cut.
    """
    if tensors and kept and not any(name in kept for name in tensors):
        raise ModelError(
            f"none of the tensors, such as {next(iter(tensors))!r}, has the name of one that was cut, such as "
            f"{next(iter(kept))!r}; give the state of the network itself, such as averaged.module.state_dict()"
        )
    result = {}
    for name, tensor in tensors.items():
        dims = kept.get(name, {})
        if is_gone(name, kept):
            continue
        short = [
            dim for dim, index in dims.items() if dim >= tensor.ndim or int(index[-1]) >= tensor.shape[dim]
        ]
        if short:
            raise ModelError(
                f"expected {name!r} in the shape that the network had before compaction, got {list(tensor.shape)}: "
                "carry each average over once, right after the compaction"
            )
        result[name] = cut(tensor, dims)
    return result
