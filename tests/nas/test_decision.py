"""Decisions: what is derived is always connected, whatever is on, and benchmark rules are kept."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebayes.errors import NumericsError
from sparsebayes.nas import SPACES
from sparsebayes.nas.decision import best_architectures, connected, decide
from sparsebayes.nas.spaces import CellSpec, Decision, Edge, Space
from sparsebayes.nas.switches import SwitchTable
from tests.nas.conftest import cells, spaces


def on_a_path(spec: CellSpec, ops: set[tuple[int, str]]) -> set[tuple[int, str]]:
    """Brute force: operations that some path from an input to an output runs through."""
    found: set[tuple[int, str]] = set()

    def walk(node: int, path: list[tuple[int, str]]) -> None:
        if path and node in spec.outputs:
            found.update(path)
        for number, op in ops:
            if spec.edges[number].source == node:
                walk(spec.edges[number].target, [*path, (number, op)])

    for node in range(spec.num_inputs):
        walk(node, [])
    return found


@given(cells(), st.data())
def test_connected_is_what_lies_on_a_path(spec, data):
    ops = data.draw(st.sets(st.sampled_from(spec.places())))
    assert connected(spec, ops) == on_a_path(spec, ops)


@given(spaces(), st.data())
def test_a_derived_graph_is_always_connected_and_never_empty(space, data):
    table = SwitchTable.of(space, depth=1)
    bools = st.lists(st.booleans(), min_size=table.num_groups, max_size=table.num_groups)
    on = torch.tensor(data.draw(bools))
    scores = torch.rand(table.num_groups, dtype=torch.float64)
    decided = decide(space, table, on, scores)
    for key, spec in dict(table.cells).items():
        numbers = {(edge.source, edge.target): number for number, edge in enumerate(spec.edges)}
        ops = {(numbers[source, target], op) for source, target, op in decided.genotype.cells[key]}
        assert ops
        assert on_a_path(spec, ops) == ops
        flags = dict(zip(table.groups, on.tolist(), strict=True))
        if key not in decided.rescued:
            for group, flag in flags.items():
                if group.key == key and group.op is not None and (group.edge, group.op) in ops:
                    gate = [f for g, f in flags.items() if (g.key, g.edge, g.op) == (key, group.edge, None)]
                    assert flag
                    assert all(gate)


@given(spaces(), st.data())
def test_closing_the_hierarchy_first_changes_no_decision(space, data):
    table = SwitchTable.of(space, depth=1)
    bools = st.lists(st.booleans(), min_size=table.num_groups, max_size=table.num_groups)
    on = torch.tensor(data.draw(bools))
    scores = torch.rand(table.num_groups, dtype=torch.float64)
    closed = table.hierarchy().close(on)
    assert decide(space, table, closed, scores) == decide(space, table, on, scores)


def line(*ops: str) -> Space:
    """A cell of three nodes in a row and a bypass."""
    edges = tuple(Edge(i, j, ops) for i, j in ((0, 1), (0, 2), (1, 2)))
    return Space("line", (CellSpec("cell", 1, 3, edges),), gates=False)


def test_nothing_on_keeps_the_path_whose_weakest_operation_is_worth_most():
    space = line("skip_connect", "nor_conv_3x3")
    table = SwitchTable.of(space, depth=1)
    off = torch.zeros(6, dtype=torch.bool)
    # 0->1: 5, 4; 0->2: 3, 1; 1->2: 2, 6. Through node 1: min(5, 6) = 5; straight: 3.
    decided = decide(space, table, off, torch.tensor([5.0, 4, 3, 1, 2, 6]))
    assert decided.rescued == ("cell",)
    assert decided.genotype.cells["cell"] == ((0, 1, "skip_connect"), (1, 2, "nor_conv_3x3"))


def test_several_operations_on_an_edge_and_empty_edges_are_results():
    space = line("skip_connect", "nor_conv_3x3")
    table = SwitchTable.of(space, depth=1)
    on = torch.tensor([False, False, True, True, True, True])
    decided = decide(space, table, on, torch.ones(6))
    assert decided.genotype.cells["cell"] == ((0, 2, "nor_conv_3x3"), (0, 2, "skip_connect"))
    assert decided.rescued == ()


def test_one_operation_per_edge_and_the_best_edges():
    space = line("skip_connect", "nor_conv_3x3")
    table = SwitchTable.of(space, depth=1)
    on, scores = torch.ones(6, dtype=torch.bool), torch.tensor([1.0, 2, 9, 3, 5, 4])
    one = decide(space, table, on, scores, Decision(one_op_per_edge=True)).genotype.cells["cell"]
    assert one == ((0, 1, "nor_conv_3x3"), (0, 2, "skip_connect"), (1, 2, "skip_connect"))
    best = decide(space, table, on, scores, Decision(one_op_per_edge=True, top_k_edges=1))
    assert best.genotype.cells["cell"] == ((0, 2, "skip_connect"),)


@given(st.lists(st.floats(0, 1), min_size=27, max_size=27))
def test_a_one_shot_cell_never_keeps_more_inputs_than_the_benchmark(values):
    space = SPACES["nas_bench_1shot1_s1"]
    table = SwitchTable.of(space, depth=1)
    off = torch.zeros(table.num_groups, dtype=torch.bool)
    ops = decide(space, table, off | True, torch.tensor(values)).genotype.cells["normal"]
    for node, number in space.cells[0].keep:
        assert sum(target == node for _, target, _ in ops) in (0, number)
    for edge in space.cells[0].edges:
        assert sum((s, t) == (edge.source, edge.target) for s, t, _ in ops) <= 1


def test_scores_that_are_no_numbers_are_refused():
    space = line("skip_connect")
    table = SwitchTable.of(space, depth=1)
    with pytest.raises(NumericsError, match="finite scores"):
        decide(space, table, torch.ones(3, dtype=torch.bool), torch.tensor([1.0, float("nan"), 0.0]))


@pytest.mark.parametrize("seed", range(5))
def test_the_best_architectures_are_those_of_the_highest_sums_of_scores(seed):
    """Against all of them: on every edge one of the operations that are on, or none."""
    ops = ("skip_connect", "nor_conv_3x3", "avg_pool_3x3")
    spec = CellSpec("cell", 1, 3, (Edge(0, 1, ops), Edge(0, 2, ops), Edge(1, 2, ops)))
    space = Space("small", (spec,), gates=False, decision=Decision(one_op_per_edge=True))
    table = SwitchTable.of(space, depth=1)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(table.num_groups, generator=generator, dtype=torch.float64)
    on = torch.ones(table.num_groups, dtype=torch.bool)
    on[torch.randint(table.num_groups, (1,), generator=generator)] = False
    number = {(group.edge, group.op): n for n, group in enumerate(table.groups)}
    sums: dict[str, float] = {}
    for choice in product(*[(*edge.ops, None) for edge in spec.edges]):
        members = [number[edge, op] for edge, op in enumerate(choice) if op is not None]
        alone = torch.zeros_like(on)
        alone[members] = True
        decided = decide(space, table, alone & on, scores)
        if not decided.rescued:
            places = [(spec.edges[edge].source, spec.edges[edge].target) for edge in range(3)]
            used = [number[places.index((s, t)), op] for s, t, op in decided.genotype.cells["cell"]]
            sums[decided.genotype.to_json()] = float(scores[used].sum())
    found = best_architectures(space, table, on, scores, 8)
    assert found[0] == decide(space, table, on, scores)
    assert [sums[one.genotype.to_json()] for one in found] == pytest.approx(
        sorted(sums.values(), reverse=True)[:8]
    )
    every = best_architectures(space, table, on, scores, 1000)
    assert {one.genotype.to_json() for one in every} == set(sums)


def test_an_architecture_whose_only_path_goes_is_not_among_the_best():
    space = Space(
        "one", (CellSpec("cell", 1, 2, (Edge(0, 1, ("skip_connect", "nor_conv_3x3")),)),), gates=False
    )
    table = SwitchTable.of(space, depth=1)
    on, scores = torch.ones(2, dtype=torch.bool), torch.tensor([1.0, 3.0], dtype=torch.float64)
    ops = [
        {op for _, _, op in one.genotype.cells["cell"]}
        for one in best_architectures(space, table, on, scores, 9)
    ]
    assert ops == [{"skip_connect", "nor_conv_3x3"}, {"nor_conv_3x3"}, {"skip_connect"}]
    nothing = torch.zeros(2, dtype=torch.bool)
    (rescued,) = best_architectures(space, table, nothing, scores, 9)
    assert rescued.rescued == ("cell",)
