"""Search spaces as data: which cells there are, what their edges may carry, and how a network is made of them.

A *cell* is a directed acyclic graph. Its first nodes are its inputs; every other node is the sum of its incoming edges,
and every edge is a sum of candidate operations. A *space* says how cells are stacked:

    >>> cell = CellSpec("small", num_inputs=1, num_nodes=2, edges=(Edge(0, 1, ("skip_connect", "nor_conv_3x3")),))
    >>> Space("mine", (cell,))
    Space('mine', cells small: 1 edges, 2 operations)

The shipped spaces are in `catalogue.py`. A user's own space is a mapping of the same fields, in YAML or in Python
(`read_space`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, final, get_args

from sparsebayes.errors import RecipeError, unknown
from sparsebayes.nas.ops import check_op

__all__ = ["CellSpec", "Decision", "Edge", "Space", "read_space"]

Output = Literal["concat", "last"]
Reduction = Literal["cell", "residual", "max_pool", "stride"]
Widths = Literal["double", "linear"]

CELL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
MAX_NODES = 64
"""Nodes that a cell may have; more is a mistake in a file, not a cell."""


@final
@dataclass(frozen=True)
class Edge:
    """An edge of a cell and the operations that it may carry.

    Attributes:
        source: node that is read.
        target: node that is added to; larger than the source.
        ops: candidate operations, names of `sparsebayes.nas.ops.OPS`, each once.
    """

    source: int
    target: int
    ops: tuple[str, ...]


@final
@dataclass(frozen=True)
class CellSpec:
    """One kind of cell.

    Attributes:
        name: what genotypes, reports and files call it: letters, digits, `_` and `-`, a letter first.
        num_inputs: inputs I: the outputs of the last I cells. They are nodes 0 to I - 1.
        num_nodes: nodes, inputs included.
        edges: edges with their candidates.
        output: "concat": the channels of all nodes in `read`; "last": the last node.
        read: nodes that the output reads; empty: all that are no inputs ("concat"), or the last.
        keep: how many incoming edges a node keeps, as pairs (node, number), where a benchmark fixes it.

    Raises:
        RecipeError: a name that is none, an edge that points back or outside, a pair of equal edges, an unknown
            operation, or a node that nothing reaches or that reaches no output.
    """

    name: str
    num_inputs: int
    num_nodes: int
    edges: tuple[Edge, ...]
    output: Output = "last"
    read: tuple[int, ...] = ()
    keep: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is no cell."""
        _check_cell(self)

    @property
    def num_ops(self) -> int:
        """Candidate operations of all edges together."""
        return sum(len(edge.ops) for edge in self.edges)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The nodes that the cell's output is made of."""
        if self.read:
            return self.read
        return (
            tuple(range(self.num_inputs, self.num_nodes))
            if self.output == "concat"
            else (self.num_nodes - 1,)
        )

    def places(self) -> list[tuple[int, str]]:
        """(number of the edge, operation) of every candidate, in the order of the cell's switches."""
        return [(number, op) for number, edge in enumerate(self.edges) for op in edge.ops]


@final
@dataclass(frozen=True)
class Decision:
    """How operations are chosen where a benchmark asks for more than the evidence.

    Attributes:
        one_op_per_edge: keep the best operation of every edge that stays.
        top_k_edges: incoming edges that a node keeps, the best ones; None: all that stay.
    """

    one_op_per_edge: bool = False
    top_k_edges: int | None = None

    def __post_init__(self) -> None:
        """Refuse a number of edges below 1."""
        top = self.top_k_edges
        if top is not None and (type(top) is not int or top < 1):
            raise RecipeError(f"expected top_k_edges of at least 1, got {top!r}; give null for all edges")


