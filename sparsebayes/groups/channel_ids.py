"""The bookkeeping of a trace: which positions of which tensors belong to one unit.

While a graph is traced, each activation has a *shadow*: an integer tensor of the same shape that holds, for
every position, the id of the channel it structurally belongs to. Positions with one id are removed together;
id 0 marks positions that always stay. Layers create ids and *bind* them to (parameter, dim); operations that
combine two tensors *unify* ids; whatever cannot follow removal *fixes* them, with a reason:

    >>> trace = Trace()
    >>> first, second = trace.fresh(3), trace.fresh(3)
    >>> trace.unify(first, second, "added")
    >>> trace.fix(second[:1], "they are outputs of the model")
    >>> trace.classes(first).tolist()       # channel 0 stays, 1 and 2 are units
    [0, 2, 3]

Shadows are expanded views (stride 0 along batch and space), so that their memory and time scale with the
number of channels, not with the size of the activations.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Binding", "Count", "Leaf", "Shadow", "Trace", "fixed_shadow"]

_NEVER = np.iinfo(np.int64).max
# Parameters above this size get no id per entry in element-wise operations, but one per entry of their last dim.
_MAX_LEAF = 2**20


@dataclass(frozen=True, eq=False)
class Shadow:
    """Channel ids of one activation.

    Attributes:
        ids: int64 of the activation's shape; 0 = stays.
        zero: Bool of the same shape: True where the activation is 0 if all entries that belong to its unit
            are 0.
    """

    ids: Tensor
    zero: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the activation."""
        return tuple(self.ids.shape)


@dataclass(frozen=True)
class Leaf:
    """A parameter, buffer or constant as it enters the graph.

    Attributes:
        name: Its first name in the model; empty for a constant of the graph, which cannot be sliced.
        shape: Its shape.
        is_parameter: False for buffers and constants.
    """

    name: str
    shape: tuple[int, ...]
    is_parameter: bool


@dataclass
class Binding:
    """Ids along one dim of one parameter or buffer.

    Attributes:
        leaf: The parameter or buffer.
        dim: Its dim.
        ids: int64 of shape ``[leaf.shape[dim]]``.
        own: Whether these entries are a unit's own.
        reads: Whether these entries read a unit.
    """

    leaf: Leaf
    dim: int
    ids: Tensor
    own: bool
    reads: bool


@dataclass
class Count:
    """An attribute of a module that holds a number of channels.

    Attributes:
        module: Path of the module.
        attribute: Name of the attribute.
        position: Position in it, where it is a list or tuple; None for a plain number.
        ids: int64, one for each channel that it counts.
    """

    module: str
    attribute: str
    position: int | None
    ids: Tensor


def fixed_shadow(shape: tuple[int, ...]) -> Shadow:
    """Shadow of an activation whose positions all stay."""
    return Shadow(
        torch.zeros((), dtype=torch.int64).expand(shape), torch.zeros((), dtype=torch.bool).expand(shape)
    )


def core(tensor: Tensor) -> Tensor:
    """The part of an expanded tensor that holds its distinct elements: size 1 along dims of stride 0."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def broadcast(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors, expanded to their common shape."""
    shape = np.broadcast_shapes(first.shape, second.shape)
    return first.expand(shape), second.expand(shape)


