"""The shape of a compacted network, as data: enough to rebuild it from its builder, without pickle.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> small = architecture_of(nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 2)))
    >>> reshape_(model, small)
    >>> model
    Sequential(
      (0): Linear(in_features=4, out_features=1, bias=True)
      (1): Linear(in_features=1, out_features=2, bias=True)
    )

An `Architecture` says how the dense network is built (a name and its options), the shape and type of every
parameter and buffer, the groups of its grouped convolutions (which shapes do not tell), and which linear
layers gather their inputs. Compaction itself goes through `reshape_`: what is written to disk is what was
checked.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError, unknown
from sparsebayes.prune.gather import GatheredLinear, replace_module_, ungather_
from sparsebayes.prune.json_fields import Fields, parse
from sparsebayes.prune.substitutes import (
    Attributes,
    Substitute,
    attributes_of,
    put_substitutes_,
    read_attributes,
    read_substitute,
    set_attributes_,
    substituted_names,
    substitutes_of,
)

__all__ = ["Architecture", "Gather", "architecture_of", "named_tensors", "reshape_", "set_tensor_"]

VERSION = 1
_FIELDS = (
    "version", "builder", "options", "tensors", "groups", "gathers", "substitutes", "attributes"
)  # fmt: skip
MAX_DIMS = 8
MAX_ELEMENTS = 2**36  # 256 GiB in float32: more is a damaged file, not a network
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    )
}

PLAIN_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = PLAIN_CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS
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


@dataclass(frozen=True)
class Gather:
    """The input columns that one linear layer reads.

    Args:
        in_features: width of the input before the gather.
        columns: the positions that are read, strictly increasing.
    """

    in_features: int
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """How to build a network of given shapes.

    Args:
        shapes: of every parameter and buffer, by its first name.
        dtypes: type of each of them, such as "float32".
        groups: number of groups of each convolution that has more than one, by module path.
        gathers: the linear layers that read only some columns, by module path.
        substitutes: the other layers that were replaced, by module path.
        attributes: numbers of channels that modules hold, where they have changed: by module path and name.
        builder: name of the model, or "package.module:function"; None when it is not known.
        options: what the builder is called with; JSON values only.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    groups: Mapping[str, int] = field(default_factory=dict)
    gathers: Mapping[str, Gather] = field(default_factory=dict)
    substitutes: Mapping[str, Substitute] = field(default_factory=dict)
    attributes: Attributes = field(default_factory=dict)
    builder: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> str:
        """Write as JSON, one tensor or layer per line.

        Raises:
            ModelError: the options are not JSON values.
        """
        try:
            options = json.dumps(dict(self.options), allow_nan=False)
        except (TypeError, ValueError) as cause:
            raise ModelError(
                f"the options of model {self.builder!r} should be JSON values, to be saved with it: {cause}"
            ) from cause
        tensors = {name: {"dtype": self.dtypes[name], "shape": list(s)} for name, s in self.shapes.items()}
        gathers = {
            path: {"in_features": gather.in_features, "columns": list(gather.columns)}
            for path, gather in self.gathers.items()
        }
        substitutes = {path: {"kind": one.kind, **one.numbers} for path, one in self.substitutes.items()}
        return (
            "{\n"
            f' "version": {VERSION},\n'
            f' "builder": {json.dumps(self.builder)},\n'
            f' "options": {options},\n'
            f' "tensors": {_one_line_each(tensors)},\n'
            f' "groups": {_one_line_each(self.groups)},\n'
            f' "gathers": {_one_line_each(gathers)},\n'
            f' "substitutes": {_one_line_each(substitutes)},\n'
            f' "attributes": {_one_line_each(self.attributes)}\n'
            "}\n"
        )

    @staticmethod
    def from_json(text: str, *, where: str = "architecture.json") -> Architecture:
        """Read what `to_json` wrote.

        Args:
            text: the document.
            where: names it in messages.

        Raises:
            ModelError: not such a document; the message names the field.
        """
        document = parse(text, where=where, error=ModelError)
        document.only([*_FIELDS])
        document.integer("version", low=VERSION, high=VERSION)
        tensors = document.fields("tensors")
        entries = {name: tensors.fields(name) for name in tensors.values}
        groups = document.fields("groups")
        gathers = document.fields("gathers")
        substitutes, attributes = document.fields("substitutes"), document.fields("attributes")
        return Architecture(
            shapes={name: _read_shape(entry) for name, entry in entries.items()},
            dtypes={name: _read_dtype(entry) for name, entry in entries.items()},
            groups={path: groups.integer(path, low=2, high=2**31) for path in groups.values},
            gathers={path: _read_gather(gathers.fields(path)) for path in gathers.values},
            substitutes={path: read_substitute(substitutes.fields(path)) for path in substitutes.values},
            attributes={path: read_attributes(attributes.fields(path)) for path in attributes.values},
            builder=None if document.value("builder") is None else document.text("builder"),
            options=document.fields("options").values,
        )


