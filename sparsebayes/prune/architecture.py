"""The shape of a compacted network, as data: enough to rebuild it from its builder, without pickle.

    >>> architecture_of(nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 2))).shapes["1.weight"]
    (2, 1)

An `Architecture` says how the dense network is built (a name and its options), the shape and type of every
parameter and buffer, the groups of its grouped convolutions (which shapes do not tell), and which linear
layers gather their inputs. `prune.reshaping` gives a network these shapes.
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
from sparsebayes.groups import patterns
from sparsebayes.prune.gather import GatheredLinear
from sparsebayes.prune.json_fields import Fields, parse
from sparsebayes.prune.substitutes import (
    Attributes,
    Substitute,
    attributes_of,
    read_attributes,
    read_substitute,
    substitutes_of,
)

__all__ = ["Architecture", "Gather", "architecture_of", "named_tensors"]

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

PLAIN_CONVOLUTIONS = patterns.CONVOLUTIONS
TRANSPOSED_CONVOLUTIONS = patterns.TRANSPOSED
CONVOLUTIONS = PLAIN_CONVOLUTIONS + TRANSPOSED_CONVOLUTIONS


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
