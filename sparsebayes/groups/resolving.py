"""From a finished trace to the units of the model: numbers, slices, and a reason for all that stays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsebayes.groups.channel_ids import Binding, Trace
from sparsebayes.groups.scope import owner
from sparsebayes.groups.unit_graph import Slice, UnitCount, UnitGraph

__all__ = ["resolve"]


def resolve(trace: Trace, notes: Sequence[str]) -> tuple[UnitGraph, Tensor]:
    """Number the classes of ids that are units, and collect their slices.

    Args:
        trace: All graphs of the model have been run through it.
        notes: Further sentences about what stays.

    Returns:
        The units, and the unit of each channel id (-1 for those that stay), int64.
    """
    bindings = [*trace.bindings.values(), *_leaf_bindings(trace)]
    own = [binding for binding in bindings if binding.own and binding.leaf.is_parameter]
    none = torch.zeros(0, dtype=torch.int64)
    is_read = torch.zeros(trace.num_ids, dtype=torch.bool)
    for binding in bindings:
        if binding.reads:
            is_read[trace.roots(binding.ids)] = True
    for binding in own:
        trace.fix(binding.ids[~is_read[trace.roots(binding.ids)]], "no layer reads them")
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
    unit_of_id = unit[trace.classes(torch.arange(trace.num_ids))]
    unit_of_id[0] = -1
    joint = torch.zeros(num_units, dtype=torch.bool)
    members = unit[trace.joint()]
    joint[members[members >= 0]] = True
    counts = tuple(
        UnitCount(count.module, count.attribute, count.position, unit_of_id[count.ids])
        for count in trace.counts.values()
    )
    graph = UnitGraph(
        tuple(slices), tuple(layers), torch.cat(layer_index), fixed, tuple(buffers), preserving, counts, joint
    )
    return graph, unit_of_id


def _leaf_bindings(trace: Trace) -> list[Binding]:
    """Bindings of the parameters and buffers that met activations element by element."""
    used_twice = {name for name, _ in trace.bindings} & set(trace.leaves)
    for binding in trace.bindings.values():
        if binding.leaf.name in used_twice:
            reason = f"{binding.leaf.name!r} is also used outside of its layer"
            trace.fix(binding.ids, reason)
            trace.fix(trace.leaves[binding.leaf.name][1].ids, reason)
    # To let one parameter stay can bind another, so this repeats until nothing changes.
    count = -1
    while count != len(trace.reasons):
        count = len(trace.reasons)
        for ids, why in trace.tied:
            if not trace.varies(ids):
                trace.fix(ids, why)
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
