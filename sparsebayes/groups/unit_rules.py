"""Groupings from the coupled units of a model: whole units, and the single features behind a flatten.

Units behind a flatten are read by many columns each (one per position). The rule ``units`` takes or leaves
them together; the rule ``features`` decides about each column, and is made to be stacked on units:
``"units+features"``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsebayes.errors import GroupingError
from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.groups.scope import EVERYTHING, Scope, owner
from sparsebayes.groups.tracing import Slice, UnitGraph, trace_units

__all__ = ["feature_grouping", "features", "needed", "unit_grouping", "units"]


def units(model: nn.Module, example: Tensor | None, scope: Scope = EVERYTHING) -> Grouping:
    """Each removable channel or neuron is a group: its own rows, and the slices by which others read it.

    Args:
        model: The model, traced by `torch.export`.
        example: An input, ``[B, ...]``.
        scope: A unit is covered iff one of the layers that produce it is included and none is excluded.

    Raises:
        GroupingError: If there is no example, or no unit in the scope.
        ModelError: If the model cannot be traced.
    """
    return unit_grouping(model, trace_units(model, needed(example, "units")), scope)


def features(model: nn.Module, example: Tensor | None, scope: Scope = EVERYTHING) -> Grouping:
    """Each column of a linear layer that reads flattened channels is a group, in the layer ``"fc1.inputs"``.

    Args and errors are those of `units`; the scope may name the linear layer or its inputs.
    """
    return feature_grouping(model, trace_units(model, needed(example, "features")), scope)


def unit_grouping(model: nn.Module, graph: UnitGraph, scope: Scope = EVERYTHING) -> Grouping:
    """The grouping ``units`` of a model that is already traced.

    Own rows, biases and norm entries are no gates; the slices of the consumers are.

    Raises:
        GroupingError: If no unit is in the scope.
    """
    included = torch.zeros(graph.num_units, dtype=torch.bool)
    excluded = torch.zeros(graph.num_units, dtype=torch.bool)
    for part in graph.slices:
        mine = part.unit[part.unit >= 0]
        names = (owner(part.parameter), part.parameter)
        if not part.reads and scope.includes(*names):
            included[mine] = True
        if not part.reads and scope.excludes(*names):
            excluded[mine] = True
    on = included & ~excluded
    if not bool(on.any()):
        reasons = "; ".join(graph.fixed[:4]) or "none of its channels stays"
        raise GroupingError(
            f"the rule 'units' found nothing to group ({scope}); layers with units: "
            f"{', '.join(graph.layers) or 'none'}; {reasons}"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    number = torch.full((graph.num_units,), -1).masked_scatter(on, torch.arange(int(on.sum())))
    labels = []
    for part in graph.slices:
        index = torch.where(part.unit < 0, -1, number[part.unit])
        if bool((index >= 0).any()):
            shape = shapes[part.parameter]
            view = [1] * len(shape)
            view[part.dim] = -1
            labels.append(Labels(part.parameter, shape, index.view(view), gate=part.reads))
    kept = sorted(set(graph.layer_index[on].tolist()))
    position = torch.full((len(graph.layers),), -1)
    position[kept] = torch.arange(len(kept))
    layers = tuple(graph.layers[layer] for layer in kept)
    return Grouping("units", tuple(labels), layers, position[graph.layer_index[on]])


def feature_grouping(model: nn.Module, graph: UnitGraph, scope: Scope = EVERYTHING) -> Grouping:
    """The grouping ``features`` of a model that is already traced.

    Raises:
        GroupingError: If no linear layer in the scope reads flattened channels.
    """
    modules = dict(model.named_modules())
    labels: list[Labels] = []
    layers: list[str] = []
    layer_index: list[Tensor] = []
    num_groups = 0
    for part in graph.slices:
        layer, _, leaf = part.parameter.rpartition(".")
        is_linear = isinstance(modules.get(layer), nn.Linear) and leaf == "weight"
        if not (is_linear and _is_flattened(part)):
            continue
        if not scope.covers(layer, part.parameter, f"{layer}.inputs"):
            continue
        shape = tuple(model.get_parameter(part.parameter).shape)
        columns = shape[1]
        index = torch.arange(num_groups, num_groups + columns).view(1, -1)
        labels.append(Labels(part.parameter, shape, index))
        layer_index.append(torch.full((columns,), len(layers)))
        layers.append(f"{layer}.inputs")
        num_groups += columns
    if not labels:
        raise GroupingError(
            f"the rule 'features' found nothing to group ({scope}): no linear layer in the scope reads "
            "flattened channels; try 'units' or 'columns'"
        )
    return Grouping("features", tuple(labels), tuple(layers), torch.cat(layer_index))


def _is_flattened(part: Slice) -> bool:
    """Whether several columns of a weight ``[O, I]`` read one unit."""
    found = part.unit[part.unit >= 0]
    return part.reads and part.dim == 1 and found.numel() > 0 and int(torch.bincount(found).max()) > 1


def needed(example: Tensor | None, rule: str) -> Tensor:
    """The example input, without which a rule that traces the model can do nothing.

    Raises:
        GroupingError: If there is none.
    """
    if example is None:
        raise GroupingError(
            f"the rule {rule!r} traces the model and needs an input: pass example=a batch of inputs"
        )
    return example
