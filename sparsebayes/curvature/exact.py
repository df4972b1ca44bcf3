"""The oracle: Gauss-Newton (GGN) matrices written down by definition, with torch.func. For tiny networks.

    G = sum_n J_n^T Lam_n J_n,    J_n = df_n/dtheta of shape [C, P],    Lam_n = d2 l(f_n, y_n) / df_n^2

Nothing here is shared with the fast estimators: the Jacobian comes from `torch.func.jacrev` through the whole
network, Lam from differentiating the loss itself twice. Sums run over the images given: scale by `num_data /
len(x)` for nats of a whole data set.

    >>> ggn_matrix(model, ["fc.weight"], x, y)                           # [P, P]
    >>> gate_matrix(model, make_grouping(model, "rows"), x, y)           # [G, G]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional

from sparsebayes.errors import RecipeError, unknown
from sparsebayes.groups.grouping import Grouping

__all__ = ["LOSSES", "gate_matrix", "ggn_diagonal", "ggn_matrix", "output_hessian"]


def _squared_error(logits: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(logits, target, reduction="sum")


def _binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "mse": _squared_error,
    "binary_cross_entropy": _binary_cross_entropy,
}
"""Loss of one image, in nats: (logits `[C]`, target) -> scalar."""


def output_hessian(logits: Tensor, y: Tensor, likelihood: str = "cross_entropy") -> Tensor:
    """Second derivative of the loss with respect to the logits.

    Args:
        logits: of shape `[n, C]`.
        y: class numbers `[n]`, or targets `[n, C]` for the other likelihoods.
        likelihood: a name in `LOSSES`.

    Returns:
        Lam, of shape `[n, C, C]`.

    Raises:
        RecipeError: the likelihood is unknown.
    """
    if likelihood not in LOSSES:
        raise RecipeError(unknown("likelihood", likelihood, LOSSES))
    # Reverse mode twice: the forward mode of torch.func.hessian loads scripted functions, which torch
    # deprecates.
    result: Tensor = vmap(jacrev(jacrev(LOSSES[likelihood])))(logits, y)
    return result


def ggn_matrix(
    model: nn.Module, parameters: Sequence[str], x: Tensor, y: Tensor, likelihood: str = "cross_entropy"
) -> Tensor:
    """GGN of the total loss over the given images.

    Args:
        model: the network, run in the mode it is in; deterministic, images independent.
        parameters: names, as in `model.named_parameters()`.
        x: images, of shape `[n, ...]`.
        y: see `output_hessian`.
        likelihood: see `output_hessian`.

    Returns:
        G of shape `[P, P]`, entries of the parameters in order; in nats of the given images.

    Raises:
        RecipeError: the likelihood is unknown.
    """
    known = dict(model.named_parameters())
    values = {name: known[name].detach() for name in parameters}

    def outputs(some: dict[str, Tensor]) -> Tensor:
        logits: Tensor = functional_call(model, some, (x,))
        return logits

    jacobians = jacrev(outputs)(values)  # name -> [n, C, *shape]
    hessians = output_hessian(outputs(values).detach(), y, likelihood)
    flat = torch.cat(
        [jacobians[name].detach().reshape(*hessians.shape[:2], -1) for name in parameters], dim=2
    )
    return _sandwich(flat, hessians)


def ggn_diagonal(
    model: nn.Module, parameters: Sequence[str], x: Tensor, y: Tensor, likelihood: str = "cross_entropy"
) -> dict[str, Tensor]:
    """Diagonal of `ggn_matrix`, by parameter.

    Args:
        model: see `ggn_matrix`.
        parameters: see `ggn_matrix`.
        x: see `ggn_matrix`.
        y: see `ggn_matrix`.
        likelihood: see `ggn_matrix`.

    Returns:
        For each parameter its diagonal, of its shape; in nats of the given images.

    Raises:
        RecipeError: the likelihood is unknown.
    """
    known = dict(model.named_parameters())
    diagonal = ggn_matrix(model, parameters, x, y, likelihood).diagonal()
    parts = torch.split(diagonal, [known[name].numel() for name in parameters])
    return {name: part.reshape(known[name].shape) for name, part in zip(parameters, parts, strict=True)}


def gate_matrix(
    model: nn.Module, grouping: Grouping, x: Tensor, y: Tensor, likelihood: str = "cross_entropy"
) -> Tensor:
    """GGN of the total loss in the switches z = 1 that multiply the groups' gate entries.

    Args:
        model: see `ggn_matrix`.
        grouping: G groups; an entry in several gate labels is multiplied by several switches.
        x: see `ggn_matrix`.
        y: see `ggn_matrix`.
        likelihood: see `ggn_matrix`.

    Returns:
        G of shape `[G, G]`; in nats of the given images.

    Raises:
        RecipeError: the likelihood is unknown.
    """
    gates = [labels for labels in grouping.labels if labels.gate]
    known = dict(model.named_parameters())
    values = {labels.parameter: known[labels.parameter].detach() for labels in gates}
    like = next(iter(values.values()))

    def outputs(switches: Tensor) -> Tensor:
        table = torch.cat([switches, switches.new_ones(1)])  # at -1: entries in no group
        scaled = dict(values)
        for labels in gates:
            scaled[labels.parameter] = scaled[labels.parameter] * table[labels.index.to(like.device)]
        logits: Tensor = functional_call(model, scaled, (x,))
        return logits

    ones = like.new_ones(grouping.num_groups)
    return _sandwich(jacrev(outputs)(ones).detach(), output_hessian(outputs(ones).detach(), y, likelihood))


def _sandwich(jacobian: Tensor, hessians: Tensor) -> Tensor:
    """sum_n J_n^T Lam_n J_n, from `[n, C, P]` and `[n, C, C]`."""
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, hessians, jacobian)
