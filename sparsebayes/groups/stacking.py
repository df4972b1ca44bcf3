"""Several groupings of one model as one, numbered one after the other: ``"units+features"``.

>>> concatenate([make_grouping(net, "rows"), make_grouping(net, "columns")])
Grouping('rows+columns', 7 groups; 0: 3, 0 (columns): 4)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsebayes.errors import GroupingError
from sparsebayes.groups.grouping import Grouping, Labels, Quota

__all__ = ["concatenate"]


def concatenate(groupings: Sequence[Grouping]) -> Grouping:
    """Stack groupings into one whose groups are numbered one grouping after the other.

    A layer name that two of them use becomes ``"conv1 (filters)"`` from the second on, so that names stay
    unique.

    Args:
        groupings: At least one grouping, all of the same model.

    Raises:
        GroupingError: If there is none, if two disagree on a parameter's shape, or on how many groups a quota
            keeps.
    """
    if not groupings:
        raise GroupingError("expected at least one grouping to stack, got none")
    if len(groupings) == 1:
        return groupings[0]
    labels: list[Labels] = []
    layers: list[str] = []
    optional: list[str] = []
    layer_index: list[Tensor] = []
    num_groups = 0
    for grouping in groupings:
        for part in grouping.labels:
            index = torch.where(part.index < 0, part.index, part.index + num_groups)
            labels.append(Labels(part.parameter, part.shape, index, part.gate))
        layer_index.append(grouping.layer_index + len(layers))
        taken = set(layers)
        layers += [_unused(layer, grouping.name, taken) for layer in grouping.layers]
        optional += [_unused(layer, grouping.name, taken) for layer in grouping.optional_layers]
        num_groups += grouping.num_groups
    _check_shapes(labels)
    name = "+".join(grouping.name for grouping in groupings)
    index, quota = torch.cat(layer_index), _stack_quotas(groupings)
    return Grouping(name, tuple(labels), tuple(layers), index, quota, tuple(optional))


def _stack_quotas(groupings: Sequence[Grouping]) -> Quota | None:
    """Quota of stacked groupings: pools are renumbered; groups of a grouping without quota are in no pool."""
    keeps = sorted({grouping.quota.keep for grouping in groupings if grouping.quota is not None})
    if not keeps:
        return None
    if len(keeps) > 1:
        raise GroupingError(f"stacked n:m groupings must keep the same number of each pool, got {keeps}")
    pools: list[Tensor] = []
    num_pools = 0
    for grouping in groupings:
        if grouping.quota is None:
            pools.append(torch.full((grouping.num_groups,), -1, dtype=torch.int64))
            continue
        pool = grouping.quota.pool
        pools.append(torch.where(pool < 0, pool, pool + num_pools))
        num_pools += int(pool.max()) + 1 if pool.numel() else 0
    return Quota(torch.cat(pools), keeps[0])


def _unused(layer: str, rule: str, taken: set[str]) -> str:
    """``layer``, or a variant of it that is not in ``taken``."""
    candidate, count = layer, 1
    while candidate in taken:
        candidate = f"{layer} ({rule})" if count == 1 else f"{layer} ({rule} {count})"
        count += 1
    return candidate


def _check_shapes(labels: Sequence[Labels]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for part in labels:
        if shapes.setdefault(part.parameter, part.shape) != part.shape:
            raise GroupingError(
                f"stacked groupings must be of one model, but {part.parameter!r} has shape "
                f"{list(shapes[part.parameter])} in one and {list(part.shape)} in another"
            )
