"""Which images are worth a backward pass: those that the network is not sure of.

An image's curvature grows with t = tr Lam, which a forward pass tells: 1 - sum p^2 for the cross-entropy. A
fitted network is sure of most images, and a few hold nearly all of the curvature. An image is kept with probability
pi = min(1, c t), c such that a given share is kept on average, mixed with a little of the same chance for all; what
it contributes counts 1/pi times (Horvitz and Thompson, JASA 1952), so that sums stay unbiased.

Images are taken in pools of a fixed size: how they are split into batches does not matter.

    >>> pi = inclusion(torch.tensor([0.9, 0.1, 0.0, 0.0]), share=0.25)   # about 0.9, 0.1, and 0.005 for the others
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["choose", "curvature_traces", "inclusion", "pool_size"]

# Share of the kept images that is spread evenly: a trace of 0 by rounding must not mean never.
_EVEN = 0.02
# Images in a pool, and numbers in it.
_POOL, _POOL_NUMBERS = 1024, 1 << 24


def pool_size(numbers_per_image: int) -> int:
    """Images that are chosen from together: enough to find the few that matter, few enough to hold.

    Args:
        numbers_per_image: numbers in one image.
    """
    return max(64, min(_POOL, _POOL_NUMBERS // max(numbers_per_image, 1)))


def curvature_traces(logits: Tensor, likelihood: str) -> Tensor:
    """T = tr Lam of each image.

    Args:
        logits: of shape `[B, C]`.
        likelihood: one of `LIKELIHOODS`.

    Returns:
        Of shape `[B]`, float64.
    """
    logits = logits.double()
    if likelihood == "cross_entropy":
        # sum p (1 - p), where 1 - p of the top class is the sum of the others: subtracted, it would be lost for a
        # sure image.
        p = functional.softmax(logits, dim=1)
        top = p.argmax(1, keepdim=True)
        others = p.scatter(1, top, 0.0)
        return (others * (1 - others)).sum(1) + p.gather(1, top).squeeze(1) * others.sum(1)
    if likelihood == "binary_cross_entropy":
        return (0.5 / (logits / 2).cosh()).square().sum(1)
    return torch.full((len(logits),), 2.0 * logits.shape[1], dtype=torch.float64, device=logits.device)


def inclusion(traces: Tensor, share: float) -> Tensor:
    """Probabilities of being kept.

    Args:
        traces: t >= 0, of shape `[B]`.
        share: of the images to keep, on average; above 0, at most 1.

    Returns:
        pi, of shape `[B]`, float64, each above 0 and at most 1; their sum is at most `share * B`.
    """
    budget = share * len(traces)
    filled = torch.zeros_like(traces)
    full = torch.zeros_like(traces, dtype=torch.bool)
    # Images whose share of the budget exceeds 1 are kept for sure, which leaves more for the others.
    while True:
        rest = traces.where(~full, 0.0)
        left = budget - int(full.sum())
        if left <= 0 or float(rest.sum()) <= 0:
            break
        filled = torch.where(full, 1.0, rest * (left / rest.sum()))
        if not bool((filled > 1).any()):
            break
        full |= filled >= 1
    filled = torch.where(full, 1.0, filled)
    return ((1 - _EVEN) * filled + _EVEN * share).clamp(max=1.0)


def choose(probabilities: Tensor, uniform: float) -> Tensor:
    """Draw images, each with its probability, and as nearly as many as their sum as possible.

    Args:
        probabilities: pi, of shape `[B]`.
        uniform: a random number in [0, 1).

    Returns:
        int64: numbers of the images kept, ascending. (Systematic sampling: every image at which the running sum of
        pi passes an integer plus `uniform`.)
    """
    ends = (probabilities.cumsum(0) + uniform).floor()
    return torch.nonzero(torch.diff(ends, prepend=ends.new_zeros(1)) > 0).flatten()
