"""The table of NAS-Bench-201: whole, as published, and cells it does not have are named."""

from __future__ import annotations

import gzip
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsebayes.errors import DataError, RecipeError
from sparsebayes.nas import SPACES, Genotype
from sparsebayes.nas.tabular import EMBEDDED, BenchTable, cell_of, cell_string

SOME = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"


@pytest.fixture(scope="module")
def table() -> BenchTable:
    return BenchTable.embedded()


def test_the_table_is_the_whole_space_with_the_published_best_values(table):
    assert len(table.position) == 15_625
    best = [max(table.columns[name]) for name in ("c10_test_200", "c100_test_200", "in16_test_200")]
    assert best == [94.37, 73.51, 47.31]
    assert EMBEDDED.stat().st_size <= 700_000
    nothing = table.position["|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"]
    assert table.columns["c10_test_200"][nothing] == pytest.approx(10, abs=0.1)


def test_the_best_cell_ranks_first(table):
    values = table.columns["c10_test_200"]
    cell = next(cell for cell, at in table.position.items() if values[at] == 94.37)
    judged = table.look_up(Genotype("nas_bench_201", {"normal": cell_of(cell)}))
    assert judged.cell == cell
    assert judged.ranks["c10_test_200"] == 1
    assert judged.accuracies["c10_test_200"] == 94.37
    assert judged.num_cells == 15_625


@given(
    st.lists(
        st.sampled_from([*SPACES["nas_bench_201"].cells[0].edges[0].ops, "none"]), min_size=6, max_size=6
    )
)
def test_strings_there_and_back(ops):
    pairs = [(edge.source, edge.target) for edge in SPACES["nas_bench_201"].cells[0].edges]
    cell = tuple((s, t, op) for (s, t), op in zip(pairs, ops, strict=True) if op != "none")
    text = cell_string(Genotype("nas_bench_201", {"normal": cell}))
    assert set(cell_of(text)) == set(cell)


def test_what_no_table_holds_is_named(table, tmp_path):
    two = Genotype("nas_bench_201", {"normal": ((0, 3, "skip_connect"), (0, 3, "nor_conv_3x3"))})
    with pytest.raises(RecipeError, match="edge 0 -> 3 has several operations"):
        table.look_up(two)
    with pytest.raises(RecipeError, match="got one of 'chain'"):
        table.look_up(Genotype("chain", {"block0": ((0, 1, "skip_connect"),)}))
    with pytest.raises(RecipeError, match="expected a cell such as"):
        cell_of("nor_conv")
    path = tmp_path / "table.csv.gz"
    path.write_bytes(gzip.compress(b"arch,accuracy\n|none~0|,10\n"))
    with pytest.raises(DataError, match=r"the table of 1 cells has no cell .nor_conv_3x3~0"):
        BenchTable.read(path).look_up(Genotype("nas_bench_201", {"normal": cell_of(SOME)}))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        gzip.compress(b"a,b\n1,2\n", mtime=0),
        gzip.compress(b"arch,a\nx,y\n", mtime=0),
        gzip.compress(b"arch,a\nx,nan\n", mtime=0),
        gzip.compress(b"arch,a\nx,1\nx,2\n", mtime=0),
        gzip.compress(b"arch,a\n" + b"x" * 200_000 + b",1\n", mtime=0),
    ],
)
def test_a_file_that_is_no_table_is_refused(content, tmp_path):
    path = tmp_path / "table.csv.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="expected a table of cells at"):
        BenchTable.read(path)
    with pytest.raises(DataError, match="FileNotFoundError"):
        BenchTable.read(tmp_path / "absent.csv.gz")


def test_ranks_count_what_is_better(table):
    values = table.columns["c100_test_200"]
    judged = table.look_up(Genotype("nas_bench_201", {"normal": cell_of(next(iter(table.position)))}))
    assert judged.ranks["c100_test_200"] == 1 + sum(v > values[0] for v in values)
    assert math.isfinite(values[0])
