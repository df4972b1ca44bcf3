"""Layers of a compacted network that replace layers of the dense one, as data: kind and numbers by module path.

    >>> substitutes_of(small)
    {'norm': Substitute(kind='layer_norm', numbers={'channels': 5, 'total': 8})}

| kind | replaces | because |
| --- | --- | --- |
| attention | `nn.MultiheadAttention` | a head, or a channel of its tokens, is gone |
| layer_norm | `nn.LayerNorm`, torchvision's `LayerNorm2d` | its statistics count channels that are gone |
| group_norm | `nn.GroupNorm` | the same |
| rms_norm | `nn.RMSNorm` | the same |
| passage | any layer of a branch that is off | the branch computes nothing any more |
| constant | the last layer of such a branch | what it emits without input |

Attributes that hold a number of channels (``num_heads``, ``hidden_size``) are noted on their modules when they change,
so that an architecture can tell them: see `set_attributes_` and `attributes_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsebayes.errors import ModelError, unknown
from sparsebayes.groups.standins import is_layer_norm_of_images
from sparsebayes.groups.unit_graph import with_items
from sparsebayes.layers import (
    Constant,
    HeadAttention,
    PartialGroupNorm,
    PartialLayerNorm,
    PartialRMSNorm,
    Passage,
)
from sparsebayes.prune.gather import replace_module_
from sparsebayes.prune.json_fields import Fields

__all__ = [
    "Attributes",
    "Substitute",
    "attributes_of",
    "put_substitutes_",
    "read_attributes",
    "read_substitute",
    "set_attributes_",
    "substituted_names",
    "substitutes_of",
]

Attributes = Mapping[str, Mapping[str, "int | list[int]"]]

_NUMBERS = {
    "attention": (),
    "layer_norm": ("channels", "total"),
    "group_norm": ("channels", "total"),
    "rms_norm": ("channels", "total"),
    "passage": ("dim", "stride"),
    "constant": ("channels", "dim", "stride"),
}
_PARTIAL = {PartialLayerNorm: "layer_norm", PartialGroupNorm: "group_norm", PartialRMSNorm: "rms_norm"}
# Where a module notes the attributes that compaction has changed.
_NOTE = "compacted_attributes"


@dataclass(frozen=True)
class Substitute:
    """One replaced layer.

    Args:
        kind: see the table above.
        numbers: what its constructor needs besides the parameters.
    """

    kind: str
    numbers: Mapping[str, int | list[int]]

    def number(self, name: str) -> int:
        """One of the numbers."""
        value = self.numbers[name]
        assert isinstance(value, int)
        return value

    @property
    def stride(self) -> tuple[int, ...]:
        """The stride of a passage or constant."""
        value = self.numbers["stride"]
        assert isinstance(value, list)
        return tuple(value)


def substitutes_of(model: nn.Module) -> dict[str, Substitute]:
    """List the replaced layers of a network by path."""
    found = {}
    for path, module in model.named_modules():
        described = _described(module)
        if described is not None:
            found[path] = described
    return found


def _described(module: nn.Module) -> Substitute | None:
    if isinstance(module, HeadAttention):
        return Substitute("attention", {})
    if isinstance(module, (PartialLayerNorm, PartialGroupNorm, PartialRMSNorm)):
        return Substitute(_PARTIAL[type(module)], {"channels": module.num_channels, "total": module.total})
    if isinstance(module, Passage):
        return Substitute("passage", {"dim": module.dim, "stride": list(module.stride)})
    if isinstance(module, Constant):
        numbers: dict[str, int | list[int]] = {"channels": module.value.numel(), "dim": module.dim}
        return Substitute("constant", {**numbers, "stride": list(module.stride)})
    return None


def read_substitute(entry: Fields) -> Substitute:
    """Read one entry of a document.

    Raises:
        ModelError: it is not valid.
    """
    kind = entry.text("kind")
    if kind not in _NUMBERS:
        raise ModelError(f"{entry.where}: {unknown('kind of layer', kind, _NUMBERS)}")
    entry.only(["kind", *_NUMBERS[kind]])
    numbers: dict[str, int | list[int]] = {}
    for name in _NUMBERS[kind]:
        if name == "stride":
            numbers[name] = entry.integers(name, low=1, high=2**16)
        else:
            numbers[name] = entry.integer(name, low=-1 if name == "dim" else 1, high=2**31)
    return Substitute(kind, numbers)


def substituted_names(
    shapes: Mapping[str, tuple[int, ...]], substitutes: Mapping[str, Substitute]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors once the substitutes stand in it.

    Args:
        shapes: of the network without them.
        substitutes: by path.
    """
    gone = tuple(f"{path}." for path, one in substitutes.items() if one.kind in ("passage", "constant"))
    left = {name: shape for name, shape in shapes.items() if not gone or not name.startswith(gone)}
    for path, one in substitutes.items():
        if one.kind == "constant":
            left[f"{path}.value"] = (one.number("channels"),)
    return left


