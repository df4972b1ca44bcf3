"""What every posterior over group switches can do: the contract of this folder's three final classes.

A network's groups g = 1..G each carry a switch z_g. A posterior says what is believed of the switches, and is carried
from update to update:

    switches = posterior.sample(generator)           # [G]: run the network with its groups scaled by these
    posterior.update_(switches, measured)            # what was measured there: a curvature, or a gradient
    posterior.penalty                                # [G]: what holds the magnitudes down until the next update
    posterior.keep(), posterior.relevance            # [G]: the decision, and how sure it is
    posterior.draw(generator)                        # [G]: a sub-network drawn from the posterior

| class                | update_ takes                                | switches are        |
| -------------------- | -------------------------------------------- | ------------------- |
| `Laplace`            | curvature, nats of the whole data set        | Gaussian, at a mode |
| `VariationalDropout` | gradient of the mean loss, nats per image    | on or off           |
| `NaturalGradient`    | gradient of the mean loss, nats per image    | Gaussian            |

All vectors are float64 on the CPU, whatever the device of the network, and a random draw takes the caller's generator:
a resumed run repeats the same numbers on any device. Symbols: `sparsebayes.inference.prior`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsebayes.errors import GroupingError, NumericsError, RecipeError, RunError
from sparsebayes.groups.hierarchy import Hierarchy
from sparsebayes.inference.checks import finite

__all__ = ["Posterior"]


class Posterior(ABC):
    """What is believed of G switches.

    Args:
        num_groups: G, at least 1.
        hierarchy: Which groups need which others; None for independent groups.
        strength: Temperature T, positive; 1 is plain Bayes for the data set that is spoken of.

    Attributes:
        num_groups: G.
        hierarchy: As given.
        strength: T of the last update.
        num_updates: Updates taken in.
        penalty_order: Power of a group's magnitude that `penalty` weighs: 1 for |z| or ||w_g||, 2 for their squares.

    Raises:
        GroupingError: ``num_groups`` < 1, or it is not the hierarchy's.
        RecipeError: A strength that is not positive and finite.
    """

    penalty_order: ClassVar[int]

    def __init__(self, num_groups: int, *, hierarchy: Hierarchy | None = None, strength: float = 1.0) -> None:
        if num_groups < 1:
            raise GroupingError(
                f"expected at least one group, got {num_groups}: choose a grouping that matches a layer."
            )
        if hierarchy is not None and hierarchy.num_groups != num_groups:
            raise GroupingError(
                f"expected a hierarchy over {num_groups} groups, got one over {hierarchy.num_groups}: build "
                "it from the same grouping."
            )
        self.num_groups = num_groups
        self.hierarchy = hierarchy
        self.strength = positive("strength", strength)
        self.num_updates = 0

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw the switches z to run the network with, of shape ``[G]``.

        Args:
            generator: Of the CPU.
        """

    @abstractmethod
    def update_(self, switches: Tensor, measured: Tensor, /) -> None:
        """Take in what was measured at some switches; a refused update leaves the posterior as it was.

        Args:
            switches: Where it was measured, of shape ``[G]``.
            measured: The curvature or gradient that the class asks for, of shape ``[G]``.

        Raises:
            GroupingError: Shapes that do not fit.
            NumericsError: Values that are not finite.
        """

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Expected switches, to judge the network by before anything is decided; of shape ``[G]``."""

    @property
    @abstractmethod
    def penalty(self) -> Tensor:
        """Weight of each group's magnitude, to the power `penalty_order`, of shape ``[G]``.

        It belongs beside a loss in nats of the *whole data set*; beside a loss averaged over the data, divide by their
        number.
        """

    @property
    @abstractmethod
    def relevance(self) -> Tensor:
        """How much a group is needed, in [0, 1], of shape ``[G]``."""

    @abstractmethod
    def survives(self) -> Tensor:
        """Strength up to which each group stays, of shape ``[G]``, dependencies left out; `keep` compares it with T."""

    @abstractmethod
    def sample_survival(self, generator: torch.Generator) -> Tensor:
        """`survives` for one draw of the switches instead of for what is believed on the whole, of shape ``[G]``.

        Thresholds at T give `draw`; a threshold that meets a size gives a sub-network of that size.

        Args:
            generator: Of the CPU.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on: float64 copies, numbers and names."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; a refused one leaves the posterior as it was.

        Args:
            state: What `state_dict` of a posterior with the same options returned.

        Raises:
            RunError: A state that cannot have come from such a posterior.
        """

    def keep(self) -> Tensor:
        """Which groups stay: bool of shape ``[G]``. Groups that lost what they need follow.

        The decision itself; `sparsebayes.prune.select` makes a selection of it, within bounds for every layer.
        """
        return self._closed(self.survives() > self.strength)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Which groups are on in a sub-network drawn from the posterior: bool of shape ``[G]``.

        Args:
            generator: Of the CPU.
        """
        return self._closed(self.sample_survival(generator) > self.strength)

    def _closed(self, on: Tensor) -> Tensor:
        return on if self.hierarchy is None else self.hierarchy.close(on)

    def _require_update(self) -> None:
        if self.num_updates == 0:
            raise RunError(
                "expected a posterior with at least one update, got a new one: call update_ first."
            )

    def _measured(self, name: str, values: Tensor) -> Tensor:
        """Check numbers per group, or per image and group: float64 on the CPU, ``[G]`` or ``[B, G]``."""
        if values.ndim not in (1, 2) or values.shape[-1] != self.num_groups or 0 in values.shape:
            raise GroupingError(
                f"expected a {name} of shape [{self.num_groups}] or [images, {self.num_groups}], got "
                f"{list(values.shape)}: reduce it with the grouping that this posterior was made for."
            )
        return finite(name, values)


