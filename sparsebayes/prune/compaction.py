"""From a masked network to a smaller ordinary one that computes the same, checked every time.

    >>> masks = prune_(model, grouping, selection)
    >>> small = compact(model, masks.masks, example)
    >>> small.summary
    Summary(conv1 6 of 20, conv2 11 of 50, fc1 42 of 500; fc1 reads 118 of 176 inputs)

1. Find the units that the masks kill (`prune.liveness`), following deaths up and down the network.
2. Cut their rows, columns, biases, norm entries and running statistics out of every tensor.
3. A linear layer with input columns that are masked as a whole, although what they come from lives on,
   gathers the others (`prune.gather`).
4. Compare: masked network == compacted network, or refuse (`prune.parity`).

Entries that are masked within what survives stay, as zeros: see `Compaction.masks`. The given network is not
changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.groups.tracing import UnitGraph, trace_units
from sparsebayes.groups.unit_graph import counts_left
from sparsebayes.networks import copied
from sparsebayes.prune.architecture import Architecture, architecture_of, named_tensors
from sparsebayes.prune.branches import DeadBranches, dead_branches, emptied_layers, with_one_unit_each
from sparsebayes.prune.constants import constant_units, fold_constants_
from sparsebayes.prune.cutting import Kept, cut, is_gone
from sparsebayes.prune.gather import GatheredLinear, ungather_
from sparsebayes.prune.liveness import check_graph, kept_indices, living_units
from sparsebayes.prune.masking import apply_masks_, check_masks
from sparsebayes.prune.parity import Reference, called_modules, constant_output, inputs_for
from sparsebayes.prune.remaining import gathered_, remaining
from sparsebayes.prune.reshaping import reshape_

__all__ = ["Compaction", "Kept", "Summary", "compact", "cut", "trace_compacted"]


@dataclass(frozen=True, repr=False)
class Summary:
    """What a compaction removed.

    Args:
        params_before: number of parameter entries of the given network.
        params_after: that of the compacted network.
        units: per layer, (units that stay, units).
        gathers: per linear layer that gathers, (columns it reads, width of its input).
        fixed: what could not be removed and why, a sentence each.
        error: largest difference from the masked network, relative to the largest output.
    """

    params_before: int
    params_after: int
    units: Mapping[str, tuple[int, int]]
    gathers: Mapping[str, tuple[int, int]]
    fixed: tuple[str, ...]
    error: float

    def __repr__(self) -> str:
        units = ", ".join(f"{name} {kept} of {total}" for name, (kept, total) in self.units.items())
        gathers = ", ".join(
            f"{name} reads {k} of {total} inputs" for name, (k, total) in self.gathers.items()
        )
        parts = [f"{self.params_before} -> {self.params_after} parameters", units, gathers]
        return f"Summary({'; '.join(part for part in parts if part)})"


@dataclass(frozen=True, eq=False)
class Compaction:
    """A compacted network and how it came from the given one.

    Args:
        model: the smaller network, with its own tensors; modes, `requires_grad`, hooks, types and devices are
            those of the given one.
        kept: for each parameter and buffer that shrank, dimension to the int64 positions that stayed. Columns
            of gathers are absent: they are positions themselves, and change as their inputs shrink.
        masks: of the compacted network: entries that are still held at zero, True where an entry stays; only
            parameters that have such entries.
        architecture: describes `model`, without a builder.
        summary: what went.
    """

    model: nn.Module
    kept: Kept
    masks: dict[str, Tensor]
    architecture: Architecture
    summary: Summary


def compact(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None,
    example: Tensor,
    *,
    units: UnitGraph | None = None,
    check: Tensor | None = None,
) -> Compaction:
    """Remove what the masks switch off, and check that nothing else changed.

    Args:
        model: any network that `trace_units` can follow, also one that was compacted before; its masked
            entries need not be zero.
        masks: parameter name to bool of the parameter's shape, True where an entry stays. None, or masks that
            mask nothing, give a copy.
        example: an input batch, of shape `[B, ...]`; moved to the network's device, as `check` is.
        units: the traced units of `model`, to save tracing it again. A network that gathers is always traced
            anew, since the inputs in front of a gather do not appear in its own graph.
        check: further inputs to compare on, such as a batch of real images.

    Returns:
        The compacted network with its history.

    Raises:
        ModelError: masks do not fit, a layer would be emptied, the network cannot be traced or copied, or the
            compacted network would not compute what the masked one does.
    """
    masks = dict(masks or {})
    check_masks(model, masks)
    device = next((parameter.device for parameter in model.parameters()), example.device)
    inputs = inputs_for(example.to(device), None if check is None else check.to(device))
    masked = copied(model)
    apply_masks_(masked, masks)
    small = copied(masked)
    kept: Kept = {}
    alive: dict[str, tuple[int, int]] = {}
    fixed: tuple[str, ...] = ()
    if not all(bool(mask.all()) for mask in masks.values()):
        columns = _columns(small)
        ungather_(small)
        graph = units if units is not None and not columns else trace_units(small, inputs[0])
        wide = _widened(masks, columns, small)
        small, kept, alive, error = _shrunk(small, graph, wide, masked, inputs)
        fixed = graph.fixed
        _narrow_(kept, columns)
    else:
        error = Reference(masked, inputs).compare(small)
    left = {name: mask for name, mask in masks.items() if not is_gone(name, kept)}
    cut_masks = {name: cut(mask, kept.get(name, {})) for name, mask in left.items()}
    architecture = architecture_of(small)
    return Compaction(
        model=small,
        kept=kept,
        masks={name: mask for name, mask in cut_masks.items() if not bool(mask.all())},
        architecture=architecture,
        summary=Summary(
            params_before=sum(parameter.numel() for parameter in model.parameters()),
            params_after=sum(parameter.numel() for parameter in small.parameters()),
            units=alive,
            gathers={
                path: (len(gather.columns), gather.in_features)
                for path, gather in architecture.gathers.items()
            },
            fixed=fixed,
            error=error,
        ),
    )


def trace_compacted(model: nn.Module, example: Tensor) -> UnitGraph:
    """Trace the units of a network that may gather.

    The tracer cannot follow channels through a gather, whose positions are numbers in a buffer. So a network
    that gathers is traced with ordinary linear layers, of which the columns are then picked.

    Args:
        model: dense or compacted.
        example: an input batch, of shape `[B, ...]`.

    Returns:
        The units, over the parameters of `model` as they are.

    Raises:
        ModelError: the network cannot be traced or copied.
    """
    columns = _columns(model)
    if not columns:
        return trace_units(model, example)
    dense = copied(model)
    ungather_(dense)
    graph = trace_units(dense, example)
    slices = tuple(
        replace(piece, unit=piece.unit[columns[piece.parameter]])
        if piece.dim == 1 and piece.parameter in columns
        else piece
        for piece in graph.slices
    )
    return replace(graph, slices=slices)


def _shrunk(
    dense: nn.Module,
    graph: UnitGraph,
    masks: Mapping[str, Tensor],
    masked: nn.Module,
    inputs: list[Tensor],
) -> tuple[nn.Module, Kept, dict[str, tuple[int, int]], float]:
    """Cut everything dead out of a network without gathers, and compare; see `Compaction` for what comes back."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(dense).items()}
    check_graph(graph, shapes)
    reference = Reference(masked, inputs)
    called = cache(partial(called_modules, masked, inputs[0]))
    living = living_units(graph, masks, shapes)
    ways: list[tuple[nn.Module, Mapping[str, Tensor], Tensor, bool]] = []
    if bool((constant_units(graph, masks, shapes) & living).any()):
        folded = copied(dense)
        folded_masks = fold_constants_(folded, graph, masks, living, inputs[0])
        if any(masks.get(name) is not mask for name, mask in folded_masks.items()):
            ways.append((folded, folded_masks, living_units(graph, folded_masks, shapes), True))
    # What takes a constant over may also be read by code that the units do not show: then nothing is folded.
    ways.append((dense, masks, living, False))
    emptied = emptied_layers(graph, ways[0][2])
    if emptied:
        _check_reached(masked, inputs, emptied[0])
    for way in ways:
        try:
            return _cut_and_compared(*way, graph, masked, inputs[0], reference, called)
        except ModelError:
            if way is ways[-1]:
                raise
    raise AssertionError("the last way returns or raises")


