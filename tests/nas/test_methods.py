"""Methods: the group lasso's proximal step, evidence in nats, the softmax of DARTS, and states that resume."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsebayes.errors import RunError
from sparsebayes.nas import SPACES
from sparsebayes.nas.methods import DartsSearch, LaplaceSearch, MagnitudeSearch, Options
from sparsebayes.nas.rows import switch_matrix
from sparsebayes.nas.switches import SwitchTable

TABLE = SwitchTable.of(SPACES["darts"], depth=1)


def options(**changes: object) -> Options:
    return Options(**{"num_data": 500, "strength": 1.0, **changes})  # type: ignore[arg-type]


def planted(evidence: Tensor) -> Tensor:
    """Rows `[N, 1, G]` whose matrix for 500 images has this diagonal, and nothing beside it."""
    return torch.diag((evidence * len(evidence) / 500).sqrt())[:, None, :]


def test_a_group_stays_iff_it_is_worth_more_than_the_strength():
    generator = torch.Generator().manual_seed(0)
    evidence = 40 * torch.rand(TABLE.num_groups, generator=generator, dtype=torch.float64)
    switches = 0.2 + torch.rand(TABLE.num_switches, generator=generator)
    method = LaplaceSearch(TABLE, options(strength=20.0))
    method.update_(switches, lambda: planted(evidence))
    assert torch.allclose(method.scores(), evidence)
    assert torch.equal(method.keep(), TABLE.hierarchy().close(evidence > 20))


def test_the_scale_of_a_node_is_no_evidence():
    """Operations that all say the same are worth only what no common factor of the others makes up for."""
    table = SwitchTable.of(SPACES["nas_bench_201"], depth=1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 1, table.num_groups, generator=generator, dtype=torch.float64)
    method = LaplaceSearch(table, options(rescale=True))
    method.update_(torch.ones(table.num_switches), lambda: rows)
    matrix, nodes = switch_matrix(rows, 500), [min(into(s.edge)) for s in table.groups]
    expected = torch.zeros(table.num_groups, dtype=torch.float64)
    for group, switch in enumerate(table.groups):
        others = torch.tensor([s.edge in into(switch.edge) for s in table.groups]).double()
        others[group] = 0
        gone = -torch.nn.functional.one_hot(torch.tensor(group), table.num_groups).double()
        expected[group] = min(
            float((gone + t * others) @ matrix @ (gone + t * others))
            for t in torch.linspace(-1, 1, 20_001).tolist()
        )
    for node in (0, 1, 3):  # nothing makes up for the best of a node
        best = max((g for g in range(len(nodes)) if nodes[g] == node), key=lambda g: float(expected[g]))
        expected[best] = matrix[best, best]
    assert torch.allclose(method.scores(), expected, rtol=1e-6)
    plain = LaplaceSearch(table, options())
    plain.update_(torch.ones(table.num_switches), lambda: rows)
    assert torch.allclose(plain.scores(), matrix.diagonal())
    assert int((method.scores() < plain.scores()).sum()) == table.num_groups - 3


def into(edge: int) -> set[int]:
    """Edges of NAS-Bench-201 that enter the node that this one enters: 0-1; 0-2, 1-2; 0-3, 1-3, 2-3."""
    return next(edges for edges in ({0}, {1, 2}, {3, 4, 5}) if edge in edges)


def test_joint_evidence_counts_what_twins_hide():
    evidence = torch.full((TABLE.num_groups,), 4.0, dtype=torch.float64)
    rows = planted(evidence)
    rows[0, 0, 1] = rows[0, 0, 0]  # two operations that do the same
    rows[1, 0, 1] = 0
    method = LaplaceSearch(TABLE, options(joint=True, strength=6.0))
    method.update_(torch.ones(TABLE.num_switches), lambda: rows)
    assert method.scores()[:2].tolist() == pytest.approx([4.0, 12.0])
    assert not bool(method.keep()[2:].any())


def test_a_proximal_step_lowers_the_norm_of_a_group_and_stops_at_zero():
    method = LaplaceSearch(TABLE, options(num_data=10, strength=5.0, momentum=0.0))
    assert torch.equal(
        method.posterior.omega, torch.ones(TABLE.num_groups, dtype=torch.float64)
    )  # Algorithm 1 starts so
    switches = torch.randn(TABLE.num_switches, generator=torch.Generator().manual_seed(0))
    before = switches.clone()
    method.shrink_(switches, lr=0.3)
    for group in (0, 7, TABLE.num_groups - 1):
        members = TABLE.group == group
        z, count = before[members], int(members.sum())
        # argmin_x |x - z|^2 / 2 + lr T omega / N * |x| / sqrt(count), the last the root of the mean square.
        shrunk = z * max(0.0, 1 - 0.3 * 5 / 10 / count**0.5 / float(z.norm()))
        assert torch.allclose(switches[members], shrunk, atol=1e-6)
    method.shrink_(switches, lr=1e6)
    assert not bool(switches.any())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_loss_and_penalty_count_alike_under_momentum(momentum):
    """Where a constant slope of the loss is that of the penalty, switches rest: the slope T omega / (N c)."""
    method = LaplaceSearch(TABLE, options(num_data=10, strength=5.0, momentum=momentum, switch_lr=1e-5))
    switches = torch.nn.Parameter(torch.full((TABLE.num_switches,), 0.5, dtype=torch.float64))
    counts = torch.bincount(TABLE.group)[TABLE.group]
    optimizer = method.optimizer(switches)
    for _ in range(2000):
        switches.grad = -(5 / 10 / counts).double()
        optimizer.step()
        method.shrink_(switches, lr=1e-5)
    # Up to the steps that momentum takes to build up; the loss alone would move a lone switch by 0.1 with momentum.
    assert float((switches.detach() - 0.5).abs().max()) < 1e-3


def test_magnitude_is_switch_times_gate():
    method = MagnitudeSearch(TABLE, options())
    switches = torch.rand(TABLE.num_switches)
    with pytest.raises(RunError, match="at least one cycle"):
        method.scores()
    method.update_(switches, lambda: torch.empty(0))
    assert torch.allclose(method.scores(), TABLE.norms(TABLE.effective(switches)).double())
    assert bool(method.keep().all())


def test_darts_mixes_the_operations_of_an_edge_with_a_softmax():
    method = DartsSearch(TABLE, options())
    optimizer = method.optimizer(torch.nn.Parameter(torch.ones(TABLE.num_switches)))
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].copy_(torch.randn(TABLE.num_groups))
    alpha = method.state_dict()["alpha"]
    sample = method.sample(torch.ones(TABLE.num_switches), torch.Generator())
    edges = {(switch.key, switch.edge) for switch in TABLE.groups}
    for key, edge in edges:
        ops = [g for g, s in enumerate(TABLE.groups) if (s.key, s.edge) == (key, edge) and s.op is not None]
        assert torch.allclose(method.scores()[ops].float(), torch.softmax(alpha[ops], 0), atol=1e-6)
    assert torch.allclose(sample, method.scores().float()[TABLE.group])
    gates = torch.tensor([switch.op is None for switch in TABLE.groups])
    assert bool((method.scores()[gates] == 1).all())


@pytest.mark.parametrize("kind", [LaplaceSearch, MagnitudeSearch, DartsSearch])
def test_a_state_resumes(kind):
    switches = torch.rand(TABLE.num_switches)
    evidence = torch.rand(TABLE.num_groups, dtype=torch.float64)
    first, second = (kind(TABLE, options(joint=True)) for _ in range(2))
    for method in (first, second):
        method.optimizer(torch.nn.Parameter(switches.clone()))
    first.update_(switches, lambda: planted(evidence))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.scores(), second.scores())
    assert torch.equal(first.keep(), second.keep())
