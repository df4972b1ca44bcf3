"""The Gauss-Newton matrix of every group's entries among themselves: block-diagonal over the groups.

    G_g = num_data * mean_n sum_k r_nkg r_nkg^T,    r_nkg: derivatives of v_nk . f_n in the entries of group g

With it the posterior covariance of a group's weights is (Gamma^-1 + G_g)^-1, off-diagonal terms included, where
`entry_curvature` only knows the diagonal.

    >>> blocks = block_curvature(model, make_grouping(model, "kernels"), loader, num_data=60000)
    >>> blocks[0].shape                                                  # a 5 x 5 kernel
    torch.Size([25, 25])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsebayes.curvature.factors import Factor, Starts
from sparsebayes.curvature.images import Batches, check_num_data
from sparsebayes.curvature.squares import slices
from sparsebayes.curvature.sweep import Sweep
from sparsebayes.curvature.workers import add_up_, worker_seed
from sparsebayes.errors import GroupingError, NumericsError
from sparsebayes.groups.grouping import Grouping

__all__ = ["block_curvature"]

# Numbers in all matrices together: 1 GiB of float32.
_MOST_NUMBERS = 1 << 28


def block_curvature(
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
    seed: int = 0,
) -> list[Tensor]:
    """Compute each group's own GGN matrix, in evaluation mode.

    Args:
        model: the network; its outputs are logits of shape `[B, C]`.
        grouping: G groups; only gate labels count.
        batches: pairs of images `[B, ...]` and targets; see `gate_curvature` for this and the options below.
        num_data: images in the whole data set, to which the curvature is scaled.
        likelihood: "cross_entropy", "mse" or "binary_cross_entropy".
        estimator: "monte_carlo" or "exact".
        factor: "stick", "rademacher", "sampled_label", or own starting vectors.
        draws: random starting vectors per image.
        num_images: use only the first so many images; None: all.
        seed: of the random factors.

    Returns:
        For each group its matrix, of shape `[m, m]` for its m entries: label after label in the grouping's order,
        within a label in the order of the parameter's entries. `[0, 0]` for a group without gate entries.

    Raises:
        GroupingError: the grouping has no gate entries, is of another model, or its matrices would hold more than
            2^28 numbers.
        SparseBayesError: else as `gate_curvature`.
    """
    check_num_data(num_data)
    gates = [labels for labels in grouping.labels if labels.gate]
    places = _places(grouping)
    numbers = sum(sum(len(own) for own in one.values()) ** 2 for one in places)
    if not gates or numbers == 0:
        raise GroupingError(
            f"expected a grouping with gate labels, whose entries scale a switch; {grouping.name!r} has none"
        )
    if numbers > _MOST_NUMBERS:
        raise GroupingError(
            f"the groups' matrices of {grouping.name!r} would hold {numbers} numbers, more than {_MOST_NUMBERS}; "
            "choose smaller groups, or use gate_rows or entry_curvature"
        )
    names = list(dict.fromkeys(labels.parameter for labels in gates))
    starts = Starts(likelihood, estimator, factor, draws, worker_seed(seed))
    with Sweep(model, names, starts=starts) as sweep:
        sizes = [sum(len(own) for own in one.values()) for one in places]
        total = [torch.zeros(size, size, dtype=sweep.dtype, device=sweep.device) for size in sizes]
        for block in sweep.blocks(batches, num_images):
            gradients = sum(block.value(name).numel() for name in names) * block.num_passes
            volume = max([gradients, *(block.volume(name) for name in names)])
            for images in slices(block.whole, volume, sweep.device):
                flat = [block.entries(labels.parameter, images).flatten(0, 1) for labels in gates]
                flat = [one.reshape(len(one), -1) for one in flat]  # [K m, entries]
                for matrix, one in zip(total, places, strict=True):
                    if one:
                        rows = torch.cat([flat[i][:, own.to(sweep.device)] for i, own in one.items()], dim=1)
                        matrix.addmm_(rows.T, rows)
        count = torch.tensor(float(sweep.num_images), dtype=torch.float64, device=sweep.device)
    add_up_(*total, count)
    for number, matrix in enumerate(total):
        if not bool(torch.isfinite(matrix).all()):
            layer = grouping.layers[int(grouping.layer_index[number])]
            raise NumericsError(f"expected finite curvatures, got nan or inf in layer {layer!r}; use float64")
    return [matrix * (num_data / float(count)) for matrix in total]


def _places(grouping: Grouping) -> list[dict[int, Tensor]]:
    """For each group: number of the gate label -> its entries there."""
    found: list[dict[int, Tensor]] = [{} for _ in range(grouping.num_groups)]
    for i, labels in enumerate(one for one in grouping.labels if one.gate):
        numbers = labels.index.expand(labels.shape).flatten()
        order = torch.argsort(numbers, stable=True)
        values, counts = torch.unique_consecutive(numbers[order], return_counts=True)
        for group, own in zip(values.tolist(), torch.split(order, counts.tolist()), strict=True):
            if group >= 0:
                found[group][i] = own
    return found
