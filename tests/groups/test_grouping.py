"""Index algebra: adjointness, and agreement with loops written from the definitions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsebayes.errors import GroupingError
from sparsebayes.groups.grouping import Grouping, Labels, Quota
from sparsebayes.groups.stacking import concatenate

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (2, 3, 2, 2)}


@st.composite
def groupings(draw: st.DrawFn) -> Grouping:
    """Random groupings with overlapping labels, entries in no group, and empty groups."""
    num_groups = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    labels = []
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(SHAPES)))
        size = [draw(st.sampled_from([1, full])) for full in SHAPES[name]]
        index = torch.randint(-1, num_groups, size, generator=generator)
        labels.append(Labels(name, SHAPES[name], index, gate=draw(st.booleans())))
    layer_index = torch.randint(0, 2, (num_groups,), generator=generator)
    return Grouping("random", tuple(labels), ("a", "b"), layer_index)


def random_values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).double() for name, shape in SHAPES.items()}


def entries(labels: Labels):
    """Each entry's position with its group, by the definition."""
    index = labels.index.expand(labels.shape)
    for position in itertools.product(*(range(size) for size in labels.shape)):
        yield position, int(index[position])


@settings(deadline=None, max_examples=60)
@given(groupings(), st.integers(0, 1000))
def test_reduce_and_expand_are_adjoint(grouping: Grouping, seed: int) -> None:
    values = random_values(seed)
    vector = torch.randn(grouping.num_groups, generator=torch.Generator().manual_seed(seed)).double()
    left = grouping.reduce(values) @ vector
    right = sum((values[name] * part).sum() for name, part in grouping.expand(vector).items())
    assert abs(float(left - right)) < 1e-12


@settings(deadline=None, max_examples=30)
@given(groupings(), st.booleans())
def test_reduce_is_the_loop_over_entries(grouping: Grouping, gates_only: bool) -> None:
    values = random_values(0)
    expected = torch.zeros(grouping.num_groups).double()
    for labels in grouping.labels:
        if labels.gate or not gates_only:
            for position, group in entries(labels):
                if group >= 0:
                    expected[group] += values[labels.parameter][position]
    torch.testing.assert_close(
        grouping.reduce(values, gates_only=gates_only).double(), expected, atol=1e-12, rtol=0
    )


@settings(deadline=None, max_examples=30)
@given(groupings(), st.integers(0, 1000), st.booleans())
def test_masks_and_scales_are_the_loop_over_entries(grouping: Grouping, seed: int, gates_only: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(grouping.num_groups, generator=generator) > 0.4
    factor = torch.randn(grouping.num_groups, generator=generator).double()
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    scales = {name: torch.ones(shape).double() for name, shape in SHAPES.items()}
    for labels in grouping.labels:
        for position, group in entries(labels):
            if group >= 0:
                masks[labels.parameter][position] &= on[group]
                if labels.gate or not gates_only:
                    scales[labels.parameter][position] *= factor[group]
    for name, mask in grouping.masks(on).items():
        assert mask.shape == SHAPES[name]
        assert torch.equal(mask, masks[name])
    for name, scale in grouping.scales(factor, gates_only=gates_only).items():
        torch.testing.assert_close(scale.expand(SHAPES[name]), scales[name], atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=30)
@given(groupings())
def test_sizes_are_the_reduction_of_ones(grouping: Grouping) -> None:
    ones = {name: torch.ones(shape, dtype=torch.int64) for name, shape in SHAPES.items()}
    assert grouping.sizes().dtype == torch.int64
    assert torch.equal(grouping.sizes(), grouping.reduce(ones))


def two_rows() -> Grouping:
    labels = Labels("fc.weight", (2, 3), torch.tensor([[0], [1]]))
    return Grouping("rows", (labels,), ("fc",), torch.tensor([0, 0]))


def test_hand_computed_rows() -> None:
    grouping = two_rows()
    values = {"fc.weight": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])}
    assert grouping.reduce(values).tolist() == [6.0, 15.0]
    assert grouping.expand(torch.tensor([1.0, 2.0]))["fc.weight"].tolist() == [[1.0] * 3, [2.0] * 3]
    assert grouping.masks(torch.tensor([True, False]))["fc.weight"].tolist() == [[True] * 3, [False] * 3]
    assert grouping.scales(torch.tensor([0.5, 2.0]))["fc.weight"].tolist() == [[0.5], [2.0]]
    assert grouping.sizes().tolist() == [3, 3]
    assert grouping.parameters == {"fc.weight": (2, 3)}
    assert repr(grouping) == "Grouping('rows', 2 groups; fc: 2)"


