"""A grouping taken apart, so that every part is computed by the cheapest way that is right for it.

A *part* is a smallest set of gate labels that share no group with the labels outside it: one layer's filters,
or a unit together with all layers that read it. Within a part the derivatives of a group are summed over its
labels before they are squared; between parts there is nothing to sum, so no part ever needs a matrix over all
groups.

    >>> parts_of(make_grouping(lenet, "units"), torch.device("cpu"))    # one part for each layer's units
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sparsebayes.curvature.block import Block
from sparsebayes.curvature.squares import SquareSums, slices, squared_passes
from sparsebayes.groups.grouping import Grouping, Labels

__all__ = ["Part", "parts_of", "reads_columns", "reads_rows"]


@final
@dataclass(frozen=True, eq=False)
class Slots:
    """Where the entries of one label go within a part.

    Attributes:
        labels: the label.
        slot: place of each index entry among the part's groups, flat; `num_groups` for entries in no group.
        direct: whether `slot` is 0, 1, 2, ...: nothing has to be moved or summed.
    """

    labels: Labels
    slot: Tensor
    direct: bool


@final
@dataclass(frozen=True, eq=False)
class Part:
    """Gate labels that share groups with each other and with no other label.

    Attributes:
        members: the labels.
        groups: numbers of the part's groups, ascending: a slice where they are consecutive, else int64.
        num_groups: how many groups.
        single: whether every group is a single entry of a single parameter.
    """

    members: tuple[Slots, ...]
    groups: Tensor | slice
    num_groups: int
    single: bool

    def squares(self, block: Block, images: slice) -> tuple[Tensor, Tensor]:
        """Sum q = sum_k r_kg^2, and q^2, over images of a block.

        Args:
            block: derivatives of n images.
            images: m of them.

        Returns:
            sum_n q and sum_n q^2, float64, of shape `[num_groups]`.
        """
        total = torch.zeros(2, self.num_groups, dtype=torch.float64, device=self.members[0].slot.device)
        for some in self.image_slices(block, images):
            q = squared_passes(self.rows(block, some).double())  # [m, g]
            total[0] += q.sum(0)
            total[1] += q.square().sum(0)
        return total[0], total[1]

    def from_entries(self, sums: SquareSums, value: Tensor) -> tuple[Tensor, Tensor]:
        """What `squares` would give over all images, for a part that is single.

        Args:
            sums: over all images, of the squared gradients of its parameter, and of their squares.
            value: the parameter.
        """
        (member,) = self.members
        q, q_squared = sums.result()
        assert q_squared is not None, "the fourth powers were asked for"
        scale = value.double().square()
        pair = torch.stack([q.double() * scale, q_squared.double() * scale.square()]).flatten(1)
        if not member.direct:
            spread = pair.new_zeros(2, self.num_groups + 1)
            pair = spread.index_copy_(1, member.slot, pair)[:, : self.num_groups]
        return pair[0], pair[1]

    def rows(self, block: Block, images: slice) -> Tensor:
        """Derivatives with respect to the switches of the part's groups.

        Args:
            block: derivatives of n images.
            images: m of them.

        Returns:
            r of shape `[K, m, num_groups]`.
        """
        total: Tensor | None = None
        for member in self.members:
            values = _derivatives(block, member.labels, images)  # [K, m, entries of the index]
            if not member.direct:
                # One place more than groups: it takes the entries in no group.
                spread = values.new_zeros(*values.shape[:2], self.num_groups + 1)
                values = spread.index_add_(2, member.slot, values)[..., : self.num_groups]
            total = values if total is None else total + values
        assert total is not None, "a part has at least one label"
        return total

    def image_slices(self, block: Block, images: slice) -> Iterator[slice]:
        """Slices of some of a block's images that keep `rows` within a modest temporary."""
        numbers = block.num_passes * self.num_groups
        for member in self.members:
            labels = member.labels
            if _by_slices(block, labels):
                numbers = max(numbers, block.num_passes * labels.index.numel())
            else:
                numbers = max(numbers, block.volume(labels.parameter))
        return slices(images, numbers, block.device)


