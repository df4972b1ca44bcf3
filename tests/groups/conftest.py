"""Surgery by hand: the oracle that the traced units are tested against."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.groups.tracing import UnitGraph, trace_units


def dropped(part_unit: Tensor, on: Tensor) -> Tensor:
    """Positions along a slice's dim that belong to units that are off."""
    return ((part_unit >= 0) & ~on[part_unit.clamp(min=0)]).nonzero().flatten()


def masked(net: nn.Module, graph: UnitGraph, on: Tensor, *, reads: bool) -> nn.Module:
    """Zero what reads the units that are off, or their own entries."""
    result = copy.deepcopy(net)
    for part in graph.slices:
        if part.reads == reads:
            result.get_parameter(part.parameter).data.index_fill_(part.dim, dropped(part.unit, on), 0.0)
    return result


def cut(net: nn.Module, graph: UnitGraph, on: Tensor) -> nn.Module:
    """Index every parameter and buffer along the dims of its slices."""
    result = copy.deepcopy(net)
    kept = {
        (part.parameter, part.dim): torch.where(part.unit < 0, True, on[part.unit.clamp(min=0)])
        for part in (*graph.slices, *graph.buffers)
    }
    for (name, dim), keep in kept.items():
        path, _, leaf = name.rpartition(".")
        old = getattr(result.get_submodule(path), leaf)
        value = old.data[(slice(None),) * dim + (keep,)]
        new = nn.Parameter(value) if isinstance(old, nn.Parameter) else value
        # Under all names by which the model shares it.
        for module in result.modules():
            for own in (module._parameters, module._buffers):
                own.update({key: new for key, held in own.items() if held is old})
    for module in result.modules():
        is_conv = isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        if is_conv and module.groups == module.in_channels and module.groups > 1:
            first = module.weight.shape[0]
            module.groups = first if module.transposed else first * module.in_channels // module.out_channels
        if isinstance(module, nn.InstanceNorm1d):
            module.num_features = module.weight.shape[0]
    return result


def random_subset(graph: UnitGraph, seed: int) -> Tensor:
    """About half of the units on, and at least one per layer."""
    on = torch.rand(graph.num_units, generator=torch.Generator().manual_seed(seed)) > 0.5
    for layer in range(len(graph.layers)):
        of_layer = (graph.layer_index == layer).nonzero().flatten()
        if not bool(on[of_layer].any()):
            on[of_layer[0]] = True
    return on


def prepared(net: nn.Module) -> nn.Module:
    """The net in float64 and evaluation mode, with norms that are not the identity."""
    for module in net.double().eval().modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                if value is not None:
                    value.data.uniform_(0.5, 1.5)
    return net


def assert_equal(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, atol=1e-11, rtol=1e-11)


def check_removal(net: nn.Module, num_units: int) -> UnitGraph:
    """Trace a net of images [B, 3, 8, 8], compare the number of units, remove random units in all ways."""
    net, x = prepared(net), torch.randn(3, 3, 8, 8).double()
    graph = trace_units(net, x)
    assert graph.num_units == num_units, graph.fixed
    assert not any("no layer reads them" in line for line in graph.fixed)
    for reads in (False, True):
        units = torch.cat([torch.tensor([-1]), *(p.unit for p in graph.slices if p.reads == reads)]).unique()
        assert units[units >= 0].tolist() == list(range(num_units))
    for seed in range(3 if num_units else 0):
        on = random_subset(graph, seed)
        small, silent = cut(net, graph, on), masked(net, graph, on, reads=True)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
        assert_equal(small(x), silent(x))
        assert not torch.allclose(silent(x), net(x), atol=1e-6)
        # A unit without own entries is read as zero, where the graph says so.
        dead = masked(net, graph, on | ~graph.zero_preserving, reads=False)
        assert_equal(dead(x), masked(dead, graph, on | ~graph.zero_preserving, reads=True)(x))
    if not bool(graph.zero_preserving.all()):
        # And where it does not say so, the claim would be false.
        dead = masked(net, graph, graph.zero_preserving, reads=False)
        assert not torch.allclose(
            dead(x), masked(dead, graph, graph.zero_preserving, reads=True)(x), atol=1e-6
        )
    return graph


@pytest.fixture(name="check_removal")
def _check_removal() -> Callable[[nn.Module, int], UnitGraph]:
    return check_removal
