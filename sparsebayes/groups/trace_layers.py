"""Rules of the tracer for operations with weights: how layers create, read and carry channel ids.

A rule takes the trace and one call of the graph and returns the shadow of the call's result. Here live the
rules that bind ids to (parameter, dim): convolutions, linear layers, embeddings and norms. The rules without
weights, and the table of all rules, are in `sparsebayes.groups.trace_ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsebayes.groups.channel_ids import Leaf, Shadow, Trace, core, fixed_shadow

__all__ = [
    "Call",
    "Result",
    "Rule",
    "along",
    "fix_all",
    "is_one_channel",
    "own_entries",
    "read",
    "shadow_of",
    "spread",
    "stays",
]

Result = Shadow | Leaf | list["Shadow"]


@dataclass(frozen=True, eq=False)
class Call:
    """One operation of the graph with its arguments.

    Attributes:
        op: Name without overload and trailing underscore, such as ``"relu"``.
        target: The operation itself.
        args: Its arguments: shadows and leaves where the graph has tensors, else plain values.
        kwargs: Its keyword arguments.
        named: All arguments by the name in the operation's schema, with defaults.
        shapes: Shape of each tensor that it returns.
        is_list: Whether it returns a list of tensors, even of one.
        place: Where it is, for messages: ``"aten.relu at 'features.1'"``.
        module: Path of the innermost module that it runs in.
        line: File and line of the model's code that calls it.
        modules: The model's modules by path.
        is_mixed: Whether its result goes straight into a product of two activations, as heads of attention do.
        is_image: Whether its result goes into a layer that has channels along dim 1, such as a convolution.
    """

    op: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    named: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    is_list: bool
    place: str
    module: str = ""
    line: str = ""
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    is_mixed: bool = False
    is_image: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first tensor that it returns."""
        return self.shapes[0]

    def pack(self, results: list[Shadow]) -> Result:
        """Results in the form in which the operation returns them."""
        return results if self.is_list else results[0]

    def tensors(self) -> list[Shadow | Leaf]:
        """All tensor arguments, also those in lists."""
        found: list[Shadow | Leaf] = []
        pending: list[Any] = [*self.args, *self.kwargs.values()]
        while pending:
            value = pending.pop(0)
            if isinstance(value, (list, tuple)):
                pending = [*value, *pending]
            elif isinstance(value, (Shadow, Leaf)):
                found.append(value)
        return found


Rule = Callable[[Trace, Call], Result]


def shadow_of(trace: Trace, value: Shadow | Leaf) -> Shadow:
    """The shadow of a tensor argument; a parameter gets an id per entry."""
    return value if isinstance(value, Shadow) else trace.shadow(value)


def fix_all(trace: Trace, call: Call, reason: str) -> Result:
    """Let everything that flows into a call stay; its results carry no units."""
    for value in call.tensors():
        trace.fix(shadow_of(trace, value).ids, reason)
    return call.pack([fixed_shadow(shape) for shape in call.shapes])


def along(trace: Trace, shadow: Shadow, dim: int, reason: str) -> tuple[Tensor, Tensor]:
    """Ids and zero flags along one dim, each of shape ``[size]``.

    If ids vary along another dim, all of them stay, for ``reason``; entries of raw parameters go together there.
    """
    dim %= len(shadow.shape)
    across = set(trace.varies(shadow.ids)) - {dim}
    if across and not trace.tie_positions(shadow.ids, across):
        trace.fix(shadow.ids, reason)
    others = [d for d in range(len(shadow.shape)) if d != dim]
    ids, zero = shadow.ids, shadow.zero
    for other in reversed(others):
        ids = ids.select(other, 0)
        zero = zero.all(other)
    return ids, zero


def spread(ids: Tensor, zero: Tensor | bool, dim: int, shape: tuple[int, ...]) -> Shadow:
    """Shadow of a result whose channels lie along ``dim``."""
    view = [1] * len(shape)
    view[dim] = -1
    flags = torch.full((), zero) if isinstance(zero, bool) else zero.view(view)
    return Shadow(ids.view(view).expand(shape), flags.expand(shape))


def is_one_channel(shadow: Shadow) -> bool:
    """Whether one channel, which may stay or not, fills an activation."""
    ids = core(shadow.ids)
    return ids.numel() > 0 and bool((ids == ids.max()).all() & (ids > 0).all())


def read(trace: Trace, leaf: Leaf, dim: int, ids: Tensor, zero: Tensor) -> None:
    """Bind the dim of a weight by which a consumer reads units."""
    trace.bind(leaf, dim, ids, reads=True)
    trace.taint(ids[~zero])


def stays(trace: Trace, leaf: Leaf, dim: int) -> None:
    """Bind a dim that holds no channels, so that another use of the same parameter cannot cut it."""
    trace.bind(leaf, dim, torch.zeros(leaf.shape[dim], dtype=torch.int64), reads=True)


def own_entries(trace: Trace, ids: Tensor, *leaves: Leaf | None) -> None:
    """Bind dim 0 of biases, affine parameters and running statistics."""
    for leaf in leaves:
        if leaf is not None:
            trace.bind(leaf, 0, ids, reads=False)


def _own_bias(trace: Trace, call: Call, ids: Tensor, bias: Shadow | Leaf | None) -> None:
    """Bind the bias of a layer to the outputs, which stay if other operations compute it."""
    if bias is None or (isinstance(bias, Leaf) and bias.is_parameter):
        own_entries(trace, ids, bias)
        return
    for computed in (ids, shadow_of(trace, bias).ids):
        trace.fix(computed, f"the bias of {call.place} is computed by other operations")