@final
@dataclass(frozen=True, repr=False)
class Space:
    """A search space.

    Attributes:
        name: what genotypes call it.
        cells: the kinds of cells; the first is the one that stages are made of.
        shared: all cells of a kind have the same operations ("proxy": a group spans the repeated cells, BayesNAS
            eq. 21); False: every cell decides for itself ("proxyless").
        gates: every edge has a zero-gate (BayesNAS eq. 8).
        num_stages: stages of equal width and resolution.
        reduction: what stands between two stages: the second kind of cell, a residual block, max-pooling, or nothing:
            the next stage's first cell has stride 2.
        widths: "double" at each reduction, or grow by the same number of channels in every cell ("linear").
        project: every input of a cell first goes through ReLU, a pointwise convolution and a norm.
        residual: the input of a cell is added to its output, padded with zeros where that is wider.
        stem_multiplier: width of the stem over that of the first stage.
        decision: how operations are chosen.

    Raises:
        RecipeError: no cell, or settings that contradict each other.
    """

    name: str
    cells: tuple[CellSpec, ...]
    shared: bool = True
    gates: bool = True
    num_stages: int = 3
    reduction: Reduction = "residual"
    widths: Widths = "double"
    project: bool = False
    residual: bool = False
    stem_multiplier: int = 1
    decision: Decision = field(default_factory=Decision)

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        _check_space(self)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{c.name}: {len(c.edges)} edges, {c.num_ops} operations" for c in self.cells)
        return f"Space({self.name!r}, cells {kinds})"

    def cell(self, name: str) -> CellSpec:
        """The kind of cell of that name.

        Raises:
            RecipeError: unknown name.
        """
        for spec in self.cells:
            if spec.name == name:
                return spec
        raise RecipeError(unknown("cell", name, [spec.name for spec in self.cells]))

    def to_dict(self) -> dict[str, Any]:
        """The space as plain data, which `read_space` reads back."""
        return cast("dict[str, Any]", json.loads(json.dumps(asdict(self))))


def read_space(data: Mapping[str, Any]) -> Space:
    """A space from plain data, as a YAML file or a JSON genotype holds it.

    An edge may be written as a mapping or as a list `[source, target, [operations]]`.

    Args:
        data: the fields of `Space`, with `cells` as a list of the fields of `CellSpec`.

    Returns:
        The validated space.

    Raises:
        RecipeError: an unknown, missing or ill-typed field, or one that `Space` or `CellSpec` refuses.
    """
    fields = _known(data, "space", Space)
    cells = _list(fields.pop("cells", None), "cells of the space")
    decision = fields.pop("decision", {})
    fields["cells"] = tuple(_read_cell(cell) for cell in cells)
    fields["decision"] = _make(Decision, _known(decision, "decision", Decision), "decision")
    return cast("Space", _make(Space, fields, "space"))


def _read_cell(data: Any) -> CellSpec:
    fields = _known(data, "cell", CellSpec)
    edges = []
    for entry in _list(fields.get("edges"), "edges of the cell"):
        values = (
            dict(zip(("source", "target", "ops"), entry, strict=False)) if isinstance(entry, list) else entry
        )
        edge = _known(values, "edge", Edge)
        edge["ops"] = tuple(_list(edge.get("ops"), "operations of an edge"))
        edges.append(_make(Edge, edge, "edge"))
    fields["edges"] = tuple(edges)
    if "read" in fields:
        fields["read"] = _integers(fields["read"], "nodes that the cell's output reads")
    if "keep" in fields:
        pairs = [
            _integers(pair, "pairs in keep of the cell") for pair in _list(fields["keep"], "keep of the cell")
        ]
        if any(len(pair) != 2 for pair in pairs):
            raise RecipeError(f"expected keep of the cell as pairs [node, number], got {fields['keep']!r}")
        fields["keep"] = tuple(pairs)
    return cast("CellSpec", _make(CellSpec, fields, "cell"))


