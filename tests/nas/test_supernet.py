"""Supernets: what a switch does, rows of switches for each image, recomputed activations, operations that are off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsebayes.errors import ModelError
from sparsebayes.nas import SPACES, Shape, Supernet
from sparsebayes.nas.switches import Switch

SHAPE = Shape(width=4, depth=1)


def images(number: int = 6) -> Tensor:
    return torch.randn(number, 3, 16, 16)


def warm(supernet: Supernet) -> Supernet:
    """The supernet with running statistics of some images."""
    with torch.no_grad():
        for _ in range(3):
            supernet.train()(images(16))
    return supernet


@pytest.mark.parametrize("name", sorted(SPACES))
def test_every_space_makes_a_network_with_a_gradient_for_every_switch(name):
    supernet = Supernet(SPACES[name], SHAPE, initial=0.5)
    logits = supernet(images())
    assert logits.shape == (6, 10)
    logits.square().sum().backward()
    assert bool((supernet.switches.grad != 0).all())


def test_a_node_is_the_sum_of_its_operations_times_switch_and_gate():
    supernet = Supernet(SPACES["tree"], SHAPE).eval()
    cell = supernet.network.cells[0]
    with torch.no_grad():
        supernet.switches.copy_(torch.randn_like(supernet.switches))
        x = torch.randn(2, supernet.network.stem[0].out_channels, 8, 8)
        spans = supernet.table.op_slices[0], supernet.table.gate_slices[0]
        own, gates = (supernet.switches[span] for span in spans)
        factors = supernet.table.effective(supernet.switches)[spans[0]]
        nodes = {0: cell.inputs["0"](x)}
        for position, (number, op) in enumerate(cell.spec.places()):
            edge = cell.spec.edges[number]
            result = cell.edges[f"{edge.source}-{edge.target}"][op](nodes[edge.source])
            nodes[edge.target] = nodes.get(edge.target, 0) + gates[number] * own[position] * result
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, cell.out_channels - x.shape[1]))
        assert torch.allclose(cell([x], factors), nodes[4] + padded, atol=1e-5)


def test_one_row_of_switches_for_each_image_is_one_network_for_each_image():
    supernet = warm(Supernet(SPACES["nas_bench_201"], SHAPE)).eval()
    x, rows = images(3), torch.rand(3, supernet.table.num_switches)
    together = supernet(x, rows)
    single = torch.cat([supernet(x[n : n + 1], rows[n]) for n in range(3)])
    assert torch.allclose(together, single, atol=1e-4)


def test_switches_of_another_shape_are_refused():
    supernet = Supernet(SPACES["nas_bench_201"], SHAPE)
    with pytest.raises(ModelError, match=r"expected switches of shape \[72\] or \[6, 72\], got \[5\]"):
        supernet(images(), torch.ones(5))


@pytest.mark.parametrize("name", ["nas_bench_201", "chain"])
def test_recomputed_activations_change_neither_gradients_nor_statistics(name):
    torch.manual_seed(1)
    kept = Supernet(SPACES[name], SHAPE, initial=0.5)
    lean = Supernet(SPACES[name], SHAPE, initial=0.5, remember=False)
    lean.load_state_dict(kept.state_dict())
    x = images()
    results = []
    for supernet in (kept, lean):
        loss = supernet(x).logsumexp(1).sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in supernet.parameters()), *supernet.buffers()])
    for (name_of, mine), (_, other) in zip(kept.named_buffers(), lean.named_buffers(), strict=True):
        if not name_of.endswith("num_batches_tracked"):
            assert torch.allclose(mine, other, atol=1e-6), name_of
    for mine, other in zip(kept.parameters(), lean.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-3, atol=1e-4)


def test_a_switch_at_zero_and_an_operation_that_is_off_compute_the_same():
    supernet = warm(Supernet(SPACES["darts"], SHAPE, initial=0.3)).eval()
    table, x = supernet.table, images()
    on = torch.rand(table.num_groups, generator=torch.Generator().manual_seed(3)) > 0.4
    # A norm makes something even of a node that is zero: what reads a node without operations must be off, too.
    off = ~table.hierarchy().close(on)
    zeroed = torch.where(off[table.group], 0.0, supernet.switches.detach())
    expected = supernet(x, zeroed)
    calls: list[str] = []
    for name, module in supernet.network.named_modules():
        if name.endswith("sep_conv_5x5"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    supernet.switch_off_(off)
    assert torch.allclose(supernet(x), expected, atol=1e-5)
    alive = [
        s for s, gone in zip(table.groups, off.tolist(), strict=True) if s.op == "sep_conv_5x5" and not gone
    ]
    gated = [s for s in alive if not off[table.groups.index(Switch(s.key, s.edge, None))]]
    assert 0 < len(calls) <= sum(3 if s.key == "normal" else 2 for s in gated)


def test_what_is_off_stays_off_in_a_loaded_supernet():
    supernet = warm(Supernet(SPACES["nas_bench_201"], SHAPE)).eval()
    off = torch.zeros(24, dtype=torch.bool)
    off[:5] = True
    supernet.switch_off_(off)
    other = Supernet(SPACES["nas_bench_201"], SHAPE).eval()
    other.load_state_dict(supernet.state_dict())
    x = images()
    assert torch.equal(other(x), supernet(x))
    assert other.network.cells[0]._skip == frozenset(range(5))


def test_a_cell_cannot_lose_all_that_reaches_its_output():
    supernet = Supernet(SPACES["chain"], SHAPE)
    with pytest.raises(ModelError, match="reaches the output of cell 'block', got none"):
        supernet.switch_off_(torch.ones(supernet.table.num_groups, dtype=torch.bool))
