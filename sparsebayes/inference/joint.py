"""How much evidence is lost when several switches go together: the off-diagonal part of the curvature.

With the full curvature H of the switches, nats of the whole data set, switching off a set S changes the loss by
(1/2) z_S' H_SS z_S, not by the sum of its diagonal: groups that do the same thing hide each other. Given that S is off
already, group g is worth

    e_g(S) = z_g^2 h_g + 2 z_g sum_{s in S} H_gs z_s

nats of evidence more (z^2 h counts twice the loss, as in the evidence rule of `sparsebayes.inference.laplace`). Groups
go one at a time, the cheapest first, and the strength up to which a group survives is the largest price that had to be
paid until it went:

    >>> H = torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 9.0]])       # two twins and a loner
    >>> joint_survival(H)
    tensor([ 4., 12.,  9.], dtype=torch.float64)

One by one each twin looks cheaper than the loner; both together they are not. Switches at 1 throughout; without other
switches readjusting. The diagonal rule is that of Tipping and Faul (AISTATS 2003); the greedy order over the full
matrix is that of backward elimination.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsebayes.errors import NumericsError

__all__ = ["joint_survival"]


def joint_survival(curvature: Tensor, prices: Tensor | None = None) -> Tensor:
    """Strength up to which each group survives when groups are removed one at a time, the cheapest first.

    Args:
        curvature: Full curvature matrix of the switches, nats of the whole data set, of shape ``[G, G]``.
        prices: Positive prices of shape ``[G]``; None: all 1. Evidence is divided by them.

    Returns:
        Of shape ``[G]``, at least 0. The groups with more than T are those that are left when all that is worth less
        than T was removed. In float64, on the curvature's device.

    Raises:
        NumericsError: If the matrix is not square or not finite.
    """
    if curvature.ndim != 2 or curvature.shape[0] != curvature.shape[1]:
        raise NumericsError(f"expected a square curvature matrix, got shape {list(curvature.shape)}")
    if not bool(torch.isfinite(curvature).all()):
        raise NumericsError(
            "expected a finite curvature matrix; check the loss for values that are not finite"
        )
    num_groups = len(curvature)
    found = curvature
    # One group after the other: on an accelerator each would wait for the last. In float64, where a level can rise by
    # less than float32 can tell apart.
    curvature = curvature.cpu().double()
    scale = curvature.new_ones(num_groups) if prices is None else prices.to(curvature)
    marginal = curvature.diagonal().clone()
    survives = torch.zeros_like(marginal)
    gone = torch.zeros_like(marginal)
    level = torch.zeros((), dtype=marginal.dtype, device=marginal.device)
    for _ in range(num_groups):
        # Infinity keeps the groups that are off already from being chosen again.
        group = int((marginal / scale + gone).argmin())
        # Strictly rising, so that a size between two groups of equal strength can still be met.
        level = torch.maximum(level * (1 + 1e-9), marginal[group] / scale[group])
        survives[group] = level
        gone[group] = float("inf")
        marginal += 2 * curvature[group]
    return survives.to(found.device)
