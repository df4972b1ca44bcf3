"""Evidence updates of the prior variances, as pure functions (symbols: `sparsebayes.inference.prior`).

Two iterations with the same fixed point. *Reweighted* (BayesNAS, arXiv 1905.04919, eqs. 17-19 and Algorithm
1): C = 1/(1/gamma + h), omega = sqrt(gamma - C)/gamma, s = |z|/omega. *MacKay* (1994): s = z^2/rho. Both are
written here in forms that cancel nothing and are defined at gamma = 0 and h = 0:

    alpha = h/(1 + gamma h)        omega = sqrt(alpha)        rho = gamma h/(1 + gamma h)

    >>> z, h = torch.tensor(0.75), torch.tensor(4.0)
    >>> reweighted(z, h, gamma=torch.tensor(0.75))       # at rest: the data want z = 1, and 0.75 = 1 - 1/h
    (tensor(1.), tensor(0.7500))

A direction without curvature (h = 0) has omega = 0, and the printed s = |z|/omega would be infinite: the
group that the data say nothing about would be the last to go. Here it gets s = 0: off.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsebayes.errors import GroupingError
from sparsebayes.groups.grouping import Grouping


def log_det_slope(curvature: Tensor, gamma: Tensor) -> Tensor:
    """Slope alpha = h/(1 + gamma h), which equals 1/gamma - C/gamma^2 (the square of eq. 18).

    Args:
        curvature: h >= 0, any shape.
        gamma: prior variances >= 0, broadcastable to it.

    Returns:
        alpha, at most h and at most 1/gamma.
    """
    return curvature / (1 + gamma * curvature)


def relevance(curvature: Tensor, gamma: Tensor) -> Tensor:
    """Share rho = gamma h/(1 + gamma h) = 1 - C/gamma of a switch that the data, not the prior, determine.

    Args:
        curvature: h >= 0, any shape.
        gamma: prior variances >= 0, broadcastable to it.

    Returns:
        rho in [0, 1].
    """
    determined = gamma * curvature
    return determined / (1 + determined)


def switch_variance(magnitude: Tensor, omega: Tensor) -> Tensor:
    """Own variance s = |z|/omega (eq. 19), which minimises z^2/s + omega^2 s.

    Args:
        magnitude: z, any sign, any shape.
        omega: penalty weights >= 0 of the same shape.

    Returns:
        s >= 0; 0 where omega = 0.
    """
    return _ratio(magnitude.abs(), omega)


def reweighted(magnitude: Tensor, curvature: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """One reweighted-l1 update in the paper's order: gamma -> omega -> s.

    Args:
        magnitude: z, any sign, of shape ``[G]``.
        curvature: h >= 0 of shape ``[G]``, in the coordinate of z.
        gamma: prior variances >= 0 of shape ``[G]``, dependencies combined.

    Returns:
        omega and s, both of shape ``[G]``. With z re-fitted under the penalty omega |z| between updates,
        iterating ends in `fixed_point` of the unpenalised value.
    """
    omega = log_det_slope(curvature, gamma).sqrt()
    return omega, switch_variance(magnitude, omega)


def mackay(mean: Tensor, curvature: Tensor, gamma: Tensor) -> Tensor:
    """One MacKay update s = z^2/rho with a diagonal curvature.

    Args:
        mean: posterior mean (mode) of z, of shape ``[G]``.
        curvature: h >= 0 of shape ``[G]``.
        gamma: prior variances >= 0 of shape ``[G]``, dependencies combined.

    Returns:
        s of shape ``[G]``; 0 where gamma or h is 0, so a group that went off stays off.
    """
    return _ratio(mean.square(), relevance(curvature, gamma))


def fixed_point(magnitude: Tensor, curvature: Tensor) -> Tensor:
    """Where the updates of a single switch end: gamma* = max(z^2 - 1/h, 0) (Tipping and Faul 2003).

    Args:
        magnitude: the value that the data want, without a penalty, of shape ``[G]``.
        curvature: h >= 0 of shape ``[G]``.

    Returns:
        gamma* of shape ``[G]``; positive iff z^2 h > 1.
    """
    return (magnitude.square() - curvature.reciprocal()).clamp(min=0)


def reweighted_entries(
    norm: Tensor, curvature: Mapping[str, Tensor], grouping: Grouping, gamma: Tensor
) -> tuple[Tensor, Tensor]:
    """One reweighted group-lasso update: entries keep their own curvature and share their group's gamma.

    omega_g = sqrt(sum of alpha_i over the group), a sum and not a mean, and s_g = ||w_g||/omega_g. An entry
    in several groups has the precision 1/gamma_i = sum over its groups of 1/gamma_g, and its alpha_i counts
    in each of them (the paper is silent on overlaps; this is our choice).

    Args:
        norm: ||w_g|| of shape ``[G]``.
        curvature: H_i >= 0 for every entry of every parameter in the grouping, parameter-shaped.
        grouping: which entries form which of the G groups.
        gamma: prior variances >= 0 of shape ``[G]``, dependencies combined, of the curvature's type and
            device.

    Returns:
        omega and s, both of shape ``[G]``.

    Raises:
        GroupingError: a parameter of the grouping has no curvature, or one of another shape.
    """
    check_entries(curvature, grouping)
    variances = entry_variances(grouping, gamma)
    slopes = {name: log_det_slope(curvature[name], variance) for name, variance in variances.items()}
    omega = grouping.reduce(slopes).sqrt()
    return omega, switch_variance(norm, omega)


def mackay_entries(
    norm: Tensor, curvature: Mapping[str, Tensor], grouping: Grouping, gamma: Tensor
) -> Tensor:
    """One MacKay update with one gamma per group: s_g = ||w_g||^2/(sum of rho_i over the group).

    Args:
        norm: ||w_g|| at the posterior mean, of shape ``[G]``.
        curvature: as for `reweighted_entries`.
        grouping: which entries form which of the G groups.
        gamma: prior variances >= 0 of shape ``[G]``, of the curvature's type and device.

    Returns:
        s of shape ``[G]``; 0 where no entry of the group is determined by the data.

    Raises:
        GroupingError: a parameter of the grouping has no curvature, or one of another shape.
    """
    check_entries(curvature, grouping)
    variances = entry_variances(grouping, gamma)
    shares = {name: relevance(curvature[name], variance) for name, variance in variances.items()}
    return _ratio(norm.square(), grouping.reduce(shares))


def entry_variances(grouping: Grouping, gamma: Tensor) -> dict[str, Tensor]:
    """Prior variance of every entry, 1/gamma_i = sum over its groups of 1/gamma_g.

    Args:
        grouping: which entries form which of the G groups.
        gamma: prior variances >= 0 of shape ``[G]``.

    Returns:
        Parameter name to variances of the parameter's shape; 0 for entries in no group, which no group reads.
    """
    # An entry in no group has precision 0 here, and an infinite variance times no curvature is not a number.
    precisions = grouping.expand(gamma.reciprocal())
    return {name: torch.where(total > 0, total.reciprocal(), 0.0) for name, total in precisions.items()}


def check_entries(curvature: Mapping[str, Tensor], grouping: Grouping) -> None:
    """Refuse curvatures that do not fit the grouping; another shape would broadcast without a word.

    Args:
        curvature: H_i, parameter-shaped; parameters beyond the grouping are allowed.
        grouping: which entries form which group.

    Raises:
        GroupingError: a parameter of the grouping has no curvature, or one of another shape.
    """
    for name, shape in grouping.parameters.items():
        came = f"shape {list(curvature[name].shape)}" if name in curvature else "none"
        if came != f"shape {list(shape)}":
            raise GroupingError(
                f"expected the curvature of {name!r} with shape {list(shape)}, got {came}: compute it for "
                "every parameter of the grouping."
            )


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """``above/below``, and 0 wherever ``below`` is 0: nothing is known there, and unknown means off."""
    return torch.where(below > 0, above / below, 0.0)
