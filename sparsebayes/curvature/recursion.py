"""The layer-by-layer diagonal recursion: an approximation, kept for comparison with the literature.

Curvature is passed down from the outputs through squared Jacobians, as if the entries of every activation were
independent (Becker and LeCun 1989; the manner of BayesNAS, Zhou et al., ICML 2019):

    h_f = diag(Lam),      h_in = (W^2)^T h_out phi'^2,      h_W = sum over images and positions of h_out a^2

The products of different entries, and of different positions of one map, are dropped. That is fine for a fully
connected network with one hidden layer, and wrong otherwise: measured against the exact diagonal it found 96-104 % of
the truth on a small MLP, 37-68 % on a small CNN with batch norm, 2-5 % on a small ResNet, and 2-13 % on the switches
of one supernet cell, with a rank correlation of 0.3 to 0.8. Use `entry_curvature` or `switch_curvature`, which are
unbiased and cost no more.

One backward pass: a torch function mode replaces the functions that a network calls by ones whose backward squares
the Jacobian. A function that is not known here is refused by name.

    >>> recursion_curvature(model, ["conv1.weight"], loader, num_data=60000)["conv1.weight"].shape
    torch.Size([20, 1, 5, 5])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sparsebayes.curvature.factors import Starts, class_columns
from sparsebayes.curvature.images import Batches, check_num_data, check_targets, first_images
from sparsebayes.curvature.sweep import Sweep
from sparsebayes.curvature.workers import add_up_
from sparsebayes.errors import DataError, ModelError, NumericsError

__all__ = ["recursion_curvature"]


def recursion_curvature(
    model: nn.Module,
    parameters: Sequence[str],
    batches: Batches,
    *,
    num_data: int,
    likelihood: str = "cross_entropy",
    num_images: int | None = None,
) -> dict[str, Tensor]:
    """Approximate the GGN diagonal of parameters by the diagonal recursion, in evaluation mode. Biased: see above.

    Args:
        model: the network; its outputs are logits of shape `[B, C]`.
        parameters: names, as in `model.named_parameters()`; weights, biases, norms' and switches'.
        batches: pairs of images `[B, ...]` and targets.
        num_data: images in the whole data set, to which the curvature is scaled.
        likelihood: "cross_entropy", "mse" or "binary_cross_entropy".
        num_images: use only the first so many images; None: all.

    Returns:
        For each parameter its approximate diagonal, of its shape, in nats of the whole data set.

    Raises:
        RecipeError: an unknown likelihood, or `num_data` or `num_images` below 1.
        DataError: no images, or targets that do not fit.
        GroupingError: the model has no parameter of a name.
        ModelError: the network calls a function whose squared Jacobian is not known here.
        NumericsError: curvatures are not finite.
    """
    check_num_data(num_data)
    names = list(dict.fromkeys(parameters))
    starts = Starts(likelihood, "monte_carlo", "stick", 1, 0)
    with Sweep(model, names, starts=starts) as sweep:
        chosen = [dict(model.named_parameters())[name] for name in names]
        total = [torch.zeros_like(p) for p in chosen]
        used = torch.zeros((), dtype=torch.float64, device=sweep.device)
        for images, y in first_images(batches, num_images):
            with _SquaredJacobians():
                logits = model(sweep.ready(images))
            check_targets(logits, y, likelihood)
            diagonal = class_columns(logits.detach(), likelihood).square().sum(0)
            gradients = torch.autograd.grad(logits, chosen, diagonal, allow_unused=True)
            for sums, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    sums.add_(gradient)
            used += len(images)
    add_up_(*total, used)
    if not bool(used > 0):
        raise DataError("expected at least one image to compute the curvature from, got none")
    result = {name: sums * (num_data / float(used)) for name, sums in zip(names, total, strict=True)}
    for name, curvature in result.items():
        if not bool(torch.isfinite(curvature).all()):
            raise NumericsError(f"expected finite curvatures, got nan or inf in {name!r}; use float64")
    return result


class _Squared(torch.autograd.Function):
    """Calls a function; its backward multiplies with the squares of the Jacobian's entries.

    `pull_back` does that: (gradient, *tensors) -> one curvature per tensor.
    """

    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Tensor], pull_back: Callable[..., Any], *tensors: Tensor
    ) -> Tensor:
        ctx.pull_back = pull_back
        ctx.save_for_backward(*tensors)
        return run(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.pull_back(gradient, *ctx.saved_tensors))


def _apply(run: Callable[..., Tensor], pull_back: Callable[..., Any], *tensors: Tensor) -> Tensor:
    result: Tensor = _Squared.apply(run, pull_back, *tensors)  # type: ignore[no-untyped-call]
    return result


class _SquaredJacobians(TorchFunctionMode):
    """Replaces functions by ones whose backward squares the Jacobian, while it is entered."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace one call, or let it pass; called by torch."""
        keywords = dict(kwargs or {})
        if func is functional.batch_norm:
            return _batch_norm(*args, **keywords)
        result = func(*args, **keywords)
        if not isinstance(result, Tensor) or not result.requires_grad or func in _ZERO_OR_ONE:
            return result
        if func in _LINEAR_IN_EACH:
            return _linear_in_each(func, args, keywords)
        if func in _AVERAGES:
            count = args[0].numel() // result.numel()
            return _along(func, args, keywords, lambda squared, plain: plain / count)
        if func in _ACTIVATIONS:
            return _along(func, args, keywords, lambda squared, plain: squared)
        if func.__name__ == "__get__":
            return result
        raise ModelError(
            f"the diagonal recursion does not know the squared Jacobian of {func.__name__!r}; use entry_curvature, "
            "which needs to know none"
        )


