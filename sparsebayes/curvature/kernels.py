"""Sums of squared per-image weight gradients of a convolution: several ways, the fastest for each layer.

For an image n with output gradients g_os at positions s and patches x_ps, the weight's gradient is
sum_s g_os x_ps, and wanted is sum_n (sum_s g_os x_ps)^2. No way wins everywhere:

| way     | what it does                                                                | wins where      |
| ------- | --------------------------------------------------------------------------- | --------------- |
| batched | one batched product for many images, then squares                           | small weights   |
| loop    | the library's weight gradient, image by image                               | large maps      |
| tiles   | image by image, but a tile of the weight at a time, which stays in the cache | large weights   |
| pairs   | sum over pairs of positions (s, s') of (g_s g_s')^T (x_s x_s'), tap by tap  | a few positions |

`pairs` needs no per-image gradient at all, so that it costs nothing extra per image; a tap of the kernel sees only the
positions at which it does not meet padding, which on a 2 x 2 map are 16 of 36. By default a rule chooses from the
shapes, the same in every process, so that a resumed run repeats its numbers to the last bit; with `tune` the ways
are timed once for each layer shape and device, and the winner is kept for the life of the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from sparsebayes.curvature.squares import slices, squared_passes

__all__ = ["Geometry", "patches", "sum_squared_gradients", "ways"]

Sums = tuple[Tensor, Tensor | None]
Way = Callable[[Tensor, Tensor, "Geometry", bool], Sums]

# Numbers in a tile: it, its sums and its factors fit into one core's own cache.
_TILE = 1 << 16
# Entries of a weight up to which all images' gradients are formed at once.
_SMALL_WEIGHT = 1 << 14
# Positions of a map from which on the library's weight gradient is busy with one image, and up to which pairs of
# positions are few.
_LARGE_MAP, _SMALL_MAP = 256, 4
# Images that a way is timed with.
_TIMED_IMAGES = 16


@final
@dataclass(frozen=True)
class Geometry:
    """The shape of a convolution.

    Attributes:
        weight: shape `[O, I / groups, *kernel]`.
        stride: per spatial dim.
        padding: zeros put in front and behind, per spatial dim.
        dilation: per spatial dim.
        groups: how many parts the channels are split into.
    """

    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size per spatial dim."""
        return self.weight[2:]


def sum_squared_gradients(
    g: Tensor, x: Tensor, geometry: Geometry, *, fourth: bool, tune: bool = False
) -> Sums:
    """Sum q = sum_k (dF_k/dw)^2, and q^2, over images.

    Args:
        g: gradients of the output, of shape `[K, n, O, *out]`.
        x: inputs, of shape `[n, I, *spatial]`.
        geometry: of the layer.
        fourth: whether sum q^2 is wanted too.
        tune: time the ways, rather than choose by rule.

    Returns:
        sum_n q and sum_n q^2 (or None), of the weight's shape.
    """
    candidates = ways(g, x, geometry, fourth)
    if len(candidates) == 1:
        name = next(iter(candidates))
    elif tune:
        key = (geometry, x.shape[2:], len(g), fourth, x.device, x.dtype)
        if key not in _WINNERS:
            _WINNERS[key] = _fastest(candidates, g, x, geometry, fourth)
        name = _WINNERS[key]
    else:
        name = _by_rule(candidates, g, x, geometry)
    return candidates[name](g, x, geometry, fourth)


# The one thing that is kept between calls: which way was the fastest. It changes results by rounding alone.
_WINNERS: dict[tuple[object, ...], str] = {}


def ways(g: Tensor, x: Tensor, geometry: Geometry, fourth: bool) -> dict[str, Way]:
    """The ways that can compute a layer's sums, by name.

    Args:
        g: see `sum_squared_gradients`.
        x: see `sum_squared_gradients`.
        geometry: see `sum_squared_gradients`.
        fourth: see `sum_squared_gradients`.
    """
    found: dict[str, Way] = {"batched": _batched}
    if geometry.groups == 1 and prod(g.shape[3:]) <= 4 * _SMALL_MAP and not fourth:
        found["pairs"] = _pairs
    if x.device.type == "cpu":
        if geometry.groups == 1:
            found["tiles"] = _tiles
        if all(front == behind for front, behind in geometry.padding):
            found["loop"] = _loop
    return found


