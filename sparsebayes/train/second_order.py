"""The gradient of an architecture through one step of the weights: second order in the sense of DARTS.

Liu, Simonyan and Yang, "DARTS", ICLR 2019, section 2.3. The architecture a is judged on images of its own by weights
w' that have taken one step of SGD on the training images under a (eq. 6), so that its gradient knows how the weights
follow the architecture (eq. 7). The product with the second derivative is a difference of two gradients (eq. 8):

    w'     = w - xi (mu u + d L_train(w, a)/dw + lambda w)              u: momentum buffer, mu: momentum, lambda: decay
    g      = d L_own(w', a)/da - d2 L_train(w, a)/(da dw) . xi v        v = d L_own(w', a)/dw'
    H.xi v = (d L_train(w + e xi v, a)/da - d L_train(w - e xi v, a)/da) / (2 e),               e = 0.01/|xi v|

With one rate xi for all weights these are the paper's formulas; a rate for each group of them needs no other. The
gradient of the step is not clipped, as in the paper.

    >>> gradient = architecture_gradient(supernet, optimizer, switches, train_loss, own_loss)      # [T]
    >>> switches.backward(gradient)

It costs four passes forward and back instead of one, and room for two more copies of the weights. Nothing but the
result is left of them: weights, buffers (the running statistics of batch norm), gradients and random numbers are as
before, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = ["architecture_gradient"]

STEP = 0.01
"""Length of the step from the weights in either direction, whatever the gradient's."""


def architecture_gradient(
    network: nn.Module,
    optimizer: torch.optim.SGD,
    architecture: Tensor,
    train_loss: Callable[[Tensor], Tensor],
    own_loss: Callable[[Tensor], Tensor],
) -> Tensor:
    """Compute g.

    Args:
        network: holds the weights, and buffers that passes may change; its mode stays as it is.
        optimizer: of the weights, with their rates, momentum and decay at this step; without dampening or Nesterov.
        architecture: a, of any shape; its own graph is left alone.
        train_loss: a -> mean loss of the batch that the weights are about to learn from, of the network as it stands.
        own_loss: a -> mean loss of a batch that the architecture learns from.

    Returns:
        Of the architecture's shape, nats per image.

    Raises:
        ValueError: an optimizer with dampening or Nesterov momentum, whose step is another one.
    """
    rates, weights = _rates(optimizer)
    a = architecture.detach().clone().requires_grad_()
    before = [w.detach().clone() for w in weights]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    devices = sorted({w.device.index or 0 for w in weights if w.is_cuda})

    def derivatives(loss: Callable[[Tensor], Tensor], of: Sequence[Tensor]) -> list[Tensor]:
        # The same random numbers in every pass, or the difference of two would be noise.
        with torch.random.fork_rng(devices), torch.enable_grad():
            found = torch.autograd.grad(loss(a), of, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(of, found, strict=True)]

    def move_(changes: Sequence[Tensor], factor: float | Tensor) -> None:
        with torch.no_grad():
            for weight, old, change in zip(weights, before, changes, strict=True):
                weight.copy_(old + factor * change)

    try:
        move_(_step(optimizer, derivatives(train_loss, weights)), -1.0)
        direct, *below = derivatives(own_loss, [a, *weights])
        direction = [rate * v for rate, v in zip(rates, below, strict=True)]  # xi v
        length = torch.linalg.vector_norm(torch.stack([v.norm() for v in direction]))
        if float(length) == 0:
            return direct
        move_(direction, STEP / length)
        (ahead,) = derivatives(train_loss, [a])
        move_(direction, -STEP / length)
        (behind,) = derivatives(train_loss, [a])
        gradient: Tensor = direct - (ahead - behind) * (length / (2 * STEP)).to(direct)
        return gradient
    finally:
        with torch.no_grad():
            for tensor, old in (*zip(weights, before, strict=True), *buffers):
                tensor.copy_(old)


def _rates(optimizer: torch.optim.SGD) -> tuple[list[float], list[Tensor]]:
    """The weights that are trained, each with its rate."""
    rates: list[float] = []
    weights: list[Tensor] = []
    for group in optimizer.param_groups:
        if group["dampening"] or group["nesterov"] or group["maximize"]:
            raise ValueError("expected SGD without dampening, Nesterov momentum or maximize")
        own = [w for w in group["params"] if w.requires_grad]
        rates += [float(group["lr"])] * len(own)
        weights += own
    return rates, weights


def _step(optimizer: torch.optim.SGD, gradients: Sequence[Tensor]) -> list[Tensor]:
    """What the optimizer would take from every weight: xi (mu u + gradient + lambda w)."""
    found = []
    left = iter(gradients)
    for group in optimizer.param_groups:
        for weight in (w for w in group["params"] if w.requires_grad):
            step = next(left) + group["weight_decay"] * weight.detach()
            velocity = optimizer.state[weight].get("momentum_buffer") if weight in optimizer.state else None
            if velocity is not None:
                step = step + group["momentum"] * velocity
            found.append(group["lr"] * step)
    return found
