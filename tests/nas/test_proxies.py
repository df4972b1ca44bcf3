"""Training-free proxies: closed forms on tiny networks, nothing touched, and ranks that agree with true accuracies."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from sparsebayes.errors import NumericsError
from sparsebayes.nas import Genotype, build_network
from sparsebayes.nas.decision import connected
from sparsebayes.nas.proxies import (
    PROXIES,
    grad_norm,
    naswot,
    params,
    rank_average,
    rank_correlation,
    synflow,
)
from sparsebayes.nas.tabular import BenchTable, cell_of


def test_synflow_of_a_linear_chain_is_its_flow_once_per_layer():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    a, b = (net[layer].weight.detach().abs().double() for layer in (1, 3))
    flow = float((b @ a @ torch.ones(4, dtype=torch.float64)).sum())
    images = torch.zeros(1, 1, 2, 2)
    # The output is linear in each layer: sum w dR/dw = R for each of the two.
    assert synflow(net, images, torch.zeros(1)) == pytest.approx(math.log(2 * flow))


def test_naswot_counts_agreeing_rectifiers():
    net = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(3, 2))
    images = torch.tensor([[1.0, -1, 1], [1, 1, -1], [-1, -1, -1]]).reshape(3, 1, 1, 3)
    kernel = torch.tensor([[3.0, 1, 1], [1, 3, 1], [1, 1, 3]], dtype=torch.float64)
    kernel[0, 1] = kernel[1, 0] = 1  # images 0 and 1 agree in the first rectifier alone
    kernel[0, 2] = kernel[2, 0] = 1  # 0 and 2 in the second
    kernel[1, 2] = kernel[2, 1] = 1  # 1 and 2 in the third
    assert naswot(net, images, torch.zeros(3)) == pytest.approx(float(torch.logdet(kernel)))
    assert naswot(net, images[[0, 0]], torch.zeros(2)) == -math.inf


def test_grad_norm_and_params_of_a_linear_layer():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].bias.zero_()
    images, labels = torch.tensor([[3.0, 4.0]]).reshape(1, 1, 1, 2), torch.tensor([0])
    # dL/dlogits = (-1/2, 1/2): |g|^2 = 1/2 for the bias and 25/2 for the weights.
    assert grad_norm(net, images, labels) == pytest.approx(math.sqrt(13))
    assert params(net, images, labels) == 6


@pytest.mark.parametrize("name", sorted(PROXIES))
def test_a_proxy_leaves_the_network_as_it_is(name):
    genotype = Genotype("nas_bench_201", {"normal": ((0, 1, "nor_conv_3x3"), (1, 3, "nor_conv_1x1"))})
    net = build_network(genotype, width=4, depth=1).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    PROXIES[name](
        net, torch.randn(4, 3, 16, 16, generator=torch.Generator()), torch.zeros(4, dtype=torch.int64)
    )
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.training
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rank_correlation_is_spearmans():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, -math.inf]) == pytest.approx(-1)
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5 over sqrt(4.5 * 5).
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    with pytest.raises(NumericsError, match="values that differ"):
        rank_correlation([1, 1], [1, 2])
    with pytest.raises(NumericsError, match="two lists of at least two"):
        rank_correlation([1, 2], [1, math.nan])


def test_proxies_rank_cells_of_the_benchmark_as_their_accuracies_do():
    """On 60 cells at a small size; tools/rank_proxies.py does it for 1,000 at the benchmark's own."""
    table = BenchTable.embedded()
    cells = random.Random(0).sample(sorted(table.position), 60)
    truth = [table.columns["c10_test_200"][table.position[cell]] for cell in cells]
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(16, 3, 16, 16, generator=generator), torch.zeros(16, dtype=torch.int64)
    scores: dict[str, list[float]] = {"synflow": [], "naswot": [], "params": []}
    (spec,) = Genotype("nas_bench_201", {}).search_space.cells
    numbers = {(edge.source, edge.target): number for number, edge in enumerate(spec.edges)}
    for cell in cells:
        ops = cell_of(cell)
        paths = connected(spec, [(numbers[s, t], op) for s, t, op in ops])
        alive = tuple((s, t, op) for s, t, op in ops if (numbers[s, t], op) in paths)
        for name, values in scores.items():
            if not alive:
                values.append(-math.inf)
                continue
            torch.manual_seed(0)
            net = build_network(Genotype("nas_bench_201", {"normal": alive}), width=4, depth=1)
            values.append(PROXIES[name](net, images, labels))
    assert rank_correlation(scores["synflow"], truth) > 0.55
    assert rank_correlation(scores["naswot"], truth) > 0.55
    assert rank_correlation(scores["params"], truth) > 0.5


def test_rank_average_is_the_mean_of_ranks_with_ties_shared():
    # Ranks 2, 0, 1 and 0.5, 2, 0.5.
    assert rank_average([[5.0, -math.inf, 1.0], [0.0, 9.0, 0.0]]) == [1.25, 1.0, 0.75]
    for bad in ([], [[]], [[1.0], [1.0, 2.0]], [[math.nan]]):
        with pytest.raises(NumericsError, match="expected"):
            rank_average(bad)
