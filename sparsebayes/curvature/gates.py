"""Gauss-Newton curvature of every group's switch: how much the loss bends when a group is scaled.

Multiply the gate entries of group g by a switch z_g (= 1). For image n with starting vectors v_nk
(`factors.py`),

    r_nkg = d(v_nk . f_n)/dz_g = sum over the group's gate entries e of  w_e d(v_nk . f_n)/dw_e
    h_g   = num_data * mean_n sum_k r_nkg^2

The sum over a group's entries comes before the square, also where a unit is read by several layers: h_g is
the curvature of the switch itself, off-diagonal terms between its weights included (h = w^T G w for the GGN
matrix G of the weights). Groups that are slices of a weight along its output or input dim cost one product of
activations and gradients; single weights are squared without ever forming a matrix of images by groups.

Martens, "New insights and perspectives on the natural gradient method", JMLR 2020, section 8, for the GGN;
for networks that are piecewise linear in each weight its diagonal is that of the Hessian (Botev et al., ICML
2017).

    >>> curvature = gate_curvature(model, make_grouping(model, "filters"), loader, num_data=60000)
    >>> curvature.diagonal                                               # [G], nats of the whole data set
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sparsebayes.curvature.factors import Factor, Starts
from sparsebayes.curvature.images import Batches, check_num_data
from sparsebayes.curvature.parts import parts_of, reads_columns, reads_rows
from sparsebayes.curvature.result import Curvature, from_sums
from sparsebayes.curvature.squares import SquareSums
from sparsebayes.curvature.stopping import Stopping
from sparsebayes.curvature.sweep import Sweep
from sparsebayes.curvature.workers import add_up_, worker_seed
from sparsebayes.errors import GroupingError, NumericsError
from sparsebayes.groups.grouping import Grouping, Labels

__all__ = ["check_finite", "gate_curvature", "gate_labels", "gate_rows"]


def gate_curvature(
    model: nn.Module,
    grouping: Grouping,
    batches: Batches,
    *,
    num_data: int,
    likelihood: str = "cross_entropy",
    estimator: str = "monte_carlo",
    factor: str | Factor = "stick",
    draws: int = 1,
    num_images: int | Literal["auto"] | None = None,
    tolerance: float = 0.05,
    importance: float = 1.0,
    seed: int = 0,
) -> Curvature:
    """Compute the GGN curvature of each group's switch, in evaluation mode.

    Args:
        model: the network; its outputs are logits of shape `[B, C]`. Mode, gradients and random states of the
            caller stay as they are.
        grouping: G groups of entries of the model's parameters; only gate labels count. A group without gate
            entries has curvature 0: nothing reads it.
        batches: pairs of images `[B, ...]` and targets (class numbers `[B]`, or `[B, C]` for the other
            likelihoods); moved to the model's device. How images are split into batches does not matter.
        num_data: images in the whole data set, to which the curvature is scaled.
        likelihood: "cross_entropy", "mse" or "binary_cross_entropy": the loss of one image, see `factors.py`.
        estimator: "monte_carlo" (unbiased, `draws` backward passes) or "exact" (one per output).
        factor: random factor of the Monte Carlo estimator: "stick", "rademacher", "sampled_label", or own
            starting vectors.
        draws: random starting vectors per image.
        num_images: use only the first so many images; "auto": until the relative error is below `tolerance`;
            None: all.
        tolerance: relative error at which "auto" stops; it warns if the images end before.
        importance: share of the images that get a backward pass, those that the network is least sure of more
            often than others (`importance.py`); 1: all. Still unbiased; for a fitted network 0.1 is nearly as
            precise as 1.
        seed: of the random factors and choices; the same images and seed give the same result.

    Returns:
        The curvature, in nats of the whole data set, with its standard error; in the parameters' dtype, on
        their device.

    Raises:
        RecipeError: an unknown likelihood, estimator or factor, `draws`, `num_data` or `num_images` below 1, or
            `tolerance` or `importance` not above 0 and at most 1.
        DataError: no images, or targets that do not fit.
        GroupingError: the grouping has no gate entries, or is of another model.
        ModelError: outputs are not logits of shape `[B, C]`, or images influence each other.
        NumericsError: outputs or curvatures are not finite.
    """
    check_num_data(num_data)
    stop = Stopping(num_images, tolerance)
    starts = Starts(likelihood, estimator, factor, draws, worker_seed(seed))
    with _sweep(model, grouping, starts, importance) as sweep:
        parts = parts_of(grouping, sweep.device)
        first = torch.zeros(grouping.num_groups, dtype=torch.float64, device=sweep.device)
        second = torch.zeros_like(first)
        # Single weights are squared as gradients; their values come in once, at the end.
        names = [part.members[0].labels.parameter if part.single else "" for part in parts]
        values = sweep.parameters
        sums = {name: SquareSums(values[name], fourth=True) for name in names if name}

        def add_single_(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            for part, name in zip(parts, names, strict=True):
                if part.single:
                    q, q_squared = part.from_entries(sums[name], values[name])
                    first[part.groups] += q
                    second[part.groups] += q_squared
            return first, second

        def error() -> float:
            total = add_single_(first.clone(), second.clone())
            return from_sums(*total, sweep.num_images, num_data, torch.float64).relative_error

        for block in sweep.blocks(batches, stop.limit):
            for images in block.ranges(block.whole):
                for name, own in sums.items():
                    block.add_squares_(own, name, images)
                for part in parts:
                    if not part.single:
                        q, q_squared = part.squares(block, images)
                        first[part.groups] += q
                        second[part.groups] += q_squared
            if sweep.complete and stop.reached(sweep.num_images, error):
                break
        add_single_(first, second)
    used = torch.tensor(float(sweep.num_images), dtype=torch.float64, device=sweep.device)
    add_up_(first, second, used)
    check_finite(first, grouping)
    found = from_sums(first, second, int(used), num_data, sweep.dtype)
    if stop.tolerance is not None:
        stop.warn_if_short(found.relative_error, found.num_images)
    return found


def gate_rows(
    model: nn.Module,
    grouping: Grouping,
    batches: Batches,
    *,
    likelihood: str = "cross_entropy",
    estimator: str = "monte_carlo",
    factor: str | Factor = "stick",
    draws: int = 1,
    num_images: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Compute r, the derivatives of every image with respect to every switch: the full curvature in factors.

    With R of shape `[K, N, G]`, `torch.einsum("kng,knh->gh", R, R) * num_data / N` is the curvature matrix of
    the switches in nats of the whole data set (exact with estimator "exact"). Its diagonal is
    `gate_curvature`. Needs memory for K * N * G numbers: for switches, units and filters, not for single
    weights.

    Args:
        model: see `gate_curvature`.
        grouping: see `gate_curvature`.
        batches: see `gate_curvature`.
        likelihood: see `gate_curvature`.
        estimator: see `gate_curvature`.
        factor: see `gate_curvature`.
        draws: see `gate_curvature`.
        num_images: see `gate_curvature`.
        seed: see `gate_curvature`.

    Returns:
        R of shape `[K, N, G]`, images in the order of the batches, K = `draws` or the number of outputs; in
        the parameters' dtype, on their device.

    Raises:
        SparseBayesError: as `gate_curvature`.
    """
    found: list[Tensor] = []
    with _sweep(model, grouping, Starts(likelihood, estimator, factor, draws, worker_seed(seed))) as sweep:
        parts = parts_of(grouping, sweep.device)
        for block in sweep.blocks(batches, num_images):
            rows = torch.zeros(
                block.num_passes,
                block.num_images,
                grouping.num_groups,
                dtype=sweep.dtype,
                device=sweep.device,
            )
            for some in block.ranges(block.whole):
                for part in parts:
                    for images in part.image_slices(block, some):
                        rows[:, images, part.groups] = part.rows(block, images)
            found.append(rows)
    result = torch.cat(found, dim=1)
    check_finite(result.sum((0, 1)), grouping)
    return result


