"""Variational dropout over group switches: a drop probability per group, learned along with the weights.

Zhou et al., "Posterior-guided neural architecture search" (PGNAS), AAAI 2020, arXiv 1906.09557. A weight group is
m_g z_g with z_g = 1 - eps_g, eps_g ~ Bernoulli(p_g): p is the probability of being *dropped*. The prior on the weights
is N(0, I/l^2), and the loss of the whole data set gains (Gal, 2016, proposition 4)

    KL = sum_g  l^2 (1 - p_g) ||m_g||^2 / 2  -  H(p_g),        H(p) = -p log p - (1 - p) log(1 - p)

up to a constant: an L2 term that weakens where a group is dropped often, and an entropy that keeps p off 0 and 1. While
the network trains, eps is relaxed to the binary concrete distribution at temperature tau,

    eps = sigmoid((log p - log(1 - p) + log u - log(1 - u)) / tau),        u ~ U(0, 1)

so that the gradient of the loss in z reaches p. (The printed log(-log u1) - log(-log u2) has the same law.)

    >>> posterior = VariationalDropout(2, num_data=60000)
    >>> switches = posterior.sample(torch.Generator().manual_seed(0))      # near 1: p = 0.1 to begin with
    >>> posterior.update_(switches, gradient, energy=squared_norms)        # d(mean loss)/dz, ||m||^2

At rest log((1 - p)/p) = (nats of the whole data set that the group saves)/T - l^2 ||m||^2/2: groups with p -> 1 go.

Where print and code of the paper contradict each other (the sign of the entropy, whose probability p is, the factor
1/2) this file follows the derivation above. Our choices where it leaves room: p is learned with Adam, since its
gradient shrinks as 1/N and plain SGD took the paper 1800 epochs; log-odds stay within +-`LARGEST_LOGIT`; the
temperature T of the other posteriors multiplies the KL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsebayes.errors import GroupingError, NumericsError, RecipeError, RunError
from sparsebayes.groups.hierarchy import Hierarchy
from sparsebayes.inference.checks import non_negative, vector
from sparsebayes.inference.posterior import (
    Posterior,
    check_keys,
    check_same,
    initial_vector,
    loaded_strength,
    loaded_vector,
    positive,
)
from sparsebayes.inference.prior import group_temperatures

__all__ = ["VariationalDropout", "concrete_log_density", "concrete_sample", "dropout_kl"]

LARGEST_LOGIT = 20.0
"""Log-odds of p stay within +-20: beyond, 1 - p cannot be told from 0 or 1 in the network's float32."""

BETAS = (0.9, 0.999)
"""Adam's decay rates for the log-odds of p."""


def concrete_sample(logits: Tensor, tau: float, uniform: Tensor) -> Tensor:
    """Relaxed Bernoulli draws: eps in (0, 1), near 1 with probability sigmoid(logits).

    Args:
        logits: Log-odds log p - log(1 - p), of any shape.
        tau: Temperature, positive; towards 0 the draws become 0 or 1.
        uniform: Uniform draws in [0, 1), of a shape that broadcasts.

    Returns:
        eps, of the broadcast shape.
    """
    return torch.sigmoid((logits + logistic(uniform)) / tau)


def concrete_log_density(eps: Tensor, logits: Tensor, tau: float) -> Tensor:
    """Log density of `concrete_sample` at eps (Maddison, Mnih and Teh, ICLR 2017, eq 24), in nats.

    Args:
        eps: Within (0, 1), of any shape.
        logits: Log-odds, of a shape that broadcasts.
        tau: Temperature, positive.
    """
    # tau logit(eps) - logits is logistic; its density times the slope of that map.
    noise = tau * torch.logit(eps) - logits
    return math.log(tau) + F.logsigmoid(noise) + F.logsigmoid(-noise) - torch.log(eps) - torch.log1p(-eps)


