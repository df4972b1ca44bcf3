"""Rules of the tracer for operations that move, join and cut tensors: they run unchanged on the ids.

What needs care is that the removal of a unit must leave a tensor that the same Python code can still handle:
a position number or a size written into the code does not shrink with the channels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsebayes.groups.channel_ids import Leaf, Shadow, Trace
from sparsebayes.groups.trace_layers import Call, Result, fix_all, is_one_channel, shadow_of, spread
from sparsebayes.groups.written_sizes import Attribute, assumed_reading, attributes_for, follow, in_order

__all__ = [
    "channel_shuffle",
    "chunk",
    "copies",
    "cut",
    "expand_as",
    "glu",
    "join",
    "move",
    "pad",
    "pixel_shuffle",
    "pixel_unshuffle",
    "reshape",
    "roll",
]

_SPLITS = "splits them over several dimensions, by sizes that do not follow them"


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


def expand(trace: Trace, call: Call) -> Result:
    """Expansion to sizes, of which those of the channels' dims must follow them."""
    result = move(trace, call)
    assert isinstance(result, Shadow)
    sizes = call.named.get("size")
    varying = trace.varies(result.ids)
    if not isinstance(sizes, (list, tuple)) or not any(sizes[dim] != -1 for dim in varying):
        return result
    readings: list[tuple[Attribute, ...]] = [(), *attributes_for(call, [call.shape[dim] for dim in varying])]
    reading = assumed_reading(trace, call, readings) if len(varying) == 1 else None
    if reading is None:
        return fix_all(trace, call, f"{call.place} expands them to a fixed size")
    follow(trace, reading, [_line(result.ids, dim) for dim in varying][: len(reading)])
    return result


def copies(trace: Trace, call: Call) -> Result:
    """Expansion and repetition of one channel along a dim: as many copies as there are channels that they meet."""
    x = shadow_of(trace, call.args[0])
    shape = (1,) * (len(call.shape) - len(x.shape)) + x.shape
    dims = [dim for dim in range(1, len(shape)) if shape[dim] == 1 != call.shape[dim]]
    reading = None
    if is_one_channel(x) and len(dims) == 1:
        readings: list[tuple[Attribute, ...]] = [(), *attributes_for(call, [call.shape[dims[0]]])]
        reading = assumed_reading(trace, call, readings)
    if reading is None:
        return move(trace, call) if call.op == "repeat" else expand(trace, call)
    trace.fix(x.ids, f"they are spread over other channels by {call.place}")
    followers = trace.fresh(call.shape[dims[0]])
    follow(trace, reading, [followers] * len(reading))
    return spread(followers, False, dims[0], call.shape)


def expand_as(trace: Trace, call: Call) -> Result:
    """Expansion to the shape of another tensor: the copies along its channels follow them."""
    x, other = (shadow_of(trace, value) for value in call.args[:2])
    shape = (1,) * (len(call.shape) - len(x.shape)) + x.shape
    varying = trace.varies(other.ids)
    copied = [dim for dim in varying if shape[dim] == 1 != call.shape[dim]]
    if not copied:
        return move(trace, call)
    trace.fix(x.ids, f"they are spread over other channels by {call.place}")
    if len(varying) > 1:
        return fix_all(trace, call, f"{call.place} copies their number")
    return spread(_line(other.ids, copied[0]), False, copied[0], call.shape)


def reshape(trace: Trace, call: Call) -> Result:
    """Views and flattening: fine if the sizes in the call follow the channels, see `written_sizes`."""
    x = shadow_of(trace, call.args[0])
    result = Shadow(x.ids.reshape(call.shape), x.zero.reshape(call.shape))
    after = trace.varies(result.ids)
    inferred = _inferred(call)
    if not after or (len(after) == 1 and (call.op == "flatten" or after[0] == inferred)):
        return result
    if len(after) > 1 and inferred in after and not call.is_mixed:
        # The other dims keep their sizes, so channels of equal rank along the inferred one go together.
        settle(trace, result, inferred)
        return result
    # Heads come before what they hold; otherwise the last dim has the most channels as a rule.
    carriers = after[-2:] if call.is_mixed else after[:-3:-1]
    if call.is_image and 1 in after:
        carriers = [1]
    readings: list[tuple[int, tuple[Attribute, ...]]] = []
    for dim in carriers:
        ways = [] if dim == inferred else attributes_for(call, [call.shape[dim]])
        readings += in_order(call, [(dim, ())], [(dim, way) for way in ways])
    reading = assumed_reading(trace, call, readings)
    if reading is None:
        size = call.shape[after[0]]
        why = f"gives them the size {size}; flatten(1) or -1 would adapt"
        return fix_all(trace, call, f"{call.place} {why if len(after) == 1 else _SPLITS}")
    dim, attributes = reading
    if len(after) > 1:
        settle(trace, result, dim)
    line = _line(result.ids, dim)
    follow(trace, attributes, [line] * len(attributes))
    return result


