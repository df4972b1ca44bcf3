"""Gauss-Newton (GGN) diagonal of single parameter entries: how much the loss bends in each weight.

    h_e = num_data * mean_n sum_k (d(v_nk . f_n)/dw_e)^2

with starting vectors v_nk from `factors.py`. This is the curvature that the paper's per-entry form needs
(BayesNAS, Zhou et al., ICML 2019), for weights, biases and any other parameters. For a likelihood's own
factor the GGN diagonal is the diagonal of the Fisher matrix.

    >>> entry_curvature(model, ["conv1.weight"], loader, num_data=60000)["conv1.weight"].shape
    torch.Size([20, 1, 5, 5])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsebayes.curvature.factors import Factor, Starts
from sparsebayes.curvature.sweep import Batches, Sweep, check_num_data
from sparsebayes.errors import NumericsError

__all__ = ["entry_curvature"]


def entry_curvature(
    model: nn.Module,
    parameters: Sequence[str],
    batches: Batches,
    *,
    num_data: int,
    likelihood: str = "cross_entropy",
    estimator: str = "monte_carlo",
    factor: str | Factor = "stick",
    draws: int = 1,
    num_images: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Compute the GGN diagonal of parameters, in evaluation mode.

    Args:
        model: the network; its outputs are logits of shape `[B, C]`. Mode, gradients and random states of the
            caller stay as they are.
        parameters: names, as in `model.named_parameters()`.
        batches: pairs of images `[B, ...]` and targets; see `gate_curvature` for this and the options below.
        num_data: images in the whole data set, to which the curvature is scaled.
        likelihood: "cross_entropy", "mse" or "binary_cross_entropy".
        estimator: "monte_carlo" or "exact".
        factor: "stick", "rademacher", "sampled_label", or own starting vectors.
        draws: random starting vectors per image.
        num_images: use only the first so many images; None: all.
        seed: of the random factors.

    Returns:
        For each parameter its diagonal, of its shape, dtype and device, in nats of the whole data set.

    Raises:
        RecipeError: an unknown likelihood, estimator or factor, or `draws`, `num_data` or `num_images` below
            1.
        DataError: no images, or targets that do not fit.
        GroupingError: the model has no parameter of a name.
        ModelError: outputs are not logits of shape `[B, C]`, or images influence each other.
        NumericsError: outputs or curvatures are not finite.
    """
    check_num_data(num_data)
    used = 0
    total: dict[str, Tensor] = {}
    with Sweep(model, parameters, starts=Starts(likelihood, estimator, factor, draws, seed)) as sweep:
        for block in sweep.blocks(batches, num_images):
            for name in dict.fromkeys(parameters):
                q, _ = block.squares(name, fourth=False)
                total[name] = total[name].add_(q) if name in total else q.double()
            used += block.num_images
    values = dict(model.named_parameters())
    result = {name: (sums * (num_data / used)).to(values[name].dtype) for name, sums in total.items()}
    for name, curvature in result.items():
        if not bool(torch.isfinite(curvature).all()):
            raise NumericsError(
                f"expected finite curvatures, got nan or inf in {name!r}; gradients overflow: check the "
                "weights, or use float64"
            )
    return result
