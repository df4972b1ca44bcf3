"""Rule of the tracer for recurrent layers: LSTM, GRU and plain RNN.

A hidden unit of a layer owns one row in each gate and reads itself through the recurrent weight. PyTorch gives all
layers and directions of one module the same `hidden_size`, so units of equal rank go together.
"""

from __future__ import annotations

import torch

from sparsebayes.groups.channel_ids import Leaf, Shadow, Trace
from sparsebayes.groups.trace_layers import Call, Result, along, fix_all, read, shadow_of, spread

__all__ = ["recurrent"]


def recurrent(trace: Trace, call: Call) -> Result:
    """Recurrent layers: read the features of each position, own the hidden units."""
    x, params = shadow_of(trace, call.named["input"]), call.named.get("params")
    module = call.modules.get(call.module)
    started = call.named["hx"] if isinstance(call.named["hx"], (list, tuple)) else [call.named["hx"]]
    plain = (
        isinstance(params, (list, tuple))
        and all(isinstance(leaf, Leaf) and leaf.is_parameter for leaf in params)
        and module is not None
        and getattr(module, "proj_size", None) == 0
        and not any(isinstance(state, Shadow) and bool(state.ids.any()) for state in started)
        and not any(isinstance(state, Leaf) for state in started)
    )
    if not plain:
        return fix_all(
            trace, call, f"they reach {call.place}, which starts from given states or projects its own"
        )
    assert isinstance(params, (list, tuple))
    both = 2 if call.named["bidirectional"] else 1
    per_layer = 4 if call.named["has_biases"] else 2
    ids, zero = along(trace, x, len(x.shape) - 1, f"channels and positions are mixed before {call.place}")
    trace.count(call.module, "input_size", None, ids)
    hidden = trace.fresh(params[1].shape[1])
    trace.count(call.module, "hidden_size", None, hidden)
    gates = params[0].shape[0] // len(hidden)
    flags = torch.ones(len(hidden), dtype=torch.bool)
    for cell in range(len(params) // per_layer):
        into, back, *biases = params[cell * per_layer : (cell + 1) * per_layer]
        if cell < both:
            read(trace, into, 1, ids, zero)
        else:
            read(trace, into, 1, hidden.repeat(both), flags.repeat(both))
        read(trace, back, 1, hidden, flags)
        for leaf in (into, back, *biases):
            trace.bind(leaf, 0, hidden.repeat(gates), reads=False)
    # All gates of a unit at zero: its state starts at 0 and stays there, in each of the three kinds of cell.
    states = [spread(hidden, True, len(shape) - 1, shape) for shape in call.shapes[1:]]
    return [spread(hidden.repeat(both), True, len(call.shape) - 1, call.shape), *states]
