"""Coupled units of a network: which slices of which parameters must go together when a channel goes.

A *unit* is one removable channel or neuron: the rows that produce it (with bias and norm entries) and all
slices by which later layers read it. `trace_units` finds them for any model that `torch.export` can export:
it runs a shadow tensor of channel ids through the exported graph (see `sparsebayes.groups.channel_ids`).

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> trace_units(net, torch.zeros(2, 4))
    UnitGraph(3 units; 0: 3)
    >>> [(s.parameter, s.dim, s.reads, s.unit.tolist()) for s in trace_units(net, torch.zeros(2, 4)).slices]
    [('0.weight', 0, False, [0, 1, 2]), ('0.bias', 0, False, [0, 1, 2]), ('2.weight', 1, True, [0, 1, 2])]

Nothing is guessed: channels that reach the model's outputs, or an operation that the tracer does not know,
stay, and `UnitGraph.fixed` says why.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from sparsebayes.errors import ModelError
from sparsebayes.groups.channel_ids import Binding, Leaf, Shadow, Trace, fixed_shadow
from sparsebayes.groups.scope import owner
from sparsebayes.groups.trace_layers import Call, Result, shadow_of
from sparsebayes.groups.trace_ops import OPS, unknown_op

__all__ = ["Slice", "UnitGraph", "trace_units"]

# Operations without a result that matters.
_CHECKS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size"}


@dataclass(frozen=True, eq=False)
class Slice:
    """Which unit each position along one dim of a parameter or buffer belongs to.

    Attributes:
        parameter: Name of the parameter (its first name, if shared) or buffer.
        dim: The dim.
        unit: Unit numbers, int64 of shape ``[size of that dim]``; -1 = stays. Numbers may repeat: after a
            flatten, each unit is read by several columns.
        reads: True where a consumer reads the unit; False for the unit's own rows, bias and norm entries.
    """

    parameter: str
    dim: int
    unit: Tensor
    reads: bool


@dataclass(frozen=True, eq=False)
class UnitGraph:
    """The ``U`` units of a model.

    Attributes:
        slices: Slices of parameters that belong to units, in the order of the graph.
        layers: Names of the layers that produce units; a unit of several layers (a residual sum) is named
            after the first.
        layer_index: Position in ``layers`` of each unit, int64 of shape ``[U]``.
        fixed: One sentence for each layer whose channels stay, with the reason.
        buffers: Slices of buffers: running statistics of norms.
        zero_preserving: Bool of shape ``[U]``: True if a unit whose own entries are all 0 is read as 0, so
            that it may go. False behind a sigmoid, for instance, which turns 0 into 0.5.
    """

    slices: tuple[Slice, ...]
    layers: tuple[str, ...]
    layer_index: Tensor
    fixed: tuple[str, ...]
    buffers: tuple[Slice, ...]
    zero_preserving: Tensor

    @property
    def num_units(self) -> int:
        """Number of units, U."""
        return int(self.layer_index.numel())

    def __repr__(self) -> str:
        counts = torch.bincount(self.layer_index, minlength=len(self.layers)).tolist()
        parts = ", ".join(f"{layer}: {count}" for layer, count in zip(self.layers, counts, strict=True))
        return f"UnitGraph({self.num_units} units; {parts or 'none'})"


def trace_units(model: nn.Module, example: Tensor) -> UnitGraph:
    """Find the units of a model.

    Args:
        model: Any model of one tensor that `torch.export` can export. Its mode, gradients and the caller's
            random state are as before afterwards.
        example: An input, ``[B, ...]``; of a batch only the first two are used. It is moved to the model's
            device.

    Returns:
        The units. Parameters that only training mode uses (auxiliary heads) are traced in training mode as
        well.

    Raises:
        ModelError: If the model has no parameters or cannot be exported.
    """
    leaves = _leaves(model)
    device = next(model.parameters()).device
    example = example[:2].to(device)
    trace = Trace()
    program = _export(model, example, train=False)
    if isinstance(program, str):
        raise ModelError(
            f"units need a model that torch.export can trace, but it failed: {program}. Rules that need no "
            "tracing: weights, rows, columns, filters, channels, kernels, shapes, blocks, n:m"
        )
    _propagate(trace, program, leaves)
    notes: list[str] = []
    if _unreached(model, trace):
        program = _export(model, example, train=True)
        if not isinstance(program, str):
            _propagate(trace, program, leaves)
        notes = [f"{name!r} is never used by the model's forward" for name in _unreached(model, trace)]
    return _resolve(trace, notes)


def _leaves(model: nn.Module) -> dict[str, Leaf]:
    """Leaf of each parameter and buffer, under all its names."""
    leaves: dict[str, Leaf] = {}
    first: dict[int, Leaf] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.UninitializedParameter):
            raise ModelError(
                f"the lazy parameter {name!r} has no shape yet: run the model once on an example"
            )
        leaves[name] = first.setdefault(id(parameter), Leaf(name, tuple(parameter.shape), True))
    if not leaves:
        raise ModelError("units need a model with parameters, but this one has none")
    for name, buffer in model.named_buffers(remove_duplicate=False):
        leaves[name] = first.setdefault(id(buffer), Leaf(name, tuple(buffer.shape), False))
    return leaves


def _unreached(model: nn.Module, trace: Trace) -> list[str]:
    """Layers none of whose parameters were reached, in order."""
    names = [name for name, _ in model.named_parameters()]
    used = {owner(name) for name in names if name in trace.reached}
    return [layer for layer in dict.fromkeys(map(owner, names)) if layer not in used]


@contextmanager
def _mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Puts the model into one mode, and each module and the random state back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    random_state = torch.get_rng_state()
    model.train(train)
    try:
        yield
    finally:
        torch.set_rng_state(random_state)
        for module, training in modes:
            module.training = training


def _export(model: nn.Module, example: Tensor, *, train: bool) -> torch.export.ExportedProgram | str:
    """The exported graph, or the exporter's reason against it in one line."""
    with _mode(model, train=train), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        try:
            return torch.export.export(model, (example,), strict=False)
        except Exception as error:  # the exporter raises what the model raises, which can be anything
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return (lines[0] if lines else type(error).__name__).rstrip(".")