class Trace:
    """Ids, their equivalence classes, and what is bound to them.

    Attributes:
        bindings: By (name, dim), in the order of the graph.
        leaves: Parameters and buffers that entered element-wise or shape operations, with ids for each entry.
        reasons: Why ids were fixed, in the order of the graph.
        reached: Names of all parameters and buffers that the graph uses.
        counts: Attributes of modules that must follow the number of channels, by (module, attribute, position).
        levels: By line of the model's code, how many readings of the sizes written there have been given up.
        assumed: Lines of which some reading is assumed and could be given up for the next one.
        tied: Ids of raw parameters whose positions have been put together, and what to say if these were channels.
        cuts: For each cut of channels at such a line, the ids in its pieces, int64 of shape ``[*]`` each.
    """

    def __init__(self, levels: Mapping[str, int] | None = None) -> None:
        self.counts: dict[tuple[str, str, int | None], Count] = {}
        self.levels = dict(levels or {})
        self.assumed: set[str] = set()
        self.tied: list[tuple[Tensor, str]] = []
        self.cuts: list[list[Tensor]] = []
        self._entries: list[tuple[int, int]] = []
        self._joint: list[Tensor] = []
        self.bindings: dict[tuple[str, int], Binding] = {}
        self.leaves: dict[str, tuple[Leaf, Shadow]] = {}
        self.reasons: list[str] = []
        self.reached: set[str] = set()
        self._parent: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        # Number of the first reason why a root's class stays; -1 for id 0.
        self._event: NDArray[np.int64] = np.full(1, -1, dtype=np.int64)
        self._dirty: list[Tensor] = []

    @property
    def num_ids(self) -> int:
        """One more than the largest id."""
        return len(self._parent)

    def fresh(self, count: int) -> Tensor:
        """``count`` new ids, int64 of shape ``[count]``."""
        start = len(self._parent)
        ids = np.arange(start, start + count)
        self._parent = np.concatenate([self._parent, ids])
        self._event = np.concatenate([self._event, np.full(count, _NEVER)])
        return torch.from_numpy(ids)

    def roots(self, ids: Tensor) -> Tensor:
        """Representative of each id's class, also of classes that stay. Same shape."""
        return torch.from_numpy(self._find(ids.numpy()))

    def classes(self, ids: Tensor) -> Tensor:
        """Representative of each id's class, 0 for all that stay. Same shape."""
        found = self._find(ids.numpy())
        return torch.from_numpy(np.where(self._event[found] < _NEVER, 0, found))

    def reason(self, root: int) -> str:
        """Why the class of this root stays: the first reason that was given."""
        return "they follow channels that stay" if root == 0 else self.reasons[int(self._event[root])]

    def fix(self, ids: Tensor, reason: str) -> None:
        """Make the classes of these ids stay."""
        found = np.unique(self._find(core(ids).numpy()))
        free = found[self._event[found] == _NEVER]
        if len(free):
            self._event[free] = len(self.reasons)
            self.reasons.append(reason)

    def unify(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Put ids of equal position into one class; ids that meet a 0 stay, for ``reason``.

        The shapes broadcast.
        """
        first, second = broadcast(first, second)
        first, second = broadcast(core(first), core(second))
        first, second = first.flatten(), second.flatten()
        same = first == second
        first, second = first[~same], second[~same]
        stays = (first == 0) | (second == 0)
        if bool(stays.any()):
            self.fix(torch.maximum(first, second)[stays], reason)
        self._union(first[~stays].numpy(), second[~stays].numpy())

    def varies(self, ids: Tensor) -> list[int]:
        """Dims along which the classes vary."""
        found = self.classes(core(ids))
        return [
            dim
            for dim, size in enumerate(found.shape)
            if size > 1 and bool((found != found.narrow(dim, 0, 1)).any())
        ]

    def taint(self, ids: Tensor) -> None:
        """Note that these units may be read as non-zero even if all their own entries are 0."""
        self._dirty.append(core(ids).flatten())

    def tainted(self) -> Tensor:
        """Roots of the classes that `taint` was told about, int64 of shape ``[*]`` in rising order."""
        ids = torch.cat([torch.zeros(0, dtype=torch.int64), *self._dirty])
        return torch.from_numpy(np.unique(self._find(ids.numpy())))

    def join(self, ids: Tensor) -> None:
        """Note that the statistics of a norm count these units, so that only zeros may leave."""
        self._joint.append(core(ids).flatten())

    def joint(self) -> Tensor:
        """Roots of the classes that `join` was told about, int64 of shape ``[*]`` in rising order."""
        ids = torch.cat([torch.zeros(0, dtype=torch.int64), *self._joint])
        return torch.from_numpy(np.unique(self._find(ids.numpy())))

    def count(self, module: str, attribute: str, position: int | None, ids: Tensor) -> None:
        """Let an attribute count these channels; a second use of it counts the same ones."""
        known = self.counts.setdefault((module, attribute, position), Count(module, attribute, position, ids))
        if known.ids.shape == ids.shape:
            self.unify(known.ids, ids, f"{module}.{attribute} also counts channels that stay")

    def bind(self, leaf: Leaf, dim: int, ids: Tensor, *, reads: bool) -> None:
        """Tie ids to one dim of a parameter or buffer; a second binding of the same dim unifies both."""
        self.reached.add(leaf.name)
        known = self.bindings.get((leaf.name, dim))
        if known is None:
            self.bindings[leaf.name, dim] = Binding(leaf, dim, ids, own=not reads, reads=reads)
            return
        self.unify(known.ids, ids, f"{leaf.name!r} is used twice, once with channels that stay")
        known.own, known.reads = known.own or not reads, known.reads or reads

    def own(self, leaf: Leaf, dim: int) -> Tensor:
        """Ids of the units that one dim of a weight produces: new ones, or those of its earlier use."""
        known = self.bindings.get((leaf.name, dim))
        ids = self.fresh(leaf.shape[dim]) if known is None else known.ids
        self.bind(leaf, dim, ids, reads=False)
        return ids

    def shadow(self, leaf: Leaf) -> Shadow:
        """Ids for every entry of a parameter or buffer that meets activations entry by entry."""
        self.reached.add(leaf.name)
        size = int(np.prod(leaf.shape))
        if not leaf.name or not leaf.shape:
            return fixed_shadow(leaf.shape)
        if leaf.name not in self.leaves:
            shape = leaf.shape if size <= _MAX_LEAF else (*[1] * (len(leaf.shape) - 1), leaf.shape[-1])
            entries = self.fresh(int(np.prod(shape)))
            self._entries.append((int(entries[0]), int(entries[-1]) + 1))
            ids = entries.view(shape).expand(leaf.shape)
            zero = torch.full((), leaf.is_parameter).expand(leaf.shape)
            self.leaves[leaf.name] = (leaf, Shadow(ids, zero))
            if size > _MAX_LEAF:
                why = (
                    f"{leaf.name!r} has more than {_MAX_LEAF} entries, and they do not lie along its last dim"
                )
                self.tied.append((ids, why))
        return self.leaves[leaf.name][1]

    def tie_positions(self, ids: Tensor, dims: Collection[int]) -> bool:
        """Put entries of raw parameters along these dims together; False if layers have already met them."""
        if not self._is_raw(ids):
            return False
        first = ids
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        self.unify(first, ids, "")
        self.tied.append((core(ids), "they lie along a dim of a raw parameter that is cut"))
        return True

    def _is_raw(self, ids: Tensor) -> bool:
        """Whether these classes hold nothing but entries of raw parameters, and nothing has let them stay."""
        roots = np.unique(self._find(core(ids).numpy()))
        if bool((self._event[roots] < _NEVER).any()):
            return False
        is_root = np.zeros(self.num_ids, dtype=bool)
        is_root[roots] = True
        members = is_root[self._find(np.arange(self.num_ids))]
        for start, stop in self._entries:
            members[start:stop] = False
        return not bool(members.any())

    def _find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        found = self._parent[ids]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                return found
            found = above

    def _union(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> None:
        # Each round hangs the larger root below the smaller; where one root met several, the rest follows in
        # the next round. Roots only ever decrease, so this ends.
        touched = np.concatenate([self._find(first), self._find(second)])
        while True:
            first, second = self._find(first), self._find(second)
            differ = first != second
            if not differ.any():
                break
            low = np.minimum(first[differ], second[differ])
            high = np.maximum(first[differ], second[differ])
            np.minimum.at(self._parent, high, low)
            first, second = low, high
        np.minimum.at(self._event, self._find(touched), self._event[touched])
