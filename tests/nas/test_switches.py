"""The table of switches: layout, gates, groups over repeated cells, and the hierarchy of eqs. 6 and 8."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from sparsebayes.nas import SPACES
from sparsebayes.nas.switches import PARAMETER, Switch, SwitchTable, cell_keys
from tests.nas.conftest import spaces


def test_groups_span_the_cells_of_a_kind_where_they_are_shared():
    table = SwitchTable.of(SPACES["darts"], depth=2)
    assert [key for key, _ in table.cells] == [
        *("normal", "normal", "reduction", "normal", "normal", "reduction", "normal", "normal")
    ]
    assert table.num_switches == 8 * (98 + 14)
    assert table.num_groups == 2 * (98 + 14)
    assert torch.bincount(table.group).unique().tolist() == [2, 6]


def test_every_cell_has_its_own_groups_where_they_are_not_shared():
    table = SwitchTable.of(SPACES["tree"], depth=2)
    assert table.num_groups == table.num_switches
    assert [key for key, _ in table.cells] == [f"tree{number}" for number in range(6)]


def test_the_published_proxy_depths():
    """8 cells in search and 20 in evaluation, two of them reductions (BayesNAS and DARTS)."""
    assert [key for key, _ in cell_keys(SPACES["darts"], 2)].count("reduction") == 2
    assert len(cell_keys(SPACES["darts"], 2)) == 8
    assert len(cell_keys(SPACES["darts"], 6)) == 20
    assert len(cell_keys(SPACES["nas_bench_201"], 5)) == 15


@given(spaces())
def test_effective_factors_are_switch_times_gate(space):
    table = SwitchTable.of(space, depth=1)
    values = torch.rand(table.num_switches, dtype=torch.float64)
    factors = table.effective(values)
    for (_, spec), ops, gates in zip(table.cells, table.op_slices, table.gate_slices, strict=True):
        own, gate = values[ops], values[gates]
        for position, (edge, _) in enumerate(spec.places()):
            expected = own[position] * (gate[edge] if space.gates else 1.0)
            assert factors[ops][position] == expected
    rows = torch.stack([values, 2 * values])
    assert torch.equal(table.effective(rows)[0], factors)


@given(spaces())
def test_prior_variances_are_those_of_the_papers_equations(space):
    """Eq. 8 (eq. 6 without gates) written out as loops over edges and operations."""
    table = SwitchTable.of(space, depth=1)
    own = torch.rand(table.num_groups, dtype=torch.float64) + 0.1
    s = dict(zip(table.groups, own.tolist(), strict=True))
    gamma = dict(zip(table.groups, table.hierarchy().combine(own).tolist(), strict=True))
    for key, spec in dict(table.cells).items():
        for number, edge in enumerate(spec.edges):
            into = [(n, e) for n, e in enumerate(spec.edges) if e.target == edge.source]
            for op in edge.ops:
                inverse = 1 / s[Switch(key, number, op)]
                if space.gates:
                    inverse += 1 / s[Switch(key, number, None)]
                if into:
                    inverse += 1 / sum(s[Switch(key, n, o)] for n, e in into for o in e.ops)
                assert gamma[Switch(key, number, op)] == pytest.approx(1 / inverse, rel=1e-12)


@given(spaces())
def test_sums_and_norms_are_those_of_the_grouping(space):
    table = SwitchTable.of(space, depth=1)
    values = torch.randn(table.num_switches, dtype=torch.float64)
    grouping = table.grouping()
    assert grouping.num_groups == table.num_groups
    assert torch.allclose(table.sum_groups(values), grouping.reduce({PARAMETER: values}))
    counts = torch.bincount(table.group)
    expected = (grouping.reduce({PARAMETER: values.square()}) / counts).sqrt()
    assert torch.allclose(table.norms(values), expected)


@pytest.mark.parametrize("name", ["darts", "nas_bench_201"])
def test_a_softmax_is_over_the_operations_of_each_edge(name):
    table = SwitchTable.of(SPACES[name], depth=2)
    generator = torch.Generator().manual_seed(0)
    # Logits so far apart that those of one edge would vanish beside those of another.
    logits = 300 * torch.randn(table.num_groups, generator=generator, dtype=torch.float64)
    edges: dict[tuple[str, int], list[int]] = {}
    for number, switch in enumerate(table.groups):
        edges.setdefault((switch.key, switch.edge), []).append(number)
    expected = torch.ones_like(logits)
    for numbers in edges.values():
        ops = [number for number in numbers if table.groups[number].op is not None]
        expected[ops] = torch.softmax(logits[ops], 0)
    torch.testing.assert_close(table.softmax(logits), expected)
    small = (logits / 300).requires_grad_()
    assert torch.autograd.gradcheck(table.softmax, (small,))


def test_what_stands_beside_a_group_that_goes():
    table = SwitchTable.of(SPACES["darts"], depth=1)
    spec = table.cells[0][1]
    on = torch.ones(table.num_groups, dtype=torch.bool)
    on[0] = False
    beside = table.beside(on)
    for g, switch in enumerate(table.groups):
        for h, other in enumerate(table.groups):
            same_node = (
                switch.key == other.key and spec.edges[switch.edge].target == spec.edges[other.edge].target
            )
            goes_along = switch.op is None and switch.edge == other.edge
            expected = same_node and h not in (0, g) and other.op is not None and not goes_along
            assert bool(beside[g, h]) == expected