def _propagate(trace: Trace, program: torch.export.ExportedProgram, leaves: dict[str, Leaf]) -> None:
    """Run shadows through the graph."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    values: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(node, names, leaves)
        elif node.op == "call_function" and node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            values[node] = _call(trace, node, values)
        elif node.op == "output":
            for value in _tensors(_filled(node.args, values)):
                trace.fix(shadow_of(trace, value).ids, "they are outputs of the model")
        # get_attr nodes are the sub-graphs of control flow, whose operation has no rule.


def _placeholder(node: fx.Node, names: dict[str, str], leaves: dict[str, Leaf]) -> Leaf | Shadow | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    shape = tuple(value.shape)
    name = names.get(node.name)
    if name is not None:
        return leaves[name]
    is_constant = node.name.startswith("c_")
    return Leaf("", shape, False) if is_constant else fixed_shadow(shape)


def _call(trace: Trace, node: fx.Node, values: dict[fx.Node, Any]) -> Result | None:
    """Apply the rule of one operation."""
    returned = node.meta.get("val")
    is_list = isinstance(returned, (list, tuple))
    results = returned if isinstance(returned, (list, tuple)) else [returned]
    shapes = [tuple(result.shape) for result in results if isinstance(result, Tensor)]
    packet = str(getattr(getattr(node.target, "overloadpacket", None), "__name__", node.target))
    if packet in _CHECKS:
        return None
    op = packet.rstrip("_")
    args, kwargs = _filled(node.args, values), _filled(node.kwargs, values)
    call = Call(
        op=op,
        target=cast("Callable[..., Any]", node.target),
        args=args,
        kwargs=kwargs,
        named=_named(node, args, kwargs),
        shapes=tuple(shapes),
        is_list=is_list or not shapes,
        place=_place(node, op),
    )
    rule = OPS.get(op, unknown_op) if str(node.target).startswith("aten.") and shapes else unknown_op
    try:
        result = rule(trace, call)
    except (KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"the tracer cannot follow {call.place}: {error}; use a rule that needs no tracing"
        ) from error
    if packet.endswith("_") and isinstance(node.args[0], fx.Node):
        _changed_in_place(trace, values[node.args[0]], result)
    return result


def _changed_in_place(trace: Trace, before: Any, result: Result) -> None:
    """An in-place operation also changes other views of its argument, whose shadows promise zeros still."""
    if isinstance(before, Shadow) and isinstance(result, Shadow) and bool((before.zero & ~result.zero).any()):
        trace.taint(before.ids)


def _filled(value: Any, values: dict[fx.Node, Any]) -> Any:
    """Arguments with each node replaced by its shadow or leaf."""
    return fx.node.map_arg(value, values.get)


def _tensors(value: Any) -> Iterator[Shadow | Leaf]:
    if isinstance(value, (Shadow, Leaf)):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _named(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by their names in the operation's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(kwargs)
    named = {argument.name: argument.default_value for argument in schema.arguments}
    order = [argument.name for argument in schema.arguments]
    return {**named, **dict(zip(order, args, strict=False)), **kwargs}


def _place(node: fx.Node, op: str) -> str:
    """Operation and module, for messages."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    module = stack[-1][0] if stack else ""
    return f"{op} at {module!r}" if module else f"{op} in the model's forward"