def parts_of(grouping: Grouping, device: torch.device) -> list[Part]:
    """Take a grouping apart.

    Args:
        grouping: only its gate labels count.
        device: where the derivatives will be.

    Returns:
        The parts; groups without gate entries are in none.
    """
    teams: list[list[tuple[Labels, Tensor]]] = []
    team_of = torch.full((grouping.num_groups,), -1)
    for labels in grouping.labels:
        present = _present(labels.index) if labels.gate else None
        if present is None:
            continue
        joined = [(labels, present)]
        met = team_of[present]
        for number in torch.unique(met[met >= 0]).tolist():
            joined += teams[number]
            teams[number] = []
        for _, numbers in joined:
            team_of[numbers] = len(teams)
        teams.append(joined)
    return [_make_part(team, device) for team in teams if team]


def reads_columns(labels: Labels) -> bool:
    """Whether a label's groups are slices along a weight's input dim (dim 1)."""
    return labels.dim == 1


def reads_rows(labels: Labels) -> bool:
    """Whether a label's groups are slices along a weight's output dim (dim 0), or the whole weight."""
    return len(labels.shape) > 1 and all(size == 1 for size in labels.index.shape[1:])


def _make_part(team: list[tuple[Labels, Tensor]], device: torch.device) -> Part:
    numbers = team[0][1] if len(team) == 1 else torch.unique(torch.cat([present for _, present in team]))
    low, num_groups = int(numbers[0]), len(numbers)
    place = torch.full((int(numbers[-1]) - low + 1,), num_groups)
    place[numbers - low] = torch.arange(num_groups)
    members: list[Slots] = []
    for labels, _ in team:
        index = labels.index.flatten()
        slot = torch.where(index < 0, num_groups, place[(index - low).clamp(min=0)])
        direct = slot.numel() == num_groups and torch.equal(slot, torch.arange(num_groups))
        members.append(Slots(labels, slot.to(device), direct))
    first = team[0][0]
    single = (
        len(team) == 1
        and tuple(first.index.shape) == first.shape
        and int((members[0].slot < num_groups).sum()) == num_groups
    )
    consecutive = int(numbers[-1]) - low + 1 == num_groups
    groups = slice(low, low + num_groups) if consecutive else numbers.to(device)
    return Part(tuple(members), groups, num_groups, single)


def _present(index: Tensor) -> Tensor | None:
    """The group numbers in an index, ascending; None if it names none. Takes linear time, unlike `unique`."""
    named = index[index >= 0]
    if named.numel() == 0:
        return None
    low = int(named.min())
    table = torch.zeros(int(named.max()) - low + 1, dtype=torch.bool)
    table[named - low] = True
    return table.nonzero().flatten() + low


def _by_slices(block: Block, labels: Labels) -> bool:
    """Whether a label's groups are rows or columns of a weight whose calls are known."""
    varying = [d for d, size in enumerate(labels.index.shape) if size > 1]
    return len(labels.shape) > 1 and varying in ([], [0], [1]) and block.sliceable(labels.parameter)


def _derivatives(block: Block, labels: Labels, images: slice) -> Tensor:
    """Sums of w dF/dw over the entries that share an entry of the index, of shape `[K, m, index entries]`."""
    name = labels.parameter
    if _by_slices(block, labels):
        if reads_columns(labels):
            return block.columns(name, images)
        rows = block.rows(name, images)
        return rows if labels.dim == 0 else rows.sum(-1, keepdim=True)
    values = block.entries(name, images) * block.value(name)
    spread = [d + 2 for d, size in enumerate(labels.index.shape) if size == 1 and labels.shape[d] > 1]
    values = values.sum(spread) if spread else values
    return values.reshape(*values.shape[:2], -1)  # a scalar parameter's has no dims left to flatten
