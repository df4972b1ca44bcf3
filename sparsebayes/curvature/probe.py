"""Gauss-Newton diagonal of anything, from ordinary gradients: no layers known, no hooks.

A batch is split into groups. With starting vectors v_n (`factors.py`) and a random sign s_n for every image,
one backward pass from sum_n s_n v_n . f_n gives the summed gradient of a group, whose square has

    E (sum_n s_n J_n^T v_n)^2 = sum_n E (J_n^T v_n)^2

because the products of different images have mean 0. This is unbiased for any network that autograd can
differentiate, with a relative variance of at most about 2 per group. It is noisier than `entry_curvature`, which
squares image by image; its place is what has no per-image derivative: batch norm in training mode, where the images
of a batch influence each other (the Jacobian is then that of the whole batch), and networks that neither hooks nor
`torch.vmap` can run.

Hutchinson-style estimators of the Fisher diagonal by one backward pass: Liu et al., "Sophia", arXiv 2305.14342
(Gauss-Newton-Bartlett, with sampled labels); K. Sun, arXiv 2505.13614.

    >>> found = probe_curvature(model, ["conv1.weight"], loader, num_data=60000, groups=8)
    >>> found["conv1.weight"].shape, found.relative_error
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from sparsebayes.curvature.entries import EntryCurvature, finish
from sparsebayes.curvature.factors import Factor, Starts
from sparsebayes.curvature.halves import Halves
from sparsebayes.curvature.images import Batches, check_num_data, check_targets, first_images
from sparsebayes.curvature.squares import SquareSums
from sparsebayes.curvature.sweep import Sweep
from sparsebayes.curvature.workers import worker_seed
from sparsebayes.errors import DataError, ModelError, RecipeError

__all__ = ["probe_curvature"]


def probe_curvature(
    model: nn.Module,
    parameters: Sequence[str],
    batches: Batches,
    *,
    num_data: int,
    likelihood: str = "cross_entropy",
    factor: str | Factor = "stick",
    draws: int = 1,
    groups: int = 8,
    training: bool = False,
    num_images: int | None = None,
    seed: int = 0,
) -> EntryCurvature:
    """Estimate the GGN diagonal of parameters by squares of summed gradients.

    Args:
        model: the network; its outputs are logits of shape `[B, C]`. Mode, gradients, buffers and random states of
            the caller stay as they are.
        parameters: names, as in `model.named_parameters()`.
        batches: pairs of images `[B, ...]` and targets.
        num_data: images in the whole data set, to which the curvature is scaled.
        likelihood: "cross_entropy", "mse" or "binary_cross_entropy".
        factor: "stick", "rademacher", "sampled_label", or own starting vectors.
        draws: backward passes per group.
        groups: parts that a batch is split into, each with its own pass through the network; more groups, less
            noise. One in training mode, where a part would have other statistics than the batch.
        training: run the network in training mode, images coupled by its batch norms as in a training step.
        num_images: use only the first so many images; None: all.
        seed: of the random factors and signs.

    Returns:
        For each parameter its diagonal, in nats of the whole data set, with its standard error; a parameter that
        the outputs do not depend on has zeros.

    Raises:
        RecipeError: an unknown likelihood or factor, or `draws`, `groups`, `num_data` or `num_images` below 1.
        DataError: no images, or targets that do not fit.
        GroupingError: the model has no parameter of a name.
        ModelError: outputs are not logits of shape `[B, C]`.
        NumericsError: curvatures are not finite.
    """
    check_num_data(num_data)
    if groups < 1:
        raise RecipeError(f"expected at least 1 group of images in a batch, got groups={groups}")
    names = list(dict.fromkeys(parameters))
    starts = Starts(likelihood, "monte_carlo", factor, draws, worker_seed(seed))
    signs = Generator().manual_seed(worker_seed(seed) ^ 0x51A5)
    with Sweep(model, names, starts=starts) as sweep:
        model.train(training)
        halves = Halves(sweep.parameters)
        sums = {name: SquareSums(p, fourth=False) for name, p in sweep.parameters.items()}
        chosen = [dict(model.named_parameters())[name] for name in names]
        parts = _parts(first_images(batches, num_images), 1 if training else groups)
        for number, (images, y) in enumerate(parts):
            x = sweep.ready(images)
            # Copies of the buffers: in training mode a forward pass moves the running statistics.
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            logits = functional_call(model, buffers, (x,))
            _check(logits, x, y, likelihood)
            _add_squares_([sums[name].plain()[0] for name in names], logits, chosen, starts, signs)
            halves.add(number % 2, sums)
            halves.count(number % 2, slice(0, len(x)))
            sweep.num_images += len(x)
    if sweep.num_images == 0:
        raise DataError("expected at least one image to compute the curvature from, got none")
    return finish(sums, halves, sweep, num_data)


def _parts(batches: Batches, groups: int) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in batches:
        # As even as possible, none empty.
        yield from zip(
            torch.tensor_split(x, min(groups, len(x))),
            torch.tensor_split(y, min(groups, len(x))),
            strict=True,
        )


def _add_squares_(
    sums: list[Tensor], logits: Tensor, chosen: list[nn.Parameter], starts: Starts, signs: Generator
) -> None:
    """Add the squared gradients of the sum over the images, for each pass."""
    v = starts(logits.detach())
    flips = torch.where(torch.rand(v.shape[:2], generator=signs) < 0.5, -1.0, 1.0)
    v = v * flips.to(v.device, v.dtype).unsqueeze(-1)
    scales = v.new_ones(len(v))
    short = logits.dtype == torch.float16
    if short:
        # Its numbers end at 6e-8, where sure images' gradients would vanish: the longest vector starts at 1.
        longest = v.abs().amax((1, 2))
        scales = longest.where(longest > 0, 1.0)
        v = v / scales.view(-1, 1, 1)
    v = v.to(logits.dtype)
    for k, (start, scale) in enumerate(zip(v, scales, strict=True)):
        if not logits.requires_grad:
            break
        gradients = torch.autograd.grad(logits, chosen, start, retain_graph=k + 1 < len(v), allow_unused=True)
        for q, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                wide = gradient.to(q.dtype) * scale if short else gradient.to(q.dtype)
                q.addcmul_(wide, wide)


def _check(logits: object, x: Tensor, y: Tensor, likelihood: str) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
        got = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"expected network outputs (logits) of shape [{len(x)}, classes], got {got}")
    check_targets(logits, y, likelihood)
