"""Rules of the tracer for products: with raw parameters, and of two activations as in attention.

In a product of two activations, dims that both share side by side (batch, heads) carry units; a dim that is summed over
must not, since no parameter reads it. Scores are scaled by the width of a head, which therefore stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebayes.groups.channel_ids import Leaf, Shadow, Trace
from sparsebayes.groups.trace_layers import Call, Result, along, fix_all, own_entries, read, shadow_of, spread

__all__ = ["addmm", "attention", "einsum", "index", "matmul"]


def _is_weight(value: object) -> bool:
    return isinstance(value, Leaf) and value.is_parameter


def matmul(trace: Trace, call: Call) -> Result:
    """``x @ weight`` with a parameter ``[I, O]``, or a product of two activations."""
    first, second = call.args[0], call.args[1]
    if isinstance(first, Shadow) and _is_weight(second) and len(second.shape) == 2:
        return _times_weight(trace, call, first, second)
    if isinstance(first, Shadow) and isinstance(second, Shadow) and len(first.shape) == len(second.shape) > 2:
        return _product(trace, call, first, second)
    return fix_all(trace, call, f"they reach {call.place}, a product of two activations")


def addmm(trace: Trace, call: Call) -> Result:
    """``bias + x @ weight`` with parameters."""
    bias, first, second = call.args[:3]
    if not (isinstance(first, Shadow) and _is_weight(second) and _is_weight(bias) and len(bias.shape) == 1):
        return fix_all(trace, call, f"the weight of {call.place} is computed by other operations")
    result = _times_weight(trace, call, first, second)
    own_entries(trace, trace.own(second, 1), bias)
    return result


def _times_weight(trace: Trace, call: Call, x: Shadow, weight: Leaf) -> Result:
    last = len(x.shape) - 1
    across = set(trace.varies(x.ids)) - {last}
    if across and not trace.tie_positions(x.ids, across):
        return fix_all(trace, call, f"channels and positions are mixed before {call.place}")
    ids, zero = along(trace, x, last, "")
    read(trace, weight, 0, ids, zero)
    return spread(trace.own(weight, 1), True, len(call.shape) - 1, call.shape)


def _product(trace: Trace, call: Call, first: Shadow, second: Shadow) -> Result:
    """``[..., M, K] @ [..., K, N]``: units lie along the leading dims, or along N of the second one alone."""
    rank = len(call.shape)
    leading = range(rank - 2)
    one, two = set(trace.varies(first.ids)), set(trace.varies(second.ids))
    if (one | two) - {*leading} - ({rank - 1} & two - one):
        return fix_all(trace, call, f"they reach {call.place}, a product of two activations")
    if (one & {*leading} or two & {*leading}) and rank - 1 in two:
        return fix_all(trace, call, f"they reach {call.place}, a product of two activations")
    if rank - 1 in two:
        ids, zero = along(trace, second, rank - 1, "")
        return spread(ids, zero, rank - 1, call.shape)
    a, b = _ends(first), _ends(second)
    trace.unify(a.ids, b.ids, f"they are multiplied by values that stay in {call.place}")
    zero = (a.zero | b.zero).expand(call.shape)
    return Shadow(torch.maximum(a.ids, b.ids).expand(call.shape), zero)


def _ends(x: Shadow) -> Shadow:
    """A shadow without its last two dims, which are all zero or not at all."""
    zero = x.zero.all(-1, keepdim=True).all(-2, keepdim=True)
    return Shadow(x.ids[..., :1, :1], zero)


def attention(trace: Trace, call: Call) -> Result:
    """Fused attention ``[..., L, D]``: whole heads are units; a mask that differs from head to head lets them stay."""
    q, k, v = (shadow_of(trace, call.named[name]) for name in ("query", "key", "value"))
    mask = call.named.get("attn_mask")
    rank = len(call.shape)
    per_head = mask is not None and any(size != 1 for size in _aligned(mask, rank)[1 : rank - 2])
    varying = {dim for x in (q, k, v) for dim in trace.varies(x.ids)}
    if varying - {*range(rank - 2)} or per_head or call.named.get("enable_gqa"):
        return fix_all(
            trace, call, f"their number enters {call.place}, whose heads must keep their width and mask"
        )
    reason = f"they are multiplied by values that stay in {call.place}"
    parts = [_ends(x) for x in (q, k, v)]
    trace.unify(parts[0].ids, parts[1].ids, reason)
    trace.unify(parts[0].ids, parts[2].ids, reason)
    ids = torch.maximum(torch.maximum(parts[0].ids, parts[1].ids), parts[2].ids)
    return Shadow(ids.expand(call.shape), parts[2].zero.expand(call.shape))


def _aligned(mask: Shadow | Leaf, rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(mask.shape)) + tuple(mask.shape)


def index(trace: Trace, call: Call) -> Result:
    """Reading chosen positions: along channels these are numbers that stay; along one other dim it is a copy."""
    x = shadow_of(trace, call.args[0])
    if call.op == "index_select":
        dims = [int(call.named["dim"]) % len(x.shape)]
    else:
        dims = [dim for dim, chosen in enumerate(call.named["indices"]) if chosen is not None]
    varying = trace.varies(x.ids)
    is_tied = len(varying) > 1 and trace.tie_positions(x.ids, dims)
    if len(dims) != 1 or (dims[0] in varying and not is_tied):
        return fix_all(trace, call, f"{call.place} reads them at fixed positions")
    dim = dims[0]
    added = len(call.shape) - len(x.shape)

    def picked(value: Tensor) -> Tensor:
        value = value.narrow(dim, 0, 1)
        return value.reshape(*value.shape[:dim], *[1] * (added + 1), *value.shape[dim + 1 :]).expand(
            call.shape
        )

    return Shadow(picked(x.ids), picked(x.zero.all(dim, keepdim=True)))


def einsum(trace: Trace, call: Call) -> Result:
    """``einsum`` of an activation with a parameter, like a linear layer over any dims; else as products are."""
    equation = str(call.args[0]).replace(" ", "")
    operands = list(call.args[1])
    sides, _, out = equation.partition("->")
    letters = sides.split(",")
    is_plain = (
        len(operands) == 2 and out and "." not in equation and all(len(set(s)) == len(s) for s in letters)
    )
    if is_plain and _is_weight(operands[0]) and isinstance(operands[1], Shadow):
        operands.reverse()
        letters.reverse()
    if not is_plain or not isinstance(operands[0], Shadow):
        return fix_all(trace, call, f"they reach {call.place}, whose equation the tracer does not follow")
    if _is_weight(operands[1]):
        return _einsum_weight(trace, call, operands[0], operands[1], letters, out)
    return _einsum_activations(trace, call, operands, letters, out)


def _einsum_weight(trace: Trace, call: Call, x: Shadow, weight: Leaf, letters: list[str], out: str) -> Result:
    names, own_names = letters
    varying = trace.varies(x.ids)
    free = [letter for letter in own_names if letter not in names]
    summed = [letter for letter in own_names if letter in names and letter not in out]
    if len(varying) > 1 or len(free) > 1 or any(letter in own_names and letter in out for letter in names):
        return fix_all(trace, call, f"they reach {call.place}, whose equation the tracer does not follow")
    carried = names[varying[0]] if varying else ""
    if carried and carried not in own_names and carried not in out:
        return fix_all(trace, call, f"{call.place} works over channels")
    for letter in summed:
        ids, zero = along(trace, x, names.index(letter), "")
        read(trace, weight, own_names.index(letter), ids, zero)
    if carried in out and carried:
        # The channels pass by, and the parameter works on another dim.
        trace.fix(shadow_of(trace, weight).ids, f"{call.place} mixes positions, not channels")
        return fix_all(trace, call, f"{call.place} mixes positions, not channels")
    if not free:
        return fix_all(trace, call, f"{call.place} works over channels")
    return spread(trace.own(weight, own_names.index(free[0])), True, out.index(free[0]), call.shape)


def _einsum_activations(
    trace: Trace, call: Call, operands: list[Shadow], letters: list[str], out: str
) -> Result:
    """Letters that both operands and the result share may carry units, and no others."""
    shared = [letter for letter in out if all(letter in names for names in letters)]
    shadows = [shadow_of(trace, value) for value in operands]
    for shadow, names in zip(shadows, letters, strict=True):
        if any(names[dim] not in shared for dim in trace.varies(shadow.ids)):
            return fix_all(trace, call, f"they reach {call.place}, a product of two activations")

    def lined(value: Tensor, names: str, *, flag: bool) -> Tensor:
        for dim in reversed([d for d, letter in enumerate(names) if letter not in shared]):
            value = value.all(dim) if flag else value.select(dim, 0)
        rest = [letter for letter in names if letter in shared]
        value = value.permute([rest.index(letter) for letter in shared])
        return value[tuple(slice(None) if letter in shared else None for letter in out)]

    ids = [lined(s.ids, names, flag=False) for s, names in zip(shadows, letters, strict=True)]
    zero = [lined(s.zero, names, flag=True) for s, names in zip(shadows, letters, strict=True)]
    trace.unify(ids[0], ids[1], f"they are multiplied by values that stay in {call.place}")
    return Shadow(torch.maximum(ids[0], ids[1]).expand(call.shape), (zero[0] | zero[1]).expand(call.shape))