def _known(data: Any, what: str, kind: type) -> dict[str, Any]:
    """The fields of a section, none of them unknown and each of the kind's plain types."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"expected the {what} as a section of key: value lines, got {type(data).__name__}")
    choices = kind.__dataclass_fields__  # type: ignore[attr-defined]
    for name, value in data.items():
        if name not in choices:
            raise RecipeError(unknown(f"key of a {what}", str(name), choices))
        plain = {"str": str, "bool": bool, "int": int}.get(choices[name].type)
        if plain is not None and type(value) is not plain:
            raise RecipeError(f"expected {name} of the {what} as {plain.__name__}, got {value!r}")
    return dict(data)


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"expected the {what} as a list, got {value!r}")
    return list(value)


def _integers(value: Any, what: str) -> tuple[int, ...]:
    entries = _list(value, what)
    if any(type(entry) is not int for entry in entries):
        raise RecipeError(f"expected the {what} as whole numbers, got {value!r}")
    return tuple(entries)


def _make(kind: type, fields: Mapping[str, Any], what: str) -> Any:
    try:
        return kind(**fields)
    except TypeError as error:
        lacking = [
            name
            for name, entry in kind.__dataclass_fields__.items()  # type: ignore[attr-defined]
            if name not in fields and "MISSING" in f"{entry.default} {entry.default_factory}"
        ]
        reason = f"it lacks {', '.join(lacking)}" if lacking else str(error)
        raise RecipeError(f"expected a whole {what}, but {reason}") from None


def _check_cell(spec: CellSpec) -> None:
    where = f"cell {spec.name!r}"
    if not CELL_NAME.fullmatch(spec.name):
        raise RecipeError(
            f"{where}: expected a name of at most 64 letters, digits, _ and -, a letter first; files are named after it"
        )
    if not 1 <= spec.num_inputs < spec.num_nodes <= MAX_NODES:
        raise RecipeError(
            f"{where}: expected at least one input and at most {MAX_NODES} nodes, more than inputs, got "
            f"{spec.num_inputs} inputs and {spec.num_nodes} nodes"
        )
    if spec.output not in get_args(Output):
        raise RecipeError(f"{where}: {unknown('output', str(spec.output), get_args(Output))}")
    seen = set()
    for edge in spec.edges:
        ends = f"edge {edge.source} -> {edge.target}"
        if not all(
            isinstance(node, int) and 0 <= node < spec.num_nodes for node in (edge.source, edge.target)
        ):
            raise RecipeError(
                f"{where}: {ends} leaves the nodes 0 to {spec.num_nodes - 1}; correct its numbers"
            )
        if edge.source >= edge.target:
            raise RecipeError(
                f"{where}: {ends} points back, which can close a cycle; number the nodes so that edges point up"
            )
        if edge.target < spec.num_inputs:
            raise RecipeError(f"{where}: {ends} ends in an input; inputs are the outputs of earlier cells")
        if (edge.source, edge.target) in seen:
            raise RecipeError(f"{where}: {ends} is there twice; give its operations as one list")
        seen.add((edge.source, edge.target))
        if not edge.ops or len(set(edge.ops)) < len(edge.ops):
            raise RecipeError(
                f"{where}: {ends} needs at least one operation, each of them once, got {edge.ops}"
            )
        for op in edge.ops:
            check_op(op)
    _check_reach(spec, where)
    for node, number in spec.keep:
        incoming = sum(edge.target == node for edge in spec.edges)
        if not 1 <= number <= incoming:
            raise RecipeError(
                f"{where}: node {node} has {incoming} incoming edges, so it cannot keep {number}"
            )


def _check_reach(spec: CellSpec, where: str) -> None:
    """Every node must be reached from an input and reach the output."""
    outputs = set(spec.outputs)
    if not all(spec.num_inputs <= node < spec.num_nodes for node in outputs):
        raise RecipeError(
            f"{where}: the output reads the nodes {sorted(outputs)}, some of which are no inner nodes"
        )
    fed, read = set(range(spec.num_inputs)), set(outputs)
    for edge in sorted(spec.edges, key=lambda edge: edge.source):
        if edge.source in fed:
            fed.add(edge.target)
    for edge in sorted(spec.edges, key=lambda edge: -edge.target):
        if edge.target in read:
            read.add(edge.source)
    inner = set(range(spec.num_inputs, spec.num_nodes))
    for node in sorted(inner - fed):
        raise RecipeError(
            f"{where}: node {node} is reached by no edge from an input; add one, or remove the node"
        )
    for node in sorted(inner - read):
        raise RecipeError(f"{where}: node {node} reaches no output; add an edge from it, or remove the node")


def _check_space(space: Space) -> None:
    where = f"search space {space.name!r}"
    names = [cell.name for cell in space.cells]
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"{where}: expected at least one cell, each with a name of its own, got {names}")
    for what, value, choices in (
        ("reduction", space.reduction, get_args(Reduction)),
        ("widths", space.widths, get_args(Widths)),
    ):
        if value not in choices:
            raise RecipeError(f"{where}: {unknown(what, str(value), choices)}")
    if not space.shared and len(names) > 1 and any(name[-1].isdecimal() for name in names):
        raise RecipeError(
            f"{where}: cells that are not shared have their number behind their name, so names must not end in digits, "
            f"got {names}"
        )
    needed = 2 if space.reduction == "cell" else 1
    if len(names) != needed:
        raise RecipeError(
            f"{where}: reduction {space.reduction!r} takes {needed} kinds of cells, got {names}"
        )
    if len({cell.num_inputs for cell in space.cells}) > 1:
        raise RecipeError(f"{where}: all kinds of cells must have as many inputs")
    if space.num_stages < 1 or space.stem_multiplier < 1:
        raise RecipeError(f"{where}: num_stages and stem_multiplier must be at least 1")
    if space.cells[0].num_inputs > 1 and not space.project:
        raise RecipeError(
            f"{where}: cells with several inputs need project: true, which brings those to one shape"
        )
    if space.residual and (space.cells[0].num_inputs > 1 or space.cells[0].output == "concat"):
        raise RecipeError(f"{where}: residual: true needs cells with one input and output: last")