def _linear_in_each(func: Callable[..., Tensor], args: Sequence[Any], keywords: dict[str, Any]) -> Tensor:
    """A function that is linear in every tensor: its squared Jacobian is its Jacobian at the squares."""
    # A plain number is a factor like any other.
    values = [torch.tensor(float(a)) if isinstance(a, float | int) and func in _PRODUCTS else a for a in args]
    places: list[int | str] = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    places += [name for name, value in keywords.items() if isinstance(value, Tensor)]

    def run(*tensors: Tensor) -> Tensor:
        filled, named = list(values), dict(keywords)
        for place, tensor in zip(places, tensors, strict=True):
            if isinstance(place, int):
                filled[place] = tensor
            else:
                named[place] = tensor
        return func(*filled, **named)

    def pull_back(gradient: Tensor, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            squares = [t.detach().square().requires_grad_() for t in tensors]
            return torch.autograd.grad(run(*squares), squares, gradient, allow_unused=True)

    tensors = [values[place] if isinstance(place, int) else keywords[place] for place in places]
    return _apply(run, pull_back, *tensors)


def _along(
    func: Callable[..., Tensor],
    args: Sequence[Any],
    keywords: dict[str, Any],
    choose: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """A function of one tensor: `choose` makes its pull-back from g * slope^2 and from the plain one."""
    options = {name: value for name, value in keywords.items() if name != "inplace"}

    def run(x: Tensor) -> Tensor:
        return func(x, *args[1:], **options)

    def pull_back(gradient: Tensor, x: Tensor) -> tuple[Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = run(x)
            plain = torch.autograd.grad(y, x, gradient, retain_graph=True)[0]
            slope = torch.autograd.grad(y, x, torch.ones_like(y))[0]
        return (choose(gradient * slope.square() if y.shape == x.shape else plain, plain),)

    return _apply(run, pull_back, args[0])


def _batch_norm(
    x: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """In evaluation mode: a shift, and products with constants and the weight."""
    if training or mean is None or variance is None:
        raise ModelError(
            "the diagonal recursion needs batch norms with running statistics, in evaluation mode; got one that uses "
            "the statistics of the batch"
        )
    shape = [1, -1, *[1] * (x.ndim - 2)]
    y = _linear_in_each(torch.mul, (x - mean.view(shape), (variance + eps).rsqrt().view(shape)), {})
    if weight is not None:
        y = _linear_in_each(torch.mul, (y, weight.view(shape)), {})
    return y if bias is None else y + bias.view(shape)


_PRODUCTS = frozenset({torch.mul, Tensor.mul, Tensor.__mul__})
_LINEAR_IN_EACH = _PRODUCTS | {functional.linear, torch.conv1d, torch.conv2d, torch.conv3d}
_AVERAGES = frozenset({functional.avg_pool2d, functional.adaptive_avg_pool2d, torch.mean, Tensor.mean})
_ACTIVATIONS = frozenset(
    {
        functional.gelu,
        functional.silu,
        functional.elu,
        functional.leaky_relu,
        torch.tanh,
        Tensor.tanh,
        torch.sigmoid,
        Tensor.sigmoid,
    }
)
# Every entry of the Jacobian is 0 or 1: the square is the Jacobian itself.
_ZERO_OR_ONE = frozenset(
    {
        functional.relu,
        torch.relu,
        Tensor.relu,
        torch.relu_,
        Tensor.relu_,
        functional.max_pool2d,
        torch.max_pool2d,
        functional.dropout,
        torch.flatten,
        Tensor.flatten,
        Tensor.view,
        Tensor.reshape,
        Tensor.squeeze,
        Tensor.unsqueeze,
        Tensor.permute,
        Tensor.transpose,
        Tensor.contiguous,
        Tensor.index_select,
        Tensor.select,
        Tensor.__getitem__,
        torch.cat,
        torch.stack,
        torch.add,
        Tensor.add,
        Tensor.add_,
        Tensor.__radd__,
        torch.sum,
        Tensor.sum,
    }
)