def _resolve(trace: Trace, notes: list[str]) -> UnitGraph:
    """Number the classes of ids that are units, and collect their slices."""
    bindings = [*trace.bindings.values(), *_leaf_bindings(trace)]
    own = [binding for binding in bindings if binding.own and binding.leaf.is_parameter]
    none = torch.zeros(0, dtype=torch.int64)
    read = torch.cat([none, *(trace.roots(binding.ids) for binding in bindings if binding.reads)])
    for binding in own:
        unread = ~torch.isin(trace.roots(binding.ids), read)
        trace.fix(binding.ids[unread], "no layer reads them")
    unit = torch.full((trace.num_ids,), -1)
    layers: dict[str, int] = {}
    layer_index: list[Tensor] = [none]
    num_units = 0
    for binding in own:
        found = trace.classes(binding.ids)
        new = found[(found > 0) & (unit[found] < 0)].numpy()
        roots = torch.from_numpy(new[np.sort(np.unique(new, return_index=True)[1])])
        if len(roots):
            layer = layers.setdefault(owner(binding.leaf.name), len(layers))
            unit[roots] = torch.arange(num_units, num_units + len(roots))
            layer_index.append(torch.full((len(roots),), layer))
            num_units += len(roots)
    slices: list[Slice] = []
    buffers: list[Slice] = []
    for binding in bindings:
        units = unit[trace.classes(binding.ids)]
        if bool((units >= 0).any()):
            target = slices if binding.leaf.is_parameter else buffers
            for reads in [False] * binding.own + [True] * binding.reads:
                target.append(Slice(binding.leaf.name, binding.dim, units, reads))
    preserving = torch.ones(num_units, dtype=torch.bool)
    tainted = unit[trace.tainted()]
    preserving[tainted[tainted >= 0]] = False
    fixed = (*_sentences(trace, own), *notes)
    return UnitGraph(tuple(slices), tuple(layers), torch.cat(layer_index), fixed, tuple(buffers), preserving)


def _leaf_bindings(trace: Trace) -> list[Binding]:
    """Bindings of the parameters and buffers that met activations element by element."""
    used_twice = {name for name, _ in trace.bindings} & set(trace.leaves)
    for binding in trace.bindings.values():
        if binding.leaf.name in used_twice:
            trace.fix(binding.ids, f"{binding.leaf.name!r} is also used outside of its layer")
            trace.fix(trace.leaves[binding.leaf.name][1].ids, "")
    # To let one parameter stay can bind another, so this repeats until nothing changes.
    count = -1
    while count != len(trace.reasons):
        count = len(trace.reasons)
        for leaf, shadow in trace.leaves.values():
            if len(trace.varies(shadow.ids)) > 1:
                trace.fix(shadow.ids, f"{leaf.name!r} cannot be cut along one dimension")
    bindings: list[Binding] = []
    for leaf, shadow in trace.leaves.values():
        long = trace.varies(shadow.ids) or [d for d, size in enumerate(leaf.shape) if size > 1] or [0]
        ids = shadow.ids
        for dim in reversed([d for d in range(len(leaf.shape)) if d != long[0]]):
            ids = ids.select(dim, 0)
        bindings.append(Binding(leaf, long[0], ids, own=True, reads=False))
    return bindings


def _sentences(trace: Trace, own: list[Binding]) -> list[str]:
    """One sentence for each layer and reason; channels of several layers are told of the first."""
    told: set[int] = set()
    counts: dict[tuple[str, str], int] = {}
    for binding in own:
        stays = trace.roots(binding.ids)[trace.classes(binding.ids) == 0].tolist()
        for root in stays:
            if root not in told:
                key = (owner(binding.leaf.name), trace.reason(root))
                counts[key] = counts.get(key, 0) + 1
        told.update(root for root in stays if root)
    return [f"{layer!r}: {count} channels stay: {reason}" for (layer, reason), count in counts.items()]
