"""Sums of squared per-image weight gradients of a convolution: several ways, the fastest for each layer.

For an image n with output gradients g_os at positions s and patches x_ps, the weight's gradient is
sum_s g_os x_ps, and wanted is sum_n (sum_s g_os x_ps)^2. No way wins everywhere:

| way     | what it does                                                                    | wins where    |
| ------- | ------------------------------------------------------------------------------- | ------------- |
| batched | one batched product for many images, then squares                               | small weights |
| loop    | the library's weight gradient, a few images at a time as groups of one call     | large maps    |
| taps    | tap by tap of the kernel, from the positions at which it does not meet padding  | small maps    |

`taps` reads 16 of the 36 positions that the taps of a 3 x 3 kernel have on a 2 x 2 map, and 100 of 144 on a 4 x 4
map; see `products.py`. By default a rule chooses from the shapes, the same in every process, so that a resumed run
repeats its numbers to the last bit; with `tune` the ways are timed once for each layer shape and device, and the winner
is kept for the life of the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from sparsebayes.curvature.products import add_squared_products_
from sparsebayes.curvature.squares import SquareSums, slices, squared_passes

__all__ = [
    "Geometry",
    "add_squared_gradients_",
    "library_gradients",
    "num_patches",
    "patches",
    "symmetric",
    "ways",
]

Way = Callable[[SquareSums, Tensor, Tensor, "Geometry"], None]

# Entries of a weight up to which all images' gradients are formed at once.
_SMALL_WEIGHT = 1 << 14
# Positions of a map from which on the library's weight gradient is busy with one image, and up to which an
# accelerator goes tap by tap.
_LARGE_MAP, _SMALL_MAP = 256, 4
# Images that `loop` hands to the library together, and numbers in their gradients that a core's cache holds.
_TOGETHER, _TOGETHER_NUMBERS = 4, 600_000
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


def add_squared_gradients_(
    sums: SquareSums, g: Tensor, x: Tensor, geometry: Geometry, *, tune: bool = False
) -> None:
    """Add q = sum_k (dF_k/dw)^2 of some images.

    Args:
        sums: of the weight.
        g: gradients of the output, of shape `[K, n, O, *out]`.
        x: inputs, of shape `[n, I, *spatial]`.
        geometry: of the layer.
        tune: time the ways, rather than choose by rule.
    """
    candidates = ways(g, x, geometry)
    if len(candidates) == 1:
        name = next(iter(candidates))
    elif tune:
        key = (geometry, x.shape[2:], len(g), sums.fourth, x.device, x.dtype)
        if key not in _WINNERS:
            _WINNERS[key] = _fastest(candidates, sums.fourth, g, x, geometry)
        name = _WINNERS[key]
    else:
        name = _by_rule(candidates, g, x, geometry)
    candidates[name](sums, g, x, geometry)


# The one thing that is kept between calls: which way was the fastest. It changes results by rounding alone.
_WINNERS: dict[tuple[object, ...], str] = {}


def ways(g: Tensor, x: Tensor, geometry: Geometry) -> dict[str, Way]:
    """The ways that can compute a layer's sums, by name.

    Args:
        g: see `add_squared_gradients_`.
        x: see `add_squared_gradients_`.
        geometry: see `add_squared_gradients_`.
    """
    found: dict[str, Way] = {"batched": _batched}
    if geometry.groups == 1 and (x.device.type == "cpu" or prod(g.shape[3:]) <= 4 * _SMALL_MAP):
        found["taps"] = _taps
    if x.device.type == "cpu" and symmetric(geometry):
        found["loop"] = _loop
    return found


def symmetric(geometry: Geometry) -> bool:
    """Whether padding in front and behind is the same, as the library's convolutions have it."""
    return all(front == behind for front, behind in geometry.padding)


def _by_rule(candidates: dict[str, Way], g: Tensor, x: Tensor, geometry: Geometry) -> str:
    positions = prod(g.shape[3:])
    if prod(geometry.weight) <= _SMALL_WEIGHT:
        return "batched"
    if positions >= _LARGE_MAP and "loop" in candidates:
        return "loop"
    few = x.device.type == "cpu" or positions <= _SMALL_MAP
    return "taps" if few and "taps" in candidates else "batched"


def _fastest(candidates: dict[str, Way], fourth: bool, g: Tensor, x: Tensor, geometry: Geometry) -> str:
    g, x = g[:, :_TIMED_IMAGES], x[:_TIMED_IMAGES]
    sums = SquareSums(x.new_empty(geometry.weight), fourth=fourth)
    seconds = {name: min(_timed(way, sums, g, x, geometry) for _ in "ab") for name, way in candidates.items()}
    return min(seconds, key=lambda name: seconds[name])


