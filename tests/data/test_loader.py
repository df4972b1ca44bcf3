"""The loader feeds every image once, normalised, in an order that its seed alone decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsebayes.data import Images, Loader, split
from sparsebayes.errors import DataError


def make(labels: list[int], channels: int = 1) -> Images:
    """Images of 2x2 whose pixels hold their position, up to 255."""
    pixels = torch.arange(len(labels)).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, channels, 2, 2)
    return Images(pixels.contiguous(), torch.tensor(labels))


def loader(count: int = 10, **options: Any) -> Loader:
    chosen = {"batch_size": 4, "mean": (0.0,), "std": (1 / 255,), "shuffle": False, **options}
    return Loader(make([i % 5 for i in range(count)]), **chosen)


def positions(batches: Loader) -> list[int]:
    """The images of one pass in order, read from their pixels."""
    return [round(float(value)) for x, _ in batches for value in x[:, 0, 0, 0]]


def test_batches_in_order() -> None:
    batches = list(loader())
    assert [tuple(x.shape) for x, _ in batches] == [(4, 1, 2, 2), (4, 1, 2, 2), (2, 1, 2, 2)]
    assert [y.tolist() for _, y in batches] == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4]]
    assert positions(loader()) == list(range(10))
    x, y = batches[0]
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    ("count", "batch_size", "drop_last", "expected"),
    [(10, 4, False, 3), (10, 4, True, 2), (10, 5, True, 2), (10, 10, False, 1), (10, 100, False, 1)],
)
def test_number_of_batches(count: int, batch_size: int, drop_last: bool, expected: int) -> None:
    batches = loader(count, batch_size=batch_size, drop_last=drop_last)
    assert len(batches) == len(list(batches)) == expected
    assert batches.num_data == count


def test_normalises_each_channel() -> None:
    images = Images(torch.randint(0, 256, (7, 3, 4, 5), dtype=torch.uint8), torch.zeros(7).long())
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 1.5)
    (x, _), *rest = Loader(images, batch_size=7, mean=mean, std=std, shuffle=False)
    assert rest == []
    for channel in range(3):
        expected = (images.images[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(x[:, channel].double(), expected, rtol=1e-6, atol=1e-6)


def test_shuffling_feeds_each_image_once_in_a_new_order() -> None:
    batches = loader(100, shuffle=True, batch_size=7)
    first, second = positions(batches), positions(batches)
    assert sorted(first) == sorted(second) == list(range(100))
    assert len({tuple(first), tuple(second), tuple(range(100))}) == 3


def test_labels_stay_with_their_images() -> None:
    for x, y in loader(100, shuffle=True, augment="none"):
        assert torch.equal(x[:, 0, 0, 0].round().long() % 5, y)


def test_indexed_names_the_positions() -> None:
    for where, x, y in loader(30, shuffle=True).indexed():
        assert torch.equal(x[:, 0, 0, 0].round().long(), where)
        assert torch.equal(where % 5, y)


@pytest.mark.parametrize("augment", ["none", "shift", "affine"])
def test_the_seed_decides_alone(augment: str) -> None:
    passes = [
        [torch.cat([x for x, _ in batches]) for _ in range(2)]
        for batches in (loader(shuffle=True, augment=augment, seed=seed) for seed in (5, 5, 6))
    ]
    assert all(torch.equal(a, b) for a, b in zip(passes[0], passes[1], strict=True))
    assert not torch.equal(passes[0][0], passes[2][0])


def test_the_callers_random_numbers_stay() -> None:
    state = torch.get_rng_state()
    list(loader(shuffle=True, augment="affine"))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pass_that_is_broken_off_changes_nothing_after_it() -> None:
    whole, broken = loader(shuffle=True, augment="shift"), loader(shuffle=True, augment="shift")
    list(whole)
    next(iter(broken))
    assert positions(whole) == positions(broken)


def test_two_passes_at_once_do_not_disturb_each_other() -> None:
    alone, together = loader(shuffle=True, augment="affine"), loader(shuffle=True, augment="affine")
    expected = list(alone), list(alone)
    for batches, passes in zip(
        zip(*expected, strict=True), zip(iter(together), iter(together), strict=True), strict=True
    ):
        for (x, y), (x_here, y_here) in zip(batches, passes, strict=True):
            assert torch.equal(x, x_here)
            assert torch.equal(y, y_here)


def test_a_state_continues_the_passes() -> None:
    batches, resumed = loader(shuffle=True), loader(shuffle=True, seed=99)
    list(batches)
    resumed.load_state_dict(batches.state_dict())
    assert [positions(batches) for _ in range(2)] == [positions(resumed) for _ in range(2)]


def test_reseeding_starts_anew() -> None:
    batches = loader(shuffle=True, seed=3)
    first = positions(batches)
    list(batches)
    batches.reseed_(3)
    assert positions(batches) == first


def test_batches_are_copies() -> None:
    batches = loader()
    for x, y in batches:
        x.zero_()
        y.fill_(-1)
    assert positions(batches) == list(range(10))
    assert [int(label) for _, y in batches for label in y] == [i % 5 for i in range(10)]


@pytest.mark.gpu
def test_the_same_batches_on_the_gpu() -> None:
    for augment, tolerance in (("none", 0), ("shift", 0), ("affine", 1e-3)):
        here = list(loader(shuffle=True, augment=augment))
        there = list(loader(shuffle=True, augment=augment, device="cuda"))
        for (x, y), (x_gpu, y_gpu) in zip(here, there, strict=True):
            assert x_gpu.is_cuda
            torch.testing.assert_close(x_gpu.cpu(), x, rtol=0, atol=tolerance)
            assert torch.equal(y_gpu.cpu(), y)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            {"batch_size": 11, "drop_last": True},
            "batch_size 11 is larger than the 10 images.*lower batch_size",
        ),
        ({"augment": "shifts"}, r"unknown augmentation 'shifts'; did you mean 'shift'\?"),
        ({"mean": (0.1, 0.2)}, "mean and std need 1 numbers, one for each channel"),
        ({"std": (0.0,)}, "std above zero"),
    ],
)
def test_every_mistake_is_answered(options: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        loader(**options)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, r"has the one entry 'generator', got \[\]"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, "must be a generator's state"),
        ({"generator": torch.zeros(3)}, "must be a generator's state"),
    ],
)
def test_another_state_is_refused(state: dict[str, torch.Tensor], text: str) -> None:
    with pytest.raises(DataError, match=text):
        loader().load_state_dict(state)


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32),
)
def test_split_is_a_stratified_partition(labels: list[int], share: float, seed: int) -> None:
    holdout = 1 + int(share * (len(labels) - 1))
    images = make(labels)
    train, held_out = split(images, holdout=holdout, seed=seed)
    assert (len(train), len(held_out)) == (len(labels) - holdout, holdout)
    parts = [part.images[:, 0, 0, 0].tolist() for part in (train, held_out)]
    assert all(part == sorted(part) for part in parts)
    assert sorted(parts[0] + parts[1]) == list(range(len(labels)))
    for part in (train, held_out):
        assert torch.equal(part.labels, images.labels[part.images[:, 0, 0, 0].long()])
    for label in set(labels):
        exact = labels.count(label) * holdout / len(labels)
        assert abs(held_out.labels.tolist().count(label) - exact) < 1


def test_split_depends_on_its_seed_alone() -> None:
    images = make([0] * 50)
    state = torch.get_rng_state()
    chosen = [split(images, holdout=10, seed=seed)[1].images[:, 0, 0, 0].tolist() for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("holdout", [0, -1, 10, 11])
def test_split_refuses_what_leaves_nothing(holdout: int) -> None:
    with pytest.raises(DataError, match=f"holdout must be between 1 and 9, as there are 10 .* got {holdout}"):
        split(make([0] * 10), holdout=holdout, seed=0)