def logistic(uniform: Tensor) -> Tensor:
    """Logistic noise log u - log(1 - u) from uniform draws; those that are 0 count as the smallest above."""
    return torch.logit(uniform.clamp(min=torch.finfo(uniform.dtype).tiny))


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Entropy H(p) in nats from log-odds, without cancellation at p near 0 or 1; of the same shape."""
    p = torch.sigmoid(logits)
    return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits))


def dropout_kl(logits: Tensor, energy: Tensor, length_scale: float | Tensor) -> Tensor:
    """KL to the prior N(0, I/l^2) of each group, in nats, up to a constant that depends on neither p nor m.

    Args:
        logits: Log-odds of the drop probability, of shape ``[G]``.
        energy: ||m_g||^2, of shape ``[G]``.
        length_scale: l^2, positive, one or ``[G]``.

    Returns:
        l^2 (1 - p) ||m||^2/2 - H(p), of shape ``[G]``.
    """
    return 0.5 * length_scale * torch.sigmoid(-logits) * energy - bernoulli_entropy(logits)


@final
class VariationalDropout(Posterior):
    """Drop probabilities of G groups, learned from gradients in the switches.

    Args:
        num_groups: G, at least 1.
        num_data: N, images in the data set that the mean loss speaks of; the paper counts augmented ones too.
        length_scale: l^2, the precision of the prior on weights, one for all as in the paper (0.1 to 2500) or one per
            group; larger removes more.
        tau: Temperature of the relaxation.
        initial: Drop probability to begin with, one or one per group, within (0, 1).
        lr: Learning rate of the log-odds (Adam).
        adaptive: False takes the factor 1 - p out of the L2 term, which then says nothing about p: the paper's
            constant-L2 ablation.
        shared: Which groups have one probability in common (the input channels of a layer at one kernel size, in the
            paper): numbers 0..P-1 of shape ``[G]``; None: each group has its own. Each group still has its own mask.
        hierarchy: Which groups need which others; None for independent groups.
        strength: Temperature T: the data count 1/T-fold.
        prices: Cost of each group relative to the mean group, ``[G]``; group g gets the temperature T * price.

    Attributes:
        length_scale: Mean of the groups' l^2.

    Raises:
        GroupingError: ``num_groups`` < 1, or numbers that do not fit it.
        RecipeError: An option out of its range; a drop probability of 0 or 1 among them.
        NumericsError: Prices that are not positive.
    """

    penalty_order = 2

    def __init__(
        self,
        num_groups: int,
        *,
        num_data: int,
        length_scale: float | Tensor = 50.0,
        tau: float = 0.2,
        initial: float | Tensor = 0.1,
        lr: float = 0.05,
        adaptive: bool = True,
        shared: Tensor | None = None,
        hierarchy: Hierarchy | None = None,
        strength: float = 1.0,
        prices: Tensor | None = None,
    ) -> None:
        super().__init__(num_groups, hierarchy=hierarchy, strength=strength)
        self.num_data = positive("num_data", num_data)
        self._precision = initial_vector("length_scale", length_scale, num_groups)
        self.length_scale = positive("length_scale", float(self._precision.mean()))
        positive("length_scale", float(self._precision.min()))
        self.tau = positive("tau", tau)
        self.lr = positive("lr", lr)
        self.adaptive = adaptive
        self._shared = _checked_shared(shared, num_groups)
        self._temperature = group_temperatures(num_groups, strength, prices)
        size = int(self._shared.max()) + 1
        p = initial_vector("drop probability", initial, size)
        if not bool(((p > 0) & (p < 1)).all()):
            raise RecipeError(
                f"expected a drop probability between 0 and 1, both excluded, got {initial}: at 0 or 1 a group is "
                "decided before any data are seen; begin at 0.1, say."
            )
        self._logits = torch.logit(p).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        self._first, self._second = torch.zeros_like(p), torch.zeros_like(p)

    def __repr__(self) -> str:
        return (
            f"VariationalDropout({self.num_groups} groups, l^2 {self.length_scale:g}, strength {self.strength:g}, "
            f"{self.num_updates} updates, {int(self.keep().sum())} of {self.num_groups} kept)"
        )

    @property
    def drop_probability(self) -> Tensor:
        """Drop probability p of shape ``[G]``."""
        return torch.sigmoid(self._logits)[self._shared]

    @property
    def mean(self) -> Tensor:
        """Expected switches 1 - p, of shape ``[G]``."""
        return self.relevance

    @property
    def relevance(self) -> Tensor:
        """Probability 1 - p that a group is on, of shape ``[G]``."""
        return torch.sigmoid(-self._logits)[self._shared]

    @property
    def penalty(self) -> Tensor:
        """Weights T l^2 (1 - p)/2 of ||m_g||^2 beside a loss in nats of the whole data set, of shape ``[G]``.

        Beside a loss averaged over the data, divide by `num_data`.
        """
        weight = self.relevance if self.adaptive else torch.ones_like(self._temperature)
        return 0.5 * self._precision * self._temperature * weight

    def kl(self, energy: Tensor) -> Tensor:
        """KL of all groups in nats, times their temperatures, a scalar; see `dropout_kl`.

        Args:
            energy: ||m_g||^2 of shape ``[G]``.

        Raises:
            GroupingError: Another shape.
            NumericsError: Values that are not finite, or negative.
        """
        energy = non_negative("squared norm", vector("squared norm", energy, self.num_groups))
        entropy = bernoulli_entropy(self._logits)[self._shared]
        return (self.penalty * energy).sum() - (self._temperature * entropy).sum()

    def sample(self, generator: torch.Generator, num_images: int | None = None) -> Tensor:
        """Draw relaxed switches z = 1 - eps in (0, 1).

        Args:
            generator: Of the CPU.
            num_images: Draw so many, one for each image of a batch; None: one for all.

        Returns:
            Of shape ``[G]``, or ``[num_images, G]``.
        """
        shape = (self.num_groups,) if num_images is None else (num_images, self.num_groups)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return concrete_sample(-self._logits[self._shared], self.tau, uniform)

    def update_(
        self, switches: Tensor, gradient: Tensor, /, energy: Tensor | None = None, *, lr: float | None = None
    ) -> None:
        """One step of Adam on the log-odds of p.

        Args:
            switches: What `sample` drew, of shape ``[G]`` or ``[B, G]``.
            gradient: d(mean loss of the batch)/dz at them, of the same shape, nats per image.
            energy: ||m_g||^2 of shape ``[G]``; None: 0, the weights' part of the KL says nothing about p.
            lr: Rate of this step; None: `lr`.

        Raises:
            GroupingError: Shapes that do not fit.
            NumericsError: Values that are not finite, switches outside [0, 1], or negative squared norms.
            RecipeError: A rate that is not positive and finite.
        """
        rate = self.lr if lr is None else positive("lr", lr)
        gradient = self._measured("gradient", gradient)
        z = self._measured("draw of the switches", switches)
        if z.shape != gradient.shape:
            raise GroupingError(
                f"expected switches and gradient of one shape, got {list(z.shape)} and {list(gradient.shape)}: "
                "pass the draw that the gradient was taken at."
            )
        if not bool(((z >= 0) & (z <= 1)).all()):
            raise NumericsError(
                "expected switches within [0, 1], got others: pass what sample() drew for this step."
            )
        # z = sigmoid(-(logits + noise)/tau), so dz/dlogits needs nothing but z.
        data = (gradient * z * (1 - z) / -self.tau).reshape(-1, self.num_groups).sum(0)
        logits = self._logits[self._shared]
        p = torch.sigmoid(logits)
        slope = logits.clone()
        if energy is not None and self.adaptive:
            squared = non_negative("squared norm", vector("squared norm", energy, self.num_groups))
            slope -= 0.5 * self._precision * squared
        total = data + self._temperature * p * (1 - p) * slope / self.num_data
        self._step_(torch.zeros_like(self._logits).index_add_(0, self._shared, total), rate)

    def survives(self) -> Tensor:
        """T times the odds (1 - p)/p of being kept, of shape ``[G]``: above T iff p < 1/2.

        It orders groups at any T; how many nats a group is worth is log-odds times T, plus its part of the KL.
        """
        return self.strength * torch.exp(-self._logits)[self._shared]

    def sample_survival(self, generator: torch.Generator) -> Tensor:
        """T times the odds, with the noise of one draw: above T with probability 1 - p. Of shape ``[G]``.

        Args:
            generator: Of the CPU.
        """
        uniform = torch.rand(self.num_groups, generator=generator, dtype=torch.float64)
        return self.strength * torch.exp(logistic(uniform) - self._logits[self._shared])

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on: float64 copies of shape ``[P]``, and numbers."""
        return {
            **self._options(),
            "strength": self.strength,
            "num_updates": self.num_updates,
            "logits": self._logits.clone(),
            "first": self._first.clone(),
            "second": self._second.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; a refused one leaves the posterior as it was.

        Args:
            state: What `state_dict` of a posterior with the same options returned.

        Raises:
            RunError: Keys, options, shapes or values that cannot have come from such a posterior; a drop probability
                of 0 or 1 among them.
        """
        vectors = ("logits", "first", "second")
        check_keys(state, {*self._options(), "strength", "num_updates", *vectors})
        check_same(state, self._options())
        strength, num_updates = loaded_strength(state)
        size = len(self._logits)
        logits = loaded_vector("logits", state["logits"], size, signed=True)
        if bool((logits.abs() > LARGEST_LOGIT).any()):
            raise RunError(
                f"expected log-odds within +-{LARGEST_LOGIT:g} in 'logits' of the posterior state, got drop "
                "probabilities of 0 or 1: start from another checkpoint."
            )
        first = loaded_vector("first", state["first"], size, signed=True)
        second = loaded_vector("second", state["second"], size)
        self._logits, self._first, self._second = logits, first, second
        self._temperature = self._temperature * (strength / self.strength)
        self.strength, self.num_updates = strength, num_updates

    def _options(self) -> dict[str, float | bool]:
        return {
            "num_data": self.num_data,
            "length_scale": self.length_scale,
            "tau": self.tau,
            "adaptive": self.adaptive,
        }

    def _step_(self, gradient: Tensor, rate: float) -> None:
        """Adam (Kingma and Ba, 2015), algorithm 1. Scale-free: no unit of the gradient matters."""
        self.num_updates += 1
        first, second = BETAS
        self._first = first * self._first + (1 - first) * gradient
        self._second = second * self._second + (1 - second) * gradient.square()
        mean = self._first / (1 - first**self.num_updates)
        scale = (self._second / (1 - second**self.num_updates)).sqrt()
        step = torch.where(scale > 0, mean / scale.clamp(min=1e-300), 0.0)
        self._logits = (self._logits - rate * step).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)


def _checked_shared(shared: Tensor | None, num_groups: int) -> Tensor:
    """The probability that each group uses: int64 of shape ``[G]``, without gaps."""
    if shared is None:
        return torch.arange(num_groups)
    shared = shared.detach().cpu()
    numbers = torch.unique(shared)
    whole = not shared.is_floating_point() and shared.dtype != torch.bool
    if shared.shape != (num_groups,) or not whole or not torch.equal(numbers, torch.arange(len(numbers))):
        raise GroupingError(
            f"expected the number 0, 1, ... of each group's probability, {num_groups} whole numbers without gaps, "
            f"got shape {list(shared.shape)}: number the layers or kernel sizes that share one."
        )
    return shared.long()
