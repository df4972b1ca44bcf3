"""Branches of which no unit is left: their layers go, and what they still add to a sum stays as a constant.

A branch is dead when a layer in it loses all its units. The layer that reads them then emits its bias alone, and the
norm behind it one number per channel. So

* layers without units become a `Passage`,
* the layer that read them becomes a `Constant`, or a passage where a batch norm follows, which becomes the constant.

The constant is what the masked network emits in evaluation mode; it is measured there, and must not vary over images
and positions. Where this does not apply (a dead branch of a concatenation, strides that change sizes in another way,
raw parameters), one unit of each layer stays, as zeros.

    >>> plan = dead_branches(masked, graph, living, example)
    >>> plan.substitutes
    {'conv1': Substitute('passage', ...), 'bn2': Substitute('constant', ...)}
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsebayes.groups.scope import owner
from sparsebayes.groups.tracing import UnitGraph
from sparsebayes.groups.unit_graph import stays
from sparsebayes.prune.architecture import PLAIN_CONVOLUTIONS
from sparsebayes.prune.cutting import Kept
from sparsebayes.prune.observing import BATCH_NORMS, Seen, norm_behind, observe
from sparsebayes.prune.substitutes import Substitute

__all__ = ["DeadBranches", "dead_branches", "emptied_layers", "with_one_unit_each"]


@dataclass(frozen=True, eq=False)
class DeadBranches:
    """How dead branches are replaced.

    Args:
        substitutes: by module path.
        values: of the constants, by module path.
    """

    substitutes: dict[str, Substitute]
    values: dict[str, Tensor]

    def narrowed(self, kept: Kept) -> DeadBranches:
        """The plan for a network of which other units go as well.

        Args:
            kept: positions that stay of each parameter and buffer, those of the branch included.
        """
        substitutes, values = dict(self.substitutes), dict(self.values)
        for path, value in self.values.items():
            owned = (kept.get(f"{path}.{name}", {}).get(0) for name in ("weight", "bias", "running_mean"))
            index = next((one for one in owned if one is not None), None)
            if index is not None:
                values[path] = value[index.to(value.device)]
                numbers = {**substitutes[path].numbers, "channels": len(index)}
                substitutes[path] = Substitute("constant", numbers)
        return DeadBranches(substitutes, values)


def emptied_layers(graph: UnitGraph, living: Tensor) -> list[str]:
    """Layers all of whose units are gone."""
    index = graph.layer_index.cpu()
    counts = torch.bincount(index[living], minlength=len(graph.layers))
    had = torch.bincount(index, minlength=len(graph.layers))
    return [name for name, n, total in zip(graph.layers, counts, had, strict=True) if total and not n]


def with_one_unit_each(graph: UnitGraph, living: Tensor) -> Tensor:
    """The living units, and the first unit of each layer that has none: masked, it changes nothing."""
    result = living.clone()
    emptied = set(emptied_layers(graph, living))
    for number, name in enumerate(graph.layers):
        if name in emptied:
            result[(graph.layer_index.cpu() == number).nonzero().flatten()[0]] = True
    return result


def dead_branches(
    masked: nn.Module, graph: UnitGraph, living: Tensor, example: Tensor, *, fold: bool
) -> DeadBranches | None:
    """Plan the replacement of all dead branches.

    Args:
        masked: the network with its masks applied.
        graph: its units.
        living: bool ``[U]``: units that stay.
        example: an input batch.
        fold: whether a batch norm behind a branch becomes part of its constant.

    Returns:
        The plan; None if some dead layer is of a kind that cannot be replaced.
    """
    producers, readers = _emptied_modules(graph, living)
    layers = dict(masked.named_modules())
    if not readers or any(not _replaceable(layers.get(path)) for path in producers | readers):
        return None
    seen = observe(masked, producers | readers, example)
    substitutes: dict[str, Substitute] = {}
    values: dict[str, Tensor] = {}
    for path in sorted(producers | readers):
        stride = _stride(layers[path], seen.get(path))
        if stride is None:
            return None
        dim = -1 if isinstance(layers[path], nn.Linear) else 1
        substitutes[path] = Substitute("passage", {"dim": dim, "stride": list(stride)})
        if path in producers:
            continue
        result, place = seen[path].value, path
        norm = norm_behind(layers, seen, path) if fold else None
        if norm is not None:
            result, place, stride = seen[norm].value, norm, ()
        value = _per_channel(result, dim)
        if value is None:
            return None
        numbers: dict[str, int | list[int]] = {"channels": len(value), "dim": dim, "stride": list(stride)}
        substitutes[place] = Substitute("constant", numbers)
        values[place] = value
    return DeadBranches(substitutes, values)


def _emptied_modules(graph: UnitGraph, living: Tensor) -> tuple[set[str], set[str]]:
    """Modules that produce only dead units, and further modules that read only dead units."""
    producers: set[str] = set()
    readers: set[str] = set()
    for piece in graph.slices:
        if not bool(stays(living, piece.unit).any()):
            (readers if piece.reads else producers).add(owner(piece.parameter))
    return producers, readers - producers


def _replaceable(layer: nn.Module | None) -> bool:
    return isinstance(layer, (*PLAIN_CONVOLUTIONS, nn.Linear, *BATCH_NORMS, nn.PReLU)) and type(
        layer
    ).__module__.startswith("torch.nn.")


def _stride(layer: nn.Module, seen: Seen | None) -> tuple[int, ...] | None:
    """The stride of a layer; None if it is not called once, or changes sizes in another way than by a stride."""
    if seen is None or seen.calls != 1:
        return None
    if not isinstance(layer, PLAIN_CONVOLUTIONS):
        return ()
    if isinstance(layer.padding, str):
        return layer.stride if layer.padding == "same" else None
    same = all(
        2 * padding == dilation * (kernel - 1)
        for padding, dilation, kernel in zip(layer.padding, layer.dilation, layer.kernel_size, strict=True)
    )
    return tuple(layer.stride) if same else None


def _per_channel(result: Tensor, dim: int) -> Tensor | None:
    """The constant along ``dim``; None if the result varies along other dims."""
    value = result
    for other in reversed([d for d in range(result.ndim) if d != dim % result.ndim]):
        value = value.select(other, 0)
    shape = [1] * result.ndim
    shape[dim] = -1
    scale = result.abs().max().clamp(min=1.0)
    return value if bool(((result - value.view(shape)).abs() <= 1e-6 * scale).all()) else None