def positive(name: str, value: float) -> float:
    """Check an option that must be positive and finite.

    Raises:
        RecipeError: It is not.
    """
    if not (math.isfinite(value) and value > 0):
        hint = "1 is plain Bayes, more removes more" if name == "strength" else "choose a number above 0"
        raise RecipeError(f"expected a positive finite {name}, got {value}: {hint}.")
    return float(value)


def check_keys(state: Mapping[str, Any], expected: Collection[str]) -> None:
    """Refuse a state with other keys.

    Raises:
        RunError: Keys are missing or unknown.
    """
    if set(state) != set(expected):
        raise RunError(
            f"expected a posterior state with the keys {sorted(expected)}, got {sorted(state)}: load a "
            "state that this version saved."
        )


def check_same(state: Mapping[str, Any], mine: Mapping[str, object]) -> None:
    """Refuse a state that was made with other options.

    Raises:
        RunError: An option differs.
    """
    for name, value in mine.items():
        if state[name] != value:
            raise RunError(
                f"expected a posterior state with {name} {value!r}, got {state[name]!r}: resume with the "
                "recipe that made it."
            )


def loaded_strength(state: Mapping[str, Any]) -> tuple[float, int]:
    """Strength and number of updates of a state.

    Raises:
        RunError: They cannot be such.
    """
    strength, num_updates = state["strength"], state["num_updates"]
    if not (isinstance(strength, float) and 0 < strength < float("inf")):
        raise RunError(
            f"expected a positive finite strength in the posterior state, got {strength!r}: start from "
            "another checkpoint."
        )
    if not (isinstance(num_updates, int) and num_updates >= 0):
        raise RunError(
            f"expected a count of updates in the posterior state, got {num_updates!r}: start from "
            "another checkpoint."
        )
    return strength, num_updates


def loaded_vector(name: str, values: object, size: int, *, signed: bool = False) -> Tensor:
    """A vector of a state, as a float64 copy on the CPU.

    Args:
        name: Its key.
        values: What the state holds.
        size: Numbers that it must have.
        signed: Whether numbers below 0 can be right.

    Raises:
        RunError: Another shape, or values that cannot be right.
    """
    if not isinstance(values, Tensor) or values.shape != (size,):
        came = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise RunError(
            f"expected {name!r} of the posterior state with shape [{size}], got {came}: the "
            "state belongs to another grouping."
        )
    loaded = values.detach().to("cpu", torch.float64, copy=True)
    if not bool((torch.isfinite(loaded) & (signed | (loaded >= 0))).all()):
        raise RunError(
            f"expected finite values{'' if signed else ' >= 0'} in {name!r} of the posterior state, got others: "
            "start from another checkpoint."
        )
    return loaded


def initial_vector(name: str, value: float | Tensor, size: int) -> Tensor:
    """One starting value for all, or one for each: float64 of shape ``[size]`` on the CPU.

    Raises:
        GroupingError: Another number of values.
        NumericsError: A value that is not finite.
    """
    values = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if values.ndim and values.shape != (size,):
        raise GroupingError(
            f"expected one {name}, or {size} of them, got shape {list(values.shape)}: pass one number per group."
        )
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(f"expected a finite {name}, got {value}: choose ordinary numbers.")
    return values.expand(size).clone()
