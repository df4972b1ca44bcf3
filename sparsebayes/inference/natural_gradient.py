"""Natural-gradient variational inference: a Gaussian over switches or architecture logits, learned in ordinary steps.

Zhang et al., "BaLeNAS: Differentiable architecture search via the Bayesian learning rule", CVPR 2022, arXiv 2111.13204,
puts a mean-field Gaussian q(z) = N(mu, 1/(N s + delta)) on architecture weights. Each training step draws z from q,
takes the gradient g of the mean loss there, and updates

    vadam   m <- b1 m + (1 - b1)(g + delta/N mu)              s <- b2 s + (1 - b2) g^2
            mu <- mu - lr m^/(sqrt(v^) + delta/N)             v <- b2 v + (1 - b2) g^2  (Khan et al., ICML 2018)
    ivon    f = eps g sqrt(N) sqrt(s + delta/N)               m <- b1 m + (1 - b1) g
            s <- b2 s + (1 - b2) f + (1 - b2)^2 (s - f)^2/(2 (s + delta/N))
            mu <- mu - lr (m^ + delta/N mu)/(s + delta/N)     (Shen et al., ICML 2024, algorithm 1)

with eps the noise of the draw, and ^ over 1 - b^t. That correction is for an average that begins at 0, as m and v do; s
begins at the initial precision (printed as s^ in both places, which makes the first steps far too short). N is divided
by the temperature T. Both settle at the posterior mean. The variance of "vadam" is right where g^2 stands for the mean
squared gradient of *single* images: pass gradients per image, ``[B, G]``, or say how many images one gradient averages;
the square of a mean over B images, as printed, understates s about B-fold. "ivon" needs neither.

    >>> posterior = NaturalGradient(14 * 8, num_data=25000, mean=1e-3 * torch.randn(112))    # architecture logits
    >>> logits = posterior.sample(generator)
    >>> posterior.update_(logits, gradient)
    >>> posterior.mean, posterior.precision

What was not to be read of the paper is our own choice: prior precision, initial precision, N, rates and their defaults.
Over group switches it is an evidence rule whose curvature comes with training: N s is the curvature of the loss of the
whole data set in z, and a group stays iff mu^2 N s > T, as for `Laplace`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from sparsebayes.errors import GroupingError, RecipeError, RunError, unknown
from sparsebayes.groups.hierarchy import Hierarchy
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

__all__ = ["NaturalGradient"]

UPDATES = ("vadam", "ivon")


@final
class NaturalGradient(Posterior):
    """Mean and precision of G switches or logits, learned from gradients at draws.

    Args:
        num_groups: G, at least 1.
        num_data: N, images that the mean loss speaks of.
        update: "vadam" or "ivon".
        mean: mu to begin with, one or one per group: 1 for switches, about 0 for logits.
        prior_precision: delta of the prior N(0, 1/delta).
        initial_precision: Of q to begin with, at least ``prior_precision``; 1/sqrt of it is the first noise.
        lr: Learning rate of the mean.
        betas: Decay rates (b1, b2) of gradient and curvature, in [0, 1).
        hierarchy: Which groups need which others; None for independent groups.
        strength: Temperature T: the data count 1/T-fold; larger explores more and removes more.
        prices: Cost of each group relative to the mean group, ``[G]``; group g gets the temperature T * price.

    Raises:
        GroupingError: ``num_groups`` < 1, or means that do not fit it.
        RecipeError: An unknown update, or an option out of its range: precisions must be positive.
        NumericsError: Prices that are not positive, or means that are not finite.
    """

    penalty_order = 2

    def __init__(
        self,
        num_groups: int,
        *,
        num_data: int,
        update: str = "vadam",
        mean: float | Tensor = 1.0,
        prior_precision: float = 1.0,
        initial_precision: float = 100.0,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        hierarchy: Hierarchy | None = None,
        strength: float = 1.0,
        prices: Tensor | None = None,
    ) -> None:
        super().__init__(num_groups, hierarchy=hierarchy, strength=strength)
        if update not in UPDATES:
            raise RecipeError(unknown("update", update, UPDATES))
        if not all(0 <= beta < 1 for beta in betas):
            raise RecipeError(f"expected decay rates in [0, 1), got {betas}: 0.9 and 0.999 are usual.")
        self.num_data = positive("num_data", num_data)
        self.update = update
        self.prior_precision = positive("prior precision", prior_precision)
        self.lr = positive("lr", lr)
        self.betas = betas
        excess = positive("initial precision", initial_precision) - self.prior_precision
        if excess < 0:
            raise RecipeError(
                f"expected an initial precision of at least the prior precision {prior_precision}, got "
                f"{initial_precision}: data only add precision; lower prior_precision or raise the other."
            )
        self._temperature = group_temperatures(num_groups, strength, prices)
        self._mean = initial_vector("mean", mean, num_groups)
        self._momentum = torch.zeros_like(self._mean)
        self._square = torch.zeros_like(self._mean)  # v, of vadam
        self._curvature = excess / self._count  # s, per image

    def __repr__(self) -> str:
        return (
            f"NaturalGradient({self.num_groups} groups, {self.update}, strength {self.strength:g}, "
            f"{self.num_updates} updates, noise {self.noise:.3g})"
        )

    @property
    def mean(self) -> Tensor:
        """Mean mu of shape ``[G]``."""
        return self._mean.clone()

    @property
    def precision(self) -> Tensor:
        """Posterior precision N s/T_g + delta of shape ``[G]``."""
        return self._count * self._curvature + self.prior_precision

    @property
    def curvature(self) -> Tensor:
        """N s: curvature of the loss of the whole data set in each switch, nats, of shape ``[G]``."""
        return self.num_data * self._curvature

    @property
    def noise(self) -> float:
        """Root mean square of the standard deviations 1/sqrt(precision): how widely draws explore."""
        return float(self.precision.reciprocal().mean().sqrt())

    @property
    def curvature_trace(self) -> float:
        """Trace of the Hessian of the loss of the whole data set in the switches, as learned: the sum of N s, nats."""
        return float(self.curvature.sum())

    @property
    def evidence(self) -> Tensor:
        """Evidence mu^2 N s/T_g of shape ``[G]``; a group pays for itself iff it exceeds 1."""
        return self._mean.square() * self._count * self._curvature.clamp(min=0)

    @property
    def penalty(self) -> Tensor:
        """Weights T delta/2 of z^2 beside a loss in nats of the whole data set, of shape ``[G]``.

        `update_` applies them to the mean already; they are here to be reported, and for losses to be complete.
        """
        return 0.5 * self.prior_precision * self._temperature

    @property
    def relevance(self) -> Tensor:
        """Share 1 - 1/evidence that the data determine at the variance which evidence prefers, in [0, 1], ``[G]``."""
        return (1 - 1 / self.evidence.clamp(min=1.0)).clamp(min=0.0)

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw switches from q, of shape ``[G]``.

        Args:
            generator: Of the CPU.
        """
        noise = torch.randn(self.num_groups, generator=generator, dtype=torch.float64)
        return self._mean + noise / self.precision.sqrt()

    def update_(
        self, switches: Tensor, gradient: Tensor, /, *, lr: float | None = None, num_images: int = 1
    ) -> None:
        """One step on mean and curvature.

        Args:
            switches: What `sample` drew, of shape ``[G]``.
            gradient: d(mean loss of the batch)/dz there, nats per image: ``[G]``, or ``[B, G]`` split into the parts
                that the images contribute (their sum is the gradient), from which "vadam" takes the squared gradients
                of single images.
            lr: Rate of this step; None: `lr`.
            num_images: Images that a gradient ``[G]`` averages: its square counts so many times. 1 is the printed form.

        Raises:
            GroupingError: Shapes that do not fit.
            NumericsError: Values that are not finite.
            RecipeError: A rate or a number of images that is not positive and finite.
        """
        rate = self.lr if lr is None else positive("lr", lr)
        images = positive("number of images", num_images)
        z = self._measured("draw of the switches", switches)
        parts = self._measured("gradient", gradient)
        if z.ndim != 1:
            raise GroupingError(
                f"expected one draw of the switches for the whole batch, got shape {list(z.shape)}: this posterior "
                "draws once per step."
            )
        if parts.ndim == 2:
            # A part is 1/B of the gradient of its image, so the mean square over the images is B times the sum.
            total, square = parts.sum(0), len(parts) * parts.square().sum(0)
        else:
            total, square = parts, images * parts.square()
        self.num_updates += 1
        if self.update == "vadam":
            self._vadam_(total, square, rate)
        else:
            self._ivon_(z, total, rate)

    def survives(self) -> Tensor:
        """Strength up to which each group stays: mu^2 N s over its price, of shape ``[G]``."""
        return self.evidence * self.strength

    def sample_survival(self, generator: torch.Generator) -> Tensor:
        """`survives` at switches drawn by `sample`, of shape ``[G]``.

        Args:
            generator: Of the CPU.
        """
        return self.sample(generator).square() * self._count * self._curvature.clamp(min=0) * self.strength

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on: float64 copies of shape ``[G]``, numbers and names."""
        return {
            **self._options(),
            "strength": self.strength,
            "num_updates": self.num_updates,
            "mean": self._mean.clone(),
            "momentum": self._momentum.clone(),
            "square": self._square.clone(),
            "curvature": self._curvature.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; a refused one leaves the posterior as it was.

        Args:
            state: What `state_dict` of a posterior with the same options returned.

        Raises:
            RunError: Keys, options, shapes or values that cannot have come from such a posterior.
        """
        vectors = ("mean", "momentum", "square", "curvature")
        check_keys(state, {*self._options(), "strength", "num_updates", *vectors})
        check_same(state, self._options())
        strength, num_updates = loaded_strength(state)
        mean = loaded_vector("mean", state["mean"], self.num_groups, signed=True)
        momentum = loaded_vector("momentum", state["momentum"], self.num_groups, signed=True)
        square = loaded_vector("square", state["square"], self.num_groups)
        curvature = loaded_vector("curvature", state["curvature"], self.num_groups, signed=True)
        temperature = self._temperature * (strength / self.strength)
        if not bool((self.num_data / temperature * curvature + self.prior_precision > 0).all()):
            raise RunError(
                "expected a posterior state with positive precisions, got others: start from another checkpoint."
            )
        self._mean, self._momentum, self._square, self._curvature = mean, momentum, square, curvature
        self._temperature = temperature
        self.strength, self.num_updates = strength, num_updates

    @property
    def _count(self) -> Tensor:
        """N/T_g: images that the data count for, of shape ``[G]``."""
        return self.num_data / self._temperature

    def _options(self) -> dict[str, object]:
        return {
            "update": self.update,
            "num_data": self.num_data,
            "prior_precision": self.prior_precision,
        }

    def _vadam_(self, gradient: Tensor, square: Tensor, rate: float) -> None:
        first, second = self.betas
        prior = self.prior_precision / self._count
        self._momentum = first * self._momentum + (1 - first) * (gradient + prior * self._mean)
        self._curvature = second * self._curvature + (1 - second) * square
        self._square = second * self._square + (1 - second) * square
        mean = self._momentum / (1 - first**self.num_updates)
        scale = (self._square / (1 - second**self.num_updates)).sqrt() + prior
        self._mean = self._mean - rate * mean / scale

    def _ivon_(self, switches: Tensor, gradient: Tensor, rate: float) -> None:
        first, second = self.betas
        prior = self.prior_precision / self._count
        # Stein's identity: E[g (z - mu)]/variance is the mean curvature, whatever the size of a batch.
        estimate = gradient * (switches - self._mean) * self.precision
        self._momentum = first * self._momentum + (1 - first) * gradient
        change = self._curvature - estimate
        # The last term keeps s + delta/N positive (Riemannian retraction).
        correction = 0.5 * (1 - second) ** 2 * change.square() / (self._curvature + prior)
        self._curvature = second * self._curvature + (1 - second) * estimate + correction
        mean = self._momentum / (1 - first**self.num_updates)
        self._mean = self._mean - rate * (mean + prior * self._mean) / (self._curvature + prior)
