"""Which units a mask kills, on hand-made graphs and against a path search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsebayes.errors import ModelError
from sparsebayes.groups.tracing import Slice, UnitGraph
from sparsebayes.prune.liveness import check_graph, kept_indices, living_units

SHAPES = {
    "1.weight": (3, 5),
    "1.bias": (3,),
    "2.weight": (4, 3),
    "2.bias": (4,),
    "3.weight": (2, 4),
    "3.bias": (2,),
}


def perceptron(zero_preserving: bool = True) -> UnitGraph:
    """5 inputs -> 3 units -> 4 units -> 2 outputs."""
    first, second = torch.arange(3), torch.arange(3, 7)
    return UnitGraph(
        slices=(
            Slice("1.weight", 0, first, False),
            Slice("1.bias", 0, first, False),
            Slice("2.weight", 1, first, True),
            Slice("2.weight", 0, second, False),
            Slice("2.bias", 0, second, False),
            Slice("3.weight", 1, second, True),
        ),
        layers=("1", "2"),
        layer_index=torch.tensor([0, 0, 0, 1, 1, 1, 1]),
        fixed=(),
        buffers=(),
        zero_preserving=torch.full((7,), zero_preserving),
    )


def full() -> dict[str, Tensor]:
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}


def dead(graph: UnitGraph, masks: dict[str, Tensor]) -> list[int]:
    return (~living_units(graph, masks, SHAPES)).nonzero().flatten().tolist()


def test_nothing_dies_without_masks() -> None:
    assert dead(perceptron(), {}) == dead(perceptron(), full()) == []


def test_a_unit_that_nobody_reads_dies() -> None:
    masks = full()
    masks["3.weight"][:, 1] = False
    assert dead(perceptron(), masks) == [4]


def test_death_travels_upstream() -> None:
    masks = full()
    masks["3.weight"][:, 1] = False  # unit 4 of layer 2 dies ...
    masks["2.weight"][:, 2] = torch.tensor([False, True, False, False])  # ... the only reader of unit 2
    assert dead(perceptron(), masks) == [2, 4]


def test_a_unit_of_zeros_dies_only_if_zero_is_read_as_zero() -> None:
    masks = full()
    masks["1.weight"][0] = False
    assert dead(perceptron(), masks) == []  # its bias lives on
    masks["1.bias"][0] = False
    assert dead(perceptron(), masks) == [0]
    assert dead(perceptron(zero_preserving=False), masks) == []


def test_death_travels_downstream() -> None:
    masks = full()
    masks["1.weight"][0], masks["1.bias"][0] = False, False  # unit 0 is zero ...
    masks["2.weight"][3, 1:], masks["2.bias"][3] = False, False  # ... and all that unit 6 reads
    assert dead(perceptron(), masks) == [0, 6]


def test_a_unit_without_readers_in_the_graph_stays() -> None:
    graph = perceptron()
    graph = UnitGraph(graph.slices[:-1], graph.layers, graph.layer_index, (), (), graph.zero_preserving)
    assert dead(graph, full()) == []


def test_repeated_columns_count_for_one_unit() -> None:
    graph = UnitGraph(
        slices=(
            Slice("1.weight", 0, torch.arange(3), False),
            Slice("2.weight", 1, torch.tensor([0, 0, 1, 1, 2, 2]), True),
        ),
        layers=("1",),
        layer_index=torch.zeros(3, dtype=torch.int64),
        fixed=(),
        buffers=(Slice("1.mean", 0, torch.arange(3), False),),
        zero_preserving=torch.ones(3, dtype=torch.bool),
    )
    shapes = {"1.weight": (3, 1, 2, 2), "2.weight": (2, 6), "1.mean": (3,)}
    masks = {"2.weight": torch.tensor([[True, False, False, False, False, False]] * 2)}
    check_graph(graph, shapes)
    alive = living_units(graph, masks, shapes)
    assert alive.tolist() == [True, False, False]
    kept = kept_indices(graph, alive)
    assert {name: {dim: index.tolist() for dim, index in dims.items()} for name, dims in kept.items()} == {
        "1.weight": {0: [0]},
        "2.weight": {1: [0, 1]},
        "1.mean": {0: [0]},
    }


@given(seed=st.integers(0, 2**20), density=st.sampled_from([0.2, 0.5, 0.8]), biases=st.booleans())
def test_equals_a_search_for_paths(seed: int, density: float, biases: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}
    if not biases:
        masks = {name: mask for name, mask in masks.items() if name.endswith("weight")}
    bias = {
        name: masks.get(f"{name}.bias", torch.ones(SHAPES[f"{name}.bias"], dtype=torch.bool)) for name in "12"
    }
    # Forward: does anything but 0 come out of the unit? Backward: is there a path from it to an output?
    lit1 = [bool(bias["1"][i]) or bool(masks["1.weight"][i].any()) for i in range(3)]
    lit2 = [
        bool(bias["2"][j]) or any(lit1[i] and bool(masks["2.weight"][j, i]) for i in range(3))
        for j in range(4)
    ]
    seen2 = [lit2[j] and bool(masks["3.weight"][:, j].any()) for j in range(4)]
    seen1 = [lit1[i] and any(seen2[j] and bool(masks["2.weight"][j, i]) for j in range(4)) for i in range(3)]
    assert living_units(perceptron(), masks, SHAPES).tolist() == seen1 + seen2


def test_graphs_of_other_networks_are_refused() -> None:
    check_graph(perceptron(), SHAPES)
    with pytest.raises(
        ModelError, match=r"3 entries along dimension 0 of '1.weight', but the model has \[2, 5\]; trace"
    ):
        check_graph(perceptron(), {**SHAPES, "1.weight": (2, 5)})
    with pytest.raises(ModelError, match=r"of '3.weight', but the model has no such tensor"):
        check_graph(perceptron(), {name: shape for name, shape in SHAPES.items() if name != "3.weight"})
    graph = perceptron()
    twice = (*graph.slices, Slice("1.bias", 0, torch.tensor([0, 2, 1]), False))
    with pytest.raises(ModelError, match=r"labels dimension 0 of '1.bias' twice and differently"):
        check_graph(UnitGraph(twice, graph.layers, graph.layer_index, (), (), graph.zero_preserving), SHAPES)