def _sweep(model: nn.Module, grouping: Grouping, starts: Starts, importance: float = 1.0) -> Sweep:
    """A sweep over the gate parameters, once their shapes have been checked."""
    gates = gate_labels(model, grouping)
    return Sweep(
        model,
        [labels.parameter for labels in gates],
        by_column=[labels.parameter for labels in gates if reads_columns(labels)],
        by_row=[labels.parameter for labels in gates if reads_rows(labels)],
        not_looked_up=_tied(grouping),
        starts=starts,
        importance=importance,
    )


def _tied(grouping: Grouping) -> set[str]:
    """Weights that make and read the same units, as the embedding of a language model that is its last layer too.

    A switch scales a unit where it is read, and only there: what the embedding makes is scaled by no switch.
    """
    made = {part.parameter for part in grouping.labels if not part.gate and reads_columns(part)}
    gates = [part for part in grouping.labels if part.gate]
    return made & {part.parameter for part in gates if reads_columns(part)} - {
        part.parameter for part in gates if not reads_columns(part)
    }


def gate_labels(model: nn.Module, grouping: Grouping) -> list[Labels]:
    """The gate labels of a grouping.

    Args:
        model: what it must have been made for.
        grouping: any.

    Raises:
        GroupingError: it has none, or is of another model.
    """
    gates = [labels for labels in grouping.labels if labels.gate]
    if not gates:
        raise GroupingError(
            f"expected a grouping with gate labels, whose entries scale a switch; {grouping.name!r} has none"
        )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for labels in gates:
        shape = shapes.get(labels.parameter, labels.shape)
        if shape != labels.shape:
            raise GroupingError(
                f"the grouping {grouping.name!r} was made for {labels.parameter!r} of shape "
                f"{list(labels.shape)}, but the model's is {list(shape)}; make the grouping anew"
            )
    return gates


def check_finite(values: Tensor, grouping: Grouping) -> None:
    """Refuse curvatures that are not numbers, by the name of the first layer that has one.

    Args:
        values: of shape `[G]`, or summed to it.
        grouping: G groups.

    Raises:
        NumericsError: one is not finite.
    """
    bad = (~torch.isfinite(values)).nonzero().flatten()
    if bad.numel():
        layer = grouping.layers[int(grouping.layer_index[int(bad[0])])]
        raise NumericsError(
            f"expected finite curvatures, got nan or inf for {bad.numel()} of {values.numel()} groups, "
            f"first in layer {layer!r}; gradients overflow: check its weights, or use float64"
        )
