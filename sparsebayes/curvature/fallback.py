"""Per-image gradients of any parameters of any network, by torch.func: slow, but it knows no special cases.

Used for parameters whose uses `capture.py` does not understand, such as attention weights, embeddings and
parameters that a network reads without a layer. Each image passes through the network by itself, vectorised
by `torch.vmap`. A network that vmap cannot run (recurrent kernels, data-dependent control flow, custom
autograd functions without a batching rule) is differentiated in a loop over images, which needs nothing but
autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

__all__ = ["per_image_gradients"]


def per_image_gradients(model: nn.Module, names: Sequence[str], x: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Gradients of v . f(x), image by image.

    Args:
        model: the network f, in evaluation mode; the named parameters require gradients.
        names: the parameters, as in `model.named_parameters()`.
        x: images, of shape `[n, ...]`.
        v: starting vectors, of shape `[K, n, C]`.

    Returns:
        For each parameter its gradients, of shape `[K, n, *shape of the parameter]`.

    Raises:
        RuntimeError: the network fails on a single image.
    """
    try:
        with warnings.catch_warnings():
            # Operations without a batching rule are looped over inside vmap, with a warning about their
            # speed.
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            return _vectorised(model, names, x, v)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # All that vmap says about a network it cannot run. Any other fault shows again in the loop.
        return _looped(model, names, x, v)


def _vectorised(model: nn.Module, names: Sequence[str], x: Tensor, v: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    values = {name: parameters[name].detach() for name in names}

    def one_image(image: Tensor, starts: Tensor) -> dict[str, Tensor]:  # [...], [K, C]
        def outputs(some: dict[str, Tensor]) -> Tensor:
            logits: Tensor = functional_call(model, some, (image.unsqueeze(0),))
            return logits.squeeze(0)

        pull_back = vjp(outputs, values)[1]
        gradients: dict[str, Tensor] = vmap(lambda start: pull_back(start)[0])(starts)
        return gradients

    result: dict[str, Tensor] = vmap(one_image, in_dims=(0, 1), out_dims=1)(x, v)
    return {name: gradient.detach() for name, gradient in result.items()}


def _looped(model: nn.Module, names: Sequence[str], x: Tensor, v: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    found = {name: p.new_zeros(*v.shape[:2], *p.shape) for name, p in zip(names, chosen, strict=True)}
    for image in range(len(x)):
        logits = model(x[image : image + 1])
        if not logits.requires_grad:
            continue
        for k in range(len(v)):
            gradients = torch.autograd.grad(
                logits, chosen, v[k, image : image + 1], retain_graph=k + 1 < len(v), allow_unused=True
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    found[name][k, image] = gradient
    return found