def _by_rule(candidates: dict[str, Way], g: Tensor, x: Tensor, geometry: Geometry) -> str:
    positions = prod(g.shape[3:])
    if prod(geometry.weight) <= _SMALL_WEIGHT:
        return "batched"
    if positions <= _SMALL_MAP and "pairs" in candidates:
        return "pairs"
    if positions >= _LARGE_MAP and "loop" in candidates:
        return "loop"
    return "tiles" if "tiles" in candidates else "batched"


def _fastest(candidates: dict[str, Way], g: Tensor, x: Tensor, geometry: Geometry, fourth: bool) -> str:
    g, x = g[:, :_TIMED_IMAGES], x[:_TIMED_IMAGES]
    seconds = {
        name: min(_timed(way, g, x, geometry, fourth) for _ in "ab") for name, way in candidates.items()
    }
    return min(seconds, key=lambda name: seconds[name])


def _timed(way: Way, g: Tensor, x: Tensor, geometry: Geometry, fourth: bool) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    way(g, x, geometry, fourth)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def _batched(g: Tensor, x: Tensor, geometry: Geometry, fourth: bool) -> Sums:
    total: Tensor | None = None
    total_fourth: Tensor | None = None
    for images in slices(len(x), len(g) * prod(geometry.weight), x.device):
        q = squared_passes(gradients(g[:, images], x[images], geometry))
        part = q.sum(0)
        total = part if total is None else total.add_(part)
        if fourth:
            part = q.square_().sum(0)
            total_fourth = part if total_fourth is None else total_fourth.add_(part)
    assert total is not None, "there is at least one image"
    return total, total_fourth


def _loop(g: Tensor, x: Tensor, geometry: Geometry, fourth: bool) -> Sums:
    weight = x.new_empty(geometry.weight)  # its shape is all that is read
    zeros = [0] * len(geometry.kernel)
    step = partial(
        torch.ops.aten.convolution_backward,
        bias_sizes=None,
        stride=geometry.stride,
        padding=[front for front, _ in geometry.padding],
        dilation=geometry.dilation,
        transposed=False,
        output_padding=zeros,
        groups=geometry.groups,
        output_mask=[False, True, False],
    )
    total = x.new_zeros(geometry.weight)
    total_fourth = torch.zeros_like(total) if fourth else None
    for n in range(len(x)):
        image = slice(n, n + 1)
        if len(g) == 1 and total_fourth is None:
            gradient = step(g[0, image], x[image], weight)[1]
            total.addcmul_(gradient, gradient)
            continue
        q = sum(step(one_pass[image], x[image], weight)[1].square_() for one_pass in g)
        total.add_(q)
        if total_fourth is not None:
            total_fourth.addcmul_(q, q)
    return total, total_fourth


