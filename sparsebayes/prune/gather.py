"""A linear layer that reads only some of its input columns.

When a convolution's channel survives but a linear layer behind a flatten needs only some of its pixels, no
producer can shrink: the input keeps its width and the layer picks the columns it needs.

    >>> layer = GatheredLinear(4, torch.tensor([0, 3]), out_features=2)
    >>> layer(torch.ones(5, 4)).shape
    torch.Size([5, 2])
    >>> layer
    GatheredLinear(columns=2 of in_features=4, out_features=2, bias=True)

The parameters keep the names `weight` and `bias` of the `nn.Linear` that the layer replaces. The gather is
one `index_select` on the last dimension: `torch.export` shows it as `aten.index_select`, ONNX as `Gather`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsebayes.errors import ModelError

__all__ = ["GatheredLinear", "replace_module_", "ungather_", "ungathered"]


class GatheredLinear(nn.Module):
    """`y = x[..., columns] @ weight.T + bias`.

    Args:
        in_features: width F of the input's last dimension, before the gather.
        columns: int64, of shape `[K]`: the columns that are read, strictly increasing, within 0..F-1.
        out_features: width O of the output.
        bias: whether there is a bias, of shape `[O]`.
        device: where the parameters are made.
        dtype: type of the parameters.

    Attributes:
        weight: of shape `[O, K]`; starts as zeros, since the values come from the layer that is replaced.
        bias: of shape `[O]`, or None.
        columns: the buffer `[K]`; part of the state dict.

    Raises:
        ModelError: `columns` is not such a list.
    """

    weight: Tensor
    bias: Tensor | None
    columns: Tensor

    def __init__(
        self,
        in_features: int,
        columns: Tensor,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        columns = columns.detach().to(device="cpu", copy=True)
        if columns.dtype != torch.int64 or columns.ndim != 1 or columns.numel() == 0:
            raise ModelError(
                f"the columns of a GatheredLinear must be a non-empty list of int64, "
                f"not {columns.dtype} of shape {list(columns.shape)}"
            )
        if columns[0] < 0 or columns[-1] >= in_features or bool((columns[1:] <= columns[:-1]).any()):
            raise ModelError(
                f"the columns of a GatheredLinear must rise strictly within 0..{in_features - 1}, "
                f"not run from {int(columns.min())} to {int(columns.max())} or repeat"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.zeros(out_features, columns.numel(), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("columns", columns if device is None else columns.to(device))

    def forward(self, x: Tensor) -> Tensor:
        """Read the columns and multiply.

        Args:
            x: of shape `[..., in_features]`.

        Returns:
            Of shape `[..., out_features]`.

        Raises:
            ModelError: the last dimension is not `in_features` wide.
        """
        # A wider input would be read at the wrong places without an error. Under the TorchScript tracer sizes
        # are tensors, and comparing them would warn; what it traces has run eagerly before.
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not tracing and x.shape[-1] != self.in_features:
            raise ModelError(f"a GatheredLinear expected {self.in_features} input columns, got {x.shape[-1]}")
        return functional.linear(x.index_select(-1, self.columns), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Name the widths, for `print(model)`."""
        return (
            f"columns={self.weight.shape[1]} of in_features={self.in_features}, "
            f"out_features={self.out_features}, bias={self.bias is not None}"
        )


def ungathered(layer: GatheredLinear) -> nn.Linear:
    """Write a gathered layer as the ordinary linear layer that computes the same.

    Args:
        layer: reads K of F columns.

    Returns:
        `nn.Linear` with a weight of shape `[out_features, in_features]` that is zero in the columns `layer`
        skips; the bias is the very parameter of `layer`, and `requires_grad` of the weight is kept.
    """
    weight = layer.weight.new_zeros(layer.out_features, layer.in_features)
    weight.index_copy_(1, layer.columns, layer.weight.detach())
    # On the meta device the constructor draws no random numbers: the caller's generator stays where it was.
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias  # type: ignore[assignment]  # torch annotates it as never None
    linear.train(layer.training)
    return linear


def replace_module_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in every place where `model` holds `old`, with the mode and the hooks of `old`.

    Args:
        model: the network.
        old: a submodule, perhaps registered under several names.
        new: takes over.

    Raises:
        ModelError: `old` is `model` itself, so that there is no place to put `new`.
    """
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is old]
    if "" in paths:
        raise ModelError(
            f"expected a network that contains the layer to replace, got the bare {type(old).__name__}; "
            "wrap it in nn.Sequential"
        )
    new.train(old.training)
    # torch offers no public way of moving hooks. Sharing the dicts keeps the handles of `old` alive as well.
    for name, value in vars(old).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_full_backward_hook")):
            vars(new)[name] = value
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)


def ungather_(model: nn.Module) -> None:
    """Replace every `GatheredLinear` of a network by the ordinary linear layer that computes the same.

    Args:
        model: the network; layers that share a weight share it afterwards as well.

    Raises:
        ModelError: layers that share a weight gather differently, so that no ordinary weight serves both.
    """
    shared: dict[int, tuple[GatheredLinear, nn.Linear]] = {}
    for module in list(model.modules()):
        if not isinstance(module, GatheredLinear):
            continue
        linear = ungathered(module)
        first, first_linear = shared.setdefault(id(module.weight), (module, linear))
        if first.in_features != module.in_features or not torch.equal(first.columns, module.columns):
            raise ModelError(
                "two GatheredLinear layers share a weight but read different columns; give each a weight of "
                "its own"
            )
        linear.weight = first_linear.weight
        replace_module_(model, module, linear)
