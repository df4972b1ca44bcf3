"""Channels that have become constants: what they still add moves into the biases behind them, so that they can go.

A filter whose weights are all masked emits its bias everywhere, and a norm makes another constant of it. A linear
layer, or a convolution without padding, that reads the constant ``c`` by a weight ``w`` gets ``w c`` from it, for every
image and position: that is a bias. Folded there, nothing reads the channel any more, and surgery removes it.

    >>> fold_constants_(model, graph, masks, living, example)      # conv1's filter 2 is masked, its bias is 0.3
    {'conv2.weight': tensor([... False in input channel 2 ...])}

Where the next layer has no bias, the mean of the batch norm behind it takes the constant, with the opposite sign. What
is not exact is not folded: behind padding with zeros a constant is none at the border, so such channels stay.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsebayes.groups.scope import owner
from sparsebayes.groups.tracing import Slice, UnitGraph
from sparsebayes.prune.architecture import PLAIN_CONVOLUTIONS
from sparsebayes.prune.observing import Seen, norm_behind, observe

__all__ = ["constant_units", "fold_constants_"]


def constant_units(
    graph: UnitGraph, masks: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Tensor:
    """Units all of whose own weights are masked, while biases or norms of theirs may not be.

    Args:
        graph: the units, U of them.
        masks: parameter name to bool of the parameter's shape, True where an entry stays.
        shapes: of the parameters.

    Returns:
        bool, of shape `[U]`.
    """
    owns = torch.zeros(graph.num_units, dtype=torch.bool)
    free = torch.zeros(graph.num_units, dtype=torch.bool)
    for piece in graph.slices:
        if piece.reads or len(shapes[piece.parameter]) < 2:
            continue
        mine = piece.unit[piece.unit >= 0]
        owns[mine] = True
        mask = masks.get(piece.parameter)
        if mask is None:
            free[mine] = True
        else:
            others = [dim for dim in range(mask.ndim) if dim != piece.dim]
            left = piece.unit[mask.any(dim=others).cpu()]
            free[left[left >= 0]] = True
    joint = torch.zeros_like(owns) if graph.joint is None else graph.joint.cpu()
    return owns & ~free & ~joint


def fold_constants_(
    model: nn.Module, graph: UnitGraph, masks: Mapping[str, Tensor], living: Tensor, example: Tensor
) -> dict[str, Tensor]:
    """Move constants into the biases behind them; the network computes the same in evaluation mode.

    Args:
        model: the network with its masks applied; weights that read folded channels become 0, biases or running means
            take them over.
        graph: its units.
        masks: parameter name to bool of the parameter's shape, True where an entry stays.
        living: bool ``[U]``: units that would stay; the others need nothing.
        example: an input batch, on which the constants are measured.

    Returns:
        The masks, which now also mask the weights that read folded channels.
    """
    result = dict(masks)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    candidates = constant_units(graph, masks, shapes) & living
    if not bool(candidates.any()):
        return result
    readers = [piece for piece in graph.slices if piece.reads and _names(piece, candidates)]
    layers = dict(model.named_modules())
    seen = observe(model, {owner(piece.parameter) for piece in readers}, example)
    constants: list[tuple[Slice, Tensor]] = []
    for piece in readers:
        values = _read_values(layers, seen, piece, masks)
        if values is None:
            candidates[piece.unit[piece.unit >= 0]] = False
            continue
        varying = piece.unit[values.isnan().cpu() & (piece.unit >= 0)]
        candidates[varying] = False
        constants.append((piece, values))
    for piece, values in constants:
        columns = torch.cat([candidates, torch.zeros(1, dtype=torch.bool)])[piece.unit]
        if bool(columns.any()):
            _fold_(layers, seen, piece, columns, values)
            mask = result.get(piece.parameter)
            mask = (
                torch.ones(shapes[piece.parameter], dtype=torch.bool) if mask is None else mask.cpu().clone()
            )
            mask[:, columns] = False
            result[piece.parameter] = mask
    return result


def _names(piece: Slice, units: Tensor) -> bool:
    return bool(units[piece.unit[piece.unit >= 0]].any())


def _read_values(
    layers: Mapping[str, nn.Module], seen: Mapping[str, Seen], piece: Slice, masks: Mapping[str, Tensor]
) -> Tensor | None:
    """What a layer reads in each of its input channels, NaN where that varies or may not be folded; None: nothing."""
    path = owner(piece.parameter)
    layer, one = layers.get(path), seen.get(path)
    is_plain = type(layer) is nn.Linear or (
        type(layer) in PLAIN_CONVOLUTIONS and getattr(layer, "groups", 0) == 1
    )
    if layer is None or one is None or one.calls != 1 or not is_plain or piece.dim != 1:
        return None
    assert isinstance(layer, (nn.Linear, *PLAIN_CONVOLUTIONS))
    if not bool(masks.get(f"{path}.bias", torch.ones(1, dtype=torch.bool)).all()):
        return None  # what is held at zero cannot take a constant
    if layer.bias is None and norm_behind(layers, seen, path) is None:
        return None
    dim = one.taken.ndim - 1 if isinstance(layer, nn.Linear) else one.taken.ndim - layer.weight.ndim + 1
    flat = one.taken.movedim(dim, 0).flatten(1)  # [channels, everything else]
    low, high = flat.amin(1), flat.amax(1)
    # The mean over equal numbers is rounded; any one of them is not.
    values = torch.where(low == high, flat[:, 0], torch.full_like(low, torch.nan))
    pads = (
        not isinstance(layer, nn.Linear) and layer.padding_mode == "zeros" and any(map(int, _padding(layer)))
    )
    return torch.where(values == 0, values, torch.nan) if pads else values


def _padding(layer: nn.Module) -> tuple[int, ...]:
    padding = layer.padding
    if isinstance(padding, str):
        return (0,) if padding == "valid" else (1,)
    assert isinstance(padding, tuple)
    return padding


@torch.no_grad()
def _fold_(
    layers: Mapping[str, nn.Module], seen: Mapping[str, Seen], piece: Slice, columns: Tensor, values: Tensor
) -> None:
    path = owner(piece.parameter)
    layer = layers[path]
    weight = layer.weight
    assert isinstance(weight, Tensor)
    columns = columns.to(weight.device)
    added = weight[:, columns].flatten(2).sum(2) if weight.ndim > 2 else weight[:, columns]
    added = added @ values[columns]
    if isinstance(layer.bias, Tensor):
        layer.bias += added
    else:
        norm = norm_behind(layers, seen, path)
        mean = None if norm is None else layers[norm].running_mean
        assert isinstance(mean, Tensor)
        mean -= added
    weight[:, columns] = 0
