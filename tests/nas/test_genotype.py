"""Genotypes: JSON there and back, and what does not belong to the space is refused."""

from __future__ import annotations

import json

import pytest

from sparsebayes.errors import RecipeError
from sparsebayes.nas import SPACES, Genotype
from sparsebayes.nas.spaces import Edge

CELL = ((0, 3, "skip_connect"), (0, 1, "nor_conv_3x3"), (1, 3, "nor_conv_1x1"), (0, 1, "avg_pool_3x3"))


def test_json_and_back():
    genotype = Genotype("nas_bench_201", {"normal": CELL})
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert genotype == Genotype("nas_bench_201", {"normal": CELL[::-1]})


def test_a_space_of_the_user_travels_with_its_genotype():
    space = {**SPACES["nas_bench_201"].to_dict(), "name": "mine"}
    genotype = Genotype(space, {"normal": CELL})
    again = Genotype.from_json(genotype.to_json())
    assert again.search_space.name == "mine"
    assert again == genotype


def test_edges_and_counts():
    genotype = Genotype("nas_bench_201", {"normal": CELL})
    assert genotype.num_ops == 4
    assert genotype.parameter_free_share == 0.5
    assert genotype.edges("normal") == (
        Edge(0, 1, ("avg_pool_3x3", "nor_conv_3x3")),
        Edge(0, 3, ("skip_connect",)),
        Edge(1, 3, ("nor_conv_1x1",)),
    )


def text(**changes: object) -> str:
    return json.dumps({**Genotype("nas_bench_201", {"normal": CELL}).to_dict(), **changes})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "expected a genotype as JSON, got other text"),
        ("[]", "expected a genotype with the keys version, space and cells"),
        (text(version=7), "expected a genotype of version 1, got 7"),
        (
            text(space="darts"),
            "edge 0 -> 3 in cell 'normal'|edge 0 -> 1 in cell 'normal', which the space 'darts'",
        ),
        (text(space="nasbench"), "unknown search space 'nasbench'"),
        (text(space=3), "expected a genotype's space as a name or a section"),
        (
            text(cells={"normal": [[0, 1, "conv"]]}),
            "unknown operation of edge 0 -> 1 in space 'nas_bench_201' 'conv'",
        ),
        (
            text(cells={"normal": [[0, 1]]}),
            r"expected an operation as \[source, target, name\], got \[0, 1\]",
        ),
        (text(cells={"normal": [[0, 1, "skip_connect"]] * 2}), "names an operation twice"),
        (text(cells={"normal": 3}), "expected the operations of cell 'normal' as a list"),
        (text(cells={"norml": []}), "unknown cell of space 'nas_bench_201' 'norml'; did you mean 'normal'"),
    ],
)
def test_what_is_no_genotype_of_the_space_is_refused(content, says):
    with pytest.raises(RecipeError, match=says) as caught:
        Genotype.from_json(content)
    assert "\n" not in str(caught.value)


def test_proxyless_cells_carry_their_number():
    Genotype("chain", {"block0": ((0, 1, "skip_connect"),), "block12": ((0, 1, "mbconv_3x3_e3"),)})
    with pytest.raises(RecipeError, match="unknown cell of space 'chain' 'block'; did you mean 'block0'"):
        Genotype("chain", {"block": ((0, 1, "skip_connect"),)})
