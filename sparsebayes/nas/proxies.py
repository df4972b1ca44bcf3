"""Scores of untrained networks that correlate with what they will reach: judges that cost one batch each.

    >>> scores = {name: proxy(network, images, labels) for name, proxy in PROXIES.items()}

    synflow     Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow",
                NeurIPS 2020: sum |w dR/dw| of the network with |w| on an image of ones, R the sum of its outputs
    naswot      Mellor et al., "Neural architecture search without training", ICML 2021: log-determinant of the kernel
                that counts in how many rectifiers two images agree
    grad_norm   norm of the loss's gradient (Abdelfattah et al., "Zero-cost proxies for lightweight NAS", ICLR 2021)
    params      number of parameters

Larger is better. Every proxy works on a copy: the network stays as it is, and so do the caller's random numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsebayes.errors import NumericsError

__all__ = ["PROXIES", "grad_norm", "naswot", "params", "rank_average", "rank_correlation", "synflow"]


def synflow(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Synaptic flow, as its natural logarithm (sums overflow for deep networks).

    Norms are in evaluation mode, so in a fresh network they pass on what they get; the sum is over weights of two and
    more dims.

    Args:
        network: fresh.
        images: only their shape matters.
        labels: not used.

    Returns:
        The logarithm; -inf where nothing flows.
    """
    model = copy.deepcopy(network).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    ones = torch.ones(1, *images.shape[1:], dtype=torch.float64, device=images.device)
    weights = [p for p in model.parameters() if p.ndim > 1]
    with torch.enable_grad():
        gradients = torch.autograd.grad(model(ones).sum(), weights, allow_unused=True)
    total = sum(
        float((w.detach() * g).sum()) for w, g in zip(weights, gradients, strict=True) if g is not None
    )
    return math.log(total) if total > 0 else -math.inf


def naswot(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Log-determinant of K, K_nm = number of rectifiers in which the images n and m agree.

    Args:
        network: fresh; its rectifiers are `nn.ReLU` and `nn.ReLU6` modules. Norms use the batch's statistics.
        images: a batch of different images, of shape `[B, C, H, W]`.
        labels: not used.

    Returns:
        The logarithm; -inf where two images agree in all rectifiers.
    """
    model = copy.deepcopy(network).train()
    kernel = torch.zeros(len(images), len(images), dtype=torch.float64, device=images.device)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        on = (output.flatten(1) > 0).float()
        off = 1 - on
        kernel.add_((on @ on.T + off @ off.T).double())

    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(images)
    sign, logarithm = torch.linalg.slogdet(kernel)
    return float(logarithm) if float(sign) > 0 else -math.inf


def grad_norm(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Norm of the mean loss's gradient over all parameters, batch statistics in the norms."""
    model = copy.deepcopy(network).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        loss = functional.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    squares = [float(g.double().square().sum()) for g in gradients if g is not None]
    return math.sqrt(sum(squares))


def params(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Number of parameters."""
    return float(sum(p.numel() for p in network.parameters()))


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; -inf ranks last.

    Args:
        first: values, none of them NaN.
        second: as many.

    Raises:
        NumericsError: fewer than two pairs, other numbers of values, NaN, or all values of one list are equal.
    """
    if len(first) != len(second) or len(first) < 2 or any(map(math.isnan, [*first, *second])):
        raise NumericsError("expected two lists of at least two values each, equally long and without NaN")
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    if scale == 0:
        raise NumericsError("expected values that differ, got equal ones: they have no order")
    return float((a * b).sum()) / scale


def rank_average(scores: list[list[float]]) -> list[float]:
    """Mean rank of each candidate over several scores, from 0 for the worst; ties at their mean rank, -inf last.

    Args:
        scores: for each score, its value for every candidate; none of them NaN.

    Returns:
        One number per candidate; larger is better.

    Raises:
        NumericsError: no score, scores of different numbers of candidates, or NaN.
    """
    if not scores or len({len(values) for values in scores}) > 1 or not scores[0]:
        raise NumericsError("expected at least one score, each with as many values as there are candidates")
    if any(math.isnan(value) for values in scores for value in values):
        raise NumericsError(
            "expected scores that are numbers, got NaN: the network does not take these images"
        )
    means: list[float] = torch.stack([_ranks(values) for values in scores]).mean(0).tolist()
    return means


def _ranks(values: list[float]) -> Tensor:
    """Ranks from 0, float64; equal values share the mean of theirs."""
    _, inverse, counts = torch.unique(
        torch.tensor(values, dtype=torch.float64), return_inverse=True, return_counts=True
    )
    ends = counts.cumsum(0).double()
    ranks: Tensor = (ends - (counts.double() + 1) / 2)[inverse]
    return ranks


PROXIES: dict[str, Callable[[nn.Module, Tensor, Tensor], float]] = {
    "synflow": synflow,
    "naswot": naswot,
    "grad_norm": grad_norm,
    "params": params,
}
"""Proxies by name."""
