"""Sums of squared gradients over every group's entries: the traces of the groups' Gauss-Newton blocks.

    h_g = num_data * mean_n sum_k sum over the group's gate entries e of (d(v_nk . f_n)/dw_e)^2

It is what a score of filters adds up from `entry_curvature`, w^2 aside, without forming the entries. For a row o of a
weight, with g the gradient of the layer's output and x_s the patch of the input that position s reads,

    sum over i of (sum_s g_os x_si)^2 = sum_st g_os M_st g_ot,     M_st = x_s . x_t

For a convolution M_st is the sum over the kernel's taps of C[s + tap, t + tap], C = X^T X over the positions of the
input: no patch is ever formed, and the cost does not grow with the product of the channels. On large maps, where
S^2 is more than that, the library's gradients are squared image by image instead.

    >>> sum_curvature(model, make_grouping(model, "filters"), loader, num_data=60000).diagonal       # [G]
"""

from __future__ import annotations

from itertools import product
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsebayes.curvature.block import Block
from sparsebayes.curvature.factors import Factor, Starts
from sparsebayes.curvature.gates import check_finite, gate_labels
from sparsebayes.curvature.images import Batches, check_num_data
from sparsebayes.curvature.kernels import Geometry, library_gradients, symmetric
from sparsebayes.curvature.layers import Call, ConvCall, LinearCall
from sparsebayes.curvature.parts import Part, Slots, parts_of, reads_rows
from sparsebayes.curvature.result import Curvature, from_sums
from sparsebayes.curvature.squares import slices, squared_passes
from sparsebayes.curvature.sweep import Sweep
from sparsebayes.curvature.workers import add_up_, worker_seed
from sparsebayes.groups.grouping import Grouping, Labels

__all__ = ["sum_curvature"]

# What adding a number of one tap to M costs, in multiplications of a matrix product.
_TAP = 10


def sum_curvature(
    model: nn.Module,
    grouping: Grouping,
    batches: Batches,
    *,
    num_data: int,
    likelihood: str = "cross_entropy",
    estimator: str = "monte_carlo",
    factor: str | Factor = "stick",
    draws: int = 1,
    num_images: int | None = None,
    importance: float = 1.0,
    seed: int = 0,
) -> Curvature:
    """Sum the GGN diagonal over the gate entries of each group, in evaluation mode.

    Args:
        model: the network; its outputs are logits of shape `[B, C]`. Mode, gradients and random states of the
            caller stay as they are.
        grouping: G groups of entries of the model's parameters; only gate labels count, and an entry that two labels
            put into a group counts twice.
        batches: pairs of images `[B, ...]` and targets; see `gate_curvature` for this and the options below.
        num_data: images in the whole data set, to which the curvature is scaled.
        likelihood: "cross_entropy", "mse" or "binary_cross_entropy".
        estimator: "monte_carlo" or "exact".
        factor: "stick", "rademacher", "sampled_label", or own starting vectors.
        draws: random starting vectors per image.
        num_images: use only the first so many images; None: all.
        importance: share of the images that get a backward pass, see `gate_curvature`; 1: all.
        seed: of the random factors and choices.

    Returns:
        The sums, in nats of the whole data set, with their standard errors; in the parameters' dtype, on their device.

    Raises:
        SparseBayesError: as `gate_curvature`.
    """
    check_num_data(num_data)
    names = [labels.parameter for labels in gate_labels(model, grouping)]
    starts = Starts(likelihood, estimator, factor, draws, worker_seed(seed))
    with Sweep(model, names, starts=starts, importance=importance) as sweep:
        parts = parts_of(grouping, sweep.device)
        first = torch.zeros(grouping.num_groups, dtype=torch.float64, device=sweep.device)
        second = torch.zeros_like(first)
        for block in sweep.blocks(batches, num_images):
            for images in block.ranges(block.whole):
                for part in parts:
                    for some in slices(images, part.num_groups, block.device):
                        q = _traces(part, block, some)  # [m, groups of the part]
                        first[part.groups] += q.sum(0)
                        second[part.groups] += q.square_().sum(0)
        used = torch.tensor(float(sweep.num_images), dtype=torch.float64, device=sweep.device)
    add_up_(first, second, used)
    check_finite(first, grouping)
    return from_sums(first, second, int(used), num_data, sweep.dtype)


