"""Which groups need which others: the hierarchy of the HARD prior, as a directed acyclic graph.

A group may have a *zero-gate* (one group that must be on) and *predecessors* (of which at least one must be
on). With own switch variances s, the prior variance of a group is

    1/gamma = 1/s_gate + 1/sum(s over predecessors) + 1/s        (AND is a harmonic sum, OR is a plain sum)

Zhou et al., "BayesNAS: A Bayesian Approach for Neural Architecture Search", ICML 2019, arXiv 1905.04919:
eq. 6 is the case without a gate, eq. 8 the case with one. A group without a gate, or without predecessors,
has no such term: the network's input is always there.

    >>> chain = Hierarchy.build(predecessors=[[], [0], [1]])
    >>> chain.combine(torch.tensor([1.0, 1.0, 1.0]))
    tensor([1.0000, 0.5000, 0.5000])
    >>> chain.close(torch.tensor([False, True, True]))       # nothing reaches groups 1 and 2 any more
    tensor([False, False, False])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparsebayes.errors import GroupingError


@final
@dataclass(frozen=True, eq=False, repr=False)
class Hierarchy:
    """A directed acyclic graph over switch groups.

    Attributes:
        gate: int64 of shape ``[G]``: the group that is this group's zero-gate, -1 for none. A gate may itself
            have a gate or predecessors.
        edges: int64 of shape ``[2, E]``: row 0 holds predecessors, row 1 their successors, each pair once.

    Raises:
        GroupingError: a tensor of the wrong shape or type, a group number out of range, a pair given twice,
            or a cycle.
    """

    gate: Tensor
    edges: Tensor

    def __post_init__(self) -> None:
        _check_tensors(self.gate, self.edges)
        _check_numbers(self.gate, self.edges)
        _check_acyclic(self.gate, self.edges)

    @classmethod
    def build(cls, *, predecessors: Sequence[Sequence[int]], gate: Sequence[int] | None = None) -> Hierarchy:
        """Build a hierarchy from plain lists.

        Args:
            predecessors: for each of the G groups, the groups of which at least one must be on; empty for
                none.
            gate: for each of the G groups, its zero-gate or -1. None: no group has a gate.

        Returns:
            The validated hierarchy.

        Raises:
            GroupingError: as for the constructor.
        """
        pairs = [(before, after) for after, befores in enumerate(predecessors) for before in befores]
        edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T.contiguous()  # [2, E]
        gates = [-1] * len(predecessors) if gate is None else list(gate)
        if len(gates) != len(predecessors):
            raise GroupingError(
                f"expected one gate (or -1) for each of the {len(predecessors)} groups, got {len(gates)}: "
                "give both lists the same length."
            )
        return cls(gate=torch.tensor(gates, dtype=torch.int64), edges=edges)

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return self.gate.shape[0]

    def __repr__(self) -> str:
        gated = int((self.gate >= 0).sum())
        return f"Hierarchy({self.num_groups} groups, {gated} gated, {self.edges.shape[1]} predecessor pairs)"

    def combine(self, own: Tensor) -> Tensor:
        """Prior variances with every dependency counted once (eqs. 6 and 8).

        Only *own* variances enter: the gate's and the predecessors' own dependencies are theirs, not the
        group's.

        Args:
            own: own switch variances s, floating, non-negative, of shape ``[G]``.

        Returns:
            gamma of shape ``[G]``, same type and device: at most ``own``, and 0 wherever the group itself,
            its gate or all its predecessors have variance 0.

        Raises:
            GroupingError: ``own`` is not floating or not of shape ``[G]``.
        """
        self._check_vector(own, "variance", own.is_floating_point(), "floating")
        gate, before, after = self._on(own.device)
        gated = gate >= 0
        inverse_gate = torch.where(gated, own[gate.clamp(min=0)].reciprocal(), 0.0)
        follows, support = self._support(own, before, after)
        inverse_support = torch.where(follows, support.reciprocal(), 0.0)
        combined = (inverse_gate + inverse_support + own.reciprocal()).reciprocal()
        # A free group keeps its variance to the last bit instead of being rounded by two reciprocals.
        return torch.where(gated | follows, combined, own)

    def close(self, on: Tensor) -> Tensor:
        """Switch off what can no longer receive anything, transitively.

        Args:
            on: bool of shape ``[G]``: the groups that are to stay.

        Returns:
            bool of shape ``[G]``: the largest part of ``on`` in which every gated group has its gate on and
            every group with predecessors has one of them on. From each survivor, on groups lead back to a
            group without predecessors.

        Raises:
            GroupingError: ``on`` is not bool or not of shape ``[G]``.
        """
        self._check_vector(on, "on/off value", on.dtype == torch.bool, "bool")
        gate, before, after = self._on(on.device)
        while True:
            follows, support = self._support(on.to(torch.int64), before, after)
            closed = on & ((gate < 0) | on[gate.clamp(min=0)]) & (~follows | (support > 0))
            if torch.equal(closed, on):  # monotone: at most as many rounds as the graph is deep
                return closed
            on = closed

    def _support(self, values: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each group has predecessors, and the sum of the values over them; both of shape ``[G]``."""
        support = torch.zeros_like(values).index_add(0, after, values[before])
        follows = torch.zeros(self.num_groups, dtype=torch.bool, device=values.device)
        follows[after] = True
        return follows, support

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        before, after = self.edges.to(device)
        return self.gate.to(device), before, after

    def _check_vector(self, values: Tensor, what: str, type_ok: bool, type_name: str) -> None:
        if not type_ok or values.shape != (self.num_groups,):
            raise GroupingError(
                f"expected one {type_name} {what} for each of the {self.num_groups} groups, got "
                f"{_describe(values)}: pass a {type_name} tensor of shape [{self.num_groups}]."
            )


