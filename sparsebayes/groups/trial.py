"""A trial removal: does the model's own code follow when channels go?

The tracer predicts the shape of every activation after a removal. So remove some units at random from a copy of the
model, export that, and compare both graphs, operation by operation. Where a shape, a position or a factor differs from
the prediction, or the copy stops, the code there does not adapt in the way that the tracer assumed:

    >>> refuted_lines(model, example, units, unit_of_id, traced, seed=0)
    {"/home/me/net.py:31:84"}

No image is computed: the exporter works on shapes alone.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from sparsebayes.groups.channel_ids import Shadow, core
from sparsebayes.groups.exporting import Exported, Failure, exported, line_of, operation_of, step_of
from sparsebayes.groups.propagation import CHECKS
from sparsebayes.groups.unit_graph import UnitGraph, apply_counts_, stays
from sparsebayes.networks import copied

__all__ = ["Traced", "needs_trial", "refuted_lines"]

# In these operations a number among the arguments is a factor, which must not follow the width.
_FACTORS = {"add", "sub", "mul", "div", "pow", "rsub", "scaled_dot_product_attention", "full_like"}
# These change how a tensor lies in memory, at most: PyTorch leaves them out where it lies so already, as it may do with
# one head left, and it takes one view or another.
_LAYOUT = {"contiguous", "clone", "alias"}
_VIEWS = {"view", "reshape", "_unsafe_view"}


@dataclass(frozen=True, eq=False)
class Traced:
    """One exported graph with the shadow of each node."""

    exported: Exported
    shadows: Mapping[fx.Node, Any]
    train: bool


def needs_trial(one: Traced) -> bool:
    """Whether a graph has numbers in its arithmetic, which might be worked out from widths, or unused results.

    The tracer passes by what makes unused results, but it runs, and may be handed sizes.
    """
    calls = [node for node in one.exported.calls if node.target is not operator.getitem]
    unused = [node for node in calls if node not in one.shadows and operation_of(node) not in CHECKS]
    return bool(unused) or any(_packet(node) in _FACTORS and _numbers(node) for node in calls)


def refuted_lines(
    model: nn.Module,
    example: Tensor,
    graph: UnitGraph,
    unit_of_id: Tensor,
    traced: Sequence[Traced],
    cuts: Sequence[Sequence[Tensor]],
    seed: int,
) -> set[str]:
    """Lines of code that do not follow a random removal as predicted.

    Args:
        model: The model that was traced.
        example: The input that it was traced with.
        graph: Its units, as the tracer assumes them.
        unit_of_id: Unit of each channel id, -1 for those that stay.
        traced: The graphs of each mode with their shadows.
        cuts: For each cut of channels, the ids in its pieces.
        seed: Of the choice of units.

    Returns:
        Lines, as `line_of` writes them; empty if the code agrees.
    """
    alive = _some_units(graph, [[unit_of_id[piece] for piece in pieces] for pieces in cuts], seed)
    living = stays(alive, unit_of_id).numpy()
    small = _smaller(model, graph, alive)
    refuted: set[str] = set()
    for one in traced:
        result = exported(small, example, train=one.train)
        if isinstance(result, Failure):
            refuted.add(_culprit(one, result, living))
        else:
            refuted |= _differences(one, result, living)
    return refuted


def _some_units(graph: UnitGraph, cuts: Sequence[Sequence[Tensor]], seed: int) -> Tensor:
    """Which units stay: each with probability 0.6, and of each layer at least one stays and one goes.

    The same holds of the pieces of a cut, since a number in the code is right as long as all of its piece stays.
    And they do not lose equally many, or halves of what is left could pass for pieces.
    """
    generator = torch.Generator().manual_seed(seed)
    alive = torch.rand(graph.num_units, generator=generator) < 0.6
    for layer in range(len(graph.layers)):
        members = (graph.layer_index == layer).nonzero().flatten()
        if len(members) > 1:
            members = members[torch.randperm(len(members), generator=generator)]
            alive[members[0]], alive[members[1]] = True, False
        else:
            alive[members] = True
    for pieces in cuts:
        _differ_(alive, pieces, graph, seed)
    return alive


def _differ_(alive: Tensor, pieces: Sequence[Tensor], graph: UnitGraph, seed: int) -> None:
    """Let the pieces of a cut, each given by the units of its channels, lose some, and not equally many."""
    several: list[Tensor] = [torch.unique(piece[piece >= 0]) for piece in pieces]
    for units in several:
        if len(units) > 1 and not bool(alive[units].any()):
            alive[units[0]] = True
        elif bool(alive[units].all()):
            _switch_off_(alive, units, graph)
    lost = {int((~alive[units]).sum()) for units in several}
    are_tied = len(torch.unique(torch.cat(several))) < sum(map(len, several))
    if len(lost) == 1 and not are_tied:
        most = max(several, key=lambda units: int(alive[units].sum()))
        if int(alive[most].sum()) > 1:
            _switch_off_(alive, most, graph)
        elif seed:  # the other choice has shown whether the pieces keep their sizes
            alive[most] = True


def _switch_off_(alive: Tensor, members: Tensor, graph: UnitGraph) -> None:
    """Switch one of these units off, unless it is the last of its layer."""
    for unit in members[alive[members]].tolist():
        if int(alive[graph.layer_index == graph.layer_index[unit]].sum()) > 1:
            alive[unit] = False
            return


def _smaller(model: nn.Module, graph: UnitGraph, alive: Tensor) -> nn.Module:
    """A copy with tensors of the smaller shapes, without values; all other tensors are shared."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for piece in (*graph.slices, *graph.buffers):
        shapes[piece.parameter][piece.dim] = int(stays(alive, piece.unit).sum())
    memo: dict[int, Any] = {}
    for name, tensor in tensors.items():
        other = tensor
        if list(tensor.shape) != shapes[name]:
            empty = torch.empty(shapes[name], dtype=tensor.dtype, device=tensor.device)
            is_parameter = isinstance(tensor, nn.Parameter)
            other = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        memo[id(tensor)] = other
    small = copied(model, memo)
    for module in small.modules():
        _resize_(module)
    apply_counts_(small, graph, alive)
    return small


