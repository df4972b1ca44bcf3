"""What remains of a network after a removal, as an architecture: sizes, groups, gathers, and layers to replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.layers import HeadAttention, PartialGroupNorm, PartialLayerNorm, PartialRMSNorm
from sparsebayes.prune.architecture import CONVOLUTIONS, Architecture, Gather, architecture_of
from sparsebayes.prune.branches import DeadBranches
from sparsebayes.prune.cutting import Kept, cut
from sparsebayes.prune.substitutes import Substitute, substituted_names

__all__ = ["gathered_", "remaining"]

Counts = Mapping["tuple[str, str, int | None]", int]
PARTIAL = (PartialLayerNorm, PartialGroupNorm, PartialRMSNorm)


def gathered_(
    kept: Kept,
    small: nn.Module,
    masks: Mapping[str, Tensor],
    called: Callable[[], set[str]],
    *,
    one_each: bool,
) -> dict[str, Gather]:
    """Find linear layers with columns that are masked as a whole, and drop those from `kept`.

    Args:
        kept: positions that stay of each tensor; columns that go are dropped from it.
        small: the network before its tensors shrink.
        masks: of its parameters.
        called: gives the paths of modules whose `forward` runs; asked only if there is such a column.
        one_each: whether a layer of which nothing is read keeps its inputs.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in small.named_modules():
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((path, module))
    gathers = {}
    for name, parameter in small.named_parameters():
        layers = owners[id(parameter)]
        if name not in masks or parameter.ndim != 2 or layers[0][0] == "":
            continue
        if not all(type(module) is nn.Linear for _, module in layers):
            continue
        dims = kept.get(name, {})
        if any(index.numel() == 0 for index in dims.values()):
            continue
        read = cut(masks[name], dims).any(dim=0).cpu()
        # Columns can only go where every use of the weight is a linear layer that can choose its inputs.
        if read.all() or not all(path in called() for path, _ in layers):
            continue
        if not read.any() and one_each:
            continue
        if not read.any():
            raise ModelError(
                f"the layer {layers[0][0]!r} would be emptied: all its {read.numel()} inputs are masked; "
                "keep at least one of them, or exclude the layer"
            )
        columns = read.nonzero().flatten()
        gather = Gather(in_features=read.numel(), columns=tuple(columns.tolist()))
        gathers.update({path: gather for path, _ in layers})
        kept.setdefault(name, {})[1] = dims[1][columns] if 1 in dims else columns
    return gathers


def remaining(
    small: nn.Module,
    kept: Kept,
    gathers: Mapping[str, Gather],
    counts: Counts,
    plan: DeadBranches | None,
) -> Architecture:
    """The architecture that remains of a network without gathers."""
    dense = architecture_of(small)
    shapes, dtypes = dict(dense.shapes), dict(dense.dtypes)
    gone = plan.substitutes if plan is not None else {}
    shapes = substituted_names(shapes, gone)
    for name, dims in kept.items():
        if name not in shapes:
            continue
        if any(index.numel() == 0 for index in dims.values()):
            raise ModelError(
                f"{name!r} would be emptied; keep at least one of its units, or exclude its layer"
            )
        shapes[name] = tuple(dims[d].numel() if d in dims else size for d, size in enumerate(shapes[name]))
    for path, gather in gathers.items():
        shapes[f"{path}.columns"], dtypes[f"{path}.columns"] = (len(gather.columns),), "int64"
    for path in plan.values if plan is not None else ():
        like = next(small.get_submodule(path).parameters(), torch.zeros(0))
        dtypes[f"{path}.value"] = str(like.dtype).removeprefix("torch.")
    groups = {}
    for path, module in small.named_modules():
        if isinstance(module, CONVOLUTIONS) and module.groups != 1 and path not in gone:
            groups[path] = _groups_left(path, module, kept)
    substitutes, attributes = _replaced(small, kept, counts)
    return replace(
        dense,
        substitutes={**dense.substitutes, **substitutes, **gone},
        attributes=attributes,
        shapes=shapes,
        dtypes={name: dtypes[name] for name in shapes},
        groups={p: n for p, n in groups.items() if n != 1},
        gathers=gathers,
    )


def _replaced(
    small: nn.Module, kept: Kept, counts: Counts
) -> tuple[dict[str, Substitute], dict[str, dict[str, int | list[int]]]]:
    """Layers to replace, since no layer of PyTorch computes what is left of them, and attributes to set."""
    modules = dict(small.named_modules(remove_duplicate=False))
    substitutes: dict[str, Substitute] = {}
    attributes: dict[str, dict[str, int | list[int]]] = {}
    for (path, name, position), value in counts.items():
        module = modules[path]
        kind = _norm_kind(module, path, name, counts)
        if kind:
            total = module.total if isinstance(module, PARTIAL) else _width(module)
            substitutes[path] = Substitute(kind, {"channels": value, "total": total})
        elif position is None:
            attributes.setdefault(path, {})[name] = value
        else:
            held = attributes.setdefault(path, {}).setdefault(name, list(getattr(module, name)))
            assert isinstance(held, list)
            held[position] = value
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        if HeadAttention.fits(module) and any(name.startswith(prefix) for name in kept):
            substitutes[path] = Substitute("attention", {})
    return substitutes, attributes


def _norm_kind(module: nn.Module, path: str, attribute: str, counts: Counts) -> str:
    """Kind of the substitute that a shrunk norm needs; empty where none is needed."""
    if isinstance(module, (nn.LayerNorm, PartialLayerNorm)) and attribute == "normalized_shape":
        return "layer_norm"
    if isinstance(module, (nn.RMSNorm, PartialRMSNorm)) and attribute == "normalized_shape":
        return "rms_norm"
    is_group_norm = isinstance(module, (nn.GroupNorm, PartialGroupNorm)) and attribute == "num_channels"
    # With a group per channel the groups go with the channels.
    return "group_norm" if is_group_norm and (path, "num_groups", None) not in counts else ""


def _width(norm: nn.Module) -> int:
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.normalized_shape[0]


def _groups_left(path: str, module: nn.Module, kept: Kept) -> int:
    """Groups of a grouped convolution: a depthwise one loses some, in others all groups shrink alike."""
    assert isinstance(module, CONVOLUTIONS)
    index = kept.get(f"{path}.weight", {}).get(0)
    if index is None or module.groups != module.in_channels:
        return module.groups
    rows = module.weight.shape[0]
    return index.numel() * module.groups // rows
