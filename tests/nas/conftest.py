"""Small search spaces, and random ones for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from sparsebayes.nas.spaces import CellSpec, Edge, Space

OPS = ("skip_connect", "nor_conv_3x3", "avg_pool_3x3")


@st.composite
def cells(draw: st.DrawFn, name: str = "cell") -> CellSpec:
    """Random cells of 1 or 2 inputs and up to 5 inner nodes, in which every node is reached and read."""
    num_inputs = draw(st.integers(1, 2))
    num_nodes = num_inputs + draw(st.integers(1, 5))
    pairs = {(i, j) for j in range(num_inputs, num_nodes) for i in range(j)}
    wanted = draw(st.sets(st.sampled_from(sorted(pairs)), max_size=8))
    # A chain through the inner nodes from the last input keeps all of them reached and read.
    chain = {(node - 1, node) for node in range(num_inputs, num_nodes)}
    edges = sorted(wanted | chain)
    ops = st.lists(st.sampled_from(OPS), min_size=1, max_size=3, unique=True)
    output = draw(st.sampled_from(["concat", "last"]))
    return CellSpec(
        name, num_inputs, num_nodes, tuple(Edge(i, j, tuple(draw(ops))) for i, j in edges), output
    )


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Random spaces of one kind of cell, with and without gates."""
    cell = draw(cells())
    gates = draw(st.booleans())
    return Space(
        "random", (cell,), shared=draw(st.booleans()), gates=gates, reduction="max_pool", project=True
    )
