"""Selections: thresholds, bounds, quotas, and the JSON file."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsebayes.errors import GroupingError, NumericsError, RunError
from sparsebayes.groups.grouping import Grouping, Labels, Quota
from sparsebayes.prune.selection import Selection, _layers, select, select_top


def rows(*sizes: int, quota: Quota | None = None, interleaved: bool = False) -> Grouping:
    """One group per row of layers 'a', 'b', ... of the given numbers of rows."""
    labels, start = [], 0
    for number, size in enumerate(sizes):
        index = torch.arange(start, start + size)[:, None]
        labels.append(Labels(f"{'abcdef'[number]}.weight", (size, 3), index))
        start += size
    layer_index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    if interleaved:
        layer_index = layer_index[torch.randperm(start, generator=torch.Generator().manual_seed(0))]
    return Grouping("rows", tuple(labels), tuple("abcdef"[: len(sizes)]), layer_index, quota)


def numbers(flags: Tensor | None) -> list[int]:
    assert flags is not None
    return flags.nonzero().flatten().tolist()


def test_keeps_what_exceeds_the_threshold() -> None:
    selection = select(rows(3, 2), torch.tensor([5.0, 0.2, 1.0, 0.9, 7.0]), max_removal=1.0, strength=3.0)
    assert numbers(selection.on) == [0, 4]  # 1.0 does not exceed 1.0
    assert selection.counts() == {"a": (1, 3), "b": (1, 2)}
    assert numbers(selection.forced) == numbers(selection.delayed) == []
    assert selection.strength == 3.0
    assert repr(selection) == "Selection('rows': 2 of 5 kept; a 1/3, b 1/2)"


def test_infinite_scores_decide() -> None:
    score = torch.tensor([math.inf, -math.inf, 2.0, -math.inf])
    assert numbers(select(rows(4), score, max_removal=1.0).on) == [0, 2]


def test_one_update_removes_at_most_a_share_of_the_living() -> None:
    grouping, score = rows(10), torch.linspace(0.0, 0.9, 10)
    first = select(grouping, score, max_removal=0.6)
    assert numbers(first.on) == [6, 7, 8, 9]
    assert numbers(first.delayed) == [6, 7, 8]
    assert numbers(first.forced) == [9]
    second = select(grouping, score, max_removal=0.6, previous=first)
    assert numbers(second.on) == [8, 9]  # floor(0.6 * 4) = 2 more


def test_a_layer_is_never_emptied() -> None:
    selection = select(rows(3, 3), torch.tensor([0.1, 0.3, 0.2, 9.0, 0.0, 0.0]), max_removal=1.0, min_keep=2)
    assert numbers(selection.on) == [1, 2, 3, 4]
    assert numbers(selection.forced) == [1, 2, 4]  # ties go to the first


def test_previously_removed_groups_stay_off() -> None:
    grouping = rows(4)
    first = select(grouping, torch.tensor([9.0, 0.0, 9.0, 9.0]))
    second = select(grouping, torch.full((4,), 9.0), previous=first)
    assert numbers(second.on) == [0, 2, 3]
    assert numbers(select(grouping, torch.zeros(4), previous=first, min_keep=4, max_removal=1.0).on) == [
        0,
        2,
        3,
    ]


def test_quota_keeps_exactly_the_best_of_each_pool() -> None:
    quota = Quota(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, -1, -1]), keep=2)
    score = torch.tensor([0.1, 0.4, 0.3, 0.2, 9.0, 8.0, 7.0, 6.0, 5.0, 0.1])
    selection = select(rows(10, quota=quota), score, max_removal=0.0)
    assert numbers(selection.on) == [1, 2, 4, 5, 8, 9]
    assert numbers(selection.delayed) == [9]  # pools know no delay
    assert numbers(select(rows(10, quota=quota), score, max_removal=1.0).on) == [1, 2, 4, 5, 8]


def test_select_top_keeps_the_number_and_every_layer() -> None:
    score = torch.tensor([0.1, 0.2, 0.3, 9.0, 8.0, 7.0])
    selection = select_top(rows(3, 3), score, num_keep=3)
    assert numbers(selection.on) == [2, 3, 4]
    assert numbers(selection.forced) == [2]
    assert numbers(select_top(rows(3, 3), score, num_keep=3, min_keep=0).on) == [3, 4, 5]
    assert select_top(rows(3, 3), score, keep_fraction=0.5).num_kept == 3


def test_select_top_respects_what_is_off() -> None:
    grouping = rows(4)
    first = select(grouping, torch.tensor([0.0, 9.0, 9.0, 9.0]))
    assert numbers(
        select_top(grouping, torch.tensor([9.0, 3.0, 2.0, 1.0]), num_keep=2, previous=first).on
    ) == [1, 2]


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    max_removal=st.floats(0.0, 1.0),
    min_keep=st.integers(0, 3),
)
def test_bounds_hold_for_any_scores(sizes: list[int], seed: int, max_removal: float, min_keep: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grouping = rows(*sizes, interleaved=bool(seed % 2))
    score = torch.rand(grouping.num_groups, generator=generator) * 2
    first = select(grouping, score, max_removal=max_removal, min_keep=min_keep)
    again = select(grouping, score.roll(1), max_removal=max_removal, min_keep=min_keep, previous=first)
    assert not (again.on & ~first.on).any()
    for layer in range(len(sizes)):
        members = grouping.layer_index == layer
        before, after = int(first.on[members].sum()), int(again.on[members].sum())
        assert after >= min(min_keep, before)
        assert before - after <= max_removal * before
        # Nothing that goes scores more than something that stays.
        gone, stays = members & first.on & ~again.on, members & again.on
        if gone.any() and stays.any():
            assert score.roll(1)[gone].max() <= score.roll(1)[stays].min()
    assert torch.equal(Selection.from_json(first.to_json()).on, first.on)


def test_refuses_scores_it_cannot_rank() -> None:
    with pytest.raises(NumericsError, match=r"one score for each of the 5 groups of 'rows', got .* \[4\]"):
        select(rows(3, 2), torch.ones(4))
    with pytest.raises(NumericsError, match=r"score of b\[1\] and 0 others is NaN"):
        select(rows(3, 2), torch.tensor([1.0, 1.0, 1.0, 1.0, math.nan]))
    with pytest.raises(NumericsError, match=r"max_removal within 0..1, .* got 1.5, 1, 1 and 1.0"):
        select(rows(3), torch.ones(3), max_removal=1.5)


def test_refuses_numbers_it_cannot_keep() -> None:
    score = torch.ones(6)
    with pytest.raises(GroupingError, match=r"cannot keep 1 groups of 'rows': .* within 2\.\.6"):
        select_top(rows(3, 3), score, num_keep=1)
    with pytest.raises(GroupingError, match=r"cannot keep 7 groups"):
        select_top(rows(3, 3), score, num_keep=7)
    with pytest.raises(GroupingError, match="one of num_keep and keep_fraction"):
        select_top(rows(3, 3), score)
    with pytest.raises(GroupingError, match="fixes how many groups stay"):
        select_top(rows(2, quota=Quota(torch.zeros(2, dtype=torch.int64), 1)), torch.ones(2), num_keep=1)


def test_refuses_a_selection_of_another_grouping() -> None:
    first = select(rows(3, 2), torch.ones(5) * 2)
    with pytest.raises(
        GroupingError, match=r"made for the grouping 'rows' of 5 groups over a, b, not for 'rows' of 5"
    ):
        select(rows(2, 3), torch.ones(5), previous=first)


def test_json_round_trip_keeps_everything() -> None:
    grouping = rows(9, 4, 7, interleaved=True)
    score = torch.rand(20, generator=torch.Generator().manual_seed(3))
    selection = select(grouping, score, strength=12.5)
    again = Selection.from_json(selection.to_json())
    assert (again.grouping, again.layers, again.fingerprint, again.strength) == (
        "rows", ("a", "b", "c"), grouping.fingerprint(), 12.5,
    )  # fmt: skip
    for name in ("on", "forced", "delayed", "layer_index"):
        assert torch.equal(getattr(again, name), getattr(selection, name)), name
    again.check_grouping(grouping)
    top = Selection.from_json(select_top(grouping, score, num_keep=5).to_json())
    assert top.delayed is None and top.num_kept == 5


def test_json_is_readable_and_small() -> None:
    grouping = rows(300, 100)
    document = json.loads(select(grouping, torch.ones(400) * 2).to_json())
    assert document["layers"] == [
        {"name": "a", "kept": 300, "groups": 300},
        {"name": "b", "kept": 100, "groups": 100},
    ]
    assert document["runs"] == {"layer": [0, 1], "length": [300, 100]}
    assert len(document["bits"]["on"]) < 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"'version' should be a whole number within 1..1, got 2"),
        ({"surplus": 1}, r"unknown field 'surplus'"),
        ({"grouping": 3}, r"'grouping' should be text, got 3"),
        ({"strength": "high"}, r"'strength' should be a finite number or null, got 'high'"),
        ({"num_groups": True}, r"'num_groups' should be a whole number"),
        ({"num_groups": 6}, r"'on' should be the bits of 6 groups|should be one length per run, 6 in total"),
        ({"num_kept": 1}, r"'num_kept' should be 2, as the bits say, got 1"),
        (
            {"layers": [{"name": "a", "kept": 3, "groups": 3}, {"name": "b", "kept": 1, "groups": 2}]},
            "'layers' should",
        ),
        (
            {"layers": [{"name": "a", "kept": 1, "groups": 3}, {"name": "a", "kept": 1, "groups": 2}]},
            "different names",
        ),
        ({"layers": [1, 2]}, r"'layers' should be a list of objects"),
        (
            {"runs": {"layer": [0, 2], "length": [3, 2]}},
            r"'layer' should be a list of whole numbers within 0..1",
        ),
        (
            {"runs": {"layer": [0, 1], "length": [3, 2**33]}},
            r"'length' should be one length per run, 5 in total",
        ),
        ({"runs": []}, r"'runs' should be an object"),
        ({"bits": {"on": "//==", "forced": None, "delayed": None}}, r"'on' should be the bits of 5 groups"),
        ({"bits": {"on": "kQ==", "forced": None, "delayed": None}}, r"'on' should be the bits of 5 groups"),
        (
            {"bits": {"on": "???", "forced": None, "delayed": None}},
            r"'on' should be the bits of 5 groups in base64",
        ),
        (
            {"bits": {"on": None, "forced": None, "delayed": None}},
            r"'on' should be the bits of 5 groups in base64, got None",
        ),
        ({"bits": {"on": "kA=="}}, r"'bits' of selection.json lacks the field 'forced'"),
    ],
)
def test_damaged_json_is_refused(change: dict[str, object], message: str) -> None:
    selection = select(rows(3, 2), torch.tensor([5.0, 0.2, 1.0, 0.9, 7.0]), max_removal=1.0)
    document = {**json.loads(selection.to_json()), **change}
    with pytest.raises(RunError, match=message):
        Selection.from_json(json.dumps(document))


def test_truncated_json_is_refused() -> None:
    text = select(rows(3), torch.ones(3)).to_json()
    with pytest.raises(RunError, match=r"runs/x/selection.json is not JSON .* cut short"):
        Selection.from_json(text[: len(text) // 2], where="runs/x/selection.json")
    with pytest.raises(RunError, match="should hold a JSON object, not a list"):
        Selection.from_json("[]")
    with pytest.raises(RunError, match="is not JSON"):
        Selection.from_json("[" * 100_000)


@given(
    score=st.lists(st.floats(0, 2), min_size=20, max_size=20, unique=True),
    step=st.integers(1, 9),
    max_removal=st.floats(0, 1),
)
def test_rounding_fills_layers_up_with_the_best_of_what_would_go(
    score: list[float], step: int, max_removal: float
) -> None:
    grouping, scores = rows(12, 8), torch.tensor(score, dtype=torch.float64)
    plain = select(grouping, scores, max_removal=max_removal)
    rounded = select(grouping, scores, max_removal=max_removal, round_to=step)
    assert bool((rounded.on | ~plain.on).all())
    for (before, count), (after, _), layer in zip(
        plain.counts().values(), rounded.counts().values(), (slice(0, 12), slice(12, 20)), strict=True
    ):
        wanted = math.ceil(before / step) * step
        assert after == (wanted if wanted <= count else before)
        added = (rounded.on & ~plain.on)[layer]
        left = ~rounded.on[layer]
        if added.any() and left.any():
            assert float(scores[layer][added].min()) > float(scores[layer][left].max())
        assert bool((rounded.forced[layer] | ~added).all())


@pytest.mark.parametrize("optional", [(), ("branches",)])
def test_only_optional_layers_need_keep_no_group_whatever_their_name(optional: tuple[str, ...]) -> None:
    plain = rows(5, 5)
    grouping = Grouping("both", plain.labels, ("a", "branches"), plain.layer_index, optional_layers=optional)
    selection = select(grouping, torch.zeros(10), max_removal=1.0, min_keep=2, round_to=4)
    assert selection.counts() == {"a": (4, 5), "branches": (0 if optional else 4, 5)}
    assert select(grouping, torch.zeros(10), max_removal=0.6).counts()["branches"] == (2, 5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_groups_of_all_layers_take_one_number_each(interleaved: bool) -> None:
    """A vector per layer would take layers times groups: gigabytes for the single weights of a large network."""
    grouping = rows(9, 4, 7, interleaved=interleaved)
    layers = _layers(grouping)
    assert [groups.tolist() for groups in layers] == [
        (grouping.layer_index == layer).nonzero().flatten().tolist() for layer in range(3)
    ]
    assert len({groups.untyped_storage().data_ptr() for groups in layers}) == 1


def test_a_step_below_one_is_refused() -> None:
    with pytest.raises(NumericsError, match="round_to >= 1"):
        select(rows(3), torch.zeros(3), round_to=0)