def put_substitutes_(model: nn.Module, substitutes: Mapping[str, Substitute]) -> None:
    """Replace layers; those that keep their parameters hold the very same ones, still in their old shape.

    Raises:
        ModelError: there is no such layer, or it is of another kind.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, one in substitutes.items():
        old = modules.get(path)
        if old is None:
            raise ModelError(
                f"the architecture replaces a layer {path!r}, which the model lacks; check its builder"
            )
        if isinstance(old, (PartialLayerNorm, PartialGroupNorm, PartialRMSNorm)):
            old.num_channels, old.total = one.number("channels"), one.number("total")
        elif not isinstance(old, (HeadAttention, Passage, Constant)):
            replace_module_(model, old, _made(path, old, one))


def _made(path: str, old: nn.Module, one: Substitute) -> nn.Module:
    if one.kind == "attention" and HeadAttention.fits(old):
        assert isinstance(old, nn.MultiheadAttention)
        return HeadAttention.like(old)
    new: nn.Module
    if one.kind == "layer_norm" and isinstance(old, nn.LayerNorm):
        dim = 1 if is_layer_norm_of_images(old) else -1
        new = PartialLayerNorm(one.number("channels"), total=one.number("total"), dim=dim, eps=old.eps)
        new.weight, new.bias = old.weight, old.bias
        return new
    if one.kind == "group_norm" and isinstance(old, nn.GroupNorm):
        new = PartialGroupNorm(old.num_groups, one.number("channels"), total=one.number("total"), eps=old.eps)
        new.weight, new.bias = old.weight, old.bias
        return new
    if one.kind == "rms_norm" and isinstance(old, nn.RMSNorm):
        new = PartialRMSNorm(one.number("channels"), total=one.number("total"), eps=old.eps)
        new.weight = old.weight
        return new
    if one.kind == "passage":
        return Passage(dim=one.number("dim"), stride=one.stride)
    if one.kind == "constant":
        like = next(iter(old.parameters()), torch.zeros(0))
        value = torch.zeros(one.number("channels"), dtype=like.dtype, device=like.device)
        constant = Constant(value, dim=one.number("dim"), stride=one.stride)
        constant.value.requires_grad_(any(parameter.requires_grad for parameter in old.parameters()))
        return constant
    raise ModelError(
        f"the architecture replaces {path!r} by a layer of kind {one.kind!r}, which cannot replace a "
        f"{type(old).__name__}; check its builder and options"
    )


def set_attributes_(model: nn.Module, attributes: Attributes) -> None:
    """Set attributes that hold numbers of channels, and note them on their modules.

    Raises:
        ModelError: the model has no such attribute.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, values in attributes.items():
        module = modules.get(path)
        for name, value in values.items():
            held: Any = getattr(module, name, None)
            fits = type(held) is int
            if isinstance(value, list):
                fits = isinstance(held, (tuple, list)) and len(held) == len(value)
            if module is None or not fits:
                raise ModelError(
                    f"the architecture sets {name!r} of {path!r}, which the model lacks; check its builder and options"
                )
            setattr(module, name, with_items(held, value) if isinstance(value, list) else value)
        if module is not None:
            setattr(module, _NOTE, {**getattr(module, _NOTE, {}), **values})


def attributes_of(model: nn.Module) -> dict[str, dict[str, int | list[int]]]:
    """List the attributes that `set_attributes_` has set, by module path."""
    return {path: dict(vars(m)[_NOTE]) for path, m in model.named_modules() if _NOTE in vars(m)}


def read_attributes(entry: Fields) -> dict[str, int | list[int]]:
    """Read the attributes of one module.

    Raises:
        ModelError: one is neither a whole number nor a list of them.
    """
    return {
        name: entry.integers(name, low=0, high=2**31)
        if isinstance(value, list)
        else entry.integer(name, low=0, high=2**31)
        for name, value in entry.values.items()
    }
