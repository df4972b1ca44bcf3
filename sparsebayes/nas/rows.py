"""Derivatives of every image's loss with respect to every switch of a supernet: its curvature in factors.

With v_nk the starting vectors of image n (`sparsebayes.curvature.factors`), f the logits and z_g the factor of group g,

    r_nkg = sum over the group's switches t of  s_t d(v_nk . f_n)/ds_t,        H = N mean_n sum_k r_nk r_nk'

so H is the Gauss-Newton matrix of the switches in a relative change of each: z = 1, as everywhere. The switches are fed
as one row per image, a leaf `[B, T]`: one backward pass gives the rows of all images, without the gradients of weights.
The general estimator, `sparsebayes.curvature.switch_rows`, takes any network and finds out how its switches reach it;
its rows `[K, N, E]` are derivatives in the switches themselves, those here `[N, K, G]` relative and summed over groups.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sparsebayes.curvature.factors import Starts
from sparsebayes.errors import DataError, NumericsError
from sparsebayes.nas.supernet import Supernet
from sparsebayes.networks import frozen, in_mode

__all__ = ["relative_rows", "switch_matrix"]


def relative_rows(
    supernet: Supernet,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_images: int,
    at_once: int = 64,
    estimator: str = "monte_carlo",
    factor: str = "stick",
    draws: int = 1,
    seed: int = 0,
) -> Tensor:
    """Compute r in evaluation mode.

    Args:
        supernet: mode and gradients stay as they are.
        batches: pairs of images `[B, C, H, W]` and labels; labels are not used.
        num_images: use the first so many images.
        at_once: so many go through the supernet together, all of whose activations are kept: what a training step
            takes is no more than the memory can hold.
        estimator: "monte_carlo" or "exact", as in `sparsebayes.curvature`.
        factor: random factor of the Monte Carlo estimator.
        draws: random starting vectors per image.
        seed: of the random factors.

    Returns:
        Of shape `[N, K, G]`, on the supernet's device.

    Raises:
        DataError: no images.
        NumericsError: derivatives that are not finite.
    """
    starts = Starts("cross_entropy", estimator, factor, draws, seed)
    found: list[Tensor] = []
    used = 0
    with in_mode(supernet, train=False), frozen(supernet):
        for images, _ in batches:
            if used >= num_images:
                break
            some = images[: num_images - used]
            found += [_rows(supernet, part, starts) for part in torch.split(some, at_once)]
            used += len(some)
    if not found:
        raise DataError("expected images to measure the switches on, got none; check the data set")
    rows = torch.cat(found)
    if not bool(rows.isfinite().all()):
        raise NumericsError(
            "expected finite derivatives of the switches, got nan or inf; lower search.lr or set search.grad_clip"
        )
    return rows


def switch_matrix(rows: Tensor, num_data: int) -> Tensor:
    """The Gauss-Newton matrix H of the switches from their rows.

    Args:
        rows: of shape `[N, K, G]`.
        num_data: images of the whole data set.

    Returns:
        float64 of shape `[G, G]`, nats of the whole data set.
    """
    flat = rows.double().flatten(0, 1)
    return flat.T @ flat * (num_data / len(rows))


def _rows(supernet: Supernet, images: Tensor, starts: Starts) -> Tensor:
    """Rows of one batch, `[B, K, G]`."""
    own = supernet.switches.detach()
    leaf = own.expand(len(images), -1).clone().requires_grad_()
    with torch.enable_grad():
        logits = supernet(images, leaf)
        vectors = starts(logits.detach())  # [K, B, C]
        passes = [
            torch.autograd.grad((v * logits).sum(), leaf, retain_graph=k + 1 < len(vectors))[0]
            for k, v in enumerate(vectors)
        ]
    return supernet.table.sum_groups(torch.stack(passes, 1) * own)