def _cut_and_compared(
    dense: nn.Module,
    masks: Mapping[str, Tensor],
    living: Tensor,
    folded: bool,
    graph: UnitGraph,
    masked: nn.Module,
    example: Tensor,
    reference: Reference,
    called: Callable[[], set[str]],
) -> tuple[nn.Module, Kept, dict[str, tuple[int, int]], float]:
    """Cut all but the living units out by the first plan that passes the comparison."""
    emptied = bool(emptied_layers(graph, living))
    for plan in _plans(masked, graph, living, example, emptied=emptied):
        small = copied(dense) if emptied else dense
        # Without a plan one unit of each layer stays, as zeros.
        left = with_one_unit_each(graph, living) if plan is None else living
        kept = kept_indices(graph, left)
        try:
            _shrink_(small, graph, left, masks, called, kept, plan, one_each=emptied and plan is None)
            error = reference.compare(small, folded=folded or plan is not None)
        except ModelError:
            if plan is None:
                raise
            continue
        return small, kept, _units_per_layer(graph, left), error
    raise AssertionError("the last plan returns or raises")


def _plans(
    masked: nn.Module, graph: UnitGraph, living: Tensor, example: Tensor, *, emptied: bool
) -> Iterator[DeadBranches | None]:
    """Ways to replace dead branches, the most thorough first; the last is to keep one unit of each layer."""
    for fold in (True, False) if emptied else ():
        plan = dead_branches(masked, graph, living, example, fold=fold)
        if plan is not None:
            yield plan
    yield None


