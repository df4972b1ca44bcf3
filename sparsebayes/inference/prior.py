"""The hierarchical ARD (HARD) prior over group switches, and the symbols of the whole folder.

Every group g of weights is multiplied by a scalar switch z_g; in a supernet the switch is a parameter,
elsewhere it is implied (scaling a group's weights *is* scaling its switch, and z_g = 1 now). The prior is
z_g ~ N(0, gamma_g), with gamma_g found by maximising the evidence: gamma_g = 0 says: group not needed.

    symbol  in code      shape  meaning
    z       magnitude    [G]    the switch; with `scale="entries"` the norm ||w_g|| of the group's weights
    h       curvature    [G]    Gauss-Newton curvature of the loss in z, nats of the whole data set; h >= 0
    H_i     curvature    dict   the same for single entries w_i, parameter-shaped
    m       size         [G]    free numbers behind one gamma: 1 for a switch, else the group's entries
    s       own          [G]    own switch variance: what an update returns, before dependencies
    gamma   gamma        [G]    prior variance: s combined with gate and predecessors
    C       variance     [G]    posterior variance 1/(1/gamma + h); full Hessian: diagonal of the inverse
    alpha   slope        [G]    1/gamma - C/gamma^2 = h/(1 + gamma h), slope of the log det in gamma
    omega   omega        [G]    sqrt(alpha), alpha summed over a group's entries: weight of |z|
    rho     relevance    [G]    1 - C/gamma = gamma h/(1 + gamma h): share of z that the data determine
    T       strength     -      temperature: the likelihood counts 1/T-fold, so h enters as h/T
    T_g     temperature  [G]    T times the group's price relative to the mean group
    e       evidence     [G]    z^2 h/T_g; a group is worth its variance iff e > 1
    N       num_data     -      images in the data set
    p       -            [G]    variational dropout: probability that a group is dropped; m_g its weights, l^2 their
                                prior precision (length_scale), eps the relaxed drop, tau its temperature
    mu, s   mean, ...    [G]    natural gradient: mean of z, and curvature per image (h = N s there); delta its
                                prior precision

Outside this table h stands for h/T_g. The objective is E/T + sum omega_g |z_g|, so next to a loss E in nats
of the whole data set the penalty weighs T_g omega_g.

Sources: Zhou et al., "BayesNAS", ICML 2019, arXiv 1905.04919, sections 4-5 and Algorithm 1; Tipping and Faul,
"Fast marginal likelihood maximisation for sparse Bayesian models", AISTATS 2003; MacKay, "Bayesian nonlinear
modeling for the prediction competition", ASHRAE Transactions 1994; Wipf and Nagarajan, "A new view of
automatic relevance determination", NIPS 2007 (the reweighted form).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsebayes.errors import NumericsError, RecipeError
from sparsebayes.groups.hierarchy import Hierarchy

ENTROPY_THRESHOLD = 1.0 / (2.0 * math.pi * math.e)
"""Prior variance at which the entropy of N(0, gamma) is 0 nats: 0.0585 (BayesNAS, Algorithm 1, step 4)."""


def effective_variance(own: Tensor, hierarchy: Hierarchy | None) -> Tensor:
    """Prior variances gamma from own switch variances s.

    Args:
        own: s, non-negative, of shape ``[G]``. This is the state that updates carry along; combining only
            here keeps a dependency from being counted again at every update.
        hierarchy: which groups need which others, or None for independent groups.

    Returns:
        gamma of shape ``[G]``.

    Raises:
        GroupingError: ``own`` does not fit the hierarchy.
    """
    return own if hierarchy is None else hierarchy.combine(own)


def entropy(gamma: Tensor) -> Tensor:
    """Differential entropy 0.5 log(2 pi e gamma) of the prior N(0, gamma), in nats; -inf where gamma = 0.

    Args:
        gamma: prior variances, non-negative, of any shape.

    Returns:
        Entropies of the same shape; positive iff gamma > `ENTROPY_THRESHOLD`.
    """
    return 0.5 * torch.log(gamma / ENTROPY_THRESHOLD)


def group_temperatures(num_groups: int, strength: float, prices: Tensor | None) -> Tensor:
    """Temperature T_g of every group: how many nats of evidence one unit of e stands for.

    Args:
        num_groups: G.
        strength: T, positive; 1 is plain Bayes for the data set that the curvature speaks of.
        prices: cost of each group relative to the mean group (so that a typical price is 1), positive, of
            shape ``[G]``; taken as they are, not normalised again. None: every price is 1.

    Returns:
        float64 of shape ``[G]`` on the CPU.

    Raises:
        RecipeError: ``strength`` is not positive and finite.
        NumericsError: ``prices`` are not positive and finite, or not of shape ``[G]``.
    """
    if not (math.isfinite(strength) and strength > 0):
        raise RecipeError(
            f"expected a positive finite strength, got {strength}: 1 is plain Bayes, more removes more."
        )
    if prices is None:
        return torch.full((num_groups,), strength, dtype=torch.float64)
    if prices.shape != (num_groups,):
        raise NumericsError(
            f"expected one price for each of the {num_groups} groups, got shape {list(prices.shape)}: pass "
            f"a tensor of shape [{num_groups}]."
        )
    temperatures = strength * prices.detach().to("cpu", torch.float64)
    bad = (~torch.isfinite(temperatures) | (temperatures <= 0)).nonzero().flatten()
    if bad.numel():
        group = int(bad[0])
        raise NumericsError(
            f"expected positive finite prices, got {float(prices[group])} for group {group}: a group "
            "without a price could never be removed, so give it a small one."
        )
    return temperatures