def test_describe_counts_within_the_layer() -> None:
    labels = Labels("w", (4,), torch.arange(4))
    grouping = Grouping("rows", (labels,), ("conv1", "fc"), torch.tensor([0, 1, 0, 1]))
    assert [grouping.describe(group) for group in range(4)] == ["conv1[0]", "fc[0]", "conv1[1]", "fc[1]"]
    with pytest.raises(GroupingError, match=r"expected a group number in 0\.\.3, got 4"):
        grouping.describe(4)


def test_dim_of_labels() -> None:
    assert Labels("w", (2, 3), torch.zeros(2, 1, dtype=torch.int64)).dim == 0
    assert Labels("w", (2, 3), torch.zeros(1, 3, dtype=torch.int64)).dim == 1
    assert Labels("w", (2, 3), torch.zeros(2, 3, dtype=torch.int64)).dim is None
    assert Labels("w", (2, 3), torch.zeros(1, 1, dtype=torch.int64)).dim is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    labels = Labels("w", (4096,), torch.zeros(1, dtype=torch.int64))
    grouping = Grouping("all", (labels,), ("w",), torch.tensor([0]))
    total = grouping.reduce({"w": torch.ones(4096, dtype=dtype)})
    assert total.dtype == torch.float32
    assert total.tolist() == [4096.0]


def test_reduce_without_a_gate_is_zero() -> None:
    labels = Labels("w", (2,), torch.arange(2), gate=False)
    grouping = Grouping("own", (labels,), ("w",), torch.tensor([0, 0]))
    assert grouping.reduce({"w": torch.ones(2)}, gates_only=True).tolist() == [0.0, 0.0]


def test_fingerprint_tells_groupings_apart() -> None:
    base = two_rows()
    changed = [
        Labels("other.weight", (2, 3), base.labels[0].index),
        Labels("fc.weight", (2, 4), base.labels[0].index),
        Labels("fc.weight", (2, 3), base.labels[0].index.flip(0)),
        Labels("fc.weight", (2, 3), base.labels[0].index, gate=False),
    ]
    variants = [Grouping("rows", (labels,), base.layers, base.layer_index) for labels in changed]
    variants.append(Grouping("rows", base.labels, ("fc", "b"), torch.tensor([0, 1])))
    variants.append(Grouping("rows", base.labels, ("fc",), base.layer_index, Quota(torch.zeros(2).long(), 1)))
    prints = [base.fingerprint(), *(variant.fingerprint() for variant in variants)]
    assert len(set(prints)) == len(prints)
    assert two_rows().fingerprint() == base.fingerprint()
    assert len(base.fingerprint()) == 64


def test_concatenate_stacks_numbers_layers_and_pools() -> None:
    quota = Quota(torch.tensor([0, 0]), 1)
    first = Grouping("1:2", two_rows().labels, ("fc",), torch.tensor([0, 0]), quota)
    columns = Labels("fc.weight", (2, 3), torch.tensor([[0, 1, -1]]))
    second = Grouping("columns", (columns,), ("fc",), torch.tensor([0, 0]))
    stacked = concatenate([first, second, first])
    assert stacked.name == "1:2+columns+1:2"
    assert stacked.layers == ("fc", "fc (columns)", "fc (1:2)")
    assert stacked.layer_index.tolist() == [0, 0, 1, 1, 2, 2]
    assert stacked.labels[1].index.tolist() == [[2, 3, -1]]
    assert stacked.quota is not None
    assert stacked.quota.pool.tolist() == [0, 0, -1, -1, 1, 1]
    values = {"fc.weight": torch.randn(2, 3)}
    parts = [part.reduce(values) for part in (first, second, first)]
    assert torch.equal(stacked.reduce(values), torch.cat(parts))
    assert concatenate([first]) is first


def test_concatenate_refuses_what_does_not_fit() -> None:
    with pytest.raises(GroupingError, match="expected at least one grouping to stack, got none"):
        concatenate([])
    other = Grouping(
        "rows", (Labels("fc.weight", (4, 3), torch.zeros(1, 1).long()),), ("fc",), torch.tensor([0])
    )
    with pytest.raises(GroupingError, match=r"'fc.weight' has shape \[2, 3\] in one and \[4, 3\] in another"):
        concatenate([two_rows(), other])
    pools = [
        Grouping("n:m", two_rows().labels, ("fc",), torch.tensor([0, 0]), Quota(torch.zeros(2).long(), keep))
        for keep in (1, 2)
    ]
    with pytest.raises(GroupingError, match=r"must keep the same number of each pool, got \[1, 2\]"):
        concatenate(pools)


