"""What a recipe may say of the posteriors that are learned along with the weights, and of sampling from them."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from sparsebayes.recipe.base import Rate, Section

__all__ = [
    "ArchitectureSamplingSection",
    "DropoutSection",
    "GaussianSection",
    "LogitGaussianSection",
    "OperationDropoutSection",
    "SamplingSection",
]

Passes: TypeAlias = Annotated[int, Field(ge=1, le=100_000)]
"""At least one: what is learned in none says nothing of any group."""
InitialPrecision: TypeAlias = Annotated[float, Field(gt=0, le=1e12)]
CurvatureDecay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class _DropoutKeys(Section):
    """What variational dropout takes in compressions and in searches; never a section itself."""

    tau: float = Field(default=0.2, gt=0, le=10, description="Temperature of the binary concrete relaxation.")
    initial: float = Field(default=0.1, gt=0, lt=1, description="Drop probability to begin with.")
    lr: Rate = Field(
        default=0.02, description="Learning rate of the log-odds of dropping (Adam; our choice)."
    )
    adaptive: bool = Field(
        default=True,
        description="Weigh the L2 term, in a search the weight decay of an operation, by the probability of being "
        "kept; false: constant L2, a baseline.",
    )


class _GaussianKeys(Section):
    """What natural gradients take in compressions and in searches; never a section itself."""

    update: Literal["vadam", "ivon"] = Field(default="vadam", description="Form of the update.")
    lr: Rate = Field(default=0.01, description="Learning rate of the mean.")
    prior_precision: float = Field(default=1.0, gt=0, le=1e9, description="Precision of the prior.")
    initial_precision: InitialPrecision = Field(
        default=100.0,
        description="Precision to begin with, at least the prior's; 1/sqrt of it is the first noise.",
    )
    gradient_decay: float = Field(default=0.9, ge=0, lt=1, description="Decay rate of the averaged gradient.")
    curvature_decay: CurvatureDecay = Field(default=0.99, description="Decay rate of the averaged curvature.")


class DropoutSection(_DropoutKeys):
    """Variational dropout of groups (PGNAS); for posterior: variational_dropout. train.weight_decay gives way to it."""

    epochs: Passes = Field(
        default=1, description="Passes over the training images with groups dropped, before each removal."
    )
    length_scale: float = Field(
        default=50.0,
        gt=0,
        le=1e9,
        description="l^2, precision of the prior on weights; larger drops more. The paper takes 0.1 to 2500.",
    )
    relative: bool = Field(
        default=True,
        description="Take l^2 per mean squared norm of a layer's groups: l^2/2 nats for an average group of any layer; "
        "false: one absolute l^2, as in the paper.",
    )


class GaussianSection(_GaussianKeys):
    """A Gaussian over switches by natural gradients (BaLeNAS); for posterior: natural_gradient. Defaults are ours."""

    epochs: Passes = Field(
        default=1, description="Passes over the training images with drawn switches, before each removal."
    )


class SamplingSection(Section):
    """Posterior-guided sampling: sub-networks drawn from the posterior, with their weights; the best one is cut out."""

    count: int = Field(
        default=1,
        ge=1,
        le=100_000,
        description="Sub-networks judged on held-out images at each removal; 1: the posterior's own decision.",
    )
    baseline: bool = Field(
        default=False,
        description="Judge as many random sub-networks of the same widths, for comparison only.",
    )
    norm_batches: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="Training batches that batch norm is estimated anew on for each; 0: as trained.",
    )


class OperationDropoutSection(_DropoutKeys):
    """Variational dropout of operations (PGNAS), in a search; for posterior: variational_dropout."""

    length_scale: float = Field(
        default=50.0,
        gt=0,
        le=1e9,
        description="l^2: an operation stays where it saves more than l^2/2 nats, times search.strength, for each of "
        "the cells that share it. Ours: the paper's l^2 is the precision of the prior on weights.",
    )


class LogitGaussianSection(_GaussianKeys):
    """A Gaussian over architecture logits (BaLeNAS), in a search; for posterior: natural_gradient. Defaults are ours.

    N of its updates is the number of images that the weights learn from, and the temperature is search.strength.
    """

    initial_precision: InitialPrecision = Field(
        default=10.0,
        description="Precision to begin with, at least the prior's; 1/sqrt of it is the first noise.",
    )
    curvature_decay: CurvatureDecay = Field(
        default=0.999, description="Decay rate of the averaged curvature."
    )


class ArchitectureSamplingSection(Section):
    """Architectures compared when the supernet is trained; the posterior's own is always one of them.

    natural_gradient and variational_dropout draw them; laplace and baseline magnitude take those of the highest scores.
    Proxies judge fresh networks (BaLeNAS-TF): the best mean rank wins. Held-out loss is that with the supernet's
    weights: the lowest wins for variational_dropout (PGNAS); for the others one that is better than their own by more
    than two standard errors. Baselines darts and random have one decision only.
    """

    count: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Architectures to choose among; 1: the method's own decision, for natural_gradient the argmax of "
        "the mean. null: 50 for variational_dropout, else 1.",
    )
    judge: Literal["auto", "heldout", "proxies"] = Field(
        default="auto",
        description="What compares them; auto: proxies for natural_gradient, held-out loss for the others.",
    )
    proxies: Annotated[
        tuple[Literal["posterior", "synflow", "naswot", "grad_norm", "params"], ...],
        Field(strict=False, min_length=1),
    ] = Field(
        default=("synflow", "naswot"),
        description="Scores whose mean rank decides where proxies judge: of untrained networks, and posterior, the sum "
        "of what the search found the operations to be worth.",
    )
    proxy_images: int = Field(
        default=32, ge=2, le=1024, description="Training images that the proxies see, one batch."
    )
    baseline: bool = Field(
        default=True,
        description="Judge as many random architectures of as many operations by held-out loss, for comparison only.",
    )
    norm_batches: int = Field(
        default=0,
        ge=0,
        le=10_000,
        description="Training batches that batch norm is estimated anew on for each; 0: as trained.",
    )