def _traces(part: Part, block: Block, images: slice) -> Tensor:
    """Sums of squared gradients for each image and group of a part, float64, of shape `[m, num_groups]`."""
    # One place more than groups: it takes the entries in no group.
    total = torch.zeros(
        images.stop - images.start, part.num_groups + 1, dtype=torch.float64, device=block.device
    )
    for member in part.members:
        calls = block.calls(member.labels.parameter) if block.tracked(member.labels.parameter) else []
        if len(calls) == 1 and reads_rows(member.labels) and calls[0].weight == member.labels.parameter:
            q = _rows(calls[0], images)
            if q is not None:
                _spread_(total, member, q if member.slot.numel() > 1 else q.sum(1, keepdim=True))
                continue
        for some in slices(images, block.volume(member.labels.parameter), block.device):
            q = squared_passes(block.entries(member.labels.parameter, some))
            _spread_(
                total[some.start - images.start : some.stop - images.start],
                member,
                _reduced(q, member.labels),
            )
    return total[:, : part.num_groups]


def _spread_(total: Tensor, member: Slots, q: Tensor) -> None:
    total.index_add_(1, member.slot, q.to(total.dtype))


def _reduced(q: Tensor, labels: Labels) -> Tensor:
    """Sum squares `[m, *shape of the parameter]` over the entries that share an entry of the index."""
    dims = [d + 1 for d, size in enumerate(labels.index.shape) if size == 1 and labels.shape[d] > 1]
    return (q.sum(dims) if dims else q).reshape(len(q), -1)


def _rows(call: Call, images: slice) -> Tensor | None:
    """Sums over each row of a weight's squared gradient, of shape `[m, O]`; None if entries are the way."""
    if isinstance(call, LinearCall):
        return _linear_rows(call, images)
    if not isinstance(call, ConvCall) or call.geometry.groups > 1:
        return None
    geometry, positions = call.geometry, prod(call.output.shape[2:])
    wide = sum(geometry.weight[:2]) + _TAP * prod(geometry.kernel)
    if positions * wide < 0.5 * prod(geometry.weight):
        numbers = max(_padded(call.input.shape[2:], geometry) ** 2, call.output[0].numel())
        found = []
        for some in slices(images, numbers, call.input.device):
            g, x = call.factors(some)
            found.append(_forms(g.flatten(3), _gram(x, g.shape[3:], geometry)))
        return torch.cat(found)
    if call.input.device.type != "cpu" or not symmetric(geometry):
        return None
    g, x = call.factors(images)
    q = x.new_zeros(len(x), geometry.weight[0])
    for some, passes in library_gradients(g, x, geometry):
        for gradient in passes:
            flat = gradient.flatten(2)  # [m, O, I * taps]
            q[some] += torch.linalg.vecdot(flat, flat)
    return q


def _linear_rows(call: LinearCall, images: slice) -> Tensor | None:
    positions = prod(call.input.shape[1:-1])
    if positions == 1:
        g, x = call.factors(images)
        return squared_passes(g[:, :, 0]) * x.square().sum(2)
    num_outputs, num_inputs = call.values["weight"].shape
    if positions * (num_outputs + num_inputs) > 0.5 * num_outputs * num_inputs:
        return None
    found = []
    for some in slices(images, positions * max(positions, num_outputs, num_inputs), call.input.device):
        g, x = call.factors(some)
        found.append(_forms(g.transpose(-1, -2), x @ x.transpose(-1, -2)))
    return torch.cat(found)


def _forms(g: Tensor, gram: Tensor) -> Tensor:
    """Quadratic forms g^T M g, summed over the passes: `[K, m, O, S]` and `[m, S, S]` -> `[m, O]`, none below 0."""
    forms: Tensor = torch.linalg.vecdot(g @ gram, g)
    return forms.sum(0).clamp_(min=0)


def _gram(x: Tensor, out: torch.Size, geometry: Geometry) -> Tensor:
    """Inner products M of the patches that a convolution reads: `[m, I, *spatial]` -> `[m, S, S]`."""
    # The last dim comes first.
    x = functional.pad(x, [size for pair in reversed(geometry.padding) for size in pair])
    flat = x.flatten(2)
    inner = (flat.transpose(1, 2) @ flat).view(len(x), *x.shape[2:], *x.shape[2:])
    total: Tensor | None = None
    for tap in product(*map(range, geometry.kernel)):
        each = zip(tap, geometry.dilation, geometry.stride, out, strict=True)
        read = [slice(a * d, a * d + s * (size - 1) + 1, s) for a, d, s, size in each]
        places = (slice(None), *read, *read)
        seen = inner[places]
        total = seen.clone() if total is None else total.add_(seen)
    assert total is not None, "a kernel has at least one tap"
    return total.reshape(len(x), prod(out), prod(out))


def _padded(spatial: torch.Size, geometry: Geometry) -> int:
    """Positions of a padded map."""
    return prod(size + sum(pad) for size, pad in zip(spatial, geometry.padding, strict=True))