def test_labels_refuse_bad_indices() -> None:
    with pytest.raises(
        GroupingError, match=r"expected an index that broadcasts to \[2, 3\] with 2 dims, got \[3\]"
    ):
        Labels("w", (2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(GroupingError, match=r"broadcasts to \[2, 3\] with 2 dims, got \[2, 2\]"):
        Labels("w", (2, 3), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(GroupingError, match=r"expected an int64 index on the CPU, got torch.int32 on cpu"):
        Labels("w", (2,), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(GroupingError, match="group numbers start at 0 and -1 means none, got -2"):
        Labels("w", (2,), torch.tensor([0, -2]))


def test_groupings_refuse_numbers_out_of_range() -> None:
    labels = Labels("w", (2,), torch.tensor([0, 5]))
    with pytest.raises(
        GroupingError, match="labels of 'w' name group 5, but the grouping 'x' has only 2 groups"
    ):
        Grouping("x", (labels,), ("w",), torch.tensor([0, 0]))
    for layer_index in ([0, 1], [-1, 0]):
        with pytest.raises(GroupingError, match=r"layer_index of 'x' must lie in 0\.\.0"):
            Grouping("x", (), ("w",), torch.tensor(layer_index))
    with pytest.raises(
        GroupingError, match=r"the quota of 'x' needs one pool per group \(\[2\]\), got \[3\]"
    ):
        Grouping("x", (), ("w",), torch.tensor([0, 0]), Quota(torch.zeros(3).long(), 1))


def test_calls_refuse_tensors_that_do_not_fit() -> None:
    grouping = two_rows()
    with pytest.raises(GroupingError, match=r"no values for the parameter 'fc.weight'; got \['x'\]"):
        grouping.reduce({"x": torch.ones(1)})
    with pytest.raises(GroupingError, match=r"must have the parameter's shape \[2, 3\], got \[3, 2\]"):
        grouping.reduce({"fc.weight": torch.ones(3, 2)})
    with pytest.raises(
        GroupingError, match=r"'rows' has 2 groups, so a tensor of shape \[2\] was expected, got \[3\]"
    ):
        grouping.expand(torch.ones(3))
    with pytest.raises(
        GroupingError, match=r"expected a bool tensor that says which groups are on, got torch\.int64"
    ):
        grouping.masks(torch.ones(2, dtype=torch.int64))


def test_results_are_new_tensors() -> None:
    grouping = two_rows()
    expanded = grouping.expand(torch.ones(2))["fc.weight"]
    expanded[0, 0] = 7.0
    assert expanded[0].tolist() == [7.0, 1.0, 1.0]
    masks = grouping.masks(torch.ones(2, dtype=torch.bool))
    masks["fc.weight"][0, 0] = False
    assert masks["fc.weight"][0].tolist() == [False, True, True]


def test_labels_of_two_groupings_serve_both() -> None:
    """Slots of entries in no group depend on the number of groups: labels may be shared by groupings of other sizes."""
    labels = Labels("w", (3, 2), torch.tensor([[0], [-1], [1]]))
    small = Grouping("small", (labels,), ("a",), torch.zeros(2, dtype=torch.int64))
    large = Grouping("large", (labels,), ("a",), torch.zeros(4, dtype=torch.int64))
    ones = {"w": torch.ones(3, 2)}
    assert small.reduce(ones).tolist() == [2, 2]
    assert large.reduce(ones).tolist() == [2, 2, 0, 0]
    assert large.masks(torch.tensor([True, False, False, False]))["w"].tolist() == [
        [True] * 2,
        [True] * 2,
        [False] * 2,
    ]


def test_the_fingerprint_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grouping = two_rows()
    first = grouping.fingerprint()
    monkeypatch.setattr("hashlib.sha256", lambda: pytest.fail("worked out again"))
    assert grouping.fingerprint() == first


def test_optional_layers_are_layers_and_are_renamed_with_them() -> None:
    one = replace(two_rows(), optional_layers=two_rows().layers)
    stacked = concatenate([one, one])
    assert stacked.optional_layers == stacked.layers
    assert len(set(stacked.layers)) == 2
    with pytest.raises(GroupingError, match=r"optional layers of .* should be some of its layers"):
        replace(two_rows(), optional_layers=("nowhere",))