def _timed(way: Way, sums: SquareSums, g: Tensor, x: Tensor, geometry: Geometry) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    way(sums, g, x, geometry)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def _batched(sums: SquareSums, g: Tensor, x: Tensor, geometry: Geometry) -> None:
    numbers = max(len(g) * prod(geometry.weight), num_patches(g, geometry))
    for images in slices(slice(0, len(x)), numbers, x.device):
        sums.add_(squared_passes(gradients(g[:, images], x[images], geometry)))


def _loop(sums: SquareSums, g: Tensor, x: Tensor, geometry: Geometry) -> None:
    total, total_fourth = sums.plain()
    for _, found in library_gradients(g, x, geometry):
        for passes in zip(*(one.unbind() for one in found), strict=True):
            if total_fourth is None:
                for gradient in passes:
                    total.addcmul_(gradient, gradient)
                continue
            q = squared_passes(torch.stack(passes))
            total.add_(q)
            total_fourth.addcmul_(q, q)


def library_gradients(g: Tensor, x: Tensor, geometry: Geometry) -> Iterator[tuple[slice, list[Tensor]]]:
    """Per-image gradients of a convolution's weight by the library's own backward, a few images at a time.

    An image is a group of the channels of one convolution, whose weight's gradients are then those of the images.

    Args:
        g: gradients of the output, of shape `[K, n, O, *out]`.
        x: inputs, of shape `[n, I, *spatial]`.
        geometry: of the layer; padding in front and behind must be the same.

    Yields:
        m images; for each pass their gradients, of shape `[m, *shape of the weight]`.
    """
    step = partial(
        torch.ops.aten.convolution_backward,
        bias_sizes=None,
        stride=geometry.stride,
        padding=[front for front, _ in geometry.padding],
        dilation=geometry.dilation,
        transposed=False,
        output_padding=[0] * len(geometry.kernel),
        output_mask=[False, True, False],
    )
    num_outputs, *rest = geometry.weight
    size = min(_TOGETHER, max(1, _TOGETHER_NUMBERS // prod(geometry.weight)))
    weight = x.new_empty(size * num_outputs, *rest)  # its shape is all that is read
    for start in range(0, len(x), size):
        images = slice(start, min(start + size, len(x)))
        count = images.stop - start
        wide = x[images].flatten(0, 1).unsqueeze(0)
        found = [
            step(
                one_pass[images].flatten(0, 1).unsqueeze(0),
                wide,
                weight[: count * num_outputs],
                groups=count * geometry.groups,
            )[1]
            for one_pass in g
        ]
        yield images, [one.unflatten(0, (count, num_outputs)) for one in found]


def _taps(sums: SquareSums, g: Tensor, x: Tensor, geometry: Geometry) -> None:
    first, second = sums.by_tap()
    dims = range(len(geometry.kernel))
    outputs, inputs = g.movedim(2, -1), x.movedim(1, -1)  # [K, n, *out, O], [n, *spatial, I]
    for images in slices(slice(0, len(x)), max(g[:, 0].numel(), x[0].numel()), x.device):
        out, into = outputs[:, images].contiguous(), inputs[images].contiguous()
        for number, tap in enumerate(product(*map(range, geometry.kernel))):
            seen = [_seen(d, tap[d], out.shape[d + 2], into.shape[d + 1], geometry) for d in dims]
            if any(where.stop <= where.start for where, _ in seen):  # it meets padding only
                continue
            everything = slice(None)
            at = (everything, everything, *(where for where, _ in seen))
            reads = (everything, *(read for _, read in seen))
            there, here = out[at].flatten(2, -2), into[reads].flatten(1, -2)
            add_squared_products_(first[number], None if second is None else second[number], there, here)


def _seen(
    dim: int, offset: int, num_outputs: int, num_inputs: int, geometry: Geometry
) -> tuple[slice, slice]:
    """Positions along one dim at which a tap reads the input: of the output, and of the input."""
    stride = geometry.stride[dim]
    shift = (
        offset * geometry.dilation[dim] - geometry.padding[dim][0]
    )  # output s reads input s * stride + shift
    low = max(0, -(shift // stride))
    high = min(num_outputs, (num_inputs - 1 - shift) // stride + 1)
    start = low * stride + shift
    return slice(low, high), slice(start, max(start, start + (high - low - 1) * stride + 1), stride)


def num_patches(g: Tensor, geometry: Geometry) -> int:
    """Numbers in the patches of one image.

    Args:
        g: what has the output's positions as its dims from 3 on.
        geometry: of the layer.
    """
    return geometry.groups * prod(geometry.weight[1:]) * prod(g.shape[3:])


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
