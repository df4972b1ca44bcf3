"""The units of a model: the result of tracing it.

A *unit* is one removable channel, neuron or attention head: the rows that produce it (with bias and norm entries)
and all slices by which later layers read it.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> trace_units(net, torch.zeros(2, 4))
    UnitGraph(3 units; 0: 3)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["Slice", "UnitCount", "UnitGraph", "apply_counts_", "counts_left", "stays", "with_items"]


@dataclass(frozen=True, eq=False)
class Slice:
    """Which unit each position along one dim of a parameter or buffer belongs to.

    Attributes:
        parameter: Name of the parameter (its first name, if shared) or buffer.
        dim: The dim.
        unit: Unit numbers, int64 of shape ``[size of that dim]``; -1 = stays. Numbers may repeat: after a
            flatten, each unit is read by several columns.
        reads: True where a consumer reads the unit; False for the unit's own rows, bias and norm entries.
    """

    parameter: str
    dim: int
    unit: Tensor
    reads: bool


@dataclass(frozen=True, eq=False)
class UnitCount:
    """An attribute of a module that holds a number of channels, such as ``num_heads``.

    Attributes:
        module: Path of the module.
        attribute: Name of the attribute.
        position: Position in it, where it is a list or tuple; None for a plain number.
        unit: Unit of each channel that it counts, int64; -1 = stays.
    """

    module: str
    attribute: str
    position: int | None
    unit: Tensor


@dataclass(frozen=True, eq=False)
class UnitGraph:
    """The ``U`` units of a model.

    Attributes:
        slices: Slices of parameters that belong to units, in the order of the graph.
        layers: Names of the layers that produce units; a unit of several layers (a residual sum) is named
            after the first.
        layer_index: Position in ``layers`` of each unit, int64 of shape ``[U]``.
        fixed: One sentence for each layer whose channels stay, with the reason.
        buffers: Slices of buffers: running statistics of norms.
        zero_preserving: Bool of shape ``[U]``: True if a unit whose own entries are all 0 is read as 0, so
            that it may go. False behind a sigmoid, for instance, which turns 0 into 0.5.
        counts: Attributes of modules that hold a number of channels, and must follow it.
        joint: Bool of shape ``[U]``: True if the statistics of a norm count the unit, so that it may only go when
            it is zero there, whoever reads it. None: there is no such unit.
    """

    slices: tuple[Slice, ...]
    layers: tuple[str, ...]
    layer_index: Tensor
    fixed: tuple[str, ...]
    buffers: tuple[Slice, ...]
    zero_preserving: Tensor
    counts: tuple[UnitCount, ...] = ()
    joint: Tensor | None = None

    @property
    def num_units(self) -> int:
        """Number of units, U."""
        return int(self.layer_index.numel())

    def __repr__(self) -> str:
        counts = torch.bincount(self.layer_index, minlength=len(self.layers)).tolist()
        parts = ", ".join(f"{layer}: {count}" for layer, count in zip(self.layers, counts, strict=True))
        return f"UnitGraph({self.num_units} units; {parts or 'none'})"


def stays(alive: Tensor, unit: Tensor) -> Tensor:
    """Which positions stay.

    Args:
        alive: Bool of shape ``[U]``: which units stay.
        unit: Unit of each position, int64 of any shape; -1, of no unit, always stays.

    Returns:
        Bool of the shape of `unit`.
    """
    return torch.cat([alive, alive.new_ones(1)])[unit]


def counts_left(graph: UnitGraph, alive: Tensor) -> dict[tuple[str, str, int | None], int]:
    """What the attributes hold after a removal.

    Args:
        graph: The units.
        alive: Bool ``[U]``: which of them stay.

    Returns:
        (module, attribute, position) to the number of channels left; only those that change.
    """
    found = {}
    for count in graph.counts:
        left = stays(alive, count.unit)
        if not bool(left.all()):
            found[count.module, count.attribute, count.position] = int(left.sum())
    return found


def apply_counts_(model: nn.Module, graph: UnitGraph, alive: Tensor) -> None:
    """Set the attributes to what `counts_left` says."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for (path, attribute, position), value in counts_left(graph, alive).items():
        held = getattr(modules[path], attribute)
        if position is not None:
            held = with_items(held, [*held[:position], value, *held[position + 1 :]])
        setattr(modules[path], attribute, value if position is None else held)


def with_items(held: Sequence[int], items: Sequence[int]) -> Sequence[int]:
    """Other items in a list or tuple of the kind of ``held``, which may have named fields."""
    make: Any = getattr(type(held), "_make", type(held))
    return cast("Sequence[int]", make(items))
