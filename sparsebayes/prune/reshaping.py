"""Giving a network the shape of an architecture.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> reshape_(model, architecture_of(nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 2))))
    >>> model
    Sequential(
      (0): Linear(in_features=4, out_features=1, bias=True)
      (1): Linear(in_features=1, out_features=2, bias=True)
    )

Compaction itself goes this way: what is written to disk is what was checked.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.prune.architecture import (
    CONVOLUTIONS,
    DTYPES,
    PLAIN_CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    Architecture,
    named_tensors,
)
from sparsebayes.prune.gather import GatheredLinear, replace_module_, ungather_
from sparsebayes.prune.substitutes import put_substitutes_, set_attributes_, substituted_names

__all__ = ["reshape_"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip

# Which attribute repeats the size of which dimension of `weight`. Layer and group norms are absent: substitutes
# replace them.
SIZES: tuple[tuple[tuple[type[nn.Module], ...], dict[str, int]], ...] = (
    ((nn.Linear,), {"in_features": 1, "out_features": 0}),
    ((GatheredLinear,), {"out_features": 0}),
    (PLAIN_CONVOLUTIONS, {"in_channels": 1, "out_channels": 0}),
    (TRANSPOSED_CONVOLUTIONS, {"in_channels": 0, "out_channels": 1}),
    (NORMS, {"num_features": 0}),
    ((nn.Embedding,), {"num_embeddings": 0, "embedding_dim": 1}),
    ((nn.PReLU,), {"num_parameters": 0}),
)
# In these dimensions the weight of a grouped convolution holds the channels of one group only.
GROUPED = {"in_channels": 1, "out_channels": 1}


def reshape_(model: nn.Module, architecture: Architecture) -> None:
    """Give a network the shapes of an architecture; the values of reshaped tensors become 0.

    Sizes only shrink. Parameters that several modules share stay shared, `requires_grad` and devices stay,
    and attributes such as `out_channels`, `in_features` and `groups` follow the shapes.

    Args:
        model: the dense network, or one that is already compacted.
        architecture: the shapes to take.

    Raises:
        ModelError: the network has other tensors, fewer dimensions or smaller sizes than the architecture.
    """
    ungather_(model)
    _check_fits(model, architecture)
    put_substitutes_(model, architecture.substitutes)
    for path in architecture.gathers:
        _gather_(model, path, architecture)
    sized = [
        (module, name)
        for module in model.modules()
        for name, size in _sizes(module).items()
        if getattr(module, name)
        == size  # a subclass may mean something else by the attribute: leave it alone
    ]
    changed = {}
    for name, tensor in named_tensors(model).items():
        shape, dtype = architecture.shapes[name], DTYPES[architecture.dtypes[name]]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            changed[name] = torch.zeros(shape, dtype=dtype, device=tensor.device)
    _set_tensors_(model, changed)
    for path, module in model.named_modules():
        if isinstance(module, CONVOLUTIONS):
            _regroup_(path, module, architecture.groups.get(path, 1))
    for module, name in sized:
        setattr(module, name, _sizes(module)[name])
    set_attributes_(model, architecture.attributes)


def _check_fits(model: nn.Module, architecture: Architecture) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    gathered = {f"{path}.columns": (len(gather.columns),) for path, gather in architecture.gathers.items()}
    expected = substituted_names({**shapes, **gathered}, architecture.substitutes)
    if set(expected) != set(architecture.shapes):
        odd = sorted(set(expected) ^ set(architecture.shapes))[0]
        side = "model" if odd in expected else "architecture"
        raise ModelError(
            f"only the {side} has a tensor {odd!r}: expected the model that the architecture was written "
            "for; check its builder and options"
        )
    for name, dense in expected.items():
        shape = architecture.shapes[name]
        if len(shape) != len(dense) or any(n > full for n, full in zip(shape, dense, strict=True)):
            raise ModelError(
                f"{name!r} should have at most the shape {list(dense)} of the model, but the architecture "
                f"says {list(shape)}; check its builder and options"
            )


def _check_gather(linear: nn.Module, path: str, architecture: Architecture) -> nn.Linear:
    gather = architecture.gathers[path]
    if type(linear) is not nn.Linear:
        raise ModelError(
            f"the architecture gathers the inputs of {path!r}, which should be an nn.Linear but is a "
            f"{type(linear).__name__}; check its builder and options"
        )
    if gather.in_features > linear.in_features:
        raise ModelError(
            f"{path!r} has {linear.in_features} inputs, but the architecture gathers from "
            f"{gather.in_features}; check its builder and options"
        )
    shapes, dtypes, width = architecture.shapes, architecture.dtypes, len(gather.columns)
    columns = f"{path}.columns"
    weight = shapes.get(f"{path}.weight", (linear.out_features, width))  # absent where it is another layer's
    if shapes[columns] != (width,) or dtypes[columns] != "int64" or weight[1] != width:
        raise ModelError(
            f"the architecture gathers {width} inputs of {path!r}, but says that '{columns}' is "
            f"{dtypes[columns]} of shape {list(shapes[columns])} and the weight {list(weight)}; write it anew"
        )
    return linear


def _gather_(model: nn.Module, path: str, architecture: Architecture) -> None:
    """Make one linear layer read only some columns of its (already shrunk) input."""
    gather = architecture.gathers[path]
    linear = _check_gather(dict(model.named_modules())[path], path, architecture)
    layer = GatheredLinear(
        gather.in_features, torch.tensor(gather.columns), linear.out_features, bias=linear.bias is not None
    )
    layer.to(device=linear.weight.device)
    # The dense parameters move in, to be cut afterwards like all others: a shared weight stays shared.
    layer.weight = linear.weight
    layer.bias = linear.bias
    replace_module_(model, linear, layer)


def _set_tensors_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Replace parameters and buffers in every module that holds them.

    Args:
        model: the network; tensors that several modules share stay shared.
        values: by first name; those in the place of parameters become parameters with the old `requires_grad`.
    """
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for held in (module.named_parameters, module.named_buffers):
            for name, tensor in held(recurse=False, remove_duplicate=False):
                homes.setdefault(id(tensor), []).append((module, name))
    olds = named_tensors(model)
    for first, value in values.items():
        old = olds[first]
        new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
        for module, name in homes[id(old)]:
            setattr(module, name, new)


def _sizes(module: nn.Module) -> dict[str, int]:
    """The attributes that repeat sizes of the module's own tensors, as those tensors have them."""
    for kinds, dims in SIZES:
        if isinstance(module, kinds):
            # Batch norm without affine parameters still has a size, that of its running statistics.
            tensors = [module.weight, module.running_mean] if kinds is NORMS else [module.weight]
            shapes = [tensor.shape for tensor in tensors if isinstance(tensor, Tensor)]
            groups = module.groups if isinstance(module, CONVOLUTIONS) else 1
            return {
                name: shapes[0][dim] * (groups if GROUPED.get(name) == dim else 1)
                for name, dim in dims.items()
                if shapes
            }
    return {}


def _regroup_(path: str, module: Convolution, groups: int) -> None:
    """Set the number of groups of a convolution whose weight has its final shape."""
    rows = module.weight.shape[0]
    if rows % groups != 0:
        raise ModelError(
            f"the convolution {path!r} has {rows} rows, which {groups} groups do not divide; "
            "check the architecture's groups"
        )
    module.groups = groups