def _tiles(g: Tensor, x: Tensor, geometry: Geometry, fourth: bool) -> Sums:
    """Squares a tile of an image's gradient while it is still in the cache; in memory that costs more than it."""
    num_outputs = geometry.weight[0]
    num_inputs = prod(geometry.weight[1:])
    total = g.new_zeros(num_inputs, num_outputs)  # transposed: its rows are the longer side of a layer
    total_fourth = torch.zeros_like(total) if fourth else None
    height = min(num_inputs, max(1, _TILE // num_outputs))
    buffer, sums = total.new_empty(2, height, num_outputs)
    turned = g.flatten(3).transpose(2, 3).contiguous()  # [K, n, S, O]
    for images in slices(len(x), num_inputs * turned.shape[2], x.device):
        seen = patches(x[images], geometry)  # [m, P, S]
        per_image = [list(passes.unbind()) for passes in turned[:, images].unbind(1)]
        for start in range(0, num_inputs, height):
            rows = slice(start, min(start + height, num_inputs))
            tile, tile_q = buffer[: rows.stop - start], sums[: rows.stop - start]
            target = total[rows]
            for patch, passes in zip(seen[:, rows].unbind(), per_image, strict=True):
                if len(passes) == 1 and total_fourth is None:
                    torch.mm(patch, passes[0], out=tile)
                    target.addcmul_(tile, tile)
                    continue
                tile_q.zero_()
                for one_pass in passes:
                    torch.mm(patch, one_pass, out=tile)
                    tile_q.addcmul_(tile, tile)
                target.add_(tile_q)
                if total_fourth is not None:
                    total_fourth[rows].addcmul_(tile_q, tile_q)
    return _unturned(total, geometry), None if total_fourth is None else _unturned(total_fourth, geometry)


def _pairs(g: Tensor, x: Tensor, geometry: Geometry, fourth: bool) -> Sums:
    """Expands the square of the sum over positions: (sum_s a_s)^2 = sum_s a_s^2 + 2 sum_{s<s'} a_s a_s'."""
    assert not fourth, "the fourth powers do not separate"
    dims = len(geometry.kernel)
    # Positions first, so that one position of all images is a matrix.
    outputs = g.flatten(0, 1).permute(*range(2, dims + 2), 0, 1).contiguous()  # [*out, K n, O]
    inputs = x.repeat(len(g), *[1] * (dims + 1)) if len(g) > 1 else x
    inputs = inputs.permute(*range(2, dims + 2), 0, 1).contiguous()  # [*spatial, K n, I]
    found = []
    for tap in product(*map(range, geometry.kernel)):
        seen = [_seen(d, tap[d], outputs.shape[d], inputs.shape[d], geometry) for d in range(dims)]
        places = list(product(*seen))
        if not places:  # it meets padding only
            found.append(x.new_zeros(geometry.weight[:2]))
            continue
        there = torch.stack([outputs[tuple(out for out, _ in place)] for place in places])  # [S, K n, O]
        here = torch.stack([inputs[tuple(into for _, into in place)] for place in places])  # [S, K n, I]
        one, other = torch.triu_indices(len(places), len(places), device=x.device)
        twice = torch.where(one == other, 1.0, 2.0).to(x.dtype).view(-1, 1, 1)
        left = (there[one] * there[other] * twice).flatten(0, 1)
        found.append(left.T @ (here[one] * here[other]).flatten(0, 1))
    # Terms of both signs: where they cancel, rounding may leave less than nothing.
    return torch.stack(found, dim=2).view(geometry.weight).clamp_(min=0), None


def _seen(
    dim: int, offset: int, num_outputs: int, num_inputs: int, geometry: Geometry
) -> list[tuple[int, int]]:
    """Positions along one dim at which a tap reads the input: pairs (of the output, of the input)."""
    shift = offset * geometry.dilation[dim] - geometry.padding[dim][0]
    pairs = [(s, s * geometry.stride[dim] + shift) for s in range(num_outputs)]
    return [(s, read) for s, read in pairs if 0 <= read < num_inputs]


def _unturned(values: Tensor, geometry: Geometry) -> Tensor:
    return values.T.reshape(geometry.weight)


def gradients(g: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Per-image gradients of a convolution's weight.

    Args:
        g: gradients of the output, of shape `[K, m, O, *out]`.
        x: inputs, of shape `[m, I, *spatial]`.
        geometry: of the layer.

    Returns:
        Of shape `[K, m, O, I / groups, *kernel]`.
    """
    seen = patches(x, geometry)
    seen = seen.reshape(len(seen), geometry.groups, -1, seen.shape[2])  # [m, groups, I * prod(kernel), S]
    flat = g.flatten(3)
    flat = flat.reshape(*flat.shape[:2], geometry.groups, -1, flat.shape[3])  # [K, m, groups, O / groups, S]
    result: Tensor = flat @ seen.transpose(-1, -2)
    return result.reshape(*g.shape[:2], *geometry.weight)


def patches(x: Tensor, geometry: Geometry) -> Tensor:
    """What a convolution's kernel sees at each position, for any number of spatial dims.

    Args:
        x: of shape `[n, C, *spatial]`.
        geometry: of the layer; its channels do not matter.

    Returns:
        Of shape `[n, C * prod(kernel), S]`: in the order of a weight's entries `[C, *kernel]`.
    """
    if any(front or behind for front, behind in geometry.padding):
        # The last dim comes first.
        x = functional.pad(x, [size for pair in reversed(geometry.padding) for size in pair])
    each = list(zip(x.shape[2:], geometry.kernel, geometry.stride, geometry.dilation, strict=True))
    sizes = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in each]
    steps = x.stride()
    windows = x.as_strided(
        (*x.shape[:2], *geometry.kernel, *sizes),
        (
            *steps[:2],
            *(step * d for step, d in zip(steps[2:], geometry.dilation, strict=True)),
            *(step * s for step, s in zip(steps[2:], geometry.stride, strict=True)),
        ),
        x.storage_offset(),
    )
    return windows.reshape(len(x), x.shape[1] * prod(geometry.kernel), prod(sizes))
