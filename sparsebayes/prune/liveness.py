"""Which units a mask kills.

A unit (one channel or neuron) is dead when nothing of it can reach the output any more:

* *unread*: every entry by which another layer reads it is masked, or belongs to a dead unit of that layer; if the
  statistics of a norm count it, all its own entries must be masked as well;
* *zero*: all its own entries are masked or read only dead units, and own entries of 0 make it read as 0.

Each death may cause others, upstream (a dead unit reads nothing) and downstream (a zero needs no reader), so
both rules are applied until nothing changes.

    >>> # fc1 -> fc2 -> output, fc2 reads unit 1 of fc1 by nothing
    >>> living_units(graph, {"fc2.weight": torch.tensor([[True, False]])}, shapes)
    tensor([ True, False])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebayes.errors import ModelError
from sparsebayes.groups.tracing import Slice, UnitGraph
from sparsebayes.groups.unit_graph import stays

__all__ = ["check_graph", "kept_indices", "living_units"]


@dataclass(frozen=True, eq=False)
class _Entries:
    """The entries of one parameter, reduced to the dimensions along which units lie.

    Args:
        free: bool, one dimension per element of `dims`: True where some entry there is not masked.
        dims: those dimensions of the parameter, rising.
        slices: the parameter's slices.
    """

    free: Tensor
    dims: tuple[int, ...]
    slices: tuple[Slice, ...]

    def along(self, dim: int, values: Tensor) -> Tensor:
        """View a vector along one dimension of the parameter so that it broadcasts against `free`."""
        shape = [1] * len(self.dims)
        shape[self.dims.index(dim)] = values.numel()
        return values.view(shape)

    def positions(self, dim: int, entries: Tensor) -> Tensor:
        """Say for each position along one dimension whether any of its entries is True."""
        others = [axis for axis, other in enumerate(self.dims) if other != dim]
        return entries.any(dim=others) if others else entries


def check_graph(graph: UnitGraph, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a unit graph of another network.

    Args:
        graph: from `trace_units`.
        shapes: of the network's parameters and buffers.

    Raises:
        ModelError: a name or a size differs, or a tensor is labelled twice and differently.
    """
    seen: dict[tuple[str, int], Tensor] = {}
    for piece in (*graph.slices, *graph.buffers):
        shape = shapes.get(piece.parameter)
        if shape is None or not 0 <= piece.dim < len(shape) or shape[piece.dim] != piece.unit.numel():
            raise ModelError(
                f"the unit graph expects {piece.unit.numel()} entries along dimension {piece.dim} of "
                f"{piece.parameter!r}, but the model has "
                f"{'no such tensor' if shape is None else list(shape)}; "
                "trace the model as it is now"
            )
        first = seen.setdefault((piece.parameter, piece.dim), piece.unit)
        if not torch.equal(first, piece.unit):
            raise ModelError(
                f"the unit graph labels dimension {piece.dim} of {piece.parameter!r} twice and differently; "
                "trace the model again"
            )


def living_units(
    graph: UnitGraph, masks: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Tensor:
    """Find the units that survive a mask.

    Args:
        graph: the units, U of them.
        masks: parameter name to bool of the parameter's shape, True where the entry stays; all stay where
            absent.
        shapes: of the network's parameters.

    Returns:
        bool, of shape `[U]`, on the CPU.
    """
    entries = _reduced(graph, masks, shapes)
    reads, owns = _labelled(graph, reads=True), _labelled(graph, reads=False)
    # The statistics of a norm read their channels, whatever else does, and count the zeros that have left.
    joint = torch.zeros(graph.num_units, dtype=torch.bool) if graph.joint is None else graph.joint.cpu()
    zero_preserving = graph.zero_preserving.cpu()
    alive = torch.ones(graph.num_units, dtype=torch.bool)
    reached: dict[tuple[int, int], Tensor] = {}  # units that each slice of each parameter still reads or owns
    changed = list(range(len(entries)))
    while True:
        for number in changed:
            parameter = entries[number]
            reaching = parameter.free
            for piece in parameter.slices:
                reaching = reaching & parameter.along(piece.dim, stays(alive, piece.unit))
            for place, piece in enumerate(parameter.slices):
                found = piece.unit[parameter.positions(piece.dim, reaching)]
                reached[number, place] = found[found >= 0]
        read = torch.zeros(graph.num_units, dtype=torch.bool)
        own = torch.zeros(graph.num_units, dtype=torch.bool)
        for (number, place), found in reached.items():
            (read if entries[number].slices[place].reads else own)[found] = True
        silent = owns & ~own
        unread = reads & ~read & (silent | ~joint)
        dead = alive & (unread | (silent & zero_preserving))
        if not bool(dead.any()):
            return alive
        alive &= ~dead
        # A death changes the parameters that name the unit, and no other.
        changed = [
            number
            for number, parameter in enumerate(entries)
            if not all(bool(stays(~dead, piece.unit).all()) for piece in parameter.slices)
        ]


def kept_indices(graph: UnitGraph, alive: Tensor) -> dict[str, dict[int, Tensor]]:
    """List what surviving units leave of each tensor.

    Args:
        graph: the units.
        alive: bool `[U]`.

    Returns:
        Parameter or buffer name to dimension to the int64 positions that stay; only dimensions that shrink.
    """
    kept: dict[str, dict[int, Tensor]] = {}
    for piece in (*graph.slices, *graph.buffers):
        left = stays(alive, piece.unit)
        if not left.all():
            kept.setdefault(piece.parameter, {})[piece.dim] = left.nonzero().flatten()
    return kept


def _reduced(
    graph: UnitGraph, masks: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> list[_Entries]:
    """Reduce each mask once to the dimensions that carry units: the loop then never sees kernel positions."""
    by_parameter: dict[str, list[Slice]] = {}
    for piece in graph.slices:
        by_parameter.setdefault(piece.parameter, []).append(piece)
    result = []
    for name, slices in by_parameter.items():
        dims = tuple(sorted({piece.dim for piece in slices}))
        mask = masks.get(name)
        if mask is None:
            free = torch.ones([shapes[name][dim] for dim in dims], dtype=torch.bool)
        else:
            others = [dim for dim in range(mask.ndim) if dim not in dims]
            free = (mask.any(dim=others) if others else mask).cpu()
        result.append(_Entries(free, dims, tuple(slices)))
    return result


def _labelled(graph: UnitGraph, *, reads: bool) -> Tensor:
    """Say for each unit whether any slice of one kind names it; without one it cannot die for lack of it."""
    found = torch.zeros(graph.num_units, dtype=torch.bool)
    for piece in graph.slices:
        if piece.reads == reads:
            found[piece.unit[piece.unit >= 0]] = True
    return found
