"""Posterior-guided sampling: draw sub-networks, judge each as it is, keep the best.

The search of PGNAS (Zhou et al., AAAI 2020, arXiv 1906.09557, section 3.3): sub-networks are drawn from the learned
posterior *with* their weights, measured on held-out data without any training, and the best one is the answer. How many
draws that takes is read off the curve of the best of n:

    >>> candidates = draw_candidates(posterior, 50, generator)                  # bool [50, G]
    >>> guided = best_of(candidates, loss)                                      # loss: bool [G] -> float
    >>> guided.losses[guided.best], guided.curve()[4]                           # best of 50; expected best of 5
    >>> best_of(shuffled_candidates(candidates, layer_index, generator), loss)  # as large, but without knowledge
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsebayes.errors import GroupingError, NumericsError, RecipeError
from sparsebayes.inference.posterior import Posterior

__all__ = [
    "Sampled",
    "best_of",
    "draw_candidates",
    "expected_best",
    "shuffled_candidates",
    "uniform_candidates",
]


@dataclass(frozen=True, eq=False)
class Sampled:
    """Sub-networks and what each is worth.

    Attributes:
        candidates: Which groups are on, bool of shape ``[n, G]``.
        losses: Held-out loss of each, n numbers; infinite where a candidate is broken.
        best: Number of the first candidate with the smallest loss.
    """

    candidates: Tensor
    losses: tuple[float, ...]
    best: int

    def curve(self) -> Tensor:
        """Expected smallest loss among k of these candidates, for k = 1..n; see `expected_best`."""
        return expected_best(self.losses)


def draw_candidates(posterior: Posterior, num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw sub-networks from a posterior.

    Args:
        posterior: Any of the three.
        num_samples: n, at least 1.
        generator: Of the CPU.

    Returns:
        Which groups are on, bool of shape ``[n, G]``.

    Raises:
        RecipeError: ``num_samples`` < 1.
    """
    _check_count(num_samples)
    return torch.stack([posterior.draw(generator) for _ in range(num_samples)])


def shuffled_candidates(candidates: Tensor, layer_index: Tensor, generator: torch.Generator) -> Tensor:
    """Random sub-networks with as many groups on in every layer as given ones: uniform over which groups these are.

    Args:
        candidates: Bool of shape ``[n, G]``.
        layer_index: Layer number of each group, int64 of shape ``[G]``.
        generator: Of the CPU.

    Returns:
        Bool of shape ``[n, G]``.

    Raises:
        GroupingError: The shapes do not fit.
    """
    if candidates.ndim != 2 or layer_index.shape != candidates.shape[1:]:
        raise GroupingError(
            f"expected candidates [n, G] and one layer number per group, got {list(candidates.shape)} and "
            f"{list(layer_index.shape)}: pass the grouping's layer_index."
        )
    shuffled = torch.empty_like(candidates)
    for layer in torch.unique(layer_index):
        members = (layer_index == layer).nonzero().flatten()
        order = torch.rand(len(candidates), len(members), generator=generator).argsort(1)
        shuffled[:, members] = candidates[:, members].gather(1, order)
    return shuffled


def uniform_candidates(num_samples: int, num_groups: int, generator: torch.Generator) -> Tensor:
    """Sub-networks drawn uniformly from all 2^G: each group is on with probability 1/2. Bool of shape ``[n, G]``.

    Raises:
        RecipeError: ``num_samples`` < 1.
    """
    _check_count(num_samples)
    return torch.rand(num_samples, num_groups, generator=generator) < 0.5


def best_of(candidates: Tensor, loss: Callable[[Tensor], float]) -> Sampled:
    """Measure sub-networks and find the best.

    Args:
        candidates: Bool of shape ``[n, G]``, n at least 1; equal ones are measured once.
        loss: Held-out loss of one, given its bool ``[G]``; a NaN counts as infinite.

    Raises:
        RecipeError: No candidate.
        NumericsError: Several candidates that are all the same, or none with a finite loss.
    """
    _check_count(len(candidates))
    if len(candidates) > 1 and bool((candidates == candidates[0]).all()):
        raise NumericsError(
            f"all {len(candidates)} sampled sub-networks are the same, so that there is nothing to choose from: the "
            "posterior is certain of every group; take its decision (one sample), or train it for less long."
        )
    known: dict[bytes, float] = {}
    losses = []
    for on in candidates:
        key = on.cpu().numpy().tobytes()
        if key not in known:
            value = float(loss(on))
            known[key] = math.inf if math.isnan(value) else value
        losses.append(known[key])
    best = min(range(len(losses)), key=losses.__getitem__)
    if math.isinf(losses[best]):
        raise NumericsError(
            f"none of {len(losses)} sampled sub-networks has a finite loss: train the network first, or drop less."
        )
    return Sampled(candidates, tuple(losses), best)


def expected_best(losses: Sequence[float]) -> Tensor:
    """Expected smallest of k losses drawn without replacement, for k = 1..n.

    Sum over the sorted losses of C(n - i, k - 1)/C(n, k) times the i-th: an average over all subsets, so that the curve
    does not depend on the order of the draws.

    Args:
        losses: n numbers, n at least 1.

    Returns:
        float64 of shape ``[n]``: the mean loss first, the smallest last.

    Raises:
        RecipeError: No loss.
    """
    _check_count(len(losses))
    ordered = torch.tensor(sorted(losses), dtype=torch.float64)
    num = len(ordered)
    curve = torch.empty(num, dtype=torch.float64)
    left = num - torch.arange(1, num, dtype=torch.float64)
    for k in range(1, num + 1):
        # The weight of the first is k/n, and that of i + 1 is (n - i - k + 1)/(n - i) times that of i.
        ratios = (left - (k - 1)).clamp(min=0) / left
        used = torch.cat([ratios.new_tensor([k / num]), ratios]).cumprod(0)
        # A weight of 0 leaves an infinite loss out, which 0 * inf would not.
        curve[k - 1] = torch.where(used > 0, used * ordered, 0.0).sum()
    return curve


def _check_count(num_samples: int) -> None:
    if num_samples < 1:
        raise RecipeError(
            f"expected at least one sample, got {num_samples}: one is the posterior's own decision or a single draw."
        )
