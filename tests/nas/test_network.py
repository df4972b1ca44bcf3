"""Derived networks: published sizes, the supernet's function when its weights are inherited, training helpers."""

from __future__ import annotations

import pytest
import torch

from sparsebayes.cost import cost
from sparsebayes.errors import ModelError, RecipeError
from sparsebayes.nas import SPACES, Genotype, Shape, Supernet, build_network, derived_network, inherit_
from sparsebayes.nas.decision import decide
from sparsebayes.nas.network import set_drop_path_
from sparsebayes.nas.tabular import BenchTable, cell_of


@pytest.mark.parametrize(
    "cell",
    [
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|",
        "|nor_conv_1x1~0|+|nor_conv_3x3~0|nor_conv_1x1~1|+|nor_conv_1x1~0|nor_conv_3x3~1|nor_conv_3x3~2|",
        "|none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2|",
    ],
)
def test_the_benchmark_network_has_the_parameters_that_the_benchmark_states(cell):
    genotype = Genotype("nas_bench_201", {"normal": cell_of(cell)})
    network = build_network(genotype, width=16, depth=5)
    table = BenchTable.embedded()
    stated = table.columns["params_cifar10"][table.position[cell]]
    assert sum(p.numel() for p in network.parameters()) == stated


def some(name: str, share: float, depth: int = 1) -> tuple[Supernet, Genotype, torch.Tensor]:
    """A supernet, a genotype of some of its operations, and its switches with those of the others at zero."""
    torch.manual_seed(2)
    supernet = Supernet(SPACES[name], Shape(width=4, depth=depth), initial=0.6)
    with torch.no_grad():
        for _ in range(3):
            supernet(torch.randn(16, 3, 16, 16))
        supernet.switches.mul_(1 + 0.2 * torch.randn_like(supernet.switches))
    table = supernet.table
    on = torch.rand(table.num_groups) < share
    genotype = decide(supernet.space, table, on, torch.rand(table.num_groups)).genotype
    kept = []
    specs = dict(table.cells)
    for switch in table.groups:
        edge = specs[switch.key].edges[switch.edge]
        kept.append(switch.op is None or (edge.source, edge.target, switch.op) in genotype.cells[switch.key])
    switches = supernet.switches.detach() * torch.tensor(kept)[table.group]
    return supernet.eval(), genotype, switches


@pytest.mark.parametrize(
    ("name", "share"), [*((name, 0.8) for name in sorted(SPACES)), ("darts", 0.15), ("tree", 0.3)]
)
def test_a_network_that_inherits_computes_what_the_supernet_computes(name, share):
    supernet, genotype, switches = some(name, share)
    network = build_network(genotype, width=4, depth=1).eval()
    inherit_(network, supernet.network, switches, supernet.table)
    x = torch.randn(4, 3, 16, 16)
    if (name, share) == ("darts", 0.15):
        assert any(len(cell.outputs) < 4 for cell in network.cells), "expected nodes without operations"
    assert torch.allclose(network(x), supernet(x, switches), atol=1e-4)


def test_weights_of_another_width_cannot_be_inherited():
    supernet, genotype, switches = some("nas_bench_201", share=1.0)
    with pytest.raises(ModelError, match="only be inherited at the width and depth of the search"):
        inherit_(build_network(genotype, width=6, depth=1), supernet.network, switches, supernet.table)


def test_a_node_without_operations_leaves_the_output():
    ops = ((0, 2, "skip_connect"), (1, 2, "sep_conv_3x3"), (2, 4, "max_pool_3x3"))
    genotype = Genotype("darts", {"normal": ops, "reduction": ops})
    network = build_network(genotype, width=4, depth=1)
    assert [cell.out_channels // 4 for cell in network.cells] == [2, 4, 4, 8, 8]
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_the_darts_network_of_evaluation_is_in_the_published_range():
    """The published DARTS cell at 36 channels and 20 cells has 3.3 M parameters without the auxiliary tower."""
    normal = (
        *((0, 2, "sep_conv_3x3"), (1, 2, "sep_conv_3x3"), (0, 3, "sep_conv_3x3"), (1, 3, "sep_conv_3x3")),
        *((1, 4, "sep_conv_3x3"), (0, 4, "skip_connect"), (0, 5, "skip_connect"), (2, 5, "dil_conv_3x3")),
    )
    reduction = (
        *((0, 2, "max_pool_3x3"), (1, 2, "max_pool_3x3"), (2, 3, "skip_connect"), (1, 3, "max_pool_3x3")),
        *((0, 4, "max_pool_3x3"), (2, 4, "skip_connect"), (2, 5, "skip_connect"), (1, 5, "max_pool_3x3")),
    )
    network = build_network(Genotype("darts", {"normal": normal, "reduction": reduction}), width=36, depth=6)
    assert 3.1e6 < sum(p.numel() for p in network.parameters()) < 3.5e6
    assert cost(network, torch.zeros(1, 3, 32, 32)).unsupported == ()


def test_the_auxiliary_classifier_is_there_for_training_alone():
    _, genotype, _ = some("nas_bench_201", share=1.0)
    network = build_network(genotype, width=4, depth=2, auxiliary=True)
    x = torch.randn(4, 3, 16, 16)
    logits, auxiliary = network.train().classify(x)
    assert auxiliary is not None
    assert auxiliary.shape == logits.shape
    assert network.eval().classify(x)[1] is None


def test_dropped_paths_keep_the_mean_and_only_happen_in_training():
    genotype = Genotype("nas_bench_201", {"normal": ((0, 3, "nor_conv_1x1"),)})
    cell = build_network(genotype, width=3, depth=1).cells[0]
    x = torch.randn(1, 3, 4, 4).expand(4000, 3, 4, 4)
    cell.edges["0-3"]["nor_conv_1x1"].eval()
    whole = cell([x])[0]
    cell.drop_path = 0.3
    dropped = cell([x])
    zero = (dropped.flatten(1) == 0).all(1)
    assert 0.27 < float(zero.float().mean()) < 0.33
    assert torch.allclose(dropped.mean(0), whole, atol=0.1)
    assert torch.equal(cell.eval()([x])[0], whole)


def test_drop_path_is_set_for_all_cells():
    _, genotype, _ = some("nas_bench_201", share=1.0)
    network = build_network(genotype, width=4, depth=2)
    set_drop_path_(network, 0.25)
    assert {cell.drop_path for cell in network.cells} == {0.25}


def test_plain_data_build_the_same_network():
    _, genotype, _ = some("nas_bench_201", share=1.0)
    torch.manual_seed(0)
    first = build_network(genotype, width=4, depth=1)
    torch.manual_seed(0)
    second = derived_network(genotype=genotype.to_dict(), width=4, depth=1)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_sizes_below_one_and_cells_without_operations_are_refused():
    _, genotype, _ = some("nas_bench_201", share=1.0)
    with pytest.raises(RecipeError, match="expected width of at least 1, got 0"):
        build_network(genotype, width=0, depth=1)
    with pytest.raises(
        ModelError, match="cell 'normal' of the genotype has no operation that reaches its output"
    ):
        build_network(Genotype("nas_bench_201", {"normal": ()}), width=4, depth=1)


def test_a_proxyless_genotype_fits_only_its_own_depth():
    _, genotype, _ = some("chain", share=1.0)
    with pytest.raises(RecipeError, match=r"unknown cell of the genotype 'block3'.*depth of the search"):
        build_network(genotype, width=4, depth=2)
