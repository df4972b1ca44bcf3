"""Pictures of cells: well-formed, every operation on them, thicker where it is worth more."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from sparsebayes.errors import RecipeError
from sparsebayes.nas import Genotype
from sparsebayes.nas.draw import THICK, THIN, draw_cell
from sparsebayes.nas.spaces import CellSpec, Edge, Space

GENOTYPE = Genotype(
    "nas_bench_201", {"normal": ((0, 1, "nor_conv_3x3"), (0, 1, "skip_connect"), (1, 3, "nor_conv_1x1"))}
)


def test_a_picture_shows_every_operation_and_node():
    root = ElementTree.fromstring(draw_cell(GENOTYPE, "normal"))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert [t for t in texts if t and "con" in t] == ["nor conv 3x3", "skip connect", "nor conv 1x1"]
    assert len([e for e in root.iter() if e.tag.endswith("circle")]) == 4
    assert len([e for e in root.iter() if e.tag.endswith("path")]) == 3


def test_a_cell_without_operations_shows_its_nodes():
    root = ElementTree.fromstring(draw_cell(Genotype("nas_bench_201", {"normal": ()}), "normal"))
    assert len([e for e in root.iter() if e.tag.endswith("circle")]) == 4
    assert not [e for e in root.iter() if e.tag.endswith("path")]


def test_lines_are_as_thick_as_their_operations_are_worth():
    worth = {(0, 1, "nor_conv_3x3"): 100.0, (0, 1, "skip_connect"): 10.0, (1, 3, "nor_conv_1x1"): 1.0}
    picture = draw_cell(GENOTYPE, "normal", worth)
    widths = [float(w) for w in re.findall(r'stroke-width="([\d.]+)"', picture)]
    assert widths == [THICK, (THICK + THIN) / 2, THIN]


def test_a_cell_whose_name_begins_like_another_is_drawn_as_itself():
    edges = (Edge(0, 1, ("skip_connect",)),)
    far = (*edges, Edge(1, 2, ("skip_connect",)), Edge(2, 3, ("skip_connect",)))
    cells = (CellSpec("cell", 1, 2, edges), CellSpec("cell_b", 1, 4, far))
    genotype = Genotype(
        Space("two", cells, reduction="cell").to_dict(),
        {"cell": ((0, 1, "skip_connect"),), "cell_b": tuple((n, n + 1, "skip_connect") for n in range(3))},
    )
    for key, nodes in (("cell", 2), ("cell_b", 4)):
        root = ElementTree.fromstring(draw_cell(genotype, key))
        assert len([e for e in root.iter() if e.tag.endswith("circle")]) == nodes


def test_a_cell_that_is_not_there_is_named():
    with pytest.raises(RecipeError, match="unknown cell of the genotype 'reduction'"):
        draw_cell(GENOTYPE, "reduction")