def _shrink_(
    small: nn.Module,
    graph: UnitGraph,
    living: Tensor,
    masks: Mapping[str, Tensor],
    called: Callable[[], set[str]],
    kept: Kept,
    plan: DeadBranches | None,
    *,
    one_each: bool,
) -> None:
    """Cut all but the living units out of a network; adds the columns that go to `kept`."""
    before = named_tensors(small)
    constants: dict[str, Tensor] = {}
    if plan is not None:
        plan = plan.narrowed(kept)
        paths = tuple(f"{path}." for path in plan.substitutes)
        nothing = torch.zeros(0, dtype=torch.int64)
        kept.update({name: {0: nothing} for name in before if name.startswith(paths)})
        constants = {f"{path}.value": value for path, value in plan.values.items()}
    gathers = gathered_(kept, small, masks, called, one_each=one_each)
    reshape_(small, remaining(small, kept, gathers, counts_left(graph, living), plan))
    with torch.no_grad():
        for name, tensor in named_tensors(small).items():
            if name in constants:
                tensor.copy_(constants[name])
            elif name in kept:
                tensor.copy_(cut(before[name], kept[name]))


def _check_reached(masked: nn.Module, inputs: list[Tensor], layer: str) -> None:
    """Refuse a network that no longer depends on its input: a layer that everything passes through is empty."""
    if constant_output(masked, inputs):
        raise ModelError(
            f"the layer {layer!r} would be emptied, and with it every path from the input to the output; keep at "
            "least one of its units (min_keep), or exclude the layer"
        )


def _units_per_layer(graph: UnitGraph, living: Tensor) -> dict[str, tuple[int, int]]:
    index = graph.layer_index.cpu()
    left = torch.bincount(index[living], minlength=len(graph.layers)).tolist()
    had = torch.bincount(index, minlength=len(graph.layers)).tolist()
    return {name: (n, total) for name, n, total in zip(graph.layers, left, had, strict=True)}


def _columns(small: nn.Module) -> dict[str, Tensor]:
    """The columns that each gathered weight reads, by the weight's name."""
    names = {id(parameter): name for name, parameter in small.named_parameters()}
    return {
        names[id(module.weight)]: module.columns.cpu()
        for module in small.modules()
        if isinstance(module, GatheredLinear)
    }


def _widened(
    masks: Mapping[str, Tensor], columns: Mapping[str, Tensor], small: nn.Module
) -> dict[str, Tensor]:
    """Masks of gathered weights as masks of the ordinary weights: columns that are not read are masked."""
    wide = {name: mask.cpu() for name, mask in masks.items()}
    parameters = dict(small.named_parameters())
    for name, index in columns.items():
        full = torch.zeros(parameters[name].shape, dtype=torch.bool)
        full[:, index] = wide.get(name, torch.ones(full.shape[0], index.numel(), dtype=torch.bool))
        wide[name] = full
    return wide


def _narrow_(kept: Kept, columns: Mapping[str, Tensor]) -> None:
    """Express what is kept of gathered weights by their own columns instead of those of their inputs."""
    for name, index in columns.items():
        dims = kept.get(name, {})
        if 1 in dims:
            dims[1] = torch.searchsorted(index, dims[1])
            if dims[1].numel() == index.numel():
                del dims[1]
        if name in kept and not dims:
            del kept[name]
