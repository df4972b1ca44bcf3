"""Scores that other methods rank groups by, for comparisons at equal size.

* magnitude: root mean square of the group's own weights (Li et al., "Pruning Filters for Efficient ConvNets", 2017,
  with the norm taken per entry so that layers of different fan-in compare).
* taylor: squared first-order change of a batch's mean loss when the group's switch goes, `(sum of w dL/dw)^2`,
  averaged over the batches (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, eq 8).
* random: one uniform number per group.

None has a natural threshold; only their order means something.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsebayes.errors import DataError
from sparsebayes.groups.grouping import Grouping
from sparsebayes.networks import in_mode

__all__ = ["magnitude_score", "random_score", "taylor_score"]


def magnitude_score(model: nn.Module, grouping: Grouping) -> Tensor:
    """Root mean square of each group's weights; of its own rows where it has any, else of what is read of it.

    Returns:
        Of shape ``[G]``.
    """
    own = [labels for labels in grouping.labels if not labels.gate]
    has_own = torch.zeros(grouping.num_groups + 1, dtype=torch.bool)
    for labels in own:
        has_own[(labels.index + 1).flatten()] = True
    parameters = dict(model.named_parameters())
    energy = torch.zeros(grouping.num_groups + 1, dtype=torch.float64)
    count = torch.zeros_like(energy)
    for labels in grouping.labels:
        square = parameters[labels.parameter].detach().double().cpu().square().flatten()
        slot = (labels.index + 1).expand(labels.shape).flatten()
        # A unit with rows of its own is judged by them, not by its consumers.
        slot = torch.where(has_own[slot], 0, slot) if labels.gate else slot
        energy.index_add_(0, slot, square)
        count.index_add_(0, slot, torch.ones_like(square))
    return (energy / count.clamp(min=1)).sqrt()[1:]


def taylor_score(model: nn.Module, grouping: Grouping, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean over batches of the squared first-order loss change of each switch, cross-entropy loss.

    Args:
        model: The network; judged in evaluation mode, given back as it was, without gradients.
        grouping: G groups.
        batches: Pairs of images and labels.

    Returns:
        Of shape ``[G]``, nats squared of a mean loss.

    Raises:
        DataError: If there is no batch.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in grouping.parameters}
    total: Tensor | None = None
    count = 0
    with in_mode(model, train=False):
        for images, labels in batches:
            gradients = torch.autograd.grad(F.cross_entropy(model(images), labels), list(parameters.values()))
            products = {
                name: parameter.detach() * gradient
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
            }
            square = grouping.reduce(products, gates_only=True).square()
            total = square if total is None else total + square
            count += 1
    if total is None:
        raise DataError("expected batches to score groups on, got none")
    return (total / count).double().cpu()


def random_score(grouping: Grouping, seed: int) -> Tensor:
    """One uniform number per group, of shape ``[G]``."""
    return torch.rand(grouping.num_groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
