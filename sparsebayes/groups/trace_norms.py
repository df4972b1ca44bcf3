"""Rules of the tracer for norms whose statistics are taken over channels: layer, RMS and group norms.

A channel that goes changes such statistics, unless the norm still counts it as a zero. The layers of
`sparsebayes.layers.norms` do, so a channel behind one of the layers that they can replace is a unit, with two
conditions: it must be zero in front of the norm when its own entries are (`Trace.fix` otherwise), and it may only go
when they are (`Trace.join`), whoever reads it.
"""

from __future__ import annotations

import torch
from torch import nn

from sparsebayes.groups.channel_ids import Leaf, Shadow, Trace
from sparsebayes.groups.standins import is_layer_norm_of_images
from sparsebayes.groups.trace_layers import (
    Call,
    Result,
    along,
    fix_all,
    own_entries,
    shadow_of,
    spread,
)

__all__ = ["group_norm", "layer_norm"]


def layer_norm(trace: Trace, call: Call) -> Result:
    """Layer and RMS norms: over channels where a norm of `sparsebayes.layers` can stand in; over positions always."""
    x = shadow_of(trace, call.named["input"])
    dims = call.named["normalized_shape"]
    over = range(len(x.shape) - len(dims), len(x.shape))
    if set(trace.varies(x.ids)) & set(over):
        module = call.modules.get(call.module)
        if type(module) in (nn.LayerNorm, nn.RMSNorm) or is_layer_norm_of_images(module):
            return _joint(trace, call, x, groups=1)
        return fix_all(trace, call, _refusal(call))
    for leaf in call.tensors()[1:]:
        trace.fix(shadow_of(trace, leaf).ids, f"they scale positions in {call.place}")
    zero = x.zero.all() if call.named.get("bias") is None else torch.zeros((), dtype=torch.bool)
    return Shadow(x.ids, zero.expand(call.shape))


def group_norm(trace: Trace, call: Call) -> Result:
    """Group norms: as many channels go from each group; with a group per channel, a channel is its own."""
    x = shadow_of(trace, call.named["input"])
    module = call.modules.get(call.module)
    if type(module) is not nn.GroupNorm:
        return fix_all(trace, call, _refusal(call))
    return _joint(trace, call, x, groups=int(call.named["num_groups"]))


def _refusal(call: Call) -> str:
    return (
        f"the statistics of {call.place} are taken over channels, and only whole norm layers can be replaced"
    )


def _joint(trace: Trace, call: Call, x: Shadow, *, groups: int) -> Result:
    entries = [call.named.get("weight"), call.named.get("bias")]
    dims = call.named.get("normalized_shape")
    if (dims is not None and len(dims) > 1) or any(
        value is not None and not (isinstance(value, Leaf) and value.is_parameter) for value in entries
    ):
        return fix_all(trace, call, _refusal(call))
    dim = len(x.shape) - 1 if dims is not None else 1
    ids, zero = along(trace, x, dim, f"channels and positions are mixed before {call.place}")
    attribute, position = ("num_channels", None) if dims is None else ("normalized_shape", 0)
    trace.count(call.module, attribute, position, ids)
    if groups == len(ids):
        trace.count(call.module, "num_groups", None, ids)
    else:
        if groups > 1:
            ranks = ids.view(groups, -1)
            trace.unify(
                ranks[:1],
                ranks,
                f"the groups of {call.place} must keep equal sizes, and one has channels that stay",
            )
        trace.fix(
            ids[~zero], f"the statistics of {call.place} count them, and they are not 0 when they are off"
        )
        trace.join(ids)
    own_entries(trace, ids, *entries)
    # With scale and shift at 0 the output is 0; without them 0 stays 0 only if the mean is 0 as well, or not taken off.
    is_centred = call.op != "rms_norm" and groups != len(ids)
    is_zero = entries[0] is not None or (not is_centred and bool(zero.all()))
    return spread(ids, is_zero, dim, call.shape)
