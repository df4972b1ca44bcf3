"""Augmentations: every image moves as it should, on its own, and black comes in from outside."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from sparsebayes.data import augment
from sparsebayes.data.augment import AUGMENTATIONS, affine, crop_flip, cutout, shift


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """One image `[C, H, W]`, moved by whole pixels, written as a loop."""
    result = torch.zeros_like(image)
    height, width = image.shape[1:]
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[:, row, column] = image[:, row - down, column - right]
    return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shift_moves_each_image_by_up_to_two_pixels(dtype: torch.dtype) -> None:
    images = torch.randint(1, 200, (300, 2, 5, 7), generator=generator(1)).to(dtype)
    result = shift(images, generator())
    assert (result.dtype, result.shape) == (images.dtype, images.shape)
    seen = set()
    for before, after in zip(images, result, strict=True):
        fits = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(moved(before, down, right), after)
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) == 25


def test_shift_leaves_its_argument_alone() -> None:
    images = torch.ones(3, 1, 4, 4)
    shift(images, generator()).zero_()
    assert bool((images == 1).all())


def with_limits(
    monkeypatch: pytest.MonkeyPatch, *, angle: float = 0, scale: float = 0, move: float = 0
) -> None:
    monkeypatch.setattr(augment, "_MAX_ANGLE", angle)
    monkeypatch.setattr(augment, "_MAX_SCALE", scale)
    monkeypatch.setattr(augment, "_MAX_SHIFT", move)


def test_affine_without_change_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    with_limits(monkeypatch)
    images = torch.rand(4, 2, 6, 9, dtype=torch.float64)
    torch.testing.assert_close(affine(images, generator()), images)


def ones(*shape: int, generator: Generator) -> Tensor:
    """Draws at the upper end, so that each limit is reached."""
    return torch.ones(shape)


def test_affine_moves_by_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    with_limits(monkeypatch, move=2)
    monkeypatch.setattr(torch, "rand", ones)
    images = torch.rand_like(torch.empty(2, 3, 6, 9, dtype=torch.float64))
    expected = torch.stack([moved(image, -2, -2) for image in images])
    torch.testing.assert_close(affine(images, generator()), expected)


@pytest.mark.parametrize("shape", [(8, 8), (8, 12)])
def test_affine_turns_pixels_not_coordinates(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a quarter turn a pixel is as far from the centre, in pixels, as before: also in a wide image."""
    with_limits(monkeypatch, angle=math.pi / 2)
    monkeypatch.setattr(torch, "rand", ones)
    height, width = shape
    images = torch.zeros(1, 1, height, width, dtype=torch.float64)
    images[0, 0, height // 2 + 1, width // 2 + 2] = 1  # 1.5 below, 2.5 right of the centre
    result = affine(images, generator())[0, 0]
    found = torch.nonzero(result > 0.5)
    assert found.tolist() in ([[height // 2 - 3, width // 2 + 1]], [[height // 2 + 2, width // 2 - 2]])


def test_affine_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    with_limits(monkeypatch, scale=1)
    monkeypatch.setattr(torch, "rand", ones)
    images = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    images[0, 0, 3:5, 3:5] = 1  # 2 x 2 in the middle
    result = affine(images, generator())
    assert float(result.sum()) == pytest.approx(16)
    assert float(result[0, 0, 2:6, 2:6].sum()) == pytest.approx(12.25)


def test_affine_stays_within_its_limits() -> None:
    images = torch.zeros(500, 1, 29, 29)
    images[:, :, 14, 14] = 100
    result = affine(images, generator())
    weight = result.sum((1, 2, 3))
    assert bool((weight > 0).all())
    grid = torch.arange(29.0)
    rows = (result.sum((1, 3)) * grid).sum(1) / weight - 14
    columns = (result.sum((1, 2)) * grid).sum(1) / weight - 14
    for offset in (rows, columns):
        assert float(offset.abs().max()) < 2 * 1.1 + 0.6  # the interpolation of one pixel is no exact centre
        assert float(offset.std()) == pytest.approx(2 / math.sqrt(3), rel=0.15)


@pytest.mark.parametrize("change", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
def test_the_seed_decides_alone(change: Callable[[Tensor, Generator], Tensor]) -> None:
    images = torch.rand(20, 1, 8, 8)
    state = torch.get_rng_state()
    first, again = change(images, generator(3)), change(images, generator(3))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_changes_them_otherwise() -> None:
    images = torch.rand(20, 1, 8, 8)
    assert not torch.equal(shift(images, generator(3)), shift(images, generator(4)))
    assert not torch.equal(affine(images, generator(3)), affine(images, generator(4)))
    assert torch.equal(AUGMENTATIONS["none"](images, generator(3)), images)


def test_crop_flip_moves_by_up_to_four_pixels_and_mirrors_half() -> None:
    images = torch.randint(1, 200, (100, 1, 5, 6), generator=generator(1)).to(torch.float32)
    result = crop_flip(images, generator())
    seen, mirrored = set(), 0
    for before, after in zip(images, result, strict=True):
        fits = [
            (down, right, flip)
            for down in range(-4, 5)
            for right in range(-4, 5)
            for flip in (False, True)
            if torch.equal(moved(before, down, right).flip(2) if flip else moved(before, down, right), after)
        ]
        assert len(fits) == 1
        seen.add(fits[0][:2])
        mirrored += fits[0][2]
    assert len(seen) > 50  # of 81
    assert 35 < mirrored < 65


def test_cutout_hides_one_square_behind_the_mean_colour() -> None:
    images = torch.rand(300, 3, 8, 8, generator=generator(1), dtype=torch.float64)
    result = cutout(images, generator())
    sizes = set()
    for before, after in zip(images, result, strict=True):
        hidden = (before != after).any(0)
        rows, columns = hidden.any(1), hidden.any(0)
        assert torch.equal(hidden, rows[:, None] & columns[None, :])
        assert torch.equal(after[:, hidden], before.mean((1, 2))[:, None].expand(3, int(hidden.sum())))
        for axis in (rows, columns):
            inside = axis.nonzero().flatten().tolist()
            assert inside == list(range(inside[0], inside[-1] + 1))
            assert len(inside) == 4 or inside[0] == 0 or inside[-1] == 7
        sizes.add((int(rows.sum()), int(columns.sum())))
    assert max(sizes) == (4, 4)
    assert min(sizes) == (2, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_no_augmentation_waits_for_the_gpu_and_all_draw_alike(name: str) -> None:
    images = torch.rand(20, 3, 8, 8)
    expected = AUGMENTATIONS[name](images, generator(3))
    on_gpu = images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = AUGMENTATIONS[name](on_gpu, generator(3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=1e-5)
