"""The dependency graph of the HARD prior, against loops written from eqs. 6 and 8 of BayesNAS."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsebayes.errors import GroupingError
from sparsebayes.groups.hierarchy import Hierarchy


@st.composite
def dags(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    """Predecessors and gates of a random acyclic graph whose numbering is not a topological order."""
    num_groups = draw(st.integers(1, 9))
    label = draw(st.permutations(range(num_groups)))
    predecessors: list[list[int]] = [[] for _ in range(num_groups)]
    gate = [-1] * num_groups
    for rank in range(num_groups):
        earlier = st.integers(0, rank - 1) if rank else st.nothing()
        befores = draw(st.sets(earlier)) if rank else set()
        predecessors[label[rank]] = [label[before] for before in befores]
        if rank and draw(st.booleans()):
            gate[label[rank]] = label[draw(earlier)]
    return predecessors, gate


def harmonic(terms: Sequence[float]) -> float:
    """Inverse of the sum of inverses, 0 as soon as one term is 0."""
    return 0.0 if 0.0 in terms else 1.0 / sum(1.0 / term for term in terms)


def variance_of(group: int, own: list[float], predecessors: list[list[int]], gate: list[int]) -> float:
    """Eq. 8 for one group, eq. 6 if it has no gate; terms that do not exist are left out."""
    terms = [own[group]]
    if gate[group] >= 0:
        terms.append(own[gate[group]])
    if predecessors[group]:
        terms.append(math.fsum(own[before] for before in predecessors[group]))
    return harmonic(terms)


def reachable(group: int, on: list[bool], predecessors: list[list[int]], gate: list[int]) -> bool:
    """Whether a group is on, its gate is reachable, and one of its predecessors is, if it has any."""
    if not on[group] or (gate[group] >= 0 and not reachable(gate[group], on, predecessors, gate)):
        return False
    befores = predecessors[group]
    return not befores or any(reachable(before, on, predecessors, gate) for before in befores)


@settings(deadline=None)  # the first call of a torch op takes long
@given(dags(), st.data())
def test_combine_is_the_papers_equations(
    graph: tuple[list[list[int]], list[int]], data: st.DataObject
) -> None:
    predecessors, gate = graph
    variances = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
    own = data.draw(st.lists(variances, min_size=len(gate), max_size=len(gate)))
    combined = Hierarchy.build(predecessors=predecessors, gate=gate).combine(
        torch.tensor(own, dtype=torch.float64)
    )
    expected = [variance_of(group, own, predecessors, gate) for group in range(len(gate))]
    torch.testing.assert_close(combined, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@settings(deadline=None)  # the first call of a torch op takes long
@given(dags(), st.data())
def test_close_leaves_a_connected_graph_and_nothing_less(
    graph: tuple[list[list[int]], list[int]], data: st.DataObject
) -> None:
    predecessors, gate = graph
    on = data.draw(st.lists(st.booleans(), min_size=len(gate), max_size=len(gate)))
    hierarchy = Hierarchy.build(predecessors=predecessors, gate=gate)
    closed = hierarchy.close(torch.tensor(on))
    # Every survivor has what it needs among the survivors ...
    for group, alive in enumerate(closed.tolist()):
        if alive:
            assert gate[group] < 0 or closed[gate[group]]
            assert not predecessors[group] or any(closed[before] for before in predecessors[group])
    # ... nothing else was lost, and a second pass finds nothing more.
    assert closed.tolist() == [reachable(group, on, predecessors, gate) for group in range(len(gate))]
    assert torch.equal(hierarchy.close(closed), closed)


def test_a_gate_takes_its_groups_and_their_successors_along() -> None:
    # 0 is the gate of 1 and 2; 3 is read from 1 or 2; 4 is read from 3 or 5.
    hierarchy = Hierarchy.build(predecessors=[[], [], [], [1, 2], [3, 5], []], gate=[-1, 0, 0, -1, -1, -1])
    on = torch.tensor([False, True, True, True, True, True])
    assert hierarchy.close(on).tolist() == [False, False, False, False, True, True]
    on[5] = False
    assert not hierarchy.close(on).any()


def test_variance_zero_is_passed_on_without_nan() -> None:
    hierarchy = Hierarchy.build(predecessors=[[], [], [0, 1], []], gate=[-1, -1, -1, 2])
    for own, expected in (
        ([0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.5]),
        ([0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.5, 0.5]),
        ([1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    ):
        assert hierarchy.combine(torch.tensor(own)).tolist() == expected


def test_free_groups_keep_their_variance_to_the_last_bit() -> None:
    own = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hierarchy = Hierarchy.build(predecessors=[[]] * 50)
    assert torch.equal(hierarchy.combine(own), own)
    assert hierarchy.combine(own.float()).dtype == torch.float32
    assert hierarchy.close(own > 0.5).tolist() == (own > 0.5).tolist()


def test_a_long_chain_closes_to_its_end() -> None:
    hierarchy = Hierarchy.build(predecessors=[[], *([group] for group in range(299))])
    on = torch.ones(300, dtype=torch.bool)
    assert hierarchy.close(on).all()
    on[7] = False
    assert hierarchy.close(on).sum() == 7
    assert repr(hierarchy) == "Hierarchy(300 groups, 0 gated, 299 predecessor pairs)"


@pytest.mark.parametrize(
    ("predecessors", "gate", "message"),
    [
        ([[], [0, 3], [1], [2], [3]], None, r"these groups wait for each other: 1, 2, 3: remove"),
        ([[], [2], []], [-1, -1, 1], r"wait for each other: 1, 2: remove"),
        ([[0]], None, r"wait for each other: 0: remove"),
        ([[], []], [-1, 1], r"wait for each other: 1: remove"),
        ([[], [2]], None, r"the edge 2 -> 1 names an unknown group, but there are 2 groups"),
        ([[], [-1]], None, r"the edge -1 -> 1 names an unknown group, but there are 2 groups"),
        ([[], []], [-1, 5], r"the gate of group 1 is the unknown group 5, but there are 2 groups"),
        ([[], []], [-2, -1], r"the gate of group 0 is the unknown group -2, but there are 2 groups"),
        ([[], [0, 0]], None, r"the edge 0 -> 1 is given more than once"),
        ([[], []], [-1], r"one gate \(or -1\) for each of the 2 groups, got 1"),
    ],
)
def test_broken_graphs_are_refused(
    predecessors: list[list[int]], gate: list[int] | None, message: str
) -> None:
    with pytest.raises(GroupingError, match=message):
        Hierarchy.build(predecessors=predecessors, gate=gate)


def test_tensors_of_the_wrong_kind_are_refused() -> None:
    gate, edges = torch.full((3,), -1), torch.tensor([[0], [1]])
    with pytest.raises(GroupingError, match=r"the gates as int64 of shape \[G\], got float32 of shape \[3\]"):
        Hierarchy(gate.float(), edges)
    with pytest.raises(
        GroupingError, match=r"the gates as int64 of shape \[G\], got int64 of shape \[1, 3\]"
    ):
        Hierarchy(gate[None], edges)
    with pytest.raises(
        GroupingError, match=r"the edges as int64 of shape \[2, E\], got int64 of shape \[1, 2\]"
    ):
        Hierarchy(gate, edges.T)
    with pytest.raises(GroupingError, match=r"the edges as int64 of shape \[2, E\], got float32"):
        Hierarchy(gate, edges.float())
    hierarchy = Hierarchy(gate, edges)
    with pytest.raises(
        GroupingError, match=r"one floating variance for each of the 3 groups, got float32 of .* \[2\]"
    ):
        hierarchy.combine(torch.ones(2))
    with pytest.raises(GroupingError, match=r"one floating variance .* got int64 of shape \[3\]"):
        hierarchy.combine(torch.ones(3, dtype=torch.int64))
    with pytest.raises(GroupingError, match=r"one bool on/off value for each of the 3 groups, got float32"):
        hierarchy.close(torch.ones(3))