def _resize_(module: nn.Module) -> None:
    """Attributes that the forward of a layer of PyTorch reads besides its tensors."""
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        depthwise = module.groups == module.in_channels
        if depthwise:
            rows = module.weight.shape[0]
            module.groups = rows if module.transposed else rows * module.in_channels // module.out_channels
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        sized = module.weight if module.weight is not None else module.running_mean
        module.num_features = module.num_features if sized is None else len(sized)


def _culprit(one: Traced, failure: Failure, living: NDArray[np.bool_]) -> str:
    """The first line whose result differed from the prediction before the copy stopped, else where it stopped."""
    results = {
        step_of(node): _shadows(one, node)
        for node in one.exported.calls
        if node.target is not operator.getitem  # it carries the step of the list that it takes an item of
    }
    last = len(failure.steps) - 1  # it stopped there, and has no result
    for number, (old, new) in enumerate(zip(one.exported.steps, failure.steps, strict=False)):
        if (old.name, old.line) != (new.name, new.line):
            return old.line
        shadows = results.get(number, [])
        # A step of several operations may return something else than the last of them does.
        if number == last or [shadow.shape for shadow in shadows] != list(old.shapes):
            continue
        if [_shape(shadow, living) for shadow in shadows] != list(new.shapes):
            return new.line
    return failure.steps[-1].line if failure.steps else ""


def _shadows(one: Traced, node: fx.Node) -> list[Shadow]:
    """Shadows of the results of an operation; none unless each of them has one."""
    found = one.shadows.get(node)
    results = found if isinstance(found, list) else [found]
    shadows = [result for result in results if isinstance(result, Shadow)]
    return shadows if len(shadows) == len(results) else []


def _differences(one: Traced, small: Exported, living: NDArray[np.bool_]) -> set[str]:
    """Lines of the operations whose results differ from the prediction although their arguments do not."""
    before, after = _comparable(one.exported), _comparable(small)
    if [kind for kind, _ in before] != [kind for kind, _ in after]:
        pairs = zip(before, after, strict=False)
        first = next((old for (kind, old), (other, _) in pairs if kind != other), before[-1][1])
        return {line_of(first)}
    wrong: set[fx.Node] = set()
    refuted: set[str] = set()
    for (_, old), (_, new) in zip(before, after, strict=True):
        agrees = _agrees(one, old, new, living)
        if not agrees:
            wrong.add(old)
            if not any(_origin(node) in wrong for node in old.all_input_nodes):
                refuted.add(line_of(old))
    return refuted


def _comparable(exported: Exported) -> list[tuple[Any, fx.Node]]:
    """What each operation does, with its node; without those that only change how a tensor lies in memory."""
    named = [(operation_of(node), node) for node in exported.calls]
    return [("view" if name in _VIEWS else node.target, node) for name, node in named if name not in _LAYOUT]


def _origin(node: fx.Node) -> fx.Node:
    """The node that made what a node holds, seen through changes of layout."""
    is_layout = node.op == "call_function" and operation_of(node) in _LAYOUT
    return _origin(node.all_input_nodes[0]) if is_layout else node


def _agrees(one: Traced, old: fx.Node, new: fx.Node, living: NDArray[np.bool_]) -> bool:
    shadow = one.shadows.get(old)
    pairs = [(shadow, new.meta.get("val"))]
    if isinstance(shadow, list):
        values = new.meta.get("val")
        if not isinstance(values, (list, tuple)) or len(values) < len(shadow):
            return False
        pairs = list(zip(shadow, values, strict=False))
    for predicted, value in pairs:
        if isinstance(predicted, Shadow) and isinstance(value, Tensor):
            if _shape(predicted, living) != tuple(value.shape):
                return False
    packet = _packet(old)
    if old in one.shadows and packet in _FACTORS and _numbers(old) != _numbers(new):
        return False
    return packet not in ("slice", "narrow") or _starts(one, old, living) == new.args[2:3]


def _shape(shadow: Shadow, living: NDArray[np.bool_]) -> tuple[int, ...]:
    """Shape of an activation after the removal."""
    ids = core(shadow.ids)
    stays = living[ids.numpy()]
    sizes = []
    for dim, size in enumerate(shadow.shape):
        if ids.shape[dim] == 1:
            sizes.append(size)
        else:
            others = tuple(other for other in range(ids.ndim) if other != dim)
            sizes.append(int(stays.any(axis=others).sum()))
    return tuple(sizes)


def _starts(one: Traced, node: fx.Node, living: NDArray[np.bool_]) -> tuple[Any, ...]:
    """Where a slice begins after the removal: as many channels further on as stay in front of it."""
    first, start = node.args[0], node.args[2:3]
    source = one.shadows.get(first) if isinstance(first, fx.Node) else None
    if not start or not isinstance(source, Shadow) or not isinstance(start[0], int) or start[0] <= 0:
        return start
    dim = int(str(node.args[1])) % len(source.shape)
    ids = core(source.ids)
    if ids.shape[dim] == 1:
        return start
    stays = living[ids.narrow(dim, 0, min(start[0], source.shape[dim])).numpy()]
    return (int(stays.any(axis=tuple(other for other in range(ids.ndim) if other != dim)).sum()),)


def _packet(node: fx.Node) -> str:
    return operation_of(node).rstrip("_")


def _numbers(node: fx.Node) -> list[float]:
    return [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, (int, float))]
