"""The grouping ``branches``: one group for each residual branch, so that depth is pruned like width.

Where two activations are added, ``y = f(x) + s(x)``, the side with more layers on its shortest way back to where the
two part is the branch, the other one the shortcut (the identity, say, or a 1x1 convolution). The branch has a switch if
its last layer is one whose own parameters can make it exactly zero: a norm with scale and shift, a convolution, a
linear layer, a layer scale. Scaling *those* scales ``f``, so they are the gates of the group. The parameters of all
layers that serve the branch alone belong to the group as well: they are what its removal saves.

    >>> make_grouping(resnet56, "branches", example=images)
    Grouping('branches', 27 groups; branches: 27)

All groups are in one layer, ``"branches"``, which is optional: a network may lose every branch, as the shortcuts carry
the signal, so that the least number of groups per layer (`prune.min_keep`) does not concern them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsebayes.errors import GroupingError, ModelError
from sparsebayes.groups.exporting import Failure, exported, operation_of
from sparsebayes.groups.grouping import Grouping, Labels
from sparsebayes.groups.scope import EVERYTHING, Scope, owner

__all__ = ["branches"]

BRANCHES = "branches"
"""Name of the rule, and of the layer that holds its groups."""

# Layers that are zero when these of their arguments are.
_LAYERS = {
    **{f"conv{dims}d": ("weight", "bias") for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": ("weight", "bias") for dims in (1, 2, 3)},
    **dict.fromkeys(
        ("linear", "batch_norm", "layer_norm", "group_norm", "instance_norm"), ("weight", "bias")
    ),
    "mul": ("self", "other"),
}
_WEIGHTED = {name for name in _LAYERS if name.startswith("conv") or name == "linear"} | {"matmul", "mm"}
# These turn zeros into zeros and read nothing else, so a branch may end with them.
_KEEP_ZERO = {
    "alias", "clone", "contiguous", "dropout", "gelu", "permute", "relu", "reshape", "silu", "tanh", "to", "transpose",
    "view",
}  # fmt: skip


@dataclass(frozen=True)
class _Branch:
    """One residual branch.

    Attributes:
        gates: parameters of its last layer.
        others: further parameters that only this branch uses.
    """

    gates: tuple[str, ...]
    others: tuple[str, ...]


def branches(model: nn.Module, example: Tensor | None, scope: Scope = EVERYTHING) -> Grouping:
    """Each residual branch is a group: its last layer's parameters are gates, its other parameters are not.

    Args:
        model: The model, exported by `torch.export`; it is not changed.
        example: An input, ``[B, ...]``.
        scope: A branch is covered iff one of its layers is included and none is excluded.

    Raises:
        GroupingError: If there is no example, or no residual branch in the scope.
        ModelError: If the model cannot be exported.
    """
    if example is None:
        raise GroupingError(
            "the rule 'branches' traces the model and needs an input: pass example=a batch of inputs"
        )
    found = [branch for branch in _find(_Graph(model, example)) if _covers(scope, branch)]
    if not found:
        raise GroupingError(
            f"the rule 'branches' found nothing to group ({scope}): no sum of a branch of layers and its shortcut; "
            "try 'units'"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    labels = [
        Labels(name, shapes[name], torch.full([1] * len(shapes[name]), group), gate=name in branch.gates)
        for group, branch in enumerate(found)
        for name in (*branch.gates, *branch.others)
    ]
    layer_index = torch.zeros(len(found), dtype=torch.int64)
    return Grouping(BRANCHES, tuple(labels), (BRANCHES,), layer_index, optional_layers=(BRANCHES,))


def _covers(scope: Scope, branch: _Branch) -> bool:
    names = (*branch.gates, *branch.others)
    return scope.covers(*names, *map(owner, names))


class _Graph:
    """The exported graph of a model in evaluation mode, with what is asked of it.

    Attributes:
        nodes: in the order of execution.
        parameters: node to the name of the parameter that it is.
        active: nodes that depend on the model's input.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        device = next((parameter.device for parameter in model.parameters()), example.device)
        found = exported(model, example[:2].to(device), train=False)
        if isinstance(found, Failure):
            raise ModelError(
                f"branches need a model that torch.export can trace, but it failed: {found.reason}; use a rule that "
                "needs no tracing, such as filters"
            )
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            first.setdefault(id(parameter), name)
        names = {
            name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        self.nodes = list(found.graph.nodes)
        self.parameters = {
            node: names[found.names[node.name]] for node in self.nodes if found.names.get(node.name) in names
        }
        self.active: set[fx.Node] = set()
        for node in self.nodes:
            if node.name in found.inputs or any(source in self.active for source in node.all_input_nodes):
                self.active.add(node)

    def op(self, node: fx.Node) -> str:
        """Name of a node's operation without overload and trailing underscore, such as ``"conv2d"``."""
        return operation_of(node).rstrip("_")

    def argument(self, node: fx.Node, name: str) -> fx.Node | None:
        """The node that an operation gets as the argument of a name."""
        schema = getattr(node.target, "_schema", None)
        order = [] if schema is None else [argument.name for argument in schema.arguments]
        value = {**dict(zip(order, node.args, strict=False)), **node.kwargs}.get(name)
        return value if isinstance(value, fx.Node) else None

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The activations that a node reads."""
        return [source for source in node.all_input_nodes if source in self.active]

    def ancestors(self, node: fx.Node) -> set[fx.Node]:
        """A node and all activations that it depends on."""
        found, pending = {node}, [node]
        while pending:
            for source in self.sources(pending.pop()):
                if source not in found:
                    found.add(source)
                    pending.append(source)
        return found


def _find(graph: _Graph) -> Iterator[_Branch]:
    """The residual branches, in the order in which they are added."""
    for node in graph.nodes:
        if graph.op(node) != "add" and node.target is not operator.add:
            continue
        summands = graph.sources(node)
        if len(summands) != 2 or len(node.all_input_nodes) != 2:
            continue
        above = [graph.ancestors(summand) for summand in summands]
        common = above[0] & above[1]
        depths = [_depth(graph, summand, common) for summand in summands]
        if depths[0] == depths[1]:  # two branches, neither of which is the shortcut of the other
            continue
        last = summands[0] if depths[0] > depths[1] else summands[1]
        branch = _branch(graph, node, last, (above[0] | above[1]) - common)
        if branch is not None:
            yield branch


def _depth(graph: _Graph, node: fx.Node, common: set[fx.Node]) -> int:
    """Fewest weighted layers on a way from the common past to a node."""
    depths: dict[fx.Node, int] = dict.fromkeys(common, 0)
    above = graph.ancestors(node)
    for one in graph.nodes:
        if one in above and one not in depths:
            before = min((depths[source] for source in graph.sources(one)), default=0)
            depths[one] = before + (graph.op(one) in _WEIGHTED)
    return depths[node]


def _branch(graph: _Graph, total: fx.Node, last: fx.Node, exclusive: set[fx.Node]) -> _Branch | None:
    """The branch that ends in a summand; None if its last layer cannot be made zero by its own parameters."""
    serving: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in exclusive and all(
            user in serving or (user is total and node is last) for user in node.users
        ):
            serving.add(node)
    closing = last
    while closing in serving and graph.op(closing) in _KEEP_ZERO and len(graph.sources(closing)) == 1:
        closing = graph.sources(closing)[0]
    if closing not in serving or len(graph.sources(closing)) != 1:
        return None
    own = [
        name
        for node, name in graph.parameters.items()
        if node.users and all(user in serving for user in node.users)
    ]
    arguments = [graph.argument(closing, name) for name in _LAYERS.get(graph.op(closing), ())]
    gates = [graph.parameters[node] for node in arguments if node is not None and node in graph.parameters]
    given = [node for node in closing.all_input_nodes if node in graph.parameters]
    # A norm without scale and shift, a weight that is shared or computed: nothing here can make the output zero.
    if not gates or len(gates) != len(given) or not set(gates) <= set(own):
        return None
    return _Branch(tuple(gates), tuple(name for name in own if name not in gates))