def _plain_weights(call: Call, *names: str) -> bool:
    """Whether these arguments are parameters of the model or None, and not computed in the graph."""
    values = [call.named.get(name) for name in names]
    return all(value is None or (isinstance(value, Leaf) and value.is_parameter) for value in values)


def convolution(trace: Trace, call: Call, *, transposed: bool = False) -> Result:
    """Convolutions: read the input channels, own the output channels; groups tie channels of equal rank."""
    if not _plain_weights(call, "weight"):
        return fix_all(trace, call, f"the weight of {call.place} is computed by other operations")
    weight, bias = call.named["weight"], call.named["bias"]
    x = shadow_of(trace, call.named["input"])
    groups = int(call.named["groups"])
    dim = len(x.shape) - len(weight.shape) + 1
    ids, zero = along(trace, x, dim, f"channels and positions are mixed before {call.place}")
    if groups == 1:
        in_dim, out_dim = (0, 1) if transposed else (1, 0)
        read(trace, weight, in_dim, ids, zero)
        out = trace.own(weight, out_dim)
    elif groups == len(ids):
        # Depthwise: a channel passes through, and the rows that scale it are its own.
        multiplier = call.shape[dim] // groups
        out = ids.repeat_interleave(multiplier)
        trace.bind(weight, 0, ids if transposed else out, reads=False)
    else:
        out = _grouped(trace, call, weight, ids, zero, transposed=transposed)
    _own_bias(trace, call, out, bias)
    return spread(out, True, dim, call.shape)


def _grouped(
    trace: Trace, call: Call, weight: Leaf, ids: Tensor, zero: Tensor, *, transposed: bool
) -> Tensor:
    """Ids of the outputs; groups must stay equal, so channels of equal rank in them are one unit."""
    groups = int(call.named["groups"])
    per_group = ids.view(groups, -1)
    reason = f"the groups of {call.place} must keep equal sizes, and one of them has channels that stay"
    trace.unify(per_group[:1], per_group, reason)
    if transposed:
        read(trace, weight, 0, ids, zero)
        return trace.own(weight, 1).repeat(groups)
    read(trace, weight, 1, per_group[0], zero.view(groups, -1).all(0))
    rows = trace.own(weight, 0)
    trace.unify(rows.view(groups, -1)[:1], rows.view(groups, -1), reason)
    return rows


def linear(trace: Trace, call: Call) -> Result:
    """Linear layers: read the input features, own the output features."""
    if not _plain_weights(call, "weight"):
        return fix_all(trace, call, f"the weight of {call.place} is computed by other operations")
    weight, bias = call.named["weight"], call.named["bias"]
    x = shadow_of(trace, call.named["input"])
    last = len(x.shape) - 1
    varying = trace.varies(x.ids)
    if varying and last not in varying:
        return _mixes_positions(trace, call, x)
    ids, zero = along(trace, x, last, f"channels and positions are mixed before {call.place}")
    read(trace, weight, 1, ids, zero)
    out = trace.own(weight, 0)
    _own_bias(trace, call, out, bias)
    return spread(out, True, last, call.shape)


def _mixes_positions(trace: Trace, call: Call, x: Shadow) -> Result:
    """A linear layer over positions leaves the channels alone; its own rows stay."""
    rows = trace.own(call.named["weight"], 0)
    _own_bias(trace, call, rows, call.named["bias"])
    trace.fix(rows, f"{call.place} mixes positions, not channels")
    stays(trace, call.named["weight"], 1)
    zero = x.zero.all(-1, keepdim=True)
    if call.named["bias"] is not None:
        zero = torch.zeros_like(zero)
    return Shadow(x.ids[..., :1].expand(call.shape), zero.expand(call.shape))


def embedding(trace: Trace, call: Call) -> Result:
    """Embeddings own their output features; the rows of the vocabulary stay."""
    weight = call.named["weight"]
    if not isinstance(weight, Leaf) or not weight.is_parameter:
        return fix_all(trace, call, f"the weight of {call.place} is computed by other operations")
    trace.fix(shadow_of(trace, call.named["indices"]).ids, f"they are used as numbers of {call.place}")
    stays(trace, weight, 0)
    return spread(trace.own(weight, 1), True, len(call.shape) - 1, call.shape)


def batch_norm(trace: Trace, call: Call) -> Result:
    """Batch and instance norms act on each channel: scale, shift and statistics belong to the channel."""
    if not _plain_weights(call, "weight", "bias"):
        return fix_all(trace, call, f"the weight of {call.place} is computed by other operations")
    x = shadow_of(trace, call.named["input"])
    entries = [call.named.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    if any(isinstance(value, Shadow) for value in entries):
        return fix_all(trace, call, f"the statistics of {call.place} are computed by other operations")
    ids, _ = along(trace, x, 1, f"channels and positions are mixed before {call.place}")
    own_entries(trace, ids, *entries)
    module = call.modules.get(call.module)
    size = (call.module, "num_features", None)
    # Else its tensors tell its size. It warns where that is wrong, no more: further uses need not have as many.
    if not any(entries) and isinstance(module, nn.modules.batchnorm._NormBase) and size not in trace.counts:
        trace.count(*size, ids)
    # With scale and shift at 0 the output is 0; without them the running mean shifts a zero input.
    return spread(ids, call.named["weight"] is not None, 1, call.shape)


def prelu(trace: Trace, call: Call) -> Result:
    """PReLU with one slope per channel, or one for all."""
    x, weight = shadow_of(trace, call.args[0]), call.args[1]
    if not isinstance(weight, Leaf) or not weight.is_parameter:
        return fix_all(trace, call, f"the weight of {call.place} is computed by other operations")
    trace.reached.add(weight.name)
    if weight.shape != (1,):
        ids, _ = along(trace, x, 1, f"channels and positions are mixed before {call.place}")
        own_entries(trace, ids, weight)
    return x
