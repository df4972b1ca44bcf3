"""Surgery by hand: the oracle that the traced units are tested against."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.groups.tracing import UnitGraph


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
        module = result.get_submodule(path)
        value = getattr(module, leaf).data[(slice(None),) * dim + (keep,)]
        setattr(module, leaf, nn.Parameter(value) if leaf in module._parameters else value)
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


@pytest.fixture(name="masked")
def _masked() -> Callable[..., nn.Module]:
    return masked


@pytest.fixture(name="cut")
def _cut() -> Callable[..., nn.Module]:
    return cut


@pytest.fixture(name="random_subset")
def _random_subset() -> Callable[[UnitGraph, int], Tensor]:
    return random_subset
