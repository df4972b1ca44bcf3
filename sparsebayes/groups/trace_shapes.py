"""Rules of the tracer for operations that move, join and cut tensors: they run unchanged on the ids.

What needs care is that the removal of a unit must leave a tensor that the same Python code can still handle:
a position number or a size written into the code does not shrink with the channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebayes.groups.channel_ids import Leaf, Shadow, Trace
from sparsebayes.groups.trace_layers import Call, Result, fix_all, shadow_of

__all__ = ["chunk", "cut", "glu", "join", "move", "pad", "pixel_shuffle", "reshape"]


def move(trace: Trace, call: Call) -> Result:
    """Permutations, expansions, repetitions: no position depends on a number that removal would change."""
    if isinstance(call.named.get("repeats"), (Leaf, Shadow)):
        return fix_all(trace, call, f"{call.place} repeats them by numbers from a tensor")

    def pick(value: Any, field: str) -> Any:
        if isinstance(value, (Shadow, Leaf)):
            shadow = shadow_of(trace, value)
            return shadow.ids if field == "ids" else shadow.zero
        return [pick(item, field) for item in value] if isinstance(value, (list, tuple)) else value

    results: list[list[Tensor]] = []
    for field in ("ids", "zero"):
        kwargs = {key: pick(value, field) for key, value in call.kwargs.items()}
        result = call.target(*pick(call.args, field), **kwargs)
        results.append([result] if isinstance(result, Tensor) else list(result))
    shadows = [Shadow(ids, zero) for ids, zero in zip(*results, strict=True)]
    return shadows[0] if isinstance(result, Tensor) else shadows


def reshape(trace: Trace, call: Call) -> Result:
    """Views and flattening: fine if the channels' dim shrinks by itself (kept as it is, or of size -1)."""
    x = shadow_of(trace, call.args[0])
    result = Shadow(x.ids.reshape(call.shape), x.zero.reshape(call.shape))
    before, after = trace.varies(x.ids), trace.varies(result.ids)
    if not after:
        return result
    inferred = _inferred(call)
    if len(after) > 1:
        if inferred not in after:
            return fix_all(trace, call, f"{call.place} splits them over several dimensions")
        # The other dims keep their sizes, so channels of equal rank along the inferred one go together.
        settle(trace, result, inferred)
        return result
    size = call.shape[after[0]]
    adapts = call.op == "flatten" or after[0] == inferred
    # A size beside an inferred batch, view(-1, 512), is a number in the code; one that equals theirs may
    # have been read off the tensor.
    written = inferred == 0 or len(before) != 1 or x.shape[before[0]] != size
    if written and not adapts:
        reason = f"{call.place} gives them the size {size}; flatten(1) or -1 would adapt"
        return fix_all(trace, call, reason)
    return result


def _inferred(call: Call) -> int | None:
    """Dim of the result whose size is -1 in the call; None if all sizes are given."""
    sizes = call.named.get("size", call.named.get("shape", call.named.get("sizes")))
    if sizes is None or -1 not in sizes:
        return None
    first = 0
    if call.op == "unflatten":
        first = int(call.named["dim"]) % (len(call.shape) - len(sizes) + 1)
    return first + list(sizes).index(-1)


def settle(trace: Trace, shadow: Shadow, dim: int) -> None:
    """Unify ids along all dims but ``dim``."""
    first = shadow.ids
    for other in range(first.ndim):
        if other != dim:
            first = first.narrow(other, 0, 1)
    trace.unify(first, shadow.ids, "they share a dimension with values that stay")


def join(trace: Trace, call: Call) -> Result:
    """Concatenation and stacking: along channels they line up; elsewhere equal channels become one unit."""
    shadows = [shadow_of(trace, value) for value in call.tensors()]
    dims = {dim for shadow in shadows for dim in trace.varies(shadow.ids)}
    result = move(trace, call)
    assert isinstance(result, Shadow)
    where = int(call.named.get("dim", 0)) % len(call.shape)
    if call.op == "stack":
        dims = {dim + (dim >= where) for dim in dims}
    across = dims - {where}
    if len(across) > 1 or (across and where in dims):
        return fix_all(trace, call, f"{call.place} joins channels that lie along different dimensions")
    if across:
        first = result.ids.narrow(where, 0, 1)
        reason = f"they are joined with values that stay by {call.place}"
        trace.unify(first, result.ids, reason)
    return result


