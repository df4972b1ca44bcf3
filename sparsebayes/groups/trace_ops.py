"""The table of the tracer: what each operation does to channel ids.

One row of `OPS` per operation. Shape operations run unchanged on the ids; element-wise operations unify the
ids of their arguments; pools and reductions carry ids over the dims that they leave alone. An operation
without a row makes all ids that reach it stay, and the report names it: nothing is guessed.

To teach the tracer an operation, add its name (without overload and trailing underscore) with one of the
rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sparsebayes.groups import trace_layers as layers
from sparsebayes.groups import trace_norms as norms
from sparsebayes.groups import trace_products as products
from sparsebayes.groups import trace_recurrent as recurrent
from sparsebayes.groups import trace_shapes as shapes
from sparsebayes.groups.channel_ids import Leaf, Shadow, Trace, core
from sparsebayes.groups.trace_layers import Call, Result, Rule, fix_all, is_one_channel, shadow_of

__all__ = ["OPS", "constant", "unknown_op"]


def unknown_op(trace: Trace, call: Call) -> Result:
    """An operation without a row: everything that reaches it stays."""
    return fix_all(trace, call, f"they reach {call.place}, which the tracer does not know")


def keep(trace: Trace, call: Call) -> Result:
    """The result is the first argument: copies, conversions, dropout."""
    first = call.args[0]
    return first if isinstance(first, (Leaf, Shadow)) else unknown_op(trace, call)


def constant(trace: Trace, call: Call) -> Result:
    """A tensor made from a shape alone: it has no units."""
    return fix_all(trace, call, f"{call.place} copies their size")


def elementwise(trace: Trace, call: Call) -> Result:
    """Unify the ids of all tensor arguments, position by position."""
    shadows = [shadow_of(trace, value) for value in call.tensors()]
    if not shadows:
        return constant(trace, call)
    ids, flags = _meet(trace, call, shadows)
    if call.op in ("mul", "multiply") and len(flags) > 1:
        zero = flags[0] | flags[1]
    elif call.op in ("div", "divide", "true_divide") and len(flags) > 1:
        zero = flags[0]
    else:
        zero = torch.tensor(_keeps_zero(call))
        for flag in flags:
            zero = zero & flag
    return Shadow(ids, zero.expand(call.shape))


def _meet(trace: Trace, call: Call, shadows: list[Shadow]) -> tuple[Tensor, list[Tensor]]:
    """Ids of the result of an element-wise operation, and the zero flags of its arguments.

    An argument that is spread over the channels of another (a scalar, a spatial attention map) belongs to
    none of them: it stays, and the others keep their ids. Where one channel has been copied to the number of
    others, all of them stay.
    """
    aligned = [(1,) * (len(call.shape) - len(shadow.shape)) + shadow.shape for shadow in shadows]
    varying = [trace.varies(x.ids.expand(shape)) for x, shape in zip(shadows, aligned, strict=True)]
    carried = torch.zeros((), dtype=torch.int64)
    met = False
    flags: list[Tensor] = []
    for position, shadow in enumerate(shadows):
        others = {dim for rank, dims in enumerate(varying) if rank != position for dim in dims}
        if any(aligned[position][dim] == 1 and call.shape[dim] != 1 for dim in others):
            trace.fix(shadow.ids, f"they are spread over other channels by {call.place}")
            flags.append(torch.tensor(False))
            continue
        if others and is_one_channel(shadow):
            for one in shadows:
                trace.fix(one.ids, f"one channel is copied to the number of others before {call.place}")
        flags.append(core(shadow.zero))
        if shadow.ids.numel() == 1 and not shadow.ids.any():
            continue
        if met:
            trace.unify(carried, shadow.ids, f"they are combined with values that stay by {call.place}")
        carried = torch.maximum(core(carried), core(shadow.ids)) if met else core(shadow.ids)
        met = True
    return carried.expand(call.shape), flags


def _keeps_zero(call: Call) -> bool:
    """Whether the operation maps zeros to zeros, found by running it on zeros."""

    def zeros(value: Any) -> Any:
        if isinstance(value, (Shadow, Leaf)):
            return torch.zeros([2] * len(value.shape))
        return [zeros(item) for item in value] if isinstance(value, (list, tuple)) else value

    try:
        result = call.target(*zeros(call.args), **{key: zeros(value) for key, value in call.kwargs.items()})
    except (RuntimeError, TypeError, IndexError, ValueError):
        return False
    return isinstance(result, Tensor) and bool((result == 0).all())


def over_space(trace: Trace, call: Call, *, dims: int) -> Result:
    """Pools and interpolation over the last ``dims`` dims, each channel by itself."""
    x = shadow_of(trace, call.args[0])
    space = range(len(x.shape) - dims, len(x.shape))
    if set(trace.varies(x.ids)) & set(space):
        return fix_all(trace, call, f"{call.place} mixes them along the dims over which it works")
    ids, zero = x.ids, x.zero
    for dim in space:
        ids = ids.narrow(dim, 0, 1)
        zero = zero.all(dim, keepdim=True)
    return call.pack([Shadow(ids.expand(shape), zero.expand(shape)) for shape in call.shapes])


def reduction(trace: Trace, call: Call) -> Result:
    """Sums, means, maxima over positions; over channels no weight could mask one, so these stay."""
    if len(call.tensors()) > 1:  # max(x, y)
        return elementwise(trace, call)
    x = shadow_of(trace, call.args[0])
    chosen = call.named.get("dim")
    if chosen is None or chosen == []:
        chosen = list(range(len(x.shape)))
    dims = sorted({int(dim) % len(x.shape) for dim in (chosen if isinstance(chosen, list) else [chosen])})
    if set(trace.varies(x.ids)) & set(dims):
        return fix_all(trace, call, f"{call.place} works over channels")
    ids, zero = x.ids, x.zero
    for dim in dims:
        ids = ids.narrow(dim, 0, 1)
        zero = zero.all(dim, keepdim=True)
    flags = zero & torch.tensor(_keeps_zero(call))
    return call.pack([Shadow(ids.reshape(shape), flags.reshape(shape)) for shape in call.shapes])


def along_dim(trace: Trace, call: Call) -> Result:
    """Softmax and running sums along one dim: fine over positions; over channels these stay."""
    x = shadow_of(trace, call.args[0])
    dim = int(call.named["dim"]) % len(x.shape)
    if dim in trace.varies(x.ids):
        return fix_all(trace, call, f"{call.place} works over channels")
    zero = x.zero.all(dim, keepdim=True) & torch.tensor(_keeps_zero(call))
    return Shadow(x.ids, zero.expand(call.shape))


_ELEMENTWISE = (
    "abs add addcdiv addcmul atan atan2 bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max "
    "clamp_min cos cosh div divide elu eq erf erfc exp expm1 floor floor_divide fmod ge gelu gt hardshrink "
    "hardsigmoid hardswish hardtanh le leaky_relu lerp log log10 log1p log2 log_sigmoid logical_and "
    "logical_not logical_or lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative pow "
    "reciprocal relu relu6 remainder round rsqrt rsub selu sigmoid sign silu sin sinh softplus softshrink "
    "sqrt square sub subtract tan tanh threshold true_divide trunc where zeros_like ones_like full_like"
).split()
_KEEP = (
    "_to_copy alias alpha_dropout clone contiguous detach dropout dropout1d dropout2d dropout3d "
    "feature_alpha_dropout feature_dropout lift_fresh lift_fresh_copy to type_as"
).split()
_MOVE = (
    "flip movedim moveaxis mT permute repeat_interleave squeeze swapaxes swapdims t tile transpose unsqueeze"
).split()
_RESHAPE = "_unsafe_view flatten reshape unflatten view".split()
_CUT = "narrow select slice split split_with_sizes unbind unsafe_split unsafe_split_with_sizes".split()
_REDUCE = (
    "all amax amin any linalg_vector_norm logsumexp max mean median min nanmean nansum norm prod std sum var"
).split()
_SHAPE_ONLY = (
    "arange empty eye full linspace new_empty new_full new_ones new_zeros ones rand randn scalar_tensor zeros"
).split()


def _spatial_rows() -> dict[str, Rule]:
    rows: dict[str, Rule] = {}
    for dims in (1, 2, 3):
        rule = partial(over_space, dims=dims)
        for name in ("adaptive_avg_pool", "adaptive_max_pool", "avg_pool", "max_pool"):
            rows[f"{name}{dims}d"] = rule
        rows[f"max_pool{dims}d_with_indices"] = rule
        rows[f"upsample_nearest{dims}d"] = rule
        rows[f"_upsample_nearest_exact{dims}d"] = rule
    for name in ("upsample_bilinear2d", "upsample_bicubic2d"):
        rows[name] = partial(over_space, dims=2)
    rows["upsample_linear1d"] = partial(over_space, dims=1)
    rows["upsample_trilinear3d"] = partial(over_space, dims=3)
    return rows


def _layer_rows() -> dict[str, Rule]:
    rows: dict[str, Rule] = {
        "linear": layers.linear,
        "matmul": products.matmul,
        "mm": products.matmul,
        "embedding": layers.embedding,
        "batch_norm": layers.batch_norm,
        "instance_norm": layers.batch_norm,
        "layer_norm": norms.layer_norm,
        "group_norm": norms.group_norm,
        "rms_norm": norms.layer_norm,
        "prelu": layers.prelu,
    }
    for dims in (1, 2, 3):
        rows[f"conv{dims}d"] = layers.convolution
        rows[f"conv_transpose{dims}d"] = partial(layers.convolution, transposed=True)
    return rows


OPS: Mapping[str, Rule] = MappingProxyType(
    {
        **_layer_rows(),
        **_spatial_rows(),
        **dict.fromkeys(_ELEMENTWISE, elementwise),
        **dict.fromkeys(_KEEP, keep),
        **dict.fromkeys(_MOVE, shapes.move),
        **dict.fromkeys(_RESHAPE, shapes.reshape),
        **dict.fromkeys(_CUT, shapes.cut),
        **dict.fromkeys(_REDUCE, reduction),
        **dict.fromkeys(_SHAPE_ONLY, constant),
        "softmax": along_dim,
        "log_softmax": along_dim,
        "cumsum": along_dim,
        "cat": shapes.join,
        "concat": shapes.join,
        "stack": shapes.join,
        "channel_shuffle": shapes.channel_shuffle,
        "chunk": shapes.chunk,
        "glu": shapes.glu,
        "pad": shapes.pad,
        "constant_pad_nd": shapes.pad,
        "pixel_shuffle": shapes.pixel_shuffle,
        "pixel_unshuffle": shapes.pixel_unshuffle,
        "roll": shapes.roll,
        "expand": shapes.copies,
        "expand_as": shapes.expand_as,
        "broadcast_to": shapes.copies,
        "repeat": shapes.copies,
        "unsafe_chunk": shapes.chunk,
        "index": products.index,
        "index_select": products.index,
        "einsum": products.einsum,
        "addmm": products.addmm,
        "bmm": products.matmul,
        "scaled_dot_product_attention": products.attention,
        **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent.recurrent),
    }
)
