"""The true accuracies of a search's result, from a table of all cells of NAS-Bench-201.

    >>> table = BenchTable.embedded()
    >>> table.look_up(genotype).accuracies["c10_test_200"], table.look_up(genotype).ranks["c10_test_200"]
    (93.71, 1482)

Dong and Yang, "NAS-Bench-201", ICLR 2020. A table is a judge: it is read once, when a search has ended; nothing may be
chosen by it. Its file is a csv.gz with a column `arch`, the benchmark's string of the cell, and columns of numbers.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import final

from sparsebayes.errors import DataError, RecipeError
from sparsebayes.nas.genotype import Genotype, Op

__all__ = ["BenchTable", "Judgement", "cell_of", "cell_string"]

EMBEDDED = Path(__file__).with_name("tables") / "nas_bench_201.csv.gz"
NODES = 4


@final
@dataclass(frozen=True)
class Judgement:
    """What a table says of one cell.

    Attributes:
        cell: the benchmark's string.
        accuracies: percent, by column.
        ranks: 1 for the best of all cells, by column; cells of equal accuracy share the better rank.
        num_cells: cells of the table.
    """

    cell: str
    accuracies: Mapping[str, float]
    ranks: Mapping[str, int]
    num_cells: int


@final
class BenchTable:
    """A table of cells.

    Args:
        columns: accuracies in percent of every cell, by column.
        position: of each cell in the columns, by the benchmark's string.
    """

    def __init__(self, columns: Mapping[str, list[float]], position: Mapping[str, int]) -> None:
        self.columns = columns
        self.position = position

    def __repr__(self) -> str:
        return f"BenchTable({len(self.position):,} cells; {', '.join(self.columns)})"

    @staticmethod
    def embedded() -> BenchTable:
        """The table inside the package: CIFAR-10, CIFAR-100 and ImageNet16-120 after 200 epochs."""
        return BenchTable.read(EMBEDDED)

    @staticmethod
    def read(path: str | Path) -> BenchTable:
        """Read a table.

        Args:
            path: a csv.gz with a column `arch`, each cell once; all other columns must be finite numbers.

        Raises:
            DataError: the file is absent, damaged, or no such table.
        """
        try:
            with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            names = [name for name in rows[0] if name != "arch"]
            columns = {name: [float(row[name]) for row in rows] for name in names}
            position = {row["arch"]: number for number, row in enumerate(rows)}
            if len(position) < len(rows):
                raise ValueError("a cell is there twice")
            if not all(map(math.isfinite, chain.from_iterable(columns.values()))):
                raise ValueError("a number is not finite")
        except (
            OSError,
            EOFError,
            zlib.error,
            csv.Error,
            ValueError,
            TypeError,
            KeyError,
            IndexError,
        ) as error:
            raise DataError(
                f"expected a table of cells at {path}, a csv.gz with a column arch and columns of numbers, got "
                f"something else ({type(error).__name__}: {str(error)[:200]}); use table: embedded for NAS-Bench-201"
            ) from None
        return BenchTable(columns, position)

    def look_up(self, genotype: Genotype) -> Judgement:
        """The true accuracies and ranks of a cell.

        Raises:
            DataError: the cell is not in the table.
            RecipeError: the genotype is no cell of NAS-Bench-201.
        """
        cell = cell_string(genotype)
        if cell not in self.position:
            raise DataError(
                f"the table of {len(self.position):,} cells has no cell {cell}; use the whole table (table: embedded)"
            )
        at = self.position[cell]
        accuracies = {name: values[at] for name, values in self.columns.items()}
        ranks = {name: 1 + sum(v > accuracies[name] for v in values) for name, values in self.columns.items()}
        return Judgement(cell, accuracies, ranks, len(self.position))


def cell_string(genotype: Genotype) -> str:
    """The benchmark's string of a cell: `|op~source|+|op~source|op~source|+...`, node by node.

    Raises:
        RecipeError: the genotype is of another space, or has an edge with several operations.
    """
    if genotype.space != "nas_bench_201":
        raise RecipeError(
            f"the table holds cells of nas_bench_201, got one of {genotype.search_space.name!r}; set table: null"
        )
    ops: dict[tuple[int, int], str] = {}
    for source, target, op in genotype.cells["normal"]:
        if (source, target) in ops:
            raise RecipeError(
                f"edge {source} -> {target} has several operations, which no cell of the table has; set "
                "search.one_op_per_edge to null or true"
            )
        ops[source, target] = op
    nodes = (
        "".join(f"|{ops.get((source, target), 'none')}~{source}" for source in range(target)) + "|"
        for target in range(1, NODES)
    )
    return "+".join(nodes)


def cell_of(text: str) -> tuple[Op, ...]:
    """The operations of a cell from the benchmark's string, `none` left out.

    Raises:
        RecipeError: the text has another form.
    """
    try:
        nodes = [part.strip("|").split("|") for part in text.split("+")]
        ops = [
            (int(source), target, op)
            for target, entries in enumerate(nodes, start=1)
            for op, source in (entry.split("~") for entry in entries)
        ]
    except ValueError:
        raise RecipeError(
            f"expected a cell such as |op~0|+|op~0|op~1|+|op~0|op~1|op~2|, got {text!r}"
        ) from None
    return tuple(op for op in ops if op[2] != "none")