def cut(trace: Trace, call: Call) -> Result:
    """Slices, splits and rolls: their numbers are part of the code, so channels that they cut stay."""
    x = shadow_of(trace, call.args[0])
    if call.shapes == (x.shape,) and call.op == "slice":
        return x
    dims = call.named.get("dim", call.named.get("dims", 0))
    chosen = {int(dim) % len(x.shape) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}
    # roll without dims works on the flattened tensor.
    everywhere = call.op == "roll" and not chosen
    if set(trace.varies(x.ids)) & chosen or everywhere:
        return fix_all(trace, call, f"{call.place} cuts them at a fixed position")
    return move(trace, call)


def _tie_parts(trace: Trace, x: Shadow, dim: int, parts: int, place: str) -> bool:
    """Unify channels of equal rank in ``parts`` equal parts along ``dim``; False if they are unequal."""
    size = x.shape[dim]
    if size % parts:
        return False
    pieces = x.ids.view(*x.shape[:dim], parts, size // parts, *x.shape[dim + 1 :])
    trace.unify(
        pieces.narrow(dim, 0, 1), pieces, f"{place} needs equal parts, and one has channels that stay"
    )
    return True


def chunk(trace: Trace, call: Call) -> Result:
    """``chunk(n)``: parts stay equal, so channels of equal rank in the parts are one unit."""
    x = shadow_of(trace, call.args[0])
    dim = int(call.named["dim"]) % len(x.shape)
    if dim in trace.varies(x.ids) and not _tie_parts(trace, x, dim, int(call.named["chunks"]), call.place):
        return fix_all(trace, call, f"{call.place} cuts them into unequal parts")
    return move(trace, call)


def glu(trace: Trace, call: Call) -> Result:
    """Gated linear unit: first half times sigmoid of the second half."""
    x = shadow_of(trace, call.args[0])
    dim = int(call.named["dim"]) % len(x.shape)
    _tie_parts(trace, x, dim, 2, call.place)
    half = x.shape[dim] // 2
    return Shadow(x.ids.narrow(dim, 0, half), x.zero.narrow(dim, 0, half))


def pad(trace: Trace, call: Call) -> Result:
    """Padding: new positions in space belong to their channel; new channels stay."""
    x = shadow_of(trace, call.args[0])
    amounts = [int(amount) for amount in call.named["pad"]]
    constant = call.named.get("mode", "constant") == "constant"
    varying = trace.varies(x.ids)
    ids, zero = x.ids, x.zero
    # Along the other dims channels do not vary, so one position stands for all, old and new.
    for dim in set(range(len(x.shape))) - set(varying):
        ids, zero = ids.narrow(dim, 0, 1), zero.all(dim, keepdim=True)
    for rank in range(len(amounts) // 2):
        dim, margin = len(x.shape) - 1 - rank, amounts[2 * rank : 2 * rank + 2]
        if dim not in varying or margin == [0, 0]:
            continue
        if min(margin) < 0 or not constant:
            return fix_all(trace, call, f"{call.place} cuts or mirrors them at a fixed position")
        ids = F.pad(ids, [0, 0] * rank + margin)
        zero = F.pad(zero.long(), [0, 0] * rank + margin).bool()
    if constant and call.named.get("value"):
        zero = torch.zeros_like(zero)
    return Shadow(ids.expand(call.shape), zero.expand(call.shape))


def pixel_shuffle(trace: Trace, call: Call) -> Result:
    """Pixel shuffle: the r*r channels behind one output channel go together."""
    result = move(trace, call)
    assert isinstance(result, Shadow)
    settle(trace, result, len(call.shape) - 3)
    return result
