"""The Laplace posterior over group switches: which groups the data pay for.

Zhou et al., "BayesNAS", ICML 2019, arXiv 1905.04919, Algorithm 1; symbols: `sparsebayes.inference.prior`.
Between two updates the caller trains the network under the penalty; at an update it measures every group's
switch z and curvature h, and gets the next penalty and the decision.

    >>> posterior = Laplace(3)
    >>> posterior.update_(torch.ones(3), torch.tensor([0.0, 0.5, 40.0]))  # z = 1, h of the whole data set
    >>> posterior.keep()
    tensor([False, False,  True])
    >>> posterior
    Laplace(3 groups, switches, reweighted, strength 1, 1 updates, 1 of 3 kept)

**Coordinates.** z and h must be measured in the same coordinate. A switch that is absorbed into the weights
may be called 1 again at every update (h is then the curvature in a relative change of the group): at rest z
no longer moves, so the fixed points are those of a fixed coordinate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, final

import torch
from torch import Tensor

from sparsebayes.errors import GroupingError, RecipeError, unknown
from sparsebayes.groups.grouping import Grouping
from sparsebayes.groups.hierarchy import Hierarchy
from sparsebayes.inference import updates
from sparsebayes.inference.checks import finite, non_negative, vector
from sparsebayes.inference.posterior import (
    Posterior,
    check_keys,
    check_same,
    loaded_strength,
    loaded_vector,
)
from sparsebayes.inference.prior import ENTROPY_THRESHOLD, effective_variance, entropy, group_temperatures

NEGLIGIBLE = 1e-6
"""Evidence at or below which a group is dead: without it the tempered loss changes by < 1e-6 nats."""

SCALES = ("switches", "entries")
UPDATES = ("reweighted", "mackay")


@dataclass(frozen=True, eq=False)
class _State:
    """Float64 vectors of shape ``[G]``, replaced as a whole: a refusal half-way changes nothing."""

    own: Tensor  # s
    omega: Tensor  # of the last update
    energy: Tensor  # z^2/m
    curvature: Tensor  # h/T_g; with entries the mean over the group
    size: Tensor  # m
    temperature: Tensor  # T_g


@final
class Laplace(Posterior):
    """Prior variances, penalty and decision for G groups, carried from update to update.

    All vectors are float64 on the CPU, whatever the device of the network, so that a resumed run repeats the
    same numbers. The state is the own variance s; dependencies enter through gamma, which is derived from it.

    Args:
        num_groups: G, at least 1.
        hierarchy: which groups need which others; None for independent groups.
        scale: "switches": one number per group, its switch, with that switch's curvature. "entries": the
            paper's form for network weights, a diagonal curvature entry by entry, and one gamma per group.
        update: "reweighted" (eqs. 17-19 in the paper's order: the penalty belongs to the variances before the
            update) or "mackay" (the penalty belongs to those after it, since in the paper's order that
            iteration need not settle; a group that reached variance 0 stays off). Both rest at the same
            variances when there is no hierarchy.
        strength: temperature T; T = 1 is plain Bayes for the data set that the curvature speaks of.

    Raises:
        GroupingError: ``num_groups`` < 1, or it is not the hierarchy's.
        RecipeError: unknown ``scale`` or ``update``, or a strength that is not positive and finite.
    """

    penalty_order = 1

    def __init__(
        self,
        num_groups: int,
        *,
        hierarchy: Hierarchy | None = None,
        scale: str = "switches",
        update: str = "reweighted",
        strength: float = 1.0,
    ) -> None:
        super().__init__(num_groups, hierarchy=hierarchy, strength=strength)
        if scale not in SCALES:
            raise RecipeError(unknown("scale", scale, SCALES))
        if update not in UPDATES:
            raise RecipeError(unknown("update", update, UPDATES))
        self.scale = scale
        self.update = update
        temperature = group_temperatures(num_groups, strength, None)
        ones, zeros = torch.ones_like(temperature), torch.zeros_like(temperature)
        # Algorithm 1 starts from gamma = omega = 1. MacKay's update cannot revive what a penalty chosen
        # without any curvature has removed, so it starts without one.
        omega = ones if update == "reweighted" else zeros
        self._state = _State(ones, omega, energy=zeros, curvature=zeros, size=ones, temperature=temperature)

    def __repr__(self) -> str:
        kept = f", {int(self.keep().sum())} of {self.num_groups} kept" if self.num_updates else ""
        return (
            f"Laplace({self.num_groups} groups, {self.scale}, {self.update}, strength {self.strength:g}, "
            f"{self.num_updates} updates{kept})"
        )

    def update_(
        self,
        magnitude: Tensor,
        curvature: Tensor | Mapping[str, Tensor],
        *,
        grouping: Grouping | None = None,
        strength: float | None = None,
        prices: Tensor | None = None,
    ) -> None:
        """Take in what was measured and move on to the next penalty.

        A refused update leaves the posterior as it was.

        Args:
            magnitude: z of shape ``[G]``, any sign; with `scale="entries"` the norms ||w_g||.
            curvature: h of shape ``[G]``, nats of the whole data set; with `scale="entries"` parameter name
                to H_i, parameter-shaped.
            grouping: which entries form which group; for `scale="entries"`, and only there.
            strength: new temperature T, kept for later updates; None keeps the present one.
            prices: cost of each group relative to the mean group, of shape ``[G]``; None: all 1. Group g gets
                the temperature T * price; an entry in several groups the mean of theirs.

        Raises:
            GroupingError: wrong number of groups, a grouping where none belongs or none where one does, or
                entries that do not fit it.
            NumericsError: a magnitude or curvature that is not finite, a negative curvature, bad prices.
            RecipeError: a strength that is not positive and finite.
        """
        strength = self.strength if strength is None else strength
        temperature = group_temperatures(self.num_groups, strength, prices)
        magnitude = vector("magnitude", magnitude, self.num_groups).abs()
        if self.scale == "switches" and isinstance(curvature, Tensor) and grouping is None:
            state = self._from_switches(magnitude, curvature, temperature)
        elif self.scale == "entries" and not isinstance(curvature, Tensor) and grouping is not None:
            state = self._from_entries(magnitude, curvature, grouping, temperature)
        else:
            raise GroupingError(
                "expected a curvature vector and no grouping for scale 'switches', or curvatures by "
                f"parameter name and their grouping for scale 'entries', but the scale is {self.scale!r}: "
                "pass what belongs to it."
            )
        self._state = state
        self.strength = float(strength)
        self.num_updates += 1

    @property
    def own(self) -> Tensor:
        """Own switch variances s of shape ``[G]``: the state that updates carry; 1 before the first."""
        return self._state.own.clone()

    @property
    def gamma(self) -> Tensor:
        """Prior variances of shape ``[G]``: s combined with gates and predecessors."""
        return effective_variance(self._state.own, self.hierarchy).clone()

    @property
    def omega(self) -> Tensor:
        """Weights of |z| in the tempered objective E/T + sum omega |z|, of shape ``[G]``.

        Before the first update 1 (Algorithm 1), and 0 for `update="mackay"`.
        """
        return self._state.omega.clone()

    @property
    def mean(self) -> Tensor:
        """Switches |z| as last measured, 0 where the prior variance is 0, of shape ``[G]``.

        Raises:
            RunError: before the first update.
        """
        self._require_update()
        return torch.where(self.gamma > 0, (self._state.energy * self._state.size).sqrt(), 0.0)

    @property
    def penalty(self) -> Tensor:
        """Weights T_g omega_g of |z| (of ||w_g||) beside a loss in nats of the *whole data set*; ``[G]``.

        Beside a loss averaged over the data, divide by their number.
        """
        return self._state.temperature * self._state.omega

    @property
    def evidence(self) -> Tensor:
        """Evidence e = z^2 h/T_g of shape ``[G]``; a group pays for itself iff e > 1 (Tipping and Faul).

        The criterion speaks of the value of z that the data want. Where a penalty has pulled z down to its
        rest, e is (x - 1)^2/x for the x that the data alone would give, so that the rule asks for x > 2.62:
        judge switches that were trained without the penalty, or accept the stricter rule.

        With `scale="entries"`: ||w_g||^2/m times the group's mean curvature, the same criterion for m entries
        of equal curvature.

        Raises:
            RunError: before the first update.
        """
        self._require_update()
        return self._state.energy * self._state.curvature

    @property
    def relevance(self) -> Tensor:
        """Share gamma h/(1 + gamma h) that the data determine, in [0, 1], of shape ``[G]``.

        With `scale="entries"` at the group's mean curvature.

        Raises:
            RunError: before the first update.
        """
        self._require_update()
        return updates.relevance(self._state.curvature, self.gamma)

    @property
    def optimum(self) -> Tensor:
        """Prior variances of shape ``[G]`` at which the updates would rest if z is what the data want.

        The closed forms max(z^2 - 1/h, 0) and, for entries, max(||w||^2/m - 1/h, 0), then gates and
        predecessors.

        Raises:
            RunError: before the first update.
        """
        self._require_update()
        own = updates.fixed_point(self._state.energy.sqrt(), self._state.curvature)
        return effective_variance(own, self.hierarchy)

    def keep(self, rule: str = "evidence") -> Tensor:
        """Which groups stay.

        * "evidence": iff z^2 h > T_g. Free of units and thresholds.
        * "entropy": iff `optimum` > 1/(2 pi e) = 0.0585, the paper's test of the prior's entropy on the
          variance that the updates end in. At z = 1 and T_g = 1 without a hierarchy, evidence asks for h > 1
          and entropy for h > 1/(1 - 0.0585) = 1.062: nearly the same rule. Away from z = 1 the entropy
          depends on the units of z; a switch with |z| <= 0.242 goes whatever its curvature.
        * "printed": iff `gamma` > 1/(2 pi e), step 4 of Algorithm 1 to the letter, on the variance after this
          single update. It needs switches trained under the penalty: one called 1 again at every update never
          falls below variance 1 without a hierarchy, and only dead ones go.

        A group with next to no evidence (z^2 h <= 1e-6 T_g) is off under every rule; groups that lost their
        gate or all their predecessors follow.

        Args:
            rule: one of the above.

        Returns:
            bool of shape ``[G]``.

        Raises:
            RecipeError: unknown rule.
            RunError: before the first update.
        """
        if rule not in RULES:
            raise RecipeError(unknown("rule", rule, RULES))
        self._require_update()
        return self._closed(RULES[rule](self))

    def survives(self, rule: str = "evidence") -> Tensor:
        """Strength up to which each group stays under a rule, of shape ``[G]``, dependencies left out.

        `keep` at strength T keeps a group iff this exceeds T: z^2 h for "evidence" and (z^2 - 1/(2 pi e)) h for
        "entropy", with h over the group's price. One update thus answers for every strength.

        Args:
            rule: "evidence" or "entropy".

        Raises:
            RecipeError: unknown rule.
            RunError: before the first update.
        """
        if rule not in ("evidence", "entropy"):
            raise RecipeError(unknown("rule", rule, ("evidence", "entropy")))
        self._require_update()
        energy = self._state.energy - (ENTROPY_THRESHOLD if rule == "entropy" else 0.0)
        return energy.clamp(min=0) * self._state.curvature * self.strength

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw switches from N(|z|, C), C = 1/(1/gamma + h/T_g); 0 where the prior variance is 0. Shape ``[G]``.

        With `scale="entries"` norms ||w_g||, at the group's mean curvature.

        Args:
            generator: Of the CPU.

        Raises:
            RunError: before the first update.
        """
        self._require_update()
        gamma = self.gamma
        variance = gamma / (1 + gamma * self._state.curvature)
        noise = torch.randn(self.num_groups, generator=generator, dtype=torch.float64)
        return self.mean + variance.sqrt() * noise

    def sample_survival(self, generator: torch.Generator) -> Tensor:
        """`survives` under the rule "evidence" at switches drawn by `sample`, of shape ``[G]``.

        Args:
            generator: Of the CPU.

        Raises:
            RunError: before the first update.
        """
        energy = self.sample(generator).square() / self._state.size
        return energy * self._state.curvature * self.strength

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next update depends on: float64 copies of shape ``[G]``, numbers and names.

        The hierarchy is structure, not state: build it again with the grouping.
        """
        return {
            "scale": self.scale,
            "update": self.update,
            "strength": self.strength,
            "num_updates": self.num_updates,
            **asdict(self._state),  # deep copies
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; a refused one leaves the posterior as it was.

        Args:
            state: what `state_dict` of a posterior with as many groups, the same scale and update returned.

        Raises:
            RunError: keys, names, shapes or values that cannot have come from such a posterior.
        """
        vectors = [field.name for field in fields(_State)]
        expected = {"scale", "update", "strength", "num_updates", *vectors}
        check_keys(state, expected)
        check_same(state, {"scale": self.scale, "update": self.update})
        strength, num_updates = loaded_strength(state)
        loaded = _State(**{name: loaded_vector(name, state[name], self.num_groups) for name in vectors})
        self._state, self.strength, self.num_updates = loaded, strength, num_updates

    def _from_switches(self, magnitude: Tensor, curvature: Tensor, temperature: Tensor) -> _State:
        tempered = non_negative("curvature", vector("curvature", curvature, self.num_groups)) / temperature
        energy, gamma = magnitude.square(), self.gamma
        omega, own = updates.reweighted(magnitude, tempered, gamma)
        if self.update == "mackay":
            own = _living(updates.mackay(magnitude, tempered, gamma), energy * tempered)
            omega, _ = updates.reweighted(magnitude, tempered, effective_variance(own, self.hierarchy))
        own = _living(own, energy * tempered)
        return _State(own, omega, energy, tempered, torch.ones_like(own), temperature)

    def _from_entries(
        self, norm: Tensor, curvature: Mapping[str, Tensor], grouping: Grouping, temperature: Tensor
    ) -> _State:
        if grouping.num_groups != self.num_groups:
            raise GroupingError(
                f"expected a grouping of {self.num_groups} groups, got {grouping.num_groups}: pass the "
                "grouping that this posterior was made for."
            )
        entries = {}
        for name, values in curvature.items():
            what = f"curvature of {name}"
            entries[name] = non_negative(what, finite(what, values))
        gamma = self.gamma
        updates.check_entries(entries, grouping)  # shapes that do not fit would broadcast below
        total, members = grouping.expand(temperature), grouping.expand(torch.ones_like(temperature))
        # Entries in no group have no temperature; no group reads them.
        tempered = {n: torch.where(members[n] > 0, entries[n] * members[n] / total[n], 0.0) for n in total}
        size = grouping.sizes().to(torch.float64).clamp(min=1)
        energy, mean = norm.square() / size, grouping.reduce(tempered) / size
        omega, own = updates.reweighted_entries(norm, tempered, grouping, gamma)
        if self.update == "mackay":
            own = _living(updates.mackay_entries(norm, tempered, grouping, gamma), energy * mean)
            variance = effective_variance(own, self.hierarchy)
            omega, _ = updates.reweighted_entries(norm, tempered, grouping, variance)
        own = _living(own, energy * mean)
        return _State(own, omega, energy, mean, size, temperature)


def _living(own: Tensor, evidence: Tensor) -> Tensor:
    """``own``, but 0 for dead groups: the printed |z|/omega gives flat directions the largest variance."""
    return torch.where(evidence > NEGLIGIBLE, own, 0.0)


RULES: dict[str, Callable[[Laplace], Tensor]] = {
    "evidence": lambda posterior: posterior.evidence > 1,
    "entropy": lambda posterior: entropy(posterior.optimum) > 0,
    "printed": lambda posterior: entropy(posterior.gamma) > 0,
}
"""Decision rules of `Laplace.keep`, by name."""