def _line(ids: Tensor, dim: int) -> Tensor:
    """Ids along one dim, where they are the same along all others."""
    for other in reversed([d for d in range(ids.ndim) if d != dim]):
        ids = ids.select(other, 0)
    return ids


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
    several = [set(trace.varies(shadow.ids)) for shadow in shadows]
    known = set().union(*(dims for dims in several if len(dims) == 1))
    for shadow, found in zip(shadows, several, strict=True):
        if len(known) == 1 and found - known:
            trace.tie_positions(shadow.ids, found - known)
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
    """Slices, splits, selections: their positions follow the channels in one of the ways of `written_sizes`."""
    x = shadow_of(trace, call.args[0])
    if call.shapes == (x.shape,) and call.op == "slice":
        return x
    dim = int(call.named.get("dim", 0)) % len(x.shape)
    varying = trace.varies(x.ids)
    if dim not in varying or (len(varying) > 1 and trace.tie_positions(x.ids, [dim])):
        return move(trace, call)
    reason = f"{call.place} cuts them at a fixed position"
    bounds, sizes = _bounds(call, x.shape[dim])
    if varying != [dim] or bounds is None:
        return fix_all(trace, call, reason)
    line = _line(x.ids, dim)
    result = move(trace, call)
    if call.op != "select":
        for part in result if isinstance(result, list) else [shadow_of(trace, result)]:
            if part.shape[dim] == 1:
                trace.fix(part.ids, reason)  # it could only vanish, and a neighbour take its place
    sizes = [(start, stop) for start, stop in sizes if stop - start > 1]
    ways = attributes_for(call, [stop - start for start, stop in sizes])
    readings: list[tuple[int, tuple[Attribute, ...]]] = in_order(call, [(1, ())], [(1, way) for way in ways])
    # Equal parts, of which each must be able to lose something: a part of one channel could only vanish.
    parts = [
        n for n in (2, 3, 4) if len(line) // n > 1 and all(bound * n % len(line) == 0 for bound in bounds)
    ]
    readings += [(n, ()) for n in parts[:1]]
    reading = assumed_reading(trace, call, readings) if call.op != "select" else None
    if reading is None:
        for bound in bounds:
            trace.fix(line[:bound] if bound >= 0 else line[bound:], reason)
        if call.op in ("split_with_sizes", "unsafe_split_with_sizes"):
            trace.fix(line, reason)  # the sizes must add up to the whole
        return result
    count, attributes = reading
    trace.cuts.append(_pieces(line, bounds))
    _tie_parts(trace, x, dim, count, call.place)
    follow(trace, attributes, [line[start:stop] for start, stop in sizes[: len(attributes)]])
    return result


def roll(trace: Trace, call: Call) -> Result:
    """Rolling mixes channels with their neighbours; along other dims it leaves them alone."""
    x = shadow_of(trace, call.args[0])
    chosen = {int(dim) % len(x.shape) for dim in call.named["dims"]}
    if set(trace.varies(x.ids)) & (chosen or set(range(len(x.shape)))):
        return fix_all(trace, call, f"{call.place} cuts them at a fixed position")
    return move(trace, call)


def _bounds(call: Call, size: int) -> tuple[list[int] | None, list[tuple[int, int]]]:
    """Positions within ``0..size`` at which a call cuts, and the pieces whose sizes the code gives.

    A position counted from the end is negative; None: the call does more than to cut pieces.
    """
    if call.op == "select":
        index = int(call.named["index"])
        return [index + 1 if index >= 0 else index], []
    if call.op in ("slice", "narrow"):
        start = int(call.named.get("start") or 0)
        stop = call.named.get("end")
        if call.op == "narrow":
            stop = start + int(call.named["length"])
        stop = size if stop is None else int(stop)
        if int(call.named.get("step") or 1) != 1:
            return None, []
        bounds = [bound for bound in (start, stop) if bound != 0 and bound < size]
        return bounds, [(0, bound) for bound in bounds if bound > 0]
    if call.op in ("split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes"):
        pieces = [shape[int(call.named.get("dim", 0)) % len(shape)] for shape in call.shapes]
        stops = [sum(pieces[: rank + 1]) for rank in range(len(pieces))]
        return stops, list(zip([0, *stops[:-1]], stops, strict=True))
    return None, []


def _pieces(line: Tensor, bounds: list[int]) -> list[Tensor]:
    """The pieces between the positions at which a line is cut."""
    stops = sorted({0, len(line), *(bound % len(line) for bound in bounds)})
    return [line[start:stop] for start, stop in pairwise(stops)]


def _tie_parts(trace: Trace, x: Shadow, dim: int, parts: int, place: str) -> bool:
    """Unify channels of equal rank in ``parts`` equal parts along ``dim``; False if they are unequal."""
    size = x.shape[dim]
    if size % parts:
        return False
    if parts == 1:
        return True
    pieces = x.ids.reshape(*x.shape[:dim], parts, size // parts, *x.shape[dim + 1 :])
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


def channel_shuffle(trace: Trace, call: Call) -> Result:
    """Channel shuffle: groups stay equal, so channels of equal rank in them are one unit."""
    x = shadow_of(trace, call.args[0])
    if 1 in trace.varies(x.ids):
        _tie_parts(trace, x, 1, int(call.named["groups"]), call.place)
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


def pixel_unshuffle(trace: Trace, call: Call) -> Result:
    """The inverse of pixel shuffle: each channel becomes r*r neighbours, which go with it."""
    return move(trace, call)
