"""Which switch is which: the flat vector of a supernet's switches, its groups, and their hierarchy.

Every candidate operation of every cell has a scalar switch, and where a space has gates every edge of every cell has
one too. All of them lie in one vector `[T]`, cell by cell, operations before gates. A *group* is what stays or goes
together: with shared cells the same (edge, operation) in all cells of a kind (BayesNAS, arXiv 1905.04919, eq. 21), else
a single switch.

    >>> table = SwitchTable.of(SPACES["nas_bench_201"], depth=2)
    >>> table
    SwitchTable(144 switches of 6 cells in 24 groups)
    >>> table.groups[1]
    Switch(key='normal', edge=0, op='nor_conv_1x1')
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.groups.hierarchy import Hierarchy
from sparsebayes.nas.spaces import CellSpec, Space

__all__ = ["PARAMETER", "Switch", "SwitchTable", "cell_keys"]

PARAMETER = "switches"
"""Name of a supernet's parameter that holds the switches."""


@final
@dataclass(frozen=True)
class Switch:
    """What one group decides on.

    Attributes:
        key: the cell, as genotypes name it: the kind of cell, with its number where cells are not shared.
        edge: number of the edge in the cell.
        op: the operation; None for the edge's zero-gate.
    """

    key: str
    edge: int
    op: str | None


