"""Operations computed together, against the sum of operations that run one by one: float64, statistics included."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparsebayes.nas import SPACES, Shape, Supernet
from sparsebayes.nas.cell import Cell
from sparsebayes.nas.ops import build_op
from sparsebayes.nas.sharing import Place, compute, share


def plain_sum(self: Cell, states: Sequence[Tensor], factors: Tensor | None = None) -> Tensor:
    """A cell's output as its definition says: every module runs, every result is multiplied and added."""
    nodes = dict(enumerate(states))
    nodes.update({int(name): layer(states[int(name)]) for name, layer in self.inputs.items()})
    places = list(enumerate(self.spec.places()))
    for slot, (number, op) in sorted(places, key=lambda place: self.spec.edges[place[1][0]].target):
        edge = self.spec.edges[number]
        if slot in self._skip or edge.source not in nodes:
            continue
        y = self.edges[f"{edge.source}-{edge.target}"][op](nodes[edge.source])
        y = y if factors is None else y * factors[..., slot].reshape(-1, 1, 1, 1)
        nodes[edge.target] = nodes[edge.target] + y if edge.target in nodes else y
    made = next(nodes[node] for node in self.outputs if node in nodes)
    out = torch.cat([nodes.get(node, torch.zeros_like(made)) for node in self.outputs], 1)
    return out + self._shortcut(states[0]) if self._residual else out


def supernet_of(name: str) -> Supernet:
    """A supernet whose norms have statistics and momenta that differ."""
    torch.manual_seed(3)
    supernet = Supernet(SPACES[name], Shape(width=3, depth=1), initial=0.5).double()
    with torch.no_grad():
        supernet.switches.mul_(1 + 0.3 * torch.randn_like(supernet.switches))
    for number, module in enumerate(supernet.modules()):
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            module.momentum = (0.1, 0.3, None)[number % 3]
    return supernet


