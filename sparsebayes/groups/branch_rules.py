"""The rule ``branches``: each residual branch is one group, so that depth is decided by the same prior as width.

Where the exported graph adds two values, and one of them comes from the point where both part through more layers than
the other, those layers are a branch, if nothing else reads what they compute. Its switch scales what the branch adds:
the parameters of its last layer (the scale and shift of a norm, the weight and bias of a convolution) are gates, those
of the layers before it go along. With all of it off, the block hands on its shortcut, and surgery removes its layers.

    >>> make_grouping(resnet18(), "branches", example=torch.zeros(2, 3, 64, 64))
    Grouping('branches', 8 groups; layer1.0.bn2: 1, layer1.1.bn2: 1, ...)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsebayes.errors import GroupingError, ModelError
from sparsebayes.groups.exporting import Exported, Failure, exported
from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.groups.scope import EVERYTHING, Scope, owner

__all__ = ["branches"]


@dataclass(frozen=True)
class _Branch:
    """Parameters of one branch: those of its last layer, and the others."""

    last: tuple[str, ...]
    others: tuple[str, ...]


def branches(model: nn.Module, example: Tensor | None, scope: Scope = EVERYTHING) -> Grouping:
    """Each residual branch is a group, named after its last layer.

    Args:
        model: The model, traced by `torch.export`.
        example: An input, ``[B, ...]``.
        scope: A branch is covered iff its last layer is.

    Raises:
        GroupingError: If there is no example, or no branch in the scope.
        ModelError: If the model cannot be traced.
    """
    if example is None:
        raise GroupingError(
            "the rule 'branches' traces the model and needs an input: pass example=a batch of inputs"
        )
    device = next((parameter.device for parameter in model.parameters()), example.device)
    result = exported(model, example[:2].to(device), train=False)
    if isinstance(result, Failure):
        raise ModelError(
            f"branches need a model that torch.export can trace, but it failed: {result.reason}. Rules that need no "
            "tracing: weights, rows, columns, filters, channels, kernels, shapes, blocks, n:m"
        )
    found = [one for one in _branches(result, model) if scope.covers(owner(one.last[0]), *one.last)]
    if not found:
        raise GroupingError(
            f"the rule 'branches' found nothing to group ({scope}): no sum in the model joins a branch with a shortcut"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    labels = []
    for number, one in enumerate(found):
        for names, gate in ((one.last, True), (one.others, False)):
            labels += [
                Labels(name, shapes[name], torch.full([1] * len(shapes[name]), number), gate=gate)
                for name in names
            ]
    layers = tuple(owner(one.last[0]) for one in found)
    return Grouping("branches", tuple(labels), layers, torch.arange(len(found)))


def _branches(one: Exported, model: nn.Module) -> list[_Branch]:
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    known = {path: first[id(parameter)] for path, parameter in model.named_parameters(remove_duplicate=False)}
    names = {
        node: known[one.names[node.name]] for node in one.graph.nodes if one.names.get(node.name) in known
    }
    before = _ancestors(one.graph)
    used: dict[str, int] = {}
    for node, name in names.items():
        used[name] = used.get(name, 0) + len(node.users)
    found = []
    for node in one.graph.nodes:
        operands = [value for value in node.args[:2] if isinstance(value, fx.Node) and value not in names]
        if str(node.target) not in ("aten.add.Tensor", "aten.add_.Tensor") or len(operands) != 2:
            continue
        sides = [
            (before[here] | {here}) - (before[there] | {there}) for here, there in (operands, operands[::-1])
        ]
        counts = [len(_parameters(side, names)) for side in sides]
        longer = counts.index(max(counts))
        inner = sides[longer]
        closed = all(
            user in inner or user is node for value in inner if value not in names for user in value.users
        )
        if counts[0] == counts[1] or not closed:
            continue
        last = _last_layer(operands[longer], inner, names)
        inside = _parameters(inner, names)
        if last and all(used[name] == 1 for name in inside):
            found.append(_Branch(last, tuple(name for name in inside if name not in last)))
    return found


def _ancestors(graph: fx.Graph) -> dict[fx.Node, frozenset[fx.Node]]:
    """All nodes from which each node is computed."""
    before: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes
        before[node] = frozenset(sources).union(*(before[source] for source in sources))
    return before


def _parameters(nodes: Iterable[fx.Node], names: Mapping[fx.Node, str]) -> list[str]:
    inside = set(nodes)
    return list(dict.fromkeys(name for node, name in names.items() if node in inside))


def _last_layer(end: fx.Node, inner: Iterable[fx.Node], names: Mapping[fx.Node, str]) -> tuple[str, ...]:
    """Parameters of the one layer from whose result the end follows without parameters; empty if there are several."""
    inside, pending, layers = set(inner), [end], []
    while pending:
        node = pending.pop()
        own = [names[source] for source in node.all_input_nodes if source in names]
        if own:
            layers.append((node, tuple(own)))
        else:
            pending += [source for source in node.all_input_nodes if source in inside]
    return layers[0][1] if len({node for node, _ in layers}) == 1 else ()
