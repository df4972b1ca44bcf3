"""Every way of squaring a convolution's per-image gradients gives the sums of a plain loop over images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsebayes.curvature import kernels
from sparsebayes.curvature.kernels import Geometry, add_squared_gradients_, ways
from sparsebayes.curvature.squares import SquareSums

GEOMETRIES = {
    "padded": (Geometry((6, 4, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1), (2, 2)),
    "lopsided": (Geometry((5, 2, 2, 2), (1, 1), ((0, 1), (0, 1)), (1, 1), 1), (3, 3)),
    "strided": (Geometry((3, 4, 3, 2), (2, 1), ((1, 1), (0, 0)), (1, 2), 1), (5, 4)),
    "more padding than map": (Geometry((3, 2, 5), (1,), ((2, 2),), (2,), 1), (6,)),
    "volume": (Geometry((3, 2, 2, 1, 2), (1, 2, 1), ((1, 1), (0, 0), (0, 0)), (1, 1, 1), 1), (2, 3, 2)),
    "grouped": (Geometry((6, 2, 3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 2), (3, 3)),
}


def _case(name: str, num_passes: int) -> tuple[Tensor, Tensor, Geometry]:
    geometry, size = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, geometry.weight[1] * geometry.groups, *size, dtype=torch.float64, generator=generator)
    each = zip(size, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    out = [(n + sum(pad) - d * (k - 1) - 1) // s + 1 for n, k, s, pad, d in each]
    shape = (num_passes, 5, geometry.weight[0], *out)
    return torch.randn(shape, dtype=torch.float64, generator=generator), x, geometry


def _looped(g: Tensor, x: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """One backward pass of the library for each image and pass."""
    total = torch.zeros(2, *geometry.weight, dtype=torch.float64)
    run = (torch.conv1d, torch.conv2d, torch.conv3d)[x.ndim - 3]
    padded = torch.nn.functional.pad(x, [size for pair in reversed(geometry.padding) for size in pair])
    for n in range(len(x)):
        q = torch.zeros(geometry.weight, dtype=torch.float64)
        for one_pass in g:
            weight = torch.zeros(geometry.weight, dtype=torch.float64, requires_grad=True)
            y = run(padded[n : n + 1], weight, None, geometry.stride, 0, geometry.dilation, geometry.groups)
            q += torch.autograd.grad(y, weight, one_pass[n : n + 1])[0] ** 2
        total[0] += q
        total[1] += q**2
    return total[0], total[1]


def _sums(geometry: Geometry, fourth: bool, dtype: torch.dtype = torch.float64) -> SquareSums:
    return SquareSums(torch.empty(geometry.weight, dtype=dtype), fourth=fourth)


@pytest.mark.parametrize("fourth", [False, True])
@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize("small", [0, 1 << 14])
@pytest.mark.parametrize("case", GEOMETRIES)
def test_all_ways_give_the_same_sums(
    monkeypatch: pytest.MonkeyPatch, case: str, small: int, num_passes: int, fourth: bool
) -> None:
    monkeypatch.setattr("sparsebayes.curvature.products._SMALL", small)  # a tile, or many images at a time
    monkeypatch.setattr("sparsebayes.curvature.products._TILE", 10)  # a few rows at a time
    monkeypatch.setattr("sparsebayes.curvature.squares._TEMPORARY_CPU", 300)  # a few images at a time
    monkeypatch.setattr(kernels, "_TOGETHER", 2)
    g, x, geometry = _case(case, num_passes)
    expected, expected_fourth = _looped(g, x, geometry)
    candidates = ways(g, x, geometry)
    assert ("loop" in candidates) == (case != "lopsided")
    assert ("taps" in candidates) == (case != "grouped")
    for way in candidates.values():
        sums = _sums(geometry, fourth)
        way(sums, g, x, geometry)
        found, found_fourth = sums.result()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for step in (1, 7):
            torch.testing.assert_close(sums.sample(step), found.flatten()[::step], rtol=1e-12, atol=1e-12)
        if fourth:
            assert found_fourth is not None
            torch.testing.assert_close(found_fourth, expected_fourth, rtol=1e-12, atol=1e-12)
        else:
            assert found_fourth is None


@pytest.mark.parametrize("fourth", [False, True])
def test_sums_of_different_ways_add_up(fourth: bool) -> None:
    g, x, geometry = _case("padded", 2)
    sums = _sums(geometry, fourth)
    for number, way in enumerate(ways(g, x, geometry).values()):
        way(sums, g[:, number : number + 1], x[number : number + 1], geometry)
    expected, expected_fourth = _looped(g[:, :3], x[:3], geometry)
    found, found_fourth = sums.result()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sums.sample(11), expected.flatten()[::11], rtol=1e-12, atol=1e-12)
    if found_fourth is not None:
        torch.testing.assert_close(found_fourth, expected_fourth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("small_weight", "large_map", "chosen"),
    [(1 << 14, 256, "batched"), (0, 256, "taps"), (0, 4, "loop")],
)
def test_the_rule_follows_the_shapes(
    monkeypatch: pytest.MonkeyPatch, small_weight: int, large_map: int, chosen: str
) -> None:
    monkeypatch.setattr(kernels, "_SMALL_WEIGHT", small_weight)
    monkeypatch.setattr(kernels, "_LARGE_MAP", large_map)
    g, x, geometry = _case("padded", 1)
    used: list[str] = []
    for name, way in ways(g, x, geometry).items():
        assert way.__name__ == f"_{name}"
        monkeypatch.setattr(kernels, f"_{name}", _listening(name, way, used))
    add_squared_gradients_(_sums(geometry, False), g, x, geometry)
    assert used == [chosen]


def test_tuning_times_every_way_once_and_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_WINNERS", {})
    g, x, geometry = _case("padded", 1)
    seconds = {"batched": 3.0, "taps": 1.0, "loop": 4.0}
    timed: list[str] = []

    def clock(way: kernels.Way, *_: object) -> float:
        timed.append(way.__name__[1:])
        return seconds[way.__name__[1:]]

    monkeypatch.setattr(kernels, "_timed", clock)
    sums = _sums(geometry, False)
    add_squared_gradients_(sums, g, x, geometry, tune=True)
    assert sorted(set(timed)) == sorted(seconds)
    timed.clear()
    again = _sums(geometry, False)
    add_squared_gradients_(again, g, x, geometry, tune=True)
    assert timed == []
    assert list(kernels._WINNERS.values()) == ["taps"]
    torch.testing.assert_close(sums.result()[0], _looped(g, x, geometry)[0], rtol=1e-12, atol=1e-12)
    assert torch.equal(sums.result()[0], again.result()[0])


def _listening(name: str, way: kernels.Way, used: list[str]) -> kernels.Way:
    def run(sums: SquareSums, g: Tensor, x: Tensor, geometry: Geometry) -> None:
        used.append(name)
        way(sums, g, x, geometry)

    return run


def test_gradients_that_cancel_between_positions_leave_no_negative_square() -> None:
    geometry = Geometry((8, 8, 1), (1,), ((0, 0),), (1,), 1)
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(1, 4, 8, 1, generator=generator)
    x = torch.randn(4, 8, 1, generator=generator)
    # The second position takes away what the first adds, up to a rounding error.
    g, x = torch.cat([g, -g], 3), torch.cat([x, x * (1 + 1e-6)], 2)
    sums = _sums(geometry, False, torch.float32)
    ways(g, x, geometry)["taps"](sums, g, x, geometry)
    found, _ = sums.result()
    assert float(sums.sample(1).min()) < 0  # as summed up
    assert bool((found >= 0).all())
    exact, _ = _looped(g.double(), x.double(), geometry)
    assert float((found.double() - exact).abs().max()) < 1e-5
