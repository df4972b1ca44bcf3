"""Index algebra of groups: which entries of which parameters belong together, and maps between both views.

A *group* is a set of weight entries that stay or go together; a *grouping* partitions (parts of) a model into
``G`` numbered groups. It is stored as one integer index tensor per parameter, so that every quantity is
either one vector ``[G]`` or a ``dict[str, Tensor]`` of parameter-shaped tensors:

    >>> rows = Labels("fc.weight", (2, 3), torch.tensor([[0], [1]]))
    >>> grouping = Grouping("rows", (rows,), ("fc",), torch.tensor([0, 0]))
    >>> grouping.reduce({"fc.weight": torch.ones(2, 3)})
    tensor([3., 3.])
    >>> grouping.expand(torch.tensor([1.0, 2.0]))["fc.weight"]
    tensor([[1., 1., 1.],
            [2., 2., 2.]])

``reduce`` (call it R) and ``expand`` are adjoint: ``<R v, s> = <v, R^T s>`` for all values v and vectors s,
also where groups overlap. The penalty, the curvature of switches and the masks are all built from this pair.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sparsebayes.errors import GroupingError

__all__ = ["Grouping", "Labels", "Quota"]


@dataclass(frozen=True, eq=False)
class Labels:
    """Which group each entry of one parameter belongs to.

    Attributes:
        parameter: Name of the parameter in ``model.named_parameters()`` (the first name of a shared one).
        shape: The parameter's shape.
        index: Group numbers, int64 on the CPU, with as many dims as ``shape``, each of size 1 or
            ``shape[d]``: it is broadcast to ``shape``. -1 means "in no group".
        gate: True if scaling these entries scales the group's switch. The slices by which consumers read a
            unit are gates; the unit's own rows are not (behind a norm, scaling them changes nothing).

    Raises:
        GroupingError: If ``index`` does not fit ``shape``, is not int64, or holds numbers below -1.
    """

    parameter: str
    shape: tuple[int, ...]
    index: Tensor
    gate: bool = True
    _slots: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        shape = tuple(int(size) for size in self.shape)
        object.__setattr__(self, "shape", shape)
        index = self.index
        fits = index.ndim == len(shape) and all(i in (1, s) for i, s in zip(index.shape, shape, strict=True))
        if not fits:
            raise GroupingError(
                f"labels of {self.parameter!r}: expected an index that broadcasts to {list(shape)} with "
                f"{len(shape)} dims, got {list(index.shape)}"
            )
        if index.dtype != torch.int64 or index.device.type != "cpu":
            raise GroupingError(
                f"labels of {self.parameter!r}: expected an int64 index on the CPU, "
                f"got {index.dtype} on {index.device}"
            )
        if index.numel() and int(index.min()) < -1:
            raise GroupingError(
                f"labels of {self.parameter!r}: group numbers start at 0 and -1 means none, "
                f"got {int(index.min())}"
            )

    @property
    def dim(self) -> int | None:
        """The one dim along which the groups vary; None if they vary along none or several."""
        varying = [d for d, size in enumerate(self.index.shape) if size > 1]
        return varying[0] if len(varying) == 1 else None

    def slots(self, num_groups: int, device: torch.device) -> Tensor:
        """``index`` on ``device`` with slot ``num_groups`` for the entries in no group; cached."""
        if (device, num_groups) not in self._slots:
            index = self.index
            if index.numel() and int(index.min()) < 0:
                index = index.where(index >= 0, torch.tensor(num_groups))
            self._slots[device, num_groups] = index.to(device)
        return self._slots[device, num_groups]


@dataclass(frozen=True, eq=False)
class Quota:
    """Keep exactly ``keep`` groups of every pool (n:m sparsity: pools of m weights, n kept).

    Attributes:
        pool: Pool of each group, int64 of shape ``[G]``; -1 for groups in no pool.
        keep: Number of groups that stay in each pool.
    """

    pool: Tensor
    keep: int


@dataclass(frozen=True, eq=False)
class Grouping:
    """``G`` groups of weight entries.

    Attributes:
        name: The rule(s) it came from, such as ``"filters"`` or ``"units+features"``.
        labels: Index tensors. An entry may be in several labels: a weight of a middle layer lies both in the
            row of one unit and in the column that reads another.
        layers: Names of the layers that the groups belong to.
        layer_index: Position in ``layers`` of each group, int64 of shape ``[G]``.
        quota: Only for n:m rules.
        optional_layers: Those of `layers` that may lose all their groups: a network without any residual branch, say,
            still has its shortcuts.

    Raises:
        GroupingError: If a label or layer number is out of range, or an optional layer is no layer.
    """

    name: str
    labels: tuple[Labels, ...]
    layers: tuple[str, ...]
    layer_index: Tensor
    quota: Quota | None = None
    optional_layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        num_groups = self.num_groups
        for labels in self.labels:
            if labels.index.numel() and int(labels.index.max()) >= num_groups:
                raise GroupingError(
                    f"labels of {labels.parameter!r} name group {int(labels.index.max())}, "
                    f"but the grouping {self.name!r} has only {num_groups} groups"
                )
        which = self.layer_index
        if num_groups and (int(which.min()) < 0 or int(which.max()) >= len(self.layers)):
            raise GroupingError(f"layer_index of {self.name!r} must lie in 0..{len(self.layers) - 1}")
        if not set(self.optional_layers) <= set(self.layers):
            raise GroupingError(
                f"the optional layers of {self.name!r} should be some of its layers {list(self.layers)}, got "
                f"{list(self.optional_layers)}"
            )
        if self.quota is not None and self.quota.pool.shape != self.layer_index.shape:
            raise GroupingError(
                f"the quota of {self.name!r} needs one pool per group ([{num_groups}]), "
                f"got {list(self.quota.pool.shape)}"
            )

    @property
    def num_groups(self) -> int:
        """Number of groups, G."""
        return int(self.layer_index.numel())

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter that has entries in a group, in the order of the labels."""
        return {labels.parameter: labels.shape for labels in self.labels}

    @property
    def distinct_labels(self) -> tuple[Labels, ...]:
        """The labels, but one of those that name the same entries: a tied weight makes its units and reads them."""
        found: list[Labels] = []
        for labels in self.labels:
            if not any(
                labels.parameter == one.parameter and torch.equal(labels.index, one.index) for one in found
            ):
                found.append(labels)
        return tuple(found)

    def __repr__(self) -> str:
        counts = torch.bincount(self.layer_index, minlength=len(self.layers)).tolist()
        parts = ", ".join(f"{layer}: {count}" for layer, count in zip(self.layers, counts, strict=True))
        return f"Grouping({self.name!r}, {self.num_groups} groups; {parts})"

    def describe(self, group: int) -> str:
        """Readable name of a group, such as ``"conv1[3]"``: its layer and its rank among that layer's groups.

        Raises:
            GroupingError: If there is no such group.
        """
        if not 0 <= group < self.num_groups:
            raise GroupingError(f"expected a group number in 0..{self.num_groups - 1}, got {group}")
        layer = int(self.layer_index[group])
        rank = int((self.layer_index[:group] == layer).sum())
        return f"{self.layers[layer]}[{rank}]"

    def sizes(self) -> Tensor:
        """Number of entries of each group, int64 ``[G]``; an entry counts once per label that holds it."""
        total = torch.zeros(self.num_groups + 1, dtype=torch.int64)
        for labels in self.labels:
            spread = math.prod(labels.shape) // max(labels.index.numel(), 1)
            counts = torch.bincount(
                labels.slots(self.num_groups, total.device).flatten(), minlength=self.num_groups + 1
            )
            total += spread * counts
        return total[:-1]

    def reduce(self, values: Mapping[str, Tensor], *, gates_only: bool = False) -> Tensor:
        """Sum values over the entries of each group.

        Args:
            values: Parameter-shaped tensors, at least one for each labelled parameter, all on one device.
            gates_only: Sum over the gate labels only.

        Returns:
            Sums of shape ``[G]`` in the values' dtype (half precision and integers are summed in float32 and
            int64). An entry counts once per label that holds it.

        Raises:
            GroupingError: If a labelled parameter is missing or has another shape.
        """
        total: Tensor | None = None
        for labels in self.labels:
            if gates_only and not labels.gate:
                continue
            value = _lookup(values, labels)
            least = torch.float32 if value.is_floating_point() else torch.int64
            wide = torch.promote_types(value.dtype, least)
            if total is None:
                total = torch.zeros(self.num_groups + 1, dtype=wide, device=value.device)
            total = total.to(torch.promote_types(total.dtype, wide))
            # Summing the broadcast dims first leaves index_add one element per index entry instead of one per
            # weight.
            flat = [d for d, size in enumerate(labels.index.shape) if size == 1 and labels.shape[d] != 1]
            summed = value.sum(flat, keepdim=True, dtype=total.dtype) if flat else value.to(total.dtype)
            total.index_add_(0, labels.slots(self.num_groups, value.device).flatten(), summed.flatten())
        if total is None:
            return torch.zeros(self.num_groups)
        return total[:-1]

    def expand(self, values: Tensor) -> dict[str, Tensor]:
        """Give each entry the sum of its groups' values: the adjoint of `reduce`.

        Args:
            values: One number per group, of shape ``[G]``.

        Returns:
            Parameter-shaped tensors for the labelled parameters; 0 for entries in no group.

        Raises:
            GroupingError: If ``values`` is not of shape ``[G]``.
        """
        table = self._table(values, 0)
        result: dict[str, Tensor] = {}
        for labels in self.labels:
            part = table[labels.slots(self.num_groups, values.device)]
            known = result.get(labels.parameter)
            result[labels.parameter] = part.expand(labels.shape) if known is None else known + part
        return {name: value.contiguous() for name, value in result.items()}

    def masks(self, on: Tensor) -> dict[str, Tensor]:
        """Which entries stay: an entry stays iff all its groups are on.

        Args:
            on: Bool of shape ``[G]``.

        Returns:
            Parameter-shaped bool tensors for the labelled parameters; True for entries in no group.

        Raises:
            GroupingError: If ``on`` is not a bool tensor of shape ``[G]``.
        """
        if on.dtype != torch.bool:
            raise GroupingError(f"expected a bool tensor that says which groups are on, got {on.dtype}")
        table = self._table(on, True)
        result: dict[str, Tensor] = {}
        for labels in self.labels:
            part = table[labels.slots(self.num_groups, on.device)]
            known = result.get(labels.parameter)
            result[labels.parameter] = part.expand(labels.shape) if known is None else known & part
        return {name: value.contiguous() for name, value in result.items()}

    def scales(self, values: Tensor, *, gates_only: bool = True) -> dict[str, Tensor]:
        """Factor of each entry when group g is multiplied by ``values[g]``: the product over its groups.

        Args:
            values: One factor per group, of shape ``[G]``.
            gates_only: Scale the gate labels only, which scales each switch once.

        Returns:
            For each labelled parameter a tensor that broadcasts to its shape; 1 for entries in no group.

        Raises:
            GroupingError: If ``values`` is not of shape ``[G]``.
        """
        table = self._table(values, 1)
        result: dict[str, Tensor] = {}
        for labels in self.labels:
            if gates_only and not labels.gate:
                continue
            part = table[labels.slots(self.num_groups, values.device)]
            known = result.get(labels.parameter)
            result[labels.parameter] = part if known is None else known * part
        return result

    def fingerprint(self) -> str:
        """SHA-256 (hex) of parameter names, shapes, labels, layers and quota: equal iff the groups are."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for labels in self.labels:
            head = (labels.parameter, labels.shape, tuple(labels.index.shape), labels.gate)
            digest.update(repr(head).encode())
            digest.update(_little_endian(labels.index))
        digest.update(repr(self.layers).encode())
        digest.update(_little_endian(self.layer_index))
        if self.quota is not None:
            digest.update(repr(self.quota.keep).encode())
            digest.update(_little_endian(self.quota.pool))
        return digest.hexdigest()

    def _table(self, values: Tensor, default: float | bool) -> Tensor:
        """``values`` with the value for "no group" appended, so that slots index it: shape ``[G + 1]``."""
        if values.shape != (self.num_groups,):
            raise GroupingError(
                f"the grouping {self.name!r} has {self.num_groups} groups, so a tensor of shape "
                f"[{self.num_groups}] was expected, got {list(values.shape)}"
            )
        return torch.cat([values, values.new_full((1,), default)])


def _lookup(values: Mapping[str, Tensor], labels: Labels) -> Tensor:
    value = values.get(labels.parameter)
    if value is None:
        raise GroupingError(f"no values for the parameter {labels.parameter!r}; got {sorted(values)}")
    if tuple(value.shape) != labels.shape:
        raise GroupingError(
            f"values of {labels.parameter!r} must have the parameter's shape {list(labels.shape)}, "
            f"got {list(value.shape)}"
        )
    return value


def _little_endian(index: Tensor) -> bytes:
    return index.contiguous().numpy().astype("<i8", copy=False).tobytes()
