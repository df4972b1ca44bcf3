"""Gauss-Newton (GGN) diagonal of single parameter entries: how much the loss bends in each weight.

    h_e = num_data * mean_n sum_k (d(v_nk . f_n)/dw_e)^2

with starting vectors v_nk from `factors.py`. This is the curvature that the paper's per-entry form needs
(BayesNAS, Zhou et al., ICML 2019), for weights, biases and any other parameters. For a likelihood's own
factor the GGN diagonal is the diagonal of the Fisher matrix.

    >>> found = entry_curvature(model, ["conv1.weight"], loader, num_data=60000, num_images="auto")
    >>> found["conv1.weight"].shape
    torch.Size([20, 1, 5, 5])
    >>> found
    EntryCurvature(500 entries of 1 parameters, relative error 0.048, from 1536 of 60000 images)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from sparsebayes.curvature.factors import Factor, Starts
from sparsebayes.curvature.halves import Halves
from sparsebayes.curvature.images import Batches, check_num_data
from sparsebayes.curvature.squares import SquareSums
from sparsebayes.curvature.stopping import Stopping
from sparsebayes.curvature.sweep import Sweep
from sparsebayes.curvature.workers import add_up_, worker_seed
from sparsebayes.errors import NumericsError

__all__ = ["EntryCurvature", "entry_curvature", "finish"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class EntryCurvature(Mapping[str, Tensor]):
    """The GGN diagonal of parameters, by name.

    Attributes:
        diagonal: for each parameter its diagonal, of its shape, in nats of the whole data set.
        errors: for each parameter the relative standard error of its diagonal: the norm of the errors over
            the norm of the values, found by comparing two halves of the images at some thousand entries.
            Infinite when only one image was used.
        relative_error: the same for all parameters together.
        num_images: how many images were looked at.
        num_data: how many images the data set holds.
    """

    diagonal: dict[str, Tensor]
    errors: dict[str, float]
    relative_error: float
    num_images: int
    num_data: int

    def __getitem__(self, name: str) -> Tensor:
        """The diagonal of one parameter."""
        return self.diagonal[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the parameters."""
        return iter(self.diagonal)

    def __len__(self) -> int:
        """The number of parameters."""
        return len(self.diagonal)

    def __repr__(self) -> str:
        count = sum(values.numel() for values in self.diagonal.values())
        return (
            f"EntryCurvature({count} entries of {len(self.diagonal)} parameters, relative error "
            f"{self.relative_error:.2g}, from {self.num_images} of {self.num_data} images)"
        )


def entry_curvature(  # noqa: PLR0913
    model: nn.Module,
    parameters: Sequence[str],
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
    tune: bool = False,
) -> EntryCurvature:
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
        num_images: use only the first so many images; "auto": until the relative error is below `tolerance`;
            None: all.
        tolerance: relative error at which "auto" stops; it warns if the images end before.
        importance: share of the images that get a backward pass, see `gate_curvature`; 1: all.
        seed: of the random factors and choices.
        tune: time the ways to square a convolution's gradients, once for each layer shape in this process,
            instead of choosing by rule. Faster where the rule is wrong, but another process may choose another way,
            whose sums are rounded differently.

    Returns:
        For each parameter its diagonal, of its shape and dtype (at least float32) and on its device, in nats of
        the whole data set, with its standard error.

    Raises:
        RecipeError: an unknown likelihood, estimator or factor, `draws`, `num_data` or `num_images` below 1, or
            `tolerance` or `importance` not above 0 and at most 1.
        DataError: no images, or targets that do not fit.
        GroupingError: the model has no parameter of a name.
        ModelError: outputs are not logits of shape `[B, C]`, or images influence each other.
        NumericsError: outputs or curvatures are not finite.
    """
    check_num_data(num_data)
    names = list(dict.fromkeys(parameters))
    stop = Stopping(num_images, tolerance)
    starts = Starts(likelihood, estimator, factor, draws, worker_seed(seed))
    with Sweep(model, names, starts=starts, importance=importance) as sweep:
        halves = Halves(sweep.parameters)
        sums = {name: SquareSums(p, fourth=False) for name, p in sweep.parameters.items()}
        for number, block in enumerate(sweep.blocks(batches, stop.limit)):
            for half, images in block.halves(number):
                halves.count(half, images)
                for some in block.ranges(images):
                    for name in names:
                        block.add_squares_(sums[name], name, some, tune=tune)
                halves.add(half, sums)
            if sweep.complete and stop.reached(sweep.num_images, halves.error):
                break
    found = finish(sums, halves, sweep, num_data)
    stop.warn_if_short(found.relative_error, found.num_images)
    return found


def finish(sums: Mapping[str, SquareSums], halves: Halves, sweep: Sweep, num_data: int) -> EntryCurvature:
    """Sum over the workers, scale, and refuse what is not finite.

    Args:
        sums: over this worker's images, by parameter.
        halves: the same over two halves.
        sweep: which went over the images.
        num_data: images in the whole data set.

    Raises:
        NumericsError: a curvature is not finite.
    """
    count = torch.tensor(float(sweep.num_images), dtype=torch.float64, device=sweep.device)
    total = {name: one.result()[0] for name, one in sums.items()}
    add_up_(*total.values(), *halves.tensors(), count)
    used = int(count)
    result = {name: q.mul_(num_data / used) for name, q in total.items()}
    for name, curvature in result.items():
        if not bool(torch.isfinite(curvature).all()):
            raise NumericsError(
                f"expected finite curvatures, got nan or inf in {name!r}; gradients overflow: check the "
                "weights, or use float64"
            )
    errors = {name: halves.error(name) for name in total}
    return EntryCurvature(result, errors, halves.error(), used, num_data)