def images() -> Tensor:
    return torch.randn(5, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def two_steps(supernet: Supernet, switches: Tensor | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of two passes in training, and the state behind them."""
    x, found = images(), {}
    for number in range(2):
        x = x.detach().requires_grad_()
        inputs = {"images": x, **({} if switches is None else {"rows": switches})}
        inputs |= dict(supernet.named_parameters())
        logits = supernet.train()(x, switches)
        loss = functional.cross_entropy(logits, torch.arange(5))
        gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        found[f"{number} logits"] = logits.detach()
        found |= {f"{number} {k}": g for k, g in zip(inputs, gradients, strict=True) if g is not None}
        x = x.detach() + 1
    return found | dict(supernet.state_dict())


def assert_same(supernet: Supernet, monkeypatch: Any, run: Callable[[Supernet], dict[str, Tensor]]) -> None:
    other = copy.deepcopy(supernet)
    found = run(supernet)
    with monkeypatch.context() as patch:
        patch.setattr(Cell, "forward", plain_sum)
        expected = run(other)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("name", sorted(SPACES))
def test_outputs_gradients_and_statistics_are_those_of_the_plain_sum(name, monkeypatch):
    assert_same(supernet_of(name), monkeypatch, two_steps)


@pytest.mark.parametrize("name", ["nas_bench_201", "darts"])
def test_so_are_those_with_a_row_of_switches_for_each_image(name, monkeypatch):
    supernet = supernet_of(name)
    rows = torch.rand(5, supernet.table.num_switches, dtype=torch.float64, requires_grad=True)
    assert_same(supernet, monkeypatch, lambda net: two_steps(net, rows))


@pytest.mark.parametrize("name", ["nas_bench_201", "darts"])
def test_so_are_those_of_a_supernet_with_operations_off(name, monkeypatch):
    supernet = supernet_of(name)
    table = supernet.table
    on = torch.rand(table.num_groups, generator=torch.Generator().manual_seed(5)) > 0.4
    supernet.switch_off_(~table.hierarchy().close(on))
    assert_same(supernet, monkeypatch, two_steps)


def test_so_are_those_with_norms_that_keep_their_statistics(monkeypatch):
    def run(net: Supernet) -> dict[str, Tensor]:
        net.train()
        for module in list(net.modules())[::7]:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        x = images()
        return {"logits": net(x).detach(), **net.state_dict()}

    assert_same(supernet_of("nas_bench_201"), monkeypatch, run)


def test_so_are_gradients_of_functions(monkeypatch):
    def run(net: Supernet) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        buffers = {name: b.clone() for name, b in net.named_buffers()}

        def loss(values: dict[str, Tensor], statistics: dict[str, Tensor]) -> Tensor:
            logits = torch.func.functional_call(net.train(), (values, statistics), (images(),))
            return logits.square().sum()

        return torch.func.grad(loss)(parameters, buffers) | buffers

    assert_same(supernet_of("nas_bench_201"), monkeypatch, run)


def test_second_derivatives_in_the_switches_are_those_of_the_plain_sum(monkeypatch):
    def run(net: Supernet) -> dict[str, Tensor]:
        direction = torch.linspace(-1, 1, net.table.num_switches, dtype=torch.float64)
        loss = net.train()(images()).square().sum()
        (gradient,) = torch.autograd.grad(loss, net.switches, create_graph=True)
        return {"product": torch.autograd.grad(gradient @ direction, net.switches)[0]}

    assert_same(supernet_of("nas_bench_201"), monkeypatch, run)


def test_in_bfloat16_nodes_are_as_exact_as_those_of_the_plain_sum(monkeypatch):
    supernet = supernet_of("nas_bench_201").float()
    expected = supernet.train()(images().float())
    errors = []
    for forward in (Cell.forward, plain_sum):
        monkeypatch.setattr(Cell, "forward", forward)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(float((supernet(images().float()) - expected).detach().abs().max()))
    assert 0 < errors[0] < 2 * errors[1]


class Calls(TorchFunctionMode):
    """Counts the torch functions that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_what_operations_have_in_common_runs_once():
    supernet = supernet_of("nas_bench_201")
    cell = supernet.network.cells[0].train()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with Calls() as calls:
        cell([x], torch.ones(24, dtype=torch.float64))
    # Three nodes are read, each by identity, pool and two kinds of convolution.
    assert calls.count["relu"] == 3
    assert calls.count["avg_pool2d"] == 3
    assert calls.count["conv2d"] == 6
    assert calls.count["batch_norm"] == 12


def test_operations_that_differ_are_not_taken_for_one_another():
    def op(name: str, stride: int = 1) -> nn.Module:
        return build_op(name, 4, 4, stride=stride, affine=False)

    other = op("avg_pool_3x3")
    other[0].count_include_pad = True
    loose = op("skip_connect")
    loose[0].eps = 1e-3
    names = ["skip_connect", "avg_pool_3x3", "max_pool_3x3", "nor_conv_1x1", "nor_conv_3x3", "sep_conv_3x3"]
    ops = [
        *(op(name) for name in names),
        *(op(name, 2) for name in names),
        *(other, loose, op("sep_conv_3x3")),
    ]
    units = share(Place(0, 1, slot, module) for slot, module in enumerate(ops))[0]
    # Alone, a strided identity is what a strided pointwise convolution is.
    assert sorted(tuple(p.slot for p in unit.places) for unit in units) == [
        *((slot,) for slot in range(6)),
        (6, 9),
        *((slot,) for slot in (7, 8, 10, 11, 12, 13, 14)),
    ]


def test_without_factors_results_are_those_of_the_modules():
    op = build_op("sep_conv_5x5", 4, 4, stride=1, affine=False)
    x = torch.randn(2, 4, 8, 8)
    ((target, y),) = compute(share([Place(1, 3, 0, op)])[1], x, None)
    assert target == 3
    assert torch.allclose(y, op(x), atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
def test_only_norms_without_scale_are_shared(affine):
    ops = [build_op("skip_connect", 4, 4, stride=1, affine=affine), nn.ReLU()]
    assert share([Place(0, 1, slot, op) for slot, op in enumerate(ops)]) == {}
    assert bool(share([Place(0, 1, 0, ops[0])])) == (not affine)
