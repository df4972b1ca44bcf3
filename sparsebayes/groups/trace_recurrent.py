"""Rule of the tracer for recurrent layers: LSTM, GRU and plain RNN.

A hidden unit of a layer owns one row in each gate and reads itself through the recurrent weight. PyTorch gives all
layers and directions of one module the same `hidden_size`, so units of equal rank go together. States that the model's
code starts from, ``torch.zeros(1, batch, self.hidden_size)``, have the width of the layer, and so follow it too.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from sparsebayes.groups.channel_ids import Leaf, Trace
from sparsebayes.groups.exporting import operation_of
from sparsebayes.groups.trace_layers import (
    Call,
    Result,
    along,
    fix_all,
    read,
    shadow_of,
    spread,
)
from sparsebayes.groups.written_sizes import assumed_reading, attributes_for, follow, in_order

__all__ = ["first_state", "is_first_state", "recurrent"]

_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
# These leave the last dim of a state alone.
_COPIES = {"_to_copy", "to", "detach", "clone", "contiguous", "unsqueeze", "expand", "repeat"}


def is_first_state(node: fx.Node) -> bool:
    """Whether a constant goes, at most copied, into recurrent layers alone, as the state that they start from."""
    users = [user for user in node.users if not operation_of(user).startswith("_assert")]
    return bool(users) and all(
        is_first_state(user)
        if operation_of(user) in _COPIES
        else operation_of(user) in _RECURRENT and node not in user.all_input_nodes[:1]
        for user in users
    )


def first_state(trace: Trace, call: Call) -> Result:
    """The constant that a recurrent layer starts from: its last size follows the layer's hidden units."""
    hidden = trace.fresh(call.shape[-1])
    if not isinstance(call.modules.get(call.module), nn.RNNBase):  # whose own zeros have its `hidden_size`
        ways = attributes_for(call, [len(hidden)])
        reading = assumed_reading(trace, call, in_order(call, [()], ways))
        if reading is None:
            trace.fix(hidden, f"{call.place} gives the states that they start from the size {len(hidden)}")
        follow(trace, reading or (), [hidden] * len(reading or ()))
    return spread(hidden, call.op in ("zeros", "new_zeros"), len(call.shape) - 1, call.shape)


def recurrent(trace: Trace, call: Call) -> Result:
    """Recurrent layers: read the features of each position, own the hidden units."""
    x, params = shadow_of(trace, call.named["input"]), call.named.get("params")
    module = call.modules.get(call.module)
    plain = isinstance(params, (list, tuple)) and all(
        isinstance(leaf, Leaf) and leaf.is_parameter for leaf in params
    )
    if not plain or getattr(module, "proj_size", None) != 0:
        return fix_all(
            trace, call, f"they reach {call.place}, whose weights are computed or which projects its states"
        )
    assert isinstance(params, (list, tuple))
    both = 2 if call.named["bidirectional"] else 1
    per_layer = 4 if call.named["has_biases"] else 2
    ids, zero = along(trace, x, len(x.shape) - 1, f"channels and positions are mixed before {call.place}")
    trace.count(call.module, "input_size", None, ids)
    hidden = trace.fresh(params[1].shape[1])
    trace.count(call.module, "hidden_size", None, hidden)
    gates = params[0].shape[0] // len(hidden)
    flags = _started(trace, call, hidden)
    for cell in range(len(params) // per_layer):
        into, back, *biases = params[cell * per_layer : (cell + 1) * per_layer]
        if cell < both:
            read(trace, into, 1, ids, zero)
        else:
            read(trace, into, 1, hidden.repeat(both), flags.repeat(both))
        read(trace, back, 1, hidden, flags)
        for leaf in (into, back, *biases):
            trace.bind(leaf, 0, hidden.repeat(gates), reads=False)
    # All gates of a unit at zero: its state stays at 0 where it starts there, in each of the three kinds of cell.
    both_flags = flags.repeat(both)
    states = [spread(hidden, flags, len(shape) - 1, shape) for shape in call.shapes[1:]]
    return [spread(hidden.repeat(both), both_flags, len(call.shape) - 1, call.shape), *states]


def _started(trace: Trace, call: Call, hidden: Tensor) -> Tensor:
    """Let the states that a layer starts from follow its hidden units; which of them start at zero."""
    given = call.named["hx"] if isinstance(call.named["hx"], (list, tuple)) else [call.named["hx"]]
    flags = torch.ones(len(hidden), dtype=torch.bool)
    for value in given:
        state = shadow_of(trace, value)
        ids, zero = along(
            trace, state, len(state.shape) - 1, f"layers differ in the states that {call.place} starts from"
        )
        trace.unify(hidden, ids, f"{call.place} starts from states that stay")
        flags = flags & zero
    return flags