@final
@dataclass(frozen=True, eq=False, repr=False)
class SwitchTable:
    """The layout of a supernet's switches.

    Attributes:
        cells: (key, kind of cell) of every cell of the network, in order.
        groups: what each of the G groups decides on.
        group: group of every switch, int64 of shape `[T]`.
        op_slices: for each cell, where its operations' switches lie.
        gate_slices: for each cell, where its gates lie; empty slices without gates.
        gate: position of the gate of every operation's switch, int64 `[T]`; -1 for gates, and without gates.
    """

    cells: tuple[tuple[str, CellSpec], ...]
    groups: tuple[Switch, ...]
    group: Tensor
    op_slices: tuple[slice, ...]
    gate_slices: tuple[slice, ...]
    gate: Tensor
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)
    _edges: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, space: Space, depth: int) -> SwitchTable:
        """Lay out the switches of a supernet.

        Args:
            space: the search space.
            depth: cells of a stage.
        """
        cells = tuple(cell_keys(space, depth))
        numbers: dict[Switch, int] = {}
        group: list[int] = []
        gate: list[int] = []
        op_slices, gate_slices = [], []
        for key, spec in cells:
            first = len(group)
            for edge, op in spec.places():
                group.append(numbers.setdefault(Switch(key, edge, op), len(numbers)))
                gate.append(first + spec.num_ops + edge if space.gates else -1)
            middle = len(group)
            for edge in range(len(spec.edges)) if space.gates else ():
                group.append(numbers.setdefault(Switch(key, edge, None), len(numbers)))
                gate.append(-1)
            op_slices.append(slice(first, middle))
            gate_slices.append(slice(middle, len(group)))
        return cls(
            cells,
            tuple(numbers),
            torch.tensor(group),
            tuple(op_slices),
            tuple(gate_slices),
            torch.tensor(gate),
        )

    @property
    def num_switches(self) -> int:
        """Number of switches T, gates included."""
        return len(self.group)

    @property
    def num_groups(self) -> int:
        """Number of groups G, gates included."""
        return len(self.groups)

    def __repr__(self) -> str:
        return f"SwitchTable({self.num_switches} switches of {len(self.cells)} cells in {self.num_groups} groups)"

    def effective(self, switches: Tensor) -> Tensor:
        """Factor of every operation: its switch times its edge's gate.

        Args:
            switches: of shape `[T]`, or `[B, T]` for one row per image.

        Returns:
            Of the same shape; what stands at the gates' own positions has no meaning.
        """
        _, gate = self._on(switches.device)
        gates = torch.where(gate >= 0, switches[..., gate.clamp(min=0)], 1.0)
        return switches * gates

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`group` and `gate` on a device, copied there once: training asks for them in every step."""
        if device not in self._copies:
            self._copies[device] = (self.group.to(device), self.gate.to(device))
        return self._copies[device]

    def sum_groups(self, values: Tensor) -> Tensor:
        """Sum what belongs to the same group: `[..., T]` to `[..., G]`."""
        group, _ = self._on(values.device)
        result = values.new_zeros((*values.shape[:-1], self.num_groups))
        return result.index_add(-1, group, values)

    def norms(self, switches: Tensor) -> Tensor:
        """Root mean square of each group's switches, of shape `[G]`; the switch itself where a group has one."""
        counts = torch.bincount(self.group, minlength=self.num_groups).to(switches)
        return (self.sum_groups(switches.square()) / counts).sqrt()

    def softmax(self, logits: Tensor) -> Tensor:
        """Softmax over the operations of each edge; gates are 1.

        Args:
            logits: of shape `[G]`; those of gates have no effect.

        Returns:
            Of the same shape.
        """
        if logits.device not in self._edges:
            numbers: dict[tuple[str, int], int] = {}
            edge = torch.tensor([numbers.setdefault((s.key, s.edge), len(numbers)) for s in self.groups])
            is_gate = torch.tensor([switch.op is None for switch in self.groups])
            self._edges[logits.device] = (edge.to(logits.device), is_gate.to(logits.device))
        edge, is_gate = self._edges[logits.device]
        lowest = logits.detach().masked_fill(is_gate, -math.inf)
        peak = lowest.new_full((int(edge.max()) + 1,), -math.inf).scatter_reduce(0, edge, lowest, "amax")[
            edge
        ]
        weights = torch.where(is_gate, peak, logits).sub(peak).exp().masked_fill(is_gate, 0.0)
        totals = torch.zeros_like(weights).index_add(0, edge, weights)
        return (weights / totals[edge]).masked_fill(is_gate, 1.0)

    def beside(self, on: Tensor) -> Tensor:
        """Which operations are left in a node's sum when a group goes.

        Args:
            on: groups that are on, bool of shape `[G]`.

        Returns:
            bool of shape `[G, G]`: in row g the operations that are on and enter the node of g's edge, without g itself
            and, where g is a gate, without those of its edge, which go with it.
        """
        specs = dict(self.cells)
        nodes: dict[tuple[str, int], int] = {}
        node, edge, is_op = [], [], []
        for switch in self.groups:
            target = specs[switch.key].edges[switch.edge].target
            node.append(nodes.setdefault((switch.key, target), len(nodes)))
            edge.append(switch.edge)
            is_op.append(switch.op is not None)
        nodes_of, edges_of, ops = torch.tensor(node), torch.tensor(edge), torch.tensor(is_op)
        same_edge = edges_of[:, None] == edges_of
        left = (nodes_of[:, None] == nodes_of) & (ops & on) & (ops[:, None] | ~same_edge)
        return left.fill_diagonal_(False)

    def grouping(self) -> Grouping:
        """The groups over the parameter `switches`, for everything that works on groupings."""
        keys = list(dict.fromkeys(switch.key for switch in self.groups))
        index = torch.tensor([keys.index(switch.key) for switch in self.groups])
        labels = Labels(PARAMETER, (self.num_switches,), self.group)
        return Grouping(PARAMETER, (labels,), tuple(keys), index)

    def hierarchy(self) -> Hierarchy:
        """Which groups need which others (BayesNAS eqs. 6 and 8).

        An operation needs its edge's gate, and at least one operation on at least one edge into the edge's source; an
        edge that leaves an input has no such term. Gates need nothing.
        """
        specs = dict(self.cells)
        number = {switch: position for position, switch in enumerate(self.groups)}
        gates: list[int] = []
        predecessors: list[list[int]] = []
        for switch in self.groups:
            spec = specs[switch.key]
            if switch.op is None:
                gates.append(-1)
                predecessors.append([])
                continue
            gates.append(number.get(Switch(switch.key, switch.edge, None), -1))
            source = spec.edges[switch.edge].source
            into = [position for position, edge in enumerate(spec.edges) if edge.target == source]
            predecessors.append([number[Switch(switch.key, e, op)] for e in into for op in spec.edges[e].ops])
        return Hierarchy.build(predecessors=predecessors, gate=gates)


def cell_keys(space: Space, depth: int) -> list[tuple[str, CellSpec]]:
    """Key and kind of every cell of a network, in order.

    Args:
        space: the search space.
        depth: cells of a stage, at least 1.

    Returns:
        The keys are the kinds' names with shared cells, else those with the cell's number behind.
    """
    kinds: list[CellSpec] = []
    for stage in range(space.num_stages):
        if stage and space.reduction == "cell":
            kinds.append(space.cells[1])
        kinds += [space.cells[0]] * depth
    return [
        (kind.name if space.shared else f"{kind.name}{number}", kind) for number, kind in enumerate(kinds)
    ]
