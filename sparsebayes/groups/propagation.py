"""Running shadows of channel ids through an exported graph, one rule per operation."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

from torch import Tensor, fx, nn

from sparsebayes.errors import ModelError
from sparsebayes.groups.channel_ids import Leaf, Shadow, Trace, fixed_shadow
from sparsebayes.groups.exporting import Exported, line_of, operation_of, path_of
from sparsebayes.groups.trace_layers import Call, Result, shadow_of
from sparsebayes.groups.trace_ops import OPS, constant, unknown_op
from sparsebayes.groups.trace_recurrent import first_state, is_first_state

__all__ = ["CHECKS", "propagate"]

# Operations without a result that matters.
CHECKS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size"}
_OWN_CODE = "the model's forward works sizes out of their number"
_SPLITS = {"reshape", "view", "unflatten", "_unsafe_view"}
_PRODUCTS = {"scaled_dot_product_attention", "matmul", "bmm", "einsum"}
_MOVES = {
    "transpose", "permute", "unbind", "contiguous", "select", "mul", "div", "clone", "dropout", "split", "chunk",
    "squeeze", "unsqueeze", "reshape", "view", "mT", "movedim", "swapaxes", "softmax", "add",
}  # fmt: skip
_IMAGE_LAYERS = ("conv", "batch_norm", "instance_norm", "group_norm", "upsample", "pixel_shuffle")
_ACTIVATIONS = {
    "relu", "leaky_relu", "elu", "gelu", "silu", "hardswish", "tanh", "sigmoid", "contiguous", "clone", "dropout",
    "add", "mul",
}  # fmt: skip


def propagate(
    trace: Trace,
    one: Exported,
    leaves: Mapping[str, Leaf],
    modules: Mapping[str, nn.Module],
    frozen: Collection[str] = (),
) -> dict[fx.Node, Any]:
    """Run shadows through a graph.

    Args:
        trace: Collects ids, bindings and reasons.
        one: The graph.
        leaves: Leaf of each parameter and buffer, under all its names.
        modules: The model's modules by path.
        frozen: Paths of modules whose code does not follow a removal: what they work on stays.

    Returns:
        For each node a shadow, a leaf, a list of shadows, or None; nothing for those whose results nobody uses.

    Raises:
        ModelError: If a rule meets what it cannot handle.
    """
    needed = _needed(one)
    values: dict[fx.Node, Any] = {}
    for node in one.graph.nodes:
        if node.op == "placeholder":
            values[node] = _placeholder(node, one, leaves)
        elif node not in needed:
            _freeze(trace, node, values, frozen)
        elif node.op == "call_function" and node.target is operator.getitem:
            values[node] = values[node.args[0]][node.args[1]]
        elif node.op == "call_function":
            values[node] = _call(trace, node, values, modules)
            _freeze(trace, node, values, frozen)
        elif node.op == "output":
            for value in _tensors(_filled(node.args, values)):
                trace.fix(shadow_of(trace, value).ids, "they are outputs of the model")
        # get_attr nodes are the sub-graphs of control flow, whose operation has no rule.
    return values


def _needed(one: Exported) -> set[fx.Node]:
    """Nodes whose results are used: an unused attention map, say, must not let its heads stay.

    A layer is needed in any case: it runs, so its weights must fit what it reads.
    """
    from_input: set[fx.Node] = set()
    for node in one.graph.nodes:
        if node.name in one.inputs or any(source in from_input for source in node.all_input_nodes):
            from_input.add(node)
    needed: set[fx.Node] = set()
    for node in reversed(one.graph.nodes):
        has_weights = node in from_input and any(source.name in one.names for source in node.all_input_nodes)
        in_place = node.op == "call_function" and operation_of(node).endswith("_")
        if node.op == "output" or in_place or has_weights or any(user in needed for user in node.users):
            needed.add(node)
    return needed


def _freeze(trace: Trace, node: fx.Node, values: dict[fx.Node, Any], frozen: Collection[str]) -> None:
    """Let everything stay that a node of a frozen module, or of one within it, works on."""
    if not frozen:
        return
    path = path_of(node)
    around = [one for one in frozen if path == one or (one and path.startswith(f"{one}."))]
    if not around:
        return
    where = min(around, key=len)
    reason = f"the code of {where!r} works sizes out of their number" if where else _OWN_CODE
    for other in (node, *node.all_input_nodes):
        for value in _tensors(values.get(other)):
            if isinstance(value, Shadow):
                trace.fix(value.ids, reason)


def _is_mixed(node: fx.Node, depth: int = 10) -> bool:
    """Whether a result goes, merely moved about, into a product of two activations."""
    for user in node.users:
        name = operation_of(user)
        if name in _PRODUCTS and all(arg.op != "placeholder" for arg in user.all_input_nodes):
            return True
        if depth and (name in _MOVES or user.target is operator.getitem) and _is_mixed(user, depth - 1):
            return True
    return False


def _is_image(node: fx.Node, depth: int = 10) -> bool:
    """Whether a result goes, through operations on each entry alone, into a layer with channels along dim 1."""
    names = {
        user: operation_of(user).rstrip("_") for user in node.users if user.args and user.args[0] is node
    }
    return any(name.startswith(_IMAGE_LAYERS) for name in names.values()) or any(
        depth > 0 and name in _ACTIVATIONS and _is_image(user, depth - 1) for user, name in names.items()
    )


def _placeholder(node: fx.Node, one: Exported, leaves: Mapping[str, Leaf]) -> Leaf | Shadow | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    shape = tuple(value.shape)
    name = one.names.get(node.name)
    if name is not None:
        return leaves[name]
    return fixed_shadow(shape) if node.name in one.inputs else Leaf("", shape, False)


def _call(
    trace: Trace, node: fx.Node, values: dict[fx.Node, Any], modules: Mapping[str, nn.Module]
) -> Result | None:
    """Apply the rule of one operation."""
    returned = node.meta.get("val")
    is_list = isinstance(returned, (list, tuple))
    results = returned if isinstance(returned, (list, tuple)) else [returned]
    shapes = [tuple(result.shape) for result in results if isinstance(result, Tensor)]
    packet = operation_of(node)
    if packet in CHECKS:
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
        module=path_of(node),
        line=line_of(node),
        modules=modules,
        is_mixed=op in _SPLITS and _is_mixed(node),
        is_image=op in _SPLITS and _is_image(node),
    )
    rule = OPS.get(op, unknown_op) if str(node.target).startswith("aten.") and shapes else unknown_op
    if rule is constant and is_first_state(node):
        rule = first_state
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
    module = path_of(node)
    return f"{op} at {module!r}" if module else f"{op} in the model's forward"
