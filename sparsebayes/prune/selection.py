"""Which groups stay: a frozen answer that can be written to a file, read by a person, and applied later.

    >>> selection = select(grouping, evidence)        # three groups with evidence 5.0, 0.2, 3.0
    >>> selection
    Selection('units': 2 of 3 kept; fc1 2/3)

`select` keeps a group iff its score exceeds a threshold (Tipping & Faul, AISTATS 2003: iff z^2 h > 1), within
two bounds without which iterated evidence updates destroy a network: one update removes at most a share of a
layer's living groups, and no layer is emptied. `select_top` keeps a given number, for comparisons at equal
size.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebayes.errors import GroupingError, NumericsError, RunError
from sparsebayes.groups.grouping import Grouping, Quota
from sparsebayes.prune.bits import pack, unpack
from sparsebayes.prune.json_fields import Fields, parse

__all__ = ["Selection", "select", "select_top"]

VERSION = 1
MAX_GROUPS = 2**33
_FIELDS = (
    "version", "grouping", "fingerprint", "strength", "num_groups", "num_kept", "layers", "runs", "bits"
)  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """The groups of one grouping that stay.

    Args:
        grouping: the grouping's name.
        on: bool, of shape `[G]`, on the CPU: True where a group stays.
        layers: layer names.
        layer_index: int64, of shape `[G]`: each group's position in `layers`.
        fingerprint: `Grouping.fingerprint()` of the grouping.
        strength: the temperature T at which it was made, if any.
        forced: bool `[G]` or None: kept against their score, since their layer would otherwise have fewer
            than `min_keep`, or no multiple of `round_to`.
        delayed: bool `[G]` or None: kept against their score, since one update may not remove more of their
            layer.
    """

    grouping: str
    on: Tensor
    layers: tuple[str, ...]
    layer_index: Tensor
    fingerprint: str
    strength: float | None = None
    forced: Tensor | None = None
    delayed: Tensor | None = None

    @property
    def num_groups(self) -> int:
        """Number of groups G, on or off."""
        return self.on.numel()

    @property
    def num_kept(self) -> int:
        """Number of groups that stay."""
        return int(self.on.sum())

    def counts(self) -> dict[str, tuple[int, int]]:
        """Count per layer: (groups that stay, groups)."""
        return {name: (kept, total) for name, kept, total in zip(self.layers, *self._tally(), strict=True)}

    def _tally(self) -> tuple[list[int], list[int]]:
        total = torch.bincount(self.layer_index, minlength=len(self.layers))
        kept = torch.bincount(self.layer_index[self.on], minlength=len(self.layers))
        return kept.tolist(), total.tolist()

    def __repr__(self) -> str:
        layers = ", ".join(f"{name} {kept}/{total}" for name, (kept, total) in self.counts().items())
        return f"Selection({self.grouping!r}: {self.num_kept} of {self.num_groups} kept; {layers})"

    def check_grouping(self, grouping: Grouping) -> None:
        """Refuse a grouping other than the one this selection was made for.

        Raises:
            GroupingError: the fingerprints differ.
        """
        if grouping.fingerprint() != self.fingerprint:
            raise GroupingError(
                f"this selection was made for the grouping {self.grouping!r} of {self.num_groups} groups "
                "over "
                f"{', '.join(self.layers)}, not for {grouping.name!r} of {grouping.num_groups} groups over "
                f"{', '.join(grouping.layers)} with other parameters, shapes or groups; use the model and "
                "the grouping "
                "that it was made for"
            )

    def to_json(self) -> str:
        """Write as JSON: counts per layer for people, packed bits for `from_json`."""
        runs_layer, runs_length = torch.unique_consecutive(self.layer_index, return_counts=True)
        flags = {"on": self.on, "forced": self.forced, "delayed": self.delayed}
        document = {
            "version": VERSION,
            "grouping": self.grouping,
            "fingerprint": self.fingerprint,
            "strength": self.strength,
            "num_groups": self.num_groups,
            "num_kept": self.num_kept,
            "layers": [
                {"name": name, "kept": kept, "groups": total} for name, (kept, total) in self.counts().items()
            ],
            # Groups of a layer nearly always follow each other: a few (layer, length) runs instead of G
            # numbers.
            "runs": {"layer": runs_layer.tolist(), "length": runs_length.tolist()},
            "bits": {name: None if flag is None else pack(flag) for name, flag in flags.items()},
        }
        return json.dumps(document, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, *, where: str = "selection.json") -> Selection:
        """Read what `to_json` wrote.

        Args:
            text: the document.
            where: names it in messages.

        Returns:
            The selection; `check_grouping` says whether it fits a grouping.

        Raises:
            RunError: not such a document, or its parts contradict each other.
        """
        document = parse(text, where=where, error=RunError)
        document.only([*_FIELDS])
        document.integer("version", low=VERSION, high=VERSION)
        num_groups = document.integer("num_groups", low=0, high=MAX_GROUPS)
        layers = document.list_of_fields("layers")
        bits = document.fields("bits")
        bits.only(["on", "forced", "delayed"])
        on = _read_bits(bits, "on", num_groups)
        if on is None:
            raise bits.fail("on", f"the bits of {num_groups} groups in base64")
        selection = Selection(
            grouping=document.text("grouping"),
            on=on,
            layers=tuple(layer.text("name") for layer in layers),
            layer_index=_read_runs(document.fields("runs"), num_groups, len(layers)),
            fingerprint=document.text("fingerprint"),
            strength=document.number("strength"),
            forced=_read_bits(bits, "forced", num_groups),
            delayed=_read_bits(bits, "delayed", num_groups),
        )
        _check_counts(document, layers, selection)
        return selection


def _read_bits(bits: Fields, name: str, num_groups: int) -> Tensor | None:
    if bits.value(name) is None:
        return None
    try:
        return unpack(bits.text(name), num_groups)
    except ValueError as cause:
        raise bits.fail(name, f"the bits of {num_groups} groups in base64") from cause


def _read_runs(runs: Fields, num_groups: int, num_layers: int) -> Tensor:
    runs.only(["layer", "length"])
    layer = runs.integers("layer", low=0, high=num_layers - 1)
    length = runs.integers("length", low=1, high=MAX_GROUPS)
    # The sum is compared before the tensor is made: a damaged length must not ask for terabytes.
    if len(layer) != len(length) or sum(length) != num_groups:
        raise runs.fail("length", f"one length per run, {num_groups} in total")
    return torch.repeat_interleave(
        torch.tensor(layer, dtype=torch.int64), torch.tensor(length, dtype=torch.int64)
    )


def _check_counts(document: Fields, layers: list[Fields], selection: Selection) -> None:
    """The counts are there for people; if someone edited them, the bits would silently say something else."""
    stated = [(layer.integer("kept", low=0), layer.integer("groups", low=0)) for layer in layers]
    for layer in layers:
        layer.only(["name", "kept", "groups"])
    if len(set(selection.layers)) != len(selection.layers):
        raise document.fail("layers", "layers with different names")
    if stated != list(selection.counts().values()):
        raise document.fail("layers", f"the counts that the bits say, {selection!r}")
    if document.integer("num_kept", low=0) != selection.num_kept:
        raise document.fail("num_kept", f"{selection.num_kept}, as the bits say")


def select(
    grouping: Grouping,
    score: Tensor,
    *,
    threshold: float = 1.0,
    previous: Selection | None = None,
    max_removal: float = 0.6,
    min_keep: int = 1,
    round_to: int = 1,
    strength: float | None = None,
) -> Selection:
    """Keep the groups whose score exceeds the threshold.

    Groups in a pool of an n:m quota are the exception: exactly the quota's best of each pool stay, whatever
    they score.

    Args:
        grouping: the groups, G of them.
        score: of shape `[G]`; +inf always stays, -inf goes. With evidence z^2 h / T the threshold is 1.
        threshold: a group is kept iff `score > threshold`.
        previous: groups that are off in it stay off.
        max_removal: largest share of a layer's living groups that this update removes, 0..1; the best scores
            stay.
        min_keep: number of groups that a layer keeps in any case (all, if it has fewer alive); the best
            scores stay. The grouping's optional layers are exempt.
        round_to: what a layer keeps is filled up to a multiple of this with the best of what would go, where it
            has enough of it; the grouping's optional layers are exempt.
        strength: recorded in the selection.

    Returns:
        The selection, with `forced` and `delayed` groups marked.

    Raises:
        GroupingError: `previous` was made for another grouping.
        NumericsError: a score is NaN, or their number is not G, or an option is out of range.
    """
    score, alive = _prepare(grouping, score, previous)
    if not 0.0 <= max_removal <= 1.0 or min_keep < 0 or round_to < 1 or math.isnan(threshold):
        raise NumericsError(
            "expected max_removal within 0..1, min_keep >= 0, round_to >= 1 and a threshold that is a number, got "
            f"{max_removal}, {min_keep}, {round_to} and {threshold}"
        )
    above = alive & (score > threshold)
    best, enough = torch.zeros_like(alive), torch.zeros_like(alive)
    for name, members in zip(grouping.layers, _layers(grouping), strict=True):
        living = members[alive[members]]
        count = len(living)
        removable = math.floor(count * max_removal)
        least = 0 if name in grouping.optional_layers else min_keep
        if int(above[living].sum()) < max(least, count - removable):
            best[_best(score, living, least)] = True
            enough[_best(score, living, count - removable)] = True
    forced = best & ~above
    delayed = enough & ~above & ~forced
    on = above | forced | delayed
    rounded = _rounded(grouping, score, alive, on, round_to)
    on, forced = on | rounded, forced | rounded
    if grouping.quota is not None:
        pooled = grouping.quota.pool >= 0
        on = torch.where(pooled, _best_of_pools(score, alive, grouping.quota), on)
        forced, delayed = forced & ~pooled, delayed & ~pooled
    return _selection(grouping, on, strength=strength, forced=forced, delayed=delayed)


def select_top(
    grouping: Grouping,
    score: Tensor,
    *,
    num_keep: int | None = None,
    keep_fraction: float | None = None,
    previous: Selection | None = None,
    min_keep: int = 1,
) -> Selection:
    """Keep the groups with the highest scores, a given number in all.

    Args:
        grouping: the groups, G of them.
        score: of shape `[G]`.
        num_keep: how many stay; give this or `keep_fraction`.
        keep_fraction: the share of G that stays, 0..1; rounded to the nearest number.
        previous: groups that are off in it stay off.
        min_keep: number of groups that each layer keeps in any case (all, if it has fewer alive).

    Returns:
        The selection; its `forced` groups are those that stay only because of `min_keep`.

    Raises:
        GroupingError: the number cannot be met, the grouping has a quota of its own, or `previous` was made
            for another grouping.
        NumericsError: a score is NaN, or their number is not G.
    """
    score, alive = _prepare(grouping, score, previous)
    if grouping.quota is not None:
        raise GroupingError(
            f"the grouping {grouping.name!r} fixes how many groups stay, so that no number can be chosen; "
            "use select()"
        )
    if (num_keep is None) == (keep_fraction is None):
        raise GroupingError(f"expected one of num_keep and keep_fraction, got {num_keep} and {keep_fraction}")
    total = num_keep if num_keep is not None else round(float(keep_fraction or 0.0) * grouping.num_groups)
    reserved = torch.zeros_like(alive)
    for members in _layers(grouping):
        reserved[_best(score, members[alive[members]], min_keep)] = True
    least, most = int(reserved.sum()), int(alive.sum())
    if not least <= total <= most:
        raise GroupingError(
            f"cannot keep {total} groups of {grouping.name!r}: with at least {min_keep} per layer and {most} "
            "alive, "
            f"choose a number within {least}..{most}"
        )
    on, by_score_alone = reserved.clone(), torch.zeros_like(alive)
    on[_best(score, (alive & ~reserved).nonzero().flatten(), total - least)] = True
    by_score_alone[_best(score, alive.nonzero().flatten(), total)] = True
    return _selection(grouping, on, strength=None, forced=reserved & ~by_score_alone, delayed=None)


def _selection(
    grouping: Grouping, on: Tensor, *, strength: float | None, forced: Tensor | None, delayed: Tensor | None
) -> Selection:
    return Selection(
        grouping=grouping.name,
        on=on,
        layers=tuple(grouping.layers),
        layer_index=grouping.layer_index.clone(),
        fingerprint=grouping.fingerprint(),
        strength=strength,
        forced=forced,
        delayed=delayed,
    )


def _prepare(grouping: Grouping, score: Tensor, previous: Selection | None) -> tuple[Tensor, Tensor]:
    """Check the scores, bring them to the CPU, and say which groups are alive."""
    if tuple(score.shape) != (grouping.num_groups,):
        raise NumericsError(
            f"expected one score for each of the {grouping.num_groups} groups of {grouping.name!r}, "
            f"got a tensor of shape {list(score.shape)}"
        )
    score = score.detach().cpu().double()
    if score.isnan().any():
        first = int(score.isnan().nonzero()[0])
        raise NumericsError(
            f"the score of {grouping.describe(first)} and {int(score.isnan().sum()) - 1} others is NaN; "
            "check the curvature and the loss for values that are not finite"
        )
    if previous is None:
        return score, torch.ones(grouping.num_groups, dtype=torch.bool)
    previous.check_grouping(grouping)
    return score, previous.on.clone()


def _layers(grouping: Grouping) -> tuple[Tensor, ...]:
    """The groups of each layer, rising: int64. All layers together hold each group once, however many they are."""
    index = grouping.layer_index
    counts = torch.bincount(index, minlength=len(grouping.layers)).tolist()
    in_runs = bool((index[1:] >= index[:-1]).all())
    order = torch.arange(len(index)) if in_runs else torch.argsort(index, stable=True)
    return torch.split(order, counts)


def _rounded(grouping: Grouping, score: Tensor, alive: Tensor, on: Tensor, step: int) -> Tensor:
    """The best of what would go that fill each layer up to a multiple of `step`: bool of shape `[G]`."""
    extra = torch.zeros_like(on)
    if step == 1:
        return extra
    for name, members in zip(grouping.layers, _layers(grouping), strict=True):
        kept = int(on[members].sum())
        wanted = kept if name in grouping.optional_layers else -(-kept // step) * step
        if kept < wanted <= int(alive[members].sum()):
            spare = members[alive[members] & ~on[members]]
            extra[_best(score, spare, wanted - kept)] = True
    return extra


def _best(score: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` highest scores among some groups, given and returned as rising int64; ties in index order.

    The threshold is found without sorting, which would take seconds for millions of single weights.
    """
    if count >= len(among) or count <= 0:
        return among if count > 0 else among[:0]
    values = score[among]
    last = values.kthvalue(len(values) - count + 1).values
    ties = values == last
    spare = count - (values > last).sum()
    return among[(values > last) | (ties & (ties.cumsum(0) <= spare))]


def _best_of_pools(score: Tensor, alive: Tensor, quota: Quota) -> Tensor:
    """The quota's number of highest scores in each pool, ties in index order: bool of shape `[G]`."""
    members = (alive & (quota.pool >= 0)).nonzero().flatten()
    members = members[torch.argsort(score[members], descending=True, stable=True)]
    members = members[torch.argsort(quota.pool[members], stable=True)]
    pools = quota.pool[members]
    sizes = torch.bincount(pools)
    rank = torch.arange(len(members)) - (sizes.cumsum(0) - sizes)[pools]
    best = torch.zeros_like(alive)
    best[members[rank < quota.keep]] = True
    return best
