"""The plain patterns: which weights of one layer form a group, whatever the rest of the network does.

Each pattern is a function from one layer to an index tensor that broadcasts to the layer's weight, numbered
from 0 within the layer. The weight of a linear layer is ``[O, I]``, of a convolution ``[O, I/groups,
*kernel]``, of a transposed convolution ``[I, O/groups, *kernel]``.

| pattern | a group is all weights that share |
| --- | --- |
| weights | nothing: each weight is a group |
| rows, columns | an output, an input of a linear layer |
| filters, channels | an output channel, an input channel of a convolution |
| kernels | both: one kernel of a convolution |
| shapes | input channel and kernel position: one column of the unfolded convolution |
| blocks:RxC | a tile of R rows and C columns of the weight as a matrix ``[O, rest]`` |
| n:m | nothing; of every m weights along the input dim exactly n stay |

The names are those of Wen et al., "Learning Structured Sparsity in Deep Neural Networks", NeurIPS 2016.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from sparsebayes.errors import GroupingError, unknown

__all__ = ["PATTERNS", "Layer", "ParsedPattern", "Pattern", "layers_of", "parse_pattern"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """One linear layer or convolution.

    Attributes:
        name: Module path, such as ``"features.3"``.
        parameter: Name of its weight in ``model.named_parameters()``.
        kind: ``"linear"``, ``"conv"`` or ``"transposed"``.
        shape: Shape of the weight.
        groups: Groups of the convolution; 1 for linear layers.
    """

    name: str
    parameter: str
    kind: str
    shape: tuple[int, ...]
    groups: int = 1


Pattern = Callable[[Layer], "Tensor | None"]


def layers_of(model: nn.Module) -> list[Layer]:
    """All linear layers and convolutions of a model, in the order of ``model.named_modules()``.

    A layer whose weight is computed from others (a parametrization such as weight_norm) is listed with the
    empty parameter name; a weight that two layers share is listed once.

    Raises:
        GroupingError: If a lazy layer has not seen an input yet.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers: list[Layer] = []
    seen: set[str] = set()
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None:
            continue
        weight = module.weight
        if isinstance(weight, nn.UninitializedParameter):
            raise GroupingError(
                f"the lazy layer {name!r} has no weights yet: run the model once on an example"
            )
        assert isinstance(weight, Tensor)
        parameter = names.get(id(weight), "")
        if parameter in seen:
            continue
        if parameter:
            seen.add(parameter)
        groups = 1 if isinstance(module, nn.Linear) else cast("nn.Conv2d", module).groups
        layers.append(Layer(name or "model", parameter, kind, tuple(weight.shape), groups))
    return layers


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, CONVOLUTIONS):
        return "conv"
    return "transposed" if isinstance(module, TRANSPOSED) else None


def _weights(layer: Layer) -> Tensor:
    return torch.arange(math.prod(layer.shape)).view(layer.shape)


def _rows(layer: Layer) -> Tensor | None:
    return torch.arange(layer.shape[0]).view(-1, 1) if layer.kind == "linear" else None


def _columns(layer: Layer) -> Tensor | None:
    return torch.arange(layer.shape[1]).view(1, -1) if layer.kind == "linear" else None


def _over_first(layer: Layer) -> Tensor:
    """Index along dim 0 of a convolution's weight, which holds the channels of all its groups."""
    return torch.arange(layer.shape[0]).view(-1, *[1] * (len(layer.shape) - 1))


def _over_second(layer: Layer) -> Tensor:
    """Channel number along dim 1 of a convolution's weight, which holds the channels of one of its groups."""
    first, second = layer.shape[:2]
    ones = [1] * (len(layer.shape) - 2)
    within = torch.arange(second).view(1, -1)
    if layer.groups == 1:
        return within.view(1, -1, *ones)
    group = torch.arange(first).view(-1, 1) // (first // layer.groups)
    return (group * second + within).view(first, second, *ones)


def _filters(layer: Layer) -> Tensor | None:
    if layer.kind == "linear":
        return None
    return _over_first(layer) if layer.kind == "conv" else _over_second(layer)


def _channels(layer: Layer) -> Tensor | None:
    if layer.kind == "linear":
        return None
    return _over_second(layer) if layer.kind == "conv" else _over_first(layer)


def _kernels(layer: Layer) -> Tensor | None:
    if layer.kind == "linear":
        return None
    pairs = layer.shape[0] * layer.shape[1]
    return torch.arange(pairs).view(*layer.shape[:2], *[1] * (len(layer.shape) - 2))


def _shapes(layer: Layer) -> Tensor | None:
    channel = _channels(layer)
    if channel is None:
        return None
    kernel = layer.shape[2:]
    position = torch.arange(math.prod(kernel)).view(1, 1, *kernel)
    return channel * math.prod(kernel) + position


def _blocks(layer: Layer, *, rows: int, columns: int) -> Tensor:
    """Tiles of the weight as a matrix; the tiles at the far edges may be smaller."""
    height, width = layer.shape[0], math.prod(layer.shape[1:])
    per_row = -(-width // columns)
    row = torch.arange(height).view(-1, 1) // rows
    column = torch.arange(width).view(1, -1) // columns
    return (row * per_row + column).view(layer.shape)


PATTERNS: Mapping[str, Pattern] = MappingProxyType(
    {
        "weights": _weights,
        "rows": _rows,
        "columns": _columns,
        "filters": _filters,
        "channels": _channels,
        "kernels": _kernels,
        "shapes": _shapes,
    }
)


@dataclass(frozen=True)
class ParsedPattern:
    """A pattern with its numbers read.

    Attributes:
        pattern: Index of one layer, or None if the pattern does not apply to its kind.
        keep: For n:m patterns how many of each pool stay, else 0.
        of: For n:m patterns the size of a pool, else 0.
    """

    pattern: Pattern
    keep: int = 0
    of: int = 0


def parse_pattern(name: str, others: tuple[str, ...] = ()) -> ParsedPattern:
    """Read the name of a plain pattern: ``"filters"``, ``"blocks"``, ``"blocks:8x1"``, ``"2:4"``.

    Args:
        name: What the user typed.
        others: Further names to list among the choices if ``name`` is unknown.

    Raises:
        GroupingError: If there is no such pattern, or its numbers make no sense.
    """
    if name in PATTERNS:
        return ParsedPattern(PATTERNS[name])
    blocks = re.fullmatch(r"blocks(?::(\d+)x(\d+))?", name)
    if blocks:
        rows, columns = int(blocks[1] or 4), int(blocks[2] or 4)
        if not rows or not columns:
            raise GroupingError(
                f"blocks need at least one row and one column, got {name!r}; try 'blocks:4x4'"
            )
        return ParsedPattern(partial(_blocks, rows=rows, columns=columns))
    ratio = re.fullmatch(r"(\d+):(\d+)", name)
    if ratio:
        keep, of = int(ratio[1]), int(ratio[2])
        if not 0 < keep < of:
            raise GroupingError(f"n:m keeps n of every m weights with 0 < n < m, got {name!r}; try '2:4'")
        return ParsedPattern(_weights, keep, of)
    choices = [*PATTERNS, "blocks", "blocks:RxC", "n:m", *others]
    raise GroupingError(unknown("rule", name, choices))
