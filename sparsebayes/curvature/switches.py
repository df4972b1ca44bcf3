"""Gauss-Newton curvature of switches that are parameters, such as the architecture weights of a supernet.

For image n with starting vectors v_nk (`factors.py`) and all E entries of the switch parameters,

    r_nke = d(v_nk . f_n)/dz_e
    G     = num_data * mean_n sum_k r_nk r_nk^T                          (E x E, its diagonal: h)

A supernet multiplies the output of every operation by its switch, so that one backward pass through the
activations gives r for all switches and images: no weight gradients are formed (`scaling.py`). A switch that
several cells share is one parameter used several times: its derivatives are summed before they are squared.
Switches that reach the network in another way (inside an einsum, behind a batched stack) are found and
differentiated image by image instead, slower and as exactly.

The curvature is in z itself, whatever its value; that of a gate at z = 1 which scales the present value is
z^2 h. Switches of filters, units and weights of an ordinary network: `gates.py`.

    >>> class Edge(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.ops = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    ...         self.alpha = nn.Parameter(torch.ones(2))
    ...     def forward(self, x):
    ...         return sum(z * op(x) for z, op in zip(self.alpha, self.ops))
    >>> found = switch_curvature(Edge(), ["alpha"], loader, num_data=50000, estimator="exact")
    >>> found.matrix, found.diagonal                                     # [2, 2], [2]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsebayes.curvature.block import Block
from sparsebayes.curvature.factors import Factor, Starts
from sparsebayes.curvature.images import Batches, check_num_data
from sparsebayes.curvature.result import Curvature, from_sums
from sparsebayes.curvature.sweep import Sweep
from sparsebayes.curvature.workers import add_up_, worker_seed
from sparsebayes.errors import NumericsError

__all__ = ["switch_curvature", "switch_rows"]


def switch_curvature(
    model: nn.Module,
    switches: Sequence[str],
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
    matrix: bool = True,
) -> Curvature:
    """Compute the GGN curvature of switch parameters, in evaluation mode.

    Args:
        model: the network; its outputs are logits of shape `[B, C]`. Mode, gradients and random states of the
            caller stay as they are.
        switches: names, as in `model.named_parameters()`; of any shapes, E entries altogether. A parameter
            that several cells share is named once.
        batches: pairs of images `[B, ...]` and targets; see `gate_curvature` for this and the options below.
        num_data: images in the whole data set, to which the curvature is scaled.
        likelihood: "cross_entropy", "mse" or "binary_cross_entropy".
        estimator: "monte_carlo" (unbiased, `draws` backward passes) or "exact" (one per output).
        factor: "stick", "rademacher", "sampled_label", or own starting vectors.
        draws: random starting vectors per image.
        num_images: use only the first so many images; None: all.
        importance: share of the images that get a backward pass; 1: all.
        seed: of the random factors and choices.
        matrix: whether the full matrix is wanted, or its diagonal alone.

    Returns:
        The curvature, in nats of the whole data set: `diagonal` and `standard_error` of shape `[E]`, `matrix` of
        shape `[E, E]`; entries of the parameters in the order of `switches`, each flattened.

    Raises:
        RecipeError: an unknown likelihood, estimator or factor, or `draws`, `num_data` or `num_images` below
            1.
        DataError: no images, or targets that do not fit.
        GroupingError: the model has no parameter of a name.
        ModelError: outputs are not logits of shape `[B, C]`, or images influence each other.
        NumericsError: outputs or curvatures are not finite.
    """
    check_num_data(num_data)
    names = list(dict.fromkeys(switches))
    starts = Starts(likelihood, estimator, factor, draws, worker_seed(seed))
    with Sweep(model, names, switches=names, starts=starts, importance=importance) as sweep:
        count = sum(parameter.numel() for parameter in sweep.parameters.values())
        first, second = torch.zeros(2, count, dtype=torch.float64, device=sweep.device)
        product = first.new_zeros((count, count) if matrix else 0)
        for block in sweep.blocks(batches, num_images):
            rows = _rows(block, names).double()  # [K, n, E]
            q = rows.square().sum(0)  # [n, E]
            first += q.sum(0)
            second += q.square().sum(0)
            if matrix:
                flat = rows.flatten(0, 1)
                product.addmm_(flat.T, flat)
        num_seen = torch.tensor(float(sweep.num_images), dtype=torch.float64, device=sweep.device)
    add_up_(first, second, product, num_seen)
    used = int(num_seen)
    _check_finite(first, model, names)
    full = product * (num_data / used) if matrix else None
    return from_sums(first, second, used, num_data, sweep.dtype, matrix=full)


def switch_rows(
    model: nn.Module,
    switches: Sequence[str],
    batches: Batches,
    *,
    likelihood: str = "cross_entropy",
    estimator: str = "monte_carlo",
    factor: str | Factor = "stick",
    draws: int = 1,
    num_images: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Compute r, the derivatives of every image with respect to every switch: the curvature in factors.

    Args:
        model: see `switch_curvature`.
        switches: see `switch_curvature`.
        batches: see `switch_curvature`.
        likelihood: see `switch_curvature`.
        estimator: see `switch_curvature`.
        factor: see `switch_curvature`.
        draws: see `switch_curvature`.
        num_images: see `switch_curvature`.
        seed: see `switch_curvature`.

    Returns:
        R of shape `[K, N, E]`, images in the order of the batches: `einsum("kne,knf->ef", R, R) * num_data / N`
        is the curvature matrix. `sparsebayes.nas.rows.relative_rows` is the same for a supernet's groups of switches,
        per relative change of each.

    Raises:
        SparseBayesError: as `switch_curvature`.
    """
    names = list(dict.fromkeys(switches))
    starts = Starts(likelihood, estimator, factor, draws, worker_seed(seed))
    with Sweep(model, names, switches=names, starts=starts) as sweep:
        found = [_rows(block, names) for block in sweep.blocks(batches, num_images)]
    result = torch.cat(found, dim=1)
    _check_finite(result.sum((0, 1)), model, names)
    return result


def _rows(block: Block, names: Sequence[str]) -> Tensor:
    """Derivatives with respect to all switches, of shape `[K, n, E]`."""
    shape = (block.num_passes, block.num_images, -1)
    return torch.cat([block.switches(name).reshape(shape) for name in names], dim=2)


def _check_finite(values: Tensor, model: nn.Module, names: Sequence[str]) -> None:
    """Refuse curvatures that are not numbers, by the name of the first parameter that has one."""
    bad = (~torch.isfinite(values)).nonzero().flatten()
    if bad.numel() == 0:
        return
    parameters = dict(model.named_parameters())
    place = int(bad[0])
    for name in names:
        if place < parameters[name].numel():
            raise NumericsError(
                f"expected finite curvatures, got nan or inf for {bad.numel()} of {values.numel()} switches, "
                f"first in {name!r}; gradients overflow: check the weights, or use float64"
            )
        place -= parameters[name].numel()
