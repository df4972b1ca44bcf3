"""The shipped search spaces, as a table.

    >>> SPACES["nas_bench_201"]
    Space('nas_bench_201', cells normal: 6 edges, 24 operations)
    >>> SPACES["nas_bench_201"].cell("normal").edges[1]
    Edge(source=0, target=2, ops=('skip_connect', 'nor_conv_1x1', 'nor_conv_3x3', 'avg_pool_3x3'))

`darts` (Liu, Simonyan and Yang, ICLR 2019: cells of 7 nodes and 14 edges, normal and reduction);
`nas_bench_201` (Dong and Yang, ICLR 2020); `nas_bench_1shot1_s1` to `_s3` (Zela, Siems and Hutter, ICLR 2020: an
operation sits on a node, so a node is two nodes with the operation between them); `tree` (two-level trees of branches
in the blocks of a PyramidNet, after Cai et al., "Path-level network transformation", ICML 2018, and Han, Kim and Kim,
CVPR 2017); `chain` (one inverted bottleneck per block, Cai, Zhu and Han, "ProxylessNAS", ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsebayes.errors import RecipeError, unknown
from sparsebayes.nas.spaces import CellSpec, Decision, Edge, Space, read_space
from sparsebayes.user_code import call_function, load_function

__all__ = ["SPACES", "find_space"]


def find_space(reference: str | Mapping[str, Any]) -> Space:
    """A shipped space by its name, the user's own by "package.module:function", or one given as data.

    Args:
        reference: name, function without arguments that returns a `Space`, or the fields of one.

    Raises:
        RecipeError: unknown name, a function that is not found, fails or returns something else, or data that are no
            space.
    """
    if not isinstance(reference, str):
        return read_space(reference)
    if ":" in reference:
        function = load_function("search space", reference, RecipeError)
        space = call_function("search space", reference, function, {}, RecipeError)
        if not isinstance(space, Space):
            raise RecipeError(
                f"search space {reference!r} must return a sparsebayes.nas.Space, got {type(space).__name__}"
            )
        return space
    if reference not in SPACES:
        raise RecipeError(
            unknown("search space", reference, SPACES)
            + ", or your own as 'package.module:function' or as a section"
        )
    return SPACES[reference]


def _all_pairs(num_inputs: int, num_nodes: int, ops: Sequence[str]) -> tuple[Edge, ...]:
    """Every inner node reads every node before it."""
    return tuple(
        Edge(source, target, tuple(ops))
        for target in range(num_inputs, num_nodes)
        for source in range(target)
    )


_DARTS_OPS = (
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
)
_BENCH_201_OPS = ("skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
_BENCH_101_OPS = ("nor_conv_3x3", "nor_conv_1x1", "max_pool_3x3")
_TREE_OPS = ("sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7", "max_pool_3x3", "avg_pool_3x3", "skip_connect")
_CHAIN_OPS = (*(f"mbconv_{k}x{k}_e{e}" for k in (3, 5, 7) for e in (3, 6)), "skip_connect")


def _one_shot_cell(parents: Sequence[int]) -> CellSpec:
    """A cell whose operations sit on nodes: node j is a sum (2j - 1) and an operation's result (2j).

    Args:
        parents: for each choice block, and at last for the output, how many inputs it keeps.
    """
    edges, keep = [], []
    results = [0]
    for block, number in enumerate(parents[:-1], start=1):
        total, result = 2 * block - 1, 2 * block
        edges += [Edge(source, total, ("skip_connect",)) for source in results]
        edges.append(Edge(total, result, _BENCH_101_OPS))
        keep.append((total, number))
        results.append(result)
    output = 2 * len(parents) - 1
    edges += [Edge(source, output, ("skip_connect",)) for source in results]
    keep.append((output, parents[-1]))
    return CellSpec("normal", 1, output + 1, tuple(edges), keep=tuple(keep))


def _tree_cell(branches: int) -> CellSpec:
    """Two levels: the root's branches, and under each of them its leaves, which merge by a sum."""
    output = branches + 1
    edges = [Edge(0, branch, _TREE_OPS) for branch in range(1, output)]
    edges += [Edge(branch, output, _TREE_OPS) for branch in range(1, output)]
    return CellSpec("tree", 1, output + 1, tuple(edges))


_ONE_SHOT_PARENTS = {
    "nas_bench_1shot1_s1": (1, 2, 2, 2, 2),
    "nas_bench_1shot1_s2": (1, 1, 2, 2, 3),
    "nas_bench_1shot1_s3": (1, 1, 1, 2, 2, 2),
}

SPACES: dict[str, Space] = {
    space.name: space
    for space in (
        Space(
            "darts",
            tuple(
                CellSpec(name, 2, 6, _all_pairs(2, 6, _DARTS_OPS), output="concat")
                for name in ("normal", "reduction")
            ),
            reduction="cell",
            project=True,
            stem_multiplier=3,
        ),
        Space(
            "nas_bench_201",
            (CellSpec("normal", 1, 4, _all_pairs(1, 4, _BENCH_201_OPS)),),
            gates=False,
            decision=Decision(one_op_per_edge=True),
        ),
        *(
            Space(
                name,
                (_one_shot_cell(parents),),
                gates=False,
                reduction="max_pool",
                decision=Decision(one_op_per_edge=True),
            )
            for name, parents in _ONE_SHOT_PARENTS.items()
        ),
        Space(
            "tree",
            (_tree_cell(3),),
            shared=False,
            reduction="stride",
            widths="linear",
            project=True,
            residual=True,
        ),
        Space(
            "chain",
            (CellSpec("block", 1, 2, (Edge(0, 1, _CHAIN_OPS),)),),
            shared=False,
            reduction="stride",
            decision=Decision(one_op_per_edge=True),
        ),
    )
}
"""The shipped search spaces by name."""
