"""Operations that read the same node of a supernet, computed together while it trains.

Each operation is `[ReLU] body norm`, where the norm has no scale of its own. Of those that leave one node,

    without weights (pooling, identity)    the same body and norm give the same result on every edge: once is enough
    plain convolutions of one shape        are one convolution with the filters of all, and one norm of its channels
    that begin with a ReLU                 share it
    with a factor z for all images         z (x - mean) / std is the norm with the scale z: no product of its own

Results, gradients and the running statistics of every norm are those of operations that run one by one. Only hooks on
modules inside operations see nothing of it.

    >>> op = build_op("skip_connect", 8, 8, stride=1, affine=False)
    >>> other = build_op("skip_connect", 8, 8, stride=1, affine=False)
    >>> units = share([Place(0, 1, 0, op), Place(0, 2, 4, other)])[0]
    >>> [(target, y.shape) for target, y in compute(units, torch.randn(2, 8, 4, 4), factors)]
    [(1, torch.Size([2, 8, 4, 4])), (2, torch.Size([2, 8, 4, 4]))]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Place", "Unit", "compute", "share"]

_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "dilation", "return_indices"),
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation", "in_channels", "out_channels"),
}
"""What says, with a convolution's weight, all that a layer does."""


class Place(NamedTuple):
    """An operation on an edge.

    Attributes:
        source: the node that it reads.
        target: the node that its result is added to.
        slot: its position among the factors of the cell.
        op: the module.
    """

    source: int
    target: int
    slot: int
    op: nn.Module


@final
@dataclass(frozen=True)
class Unit:
    """Operations of one node that are computed together.

    Attributes:
        places: what they are.
        rectified: whether they begin with a ReLU.
        body: the layers behind it, if they run once for all of them.
        convs: instead of a body, the convolution of each.
        norms: the norm of each.
    """

    places: tuple[Place, ...]
    rectified: bool
    body: tuple[nn.Module, ...]
    convs: tuple[nn.Conv2d, ...]
    norms: tuple[nn.BatchNorm2d, ...]


def share(places: Iterable[Place]) -> dict[int, list[Unit]]:
    """Find out which operations of a cell can be computed together.

    Args:
        places: the operations.

    Returns:
        For every node that is read, in ascending order, units that hold each of its operations once; nothing if an
        operation of the cell does not end in a norm without a scale.
    """
    nodes: dict[int, dict[object, Unit]] = {}
    for place in sorted(places, key=lambda place: place.source):
        *layers, norm = place.op if isinstance(place.op, nn.Sequential) else [place.op]
        if not isinstance(norm, nn.BatchNorm2d) or norm.affine or not norm.track_running_stats:
            return {}
        rectified = bool(layers) and type(layers[0]) is nn.ReLU
        body = tuple(layers[rectified:])
        convs = tuple(layer for layer in body if isinstance(layer, nn.Conv2d)) if _is_plain(body) else ()
        alike = bool(convs) or all(type(layer) in (nn.AvgPool2d, nn.MaxPool2d) for layer in body)
        key = (rectified, norm.eps, *map(_settings, body)) if alike else place.slot
        units = nodes.setdefault(place.source, {})
        if key in units:
            first = units[key]
            units[key] = Unit(
                (*first.places, place), rectified, first.body, first.convs + convs, (*first.norms, norm)
            )
        else:
            units[key] = Unit((place,), rectified, () if convs else body, convs, (norm,))
    return {source: list(units.values()) for source, units in nodes.items()}


def compute(units: Sequence[Unit], node: Tensor, factors: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """The result of every operation, times its factor.

    Args:
        units: all that read the node; their norms are in training mode.
        node: of shape `[B, C, H, W]`.
        factors: of all operations of the cell, of shape `[S]`, or `[B, S]` for one row per image; None: all 1.

    Yields:
        The node that a result is added to, and the result, of shape `[B, C', H', W']`.
    """
    rectified = functional.relu(node) if any(unit.rectified for unit in units) else node
    values = None if factors is None else factors.unbind(-1)
    for unit in units:
        x = rectified if unit.rectified else node
        for layer in unit.body:
            x = layer(x)
        if unit.convs:
            x = _side_by_side(x, unit.convs)
        own = None if values is None else [values[place.slot] for place in unit.places]
        blocks = max(len(unit.convs), 1)
        scale = None
        if own is not None and len(own) == blocks and own[0].ndim == 0 and own[0].dtype == x.dtype:
            scale = torch.stack(own).repeat_interleave(x.shape[1] // blocks)
            own = None
        results = _normalise(x, unit.norms, blocks, scale)
        for number, place in enumerate(unit.places):
            y = results[number % blocks]
            yield place.target, y if own is None else y * own[number].reshape(-1, 1, 1, 1)


def _is_plain(body: Sequence[nn.Module]) -> bool:
    """Whether this is one convolution over all channels, and nothing else."""
    conv = body[0] if len(body) == 1 else None
    return type(conv) is nn.Conv2d and conv.groups == 1 and conv.bias is None and conv.padding_mode == "zeros"


def _settings(layer: nn.Module) -> tuple[object, ...]:
    return (type(layer), *(getattr(layer, name) for name in _SETTINGS[type(layer)]))


def _side_by_side(x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
    """The results of convolutions of one shape, one behind the other along the channels."""
    first = convs[0]
    weight = torch.cat([conv.weight for conv in convs]) if len(convs) > 1 else first.weight
    return functional.conv2d(x, weight, None, first.stride, first.padding, first.dilation)


def _normalise(
    x: Tensor, norms: Sequence[nn.BatchNorm2d], blocks: int, scale: Tensor | None
) -> tuple[Tensor, ...]:
    """Batch norm with the statistics of the batch, which go into the running ones of all norms.

    Args:
        x: of shape `[B, blocks * C, H, W]`.
        norms: one for each block of channels, or several for a single block.
        blocks: how many blocks.
        scale: of shape `[blocks * C]`; None: 1.

    Returns:
        The blocks, each of shape `[B, C, H, W]`.
    """
    sample = norms[0].running_mean
    assert sample is not None
    mean, var = sample.new_zeros(2, x.shape[1]).unbind()
    # At momentum 1 the running statistics become those of the batch.
    y = functional.batch_norm(x, mean, var, scale, None, True, 1.0, norms[0].eps)
    means, variances = mean.chunk(blocks), var.chunk(blocks)
    for number, norm in enumerate(norms):
        _count(norm, means[number % blocks], variances[number % blocks])
    return y.chunk(blocks, 1) if blocks > 1 else (y,)


@torch.no_grad()
def _count(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Let the statistics of a batch go into the running ones of a norm, as its own forward pass would."""
    seen, means, variances = norm.num_batches_tracked, norm.running_mean, norm.running_var
    assert seen is not None
    assert means is not None
    assert variances is not None
    seen.add_(1)
    weight = 1 / float(seen) if norm.momentum is None else norm.momentum
    means.lerp_(mean, weight)
    variances.lerp_(variance, weight)
