"""What a search found, as frozen data: which operations each cell has.

    >>> genotype = Genotype("nas_bench_201", {"normal": ((0, 3, "skip_connect"), (0, 1, "nor_conv_3x3"))})
    >>> Genotype.from_json(genotype.to_json()) == genotype
    True

An edge may have several operations, whose results are summed, or none; every operation lies on a path from an input to
the cell's output (`decision.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from sparsebayes.errors import RecipeError, unknown
from sparsebayes.nas.catalogue import find_space
from sparsebayes.nas.ops import OPS
from sparsebayes.nas.spaces import CellSpec, Edge, Space

__all__ = ["Genotype", "Op"]

Op = tuple[int, int, str]
"""Source, target, operation."""

VERSION = 1


@final
@dataclass(frozen=True)
class Genotype:
    """The operations of every cell.

    Attributes:
        space: name of the search space, or the space as plain data where it is the user's own.
        cells: for each cell (its kind, or its kind and number where cells are not shared) the operations that it has,
            sorted.

    Raises:
        RecipeError: an unknown space, cell or operation, or an edge that the space does not have.
    """

    space: str | Mapping[str, Any]
    cells: Mapping[str, tuple[Op, ...]]

    def __post_init__(self) -> None:
        """Sort, and refuse what the space does not have."""
        space = self.search_space
        for key, ops in self.cells.items():
            object.__setattr__(self, "cells", {**self.cells, key: tuple(sorted(ops))})
            _check_ops(space, key, ops)

    @property
    def search_space(self) -> Space:
        """The space that the genotype is a point of."""
        return find_space(self.space)

    @property
    def num_ops(self) -> int:
        """Operations of all cells together."""
        return sum(map(len, self.cells.values()))

    @property
    def parameter_free_share(self) -> float:
        """Share of operations without weights: near 1, the search has collapsed."""
        free = sum(OPS[op].parameter_free for ops in self.cells.values() for _, _, op in ops)
        return free / max(self.num_ops, 1)

    def spec(self, key: str) -> CellSpec:
        """The kind of a cell.

        Raises:
            RecipeError: the space has no such cell.
        """
        return _spec(self.search_space, key)

    def edges(self, key: str) -> tuple[Edge, ...]:
        """The edges of a cell with the operations that it has, empty ones left out.

        Raises:
            RecipeError: the genotype has no such cell.
        """
        if key not in self.cells:
            raise RecipeError(
                unknown("cell of the genotype", key, self.cells)
                + "; build the network at the depth of the search"
            )
        by_edge: dict[tuple[int, int], list[str]] = {}
        for source, target, op in self.cells[key]:
            by_edge.setdefault((source, target), []).append(op)
        return tuple(Edge(source, target, tuple(ops)) for (source, target), ops in sorted(by_edge.items()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON holds it."""
        space = self.space if isinstance(self.space, str) else dict(self.space)
        cells = {key: [list(op) for op in ops] for key, ops in self.cells.items()}
        return {"version": VERSION, "space": space, "cells": cells}

    def to_json(self) -> str:
        """The genotype as JSON text."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @staticmethod
    def from_dict(data: Any) -> Genotype:
        """The genotype from plain data.

        Raises:
            RecipeError: it is no genotype, or does not fit its space.
        """
        if not isinstance(data, Mapping) or set(data) != {"version", "space", "cells"}:
            raise RecipeError(
                "expected a genotype with the keys version, space and cells; use one that a run wrote"
            )
        if data["version"] != VERSION:
            raise RecipeError(
                f"expected a genotype of version {VERSION}, got {data['version']!r}; search again"
            )
        if not isinstance(data["cells"], Mapping) or not isinstance(data["space"], (str, Mapping)):
            raise RecipeError(
                "expected a genotype's space as a name or a section, and its cells as a section"
            )
        cells = {
            str(key): tuple(_read_op(op) for op in _entries(key, ops)) for key, ops in data["cells"].items()
        }
        return Genotype(data["space"], cells)

    @staticmethod
    def from_json(text: str) -> Genotype:
        """The genotype from JSON text.

        Raises:
            RecipeError: it is no JSON, no genotype, or does not fit its space.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(
                f"expected a genotype as JSON, got other text ({error}); use one that a run wrote"
            ) from None
        return Genotype.from_dict(data)


def _entries(key: str, ops: Any) -> Sequence[Any]:
    if not isinstance(ops, (list, tuple)):
        raise RecipeError(f"expected the operations of cell {key!r} as a list, got {ops!r}")
    return ops


def _read_op(entry: Any) -> Op:
    shape = (int, int, str)
    if not isinstance(entry, (list, tuple)) or tuple(map(type, entry)) != shape:
        raise RecipeError(f"expected an operation as [source, target, name], got {entry!r}")
    return (entry[0], entry[1], entry[2])


def _check_ops(space: Space, key: str, ops: Sequence[Op]) -> None:
    """Refuse cells and operations of another space."""
    spec = _spec(space, key)
    known = {(edge.source, edge.target): edge.ops for edge in spec.edges}
    if len(set(ops)) < len(ops):
        raise RecipeError(f"cell {key!r} of the genotype names an operation twice; each counts once")
    for source, target, op in ops:
        candidates = known.get((source, target))
        if candidates is None:
            raise RecipeError(
                f"the genotype has an edge {source} -> {target} in cell {key!r}, which the space {space.name!r} "
                "does not have; it belongs to another space"
            )
        if op not in candidates:
            raise RecipeError(
                unknown(f"operation of edge {source} -> {target} in space {space.name!r}", op, candidates)
            )


def _spec(space: Space, key: str) -> CellSpec:
    """The kind of a cell's key."""
    for spec in space.cells:
        suffix = key.removeprefix(spec.name)
        if key == spec.name if space.shared else (suffix != key and suffix.isdecimal()):
            return spec
    names = [spec.name if space.shared else f"{spec.name}0" for spec in space.cells]
    raise RecipeError(unknown(f"cell of space {space.name!r}", key, names))