def _describe(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} of shape {list(values.shape)}"


def _check_tensors(gate: Tensor, edges: Tensor) -> None:
    if gate.dtype != torch.int64 or gate.ndim != 1:
        raise GroupingError(
            f"expected the gates as int64 of shape [G], got {_describe(gate)}: pass one per group."
        )
    if edges.dtype != torch.int64 or edges.ndim != 2 or edges.shape[0] != 2:
        raise GroupingError(
            f"expected the edges as int64 of shape [2, E], got {_describe(edges)}: row 0 holds "
            "predecessors, row 1 their successors."
        )


def _check_numbers(gate: Tensor, edges: Tensor) -> None:
    """Refuse unknown group numbers, and pairs given twice (their variance would count twice)."""
    num_groups = gate.shape[0]
    known = f"there are {num_groups} groups, numbered from 0: correct the number."
    stray = ((gate < -1) | (gate >= num_groups)).nonzero().flatten()
    if stray.numel():
        group = int(stray[0])
        raise GroupingError(f"the gate of group {group} is the unknown group {int(gate[group])}, but {known}")
    stray = ((edges < 0) | (edges >= num_groups)).any(dim=0).nonzero().flatten()
    if stray.numel():
        before, after = edges[:, int(stray[0])].tolist()
        raise GroupingError(f"the edge {before} -> {after} names an unknown group, but {known}")
    pairs, counts = torch.unique(edges[0] * max(num_groups, 1) + edges[1], return_counts=True)
    if bool((counts > 1).any()):
        pair = int(pairs[counts > 1][0])
        raise GroupingError(
            f"the edge {pair // num_groups} -> {pair % num_groups} is given more than once, which would "
            "count its variance twice: give each pair once."
        )


def _check_acyclic(gate: Tensor, edges: Tensor) -> None:
    gated = (gate >= 0).nonzero().flatten()
    before = torch.cat([edges[0], gate[gated]])
    after = torch.cat([edges[1], gated])
    behind = _peel(gate.shape[0], before, after)
    if bool(behind.any()):
        # What merely follows a cycle cannot be peeled either, so peel from the other end too.
        cycle = behind & _peel(gate.shape[0], after, before)
        names = ", ".join(str(group) for group in cycle.nonzero().flatten()[:8].tolist())
        raise GroupingError(
            f"expected a hierarchy without cycles, but these groups wait for each other: {names}: remove a "
            "gate or an edge between them."
        )


def _peel(num_groups: int, before: Tensor, after: Tensor) -> Tensor:
    """Remove, round by round, the groups that need nobody who is left; bool ``[G]``: what cannot be."""
    left = torch.ones(num_groups, dtype=torch.bool, device=before.device)
    while True:
        waiting = torch.zeros_like(left)
        waiting[after] = True
        if torch.equal(waiting, left):
            return left
        left = waiting
        kept = left[before]
        before, after = before[kept], after[kept]
