"""Search spaces: the shipped ones have the published sizes, data read back to equals, and mistakes are named."""

from __future__ import annotations

import math

import pytest

from sparsebayes.errors import RecipeError
from sparsebayes.nas import SPACES, find_space, read_space
from sparsebayes.nas.spaces import CellSpec, Decision, Edge, Space

OPS = ("skip_connect", "nor_conv_3x3")


def test_darts_has_two_cells_of_14_edges_and_7_operations_each():
    space = SPACES["darts"]
    assert [cell.name for cell in space.cells] == ["normal", "reduction"]
    for cell in space.cells:
        assert (cell.num_inputs, cell.num_nodes, len(cell.edges), cell.num_ops) == (2, 6, 14, 98)
        assert cell.outputs == (2, 3, 4, 5)


def test_nas_bench_201_has_15625_cells_with_none():
    (cell,) = SPACES["nas_bench_201"].cells
    assert math.prod(len(edge.ops) + 1 for edge in cell.edges) == 15_625


def test_the_second_one_shot_space_has_29160_cells():
    (cell,) = SPACES["nas_bench_1shot1_s2"].cells
    keep = dict(cell.keep)
    into = {node: sum(edge.target == node for edge in cell.edges) for node in keep}
    operations = math.prod(len(edge.ops) for edge in cell.edges if edge.target not in keep)
    assert operations * math.prod(math.comb(into[node], keep[node]) for node in keep) == 29_160


@pytest.mark.parametrize("name", ["nas_bench_1shot1_s1", "nas_bench_1shot1_s2", "nas_bench_1shot1_s3"])
def test_one_shot_cells_keep_nine_edges_as_the_benchmark_allows(name):
    (cell,) = SPACES[name].cells
    assert sum(number for _, number in cell.keep) == 9


@pytest.mark.parametrize("name", sorted(SPACES))
def test_data_read_back_to_an_equal_space(name):
    assert read_space(SPACES[name].to_dict()) == SPACES[name]
    assert find_space(SPACES[name].to_dict()) == find_space(name)


def test_a_space_may_be_written_in_short():
    space = read_space(
        {
            "name": "mine",
            "reduction": "max_pool",
            "cells": [
                {
                    "name": "a",
                    "num_inputs": 1,
                    "num_nodes": 3,
                    "edges": [[0, 1, list(OPS)], [1, 2, list(OPS)]],
                }
            ],
        }
    )
    assert space.cells[0].edges == (Edge(0, 1, OPS), Edge(1, 2, OPS))
    assert space.decision == Decision()


def cell(*edges: tuple[int, int], nodes: int = 3, ops: tuple[str, ...] = OPS, **fields: object) -> CellSpec:
    return CellSpec("a", 1, nodes, tuple(Edge(*edge, ops) for edge in edges), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: cell((0, 1), (2, 1)), "edge 2 -> 1 points back, which can close a cycle"),
        (lambda: cell((0, 1), (1, 1)), "edge 1 -> 1 points back"),
        (lambda: cell((0, 1), (1, 5)), "edge 1 -> 5 leaves the nodes 0 to 2"),
        (lambda: cell((0, 1)), "node 2 is reached by no edge"),
        (lambda: cell((0, 1), (0, 2)), "node 1 reaches no output"),
        (lambda: cell((0, 1), (1, 2), (1, 2)), "edge 1 -> 2 is there twice"),
        (lambda: cell((0, 1), (1, 2), ops=("skip",)), "unknown operation 'skip'"),
        (lambda: cell((0, 1), (1, 2), ops=()), "needs at least one operation"),
        (lambda: cell((0, 1), (1, 2), nodes=1), "expected at least one input and at most 64 nodes"),
        (lambda: cell((0, 1), (1, 2), output="sum"), "unknown output 'sum'"),
        (lambda: cell((0, 1), (1, 2), read=(0,)), "which are no inner nodes"),
        (lambda: cell((0, 1), (1, 2), keep=((2, 2),)), "node 2 has 1 incoming edges, so it cannot keep 2"),
        (lambda: CellSpec("a", 2, 3, (Edge(0, 1, OPS),)), "ends in an input"),
        (lambda: Decision(top_k_edges=0), "top_k_edges of at least 1"),
        (lambda: Decision(top_k_edges=1.5), "top_k_edges of at least 1, got 1.5"),
        (lambda: find_space("drats"), "unknown search space 'drats'; did you mean 'darts'"),
        (lambda: read_space({"name": "a"}), "expected the cells of the space as a list, got None"),
        (lambda: read_space({"nme": "a"}), "unknown key of a space 'nme'; did you mean 'name'"),
        (lambda: read_space({"name": "a", "cells": [{"name": "b"}]}), "edges of the cell as a list"),
        (
            lambda: read_space({"name": "a", "cells": [{"edges": [[0, 1, list(OPS)]]}]}),
            "whole cell, but it lacks name, num_inputs, num_nodes",
        ),
        (
            lambda: read_space({"name": "a", "cells": [{"name": "b", "num_inputs": "1", "edges": []}]}),
            "expected num_inputs of the cell as int, got '1'",
        ),
        (
            lambda: read_space({**SPACES["nas_bench_201"].to_dict(), "reduction": "cell"}),
            "reduction 'cell' takes 2 kinds of cells, got",
        ),
        (
            lambda: read_space({**SPACES["darts"].to_dict(), "project": False}),
            "several inputs need project: true",
        ),
    ],
)
def test_mistakes_are_named_in_one_sentence(make, says):
    with pytest.raises(RecipeError, match=says) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"keep": ["abc"]}, "expected the pairs in keep of the cell as a list, got 'abc'"),
        ({"keep": [[1, "a"]]}, "expected the pairs in keep of the cell as whole numbers"),
        ({"keep": [[1]]}, r"expected keep of the cell as pairs \[node, number\], got \[\[1\]\]"),
        ({"keep": 3}, "expected the keep of the cell as a list, got 3"),
        ({"read": [[1]]}, "expected the nodes that the cell's output reads as whole numbers"),
    ],
)
def test_lists_of_a_cell_are_lists_of_numbers(fields, says):
    edge = [0, 1, ["skip_connect"]]
    data = {"name": "b", "num_inputs": 1, "num_nodes": 2, "edges": [edge], **fields}
    with pytest.raises(RecipeError, match=says):
        read_space({"name": "a", "reduction": "stride", "cells": [data]})


def test_a_cell_is_found_by_its_name():
    assert SPACES["darts"].cell("reduction").name == "reduction"
    with pytest.raises(RecipeError, match="unknown cell 'reduce'; did you mean 'reduction'"):
        SPACES["darts"].cell("reduce")


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a b", "1st", ".hidden", "x" * 65])
def test_a_name_that_no_file_should_have_is_refused(name):
    with pytest.raises(
        RecipeError, match="letters, digits, _ and -, a letter first; files are named after it"
    ):
        CellSpec(name, 1, 2, (Edge(0, 1, ("skip_connect",)),))


def test_names_of_cells_that_are_not_shared_leave_room_for_their_number():
    cells = tuple(CellSpec(name, 1, 2, (Edge(0, 1, ("skip_connect",)),)) for name in ("cell", "cell1"))
    with pytest.raises(RecipeError, match="names must not end in digits"):
        Space("two", cells, shared=False, reduction="cell")
    assert Space("two", cells, reduction="cell").cell("cell1") is cells[1]