def _one_line_each(items: Mapping[str, object]) -> str:
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in items.items()]
    return "{\n" + ",\n".join(lines) + "\n }" if lines else "{}"


def _read_shape(entry: Fields) -> tuple[int, ...]:
    entry.only(["dtype", "shape"])
    shape = tuple(entry.integers("shape", low=1, high=2**31))
    if len(shape) > MAX_DIMS or math.prod(shape) > MAX_ELEMENTS:
        raise entry.fail("shape", f"at most {MAX_DIMS} sizes with a product of at most {MAX_ELEMENTS}")
    return shape


def _read_dtype(entry: Fields) -> str:
    name = entry.text("dtype")
    if name not in DTYPES:
        raise ModelError(f"{entry.where}: {unknown('dtype', name, DTYPES)}")
    return name


def _read_gather(entry: Fields) -> Gather:
    entry.only(["in_features", "columns"])
    in_features = entry.integer("in_features", low=1, high=2**31)
    columns = entry.integers("columns", low=0, high=in_features - 1)
    if not columns or any(b <= a for a, b in itertools.pairwise(columns)):
        raise entry.fail("columns", "a non-empty list that rises strictly")
    return Gather(in_features, tuple(columns))


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """List every parameter and buffer once, under its first name; buffers that are not persistent too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def architecture_of(
    model: nn.Module, *, builder: str | None = None, options: Mapping[str, object] | None = None
) -> Architecture:
    """Describe a network as it stands.

    Args:
        model: dense or compacted.
        builder: how its dense form is built: a model's name, or "package.module:function".
        options: what the builder is called with.

    Returns:
        Its architecture.

    Raises:
        ModelError: a tensor is of a type that cannot be saved.
    """
    tensors = named_tensors(model)
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise ModelError(
                f"{name!r} is of type {dtype}, expected one of {', '.join(DTYPES)}; convert it first"
            )
    modules = dict(model.named_modules())
    return Architecture(
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes=dtypes,
        groups={
            path: module.groups
            for path, module in modules.items()
            if isinstance(module, CONVOLUTIONS) and module.groups != 1
        },
        gathers={
            path: Gather(module.in_features, tuple(module.columns.tolist()))
            for path, module in modules.items()
            if isinstance(module, GatheredLinear)
        },
        substitutes=substitutes_of(model),
        attributes=attributes_of(model),
        builder=builder,
        options=dict(options or {}),
    )


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
    for name, tensor in named_tensors(model).items():
        shape, dtype = architecture.shapes[name], DTYPES[architecture.dtypes[name]]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            set_tensor_(model, tensor, torch.zeros(shape, dtype=dtype, device=tensor.device))
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


def set_tensor_(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Replace a parameter or buffer in every module that holds it.

    Args:
        model: the network.
        old: the very tensor to replace.
        new: the values; becomes a parameter with the `requires_grad` of `old` where `old` is one.
    """
    parameter = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else None
    for module in list(model.modules()):
        parameters = list(module.named_parameters(recurse=False, remove_duplicate=False))
        buffers = list(module.named_buffers(recurse=False, remove_duplicate=False))
        for name in [name for name, tensor in parameters if tensor is old]:
            setattr(module, name, parameter)
        for name in [name for name, tensor in buffers if tensor is old]:
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
