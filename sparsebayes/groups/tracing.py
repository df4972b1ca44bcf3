"""Coupled units of a network: which slices of which parameters must go together when a channel goes.

A *unit* is one removable channel or neuron: the rows that produce it (with bias and norm entries) and all
slices by which later layers read it. `trace_units` finds them for any model that `torch.export` can export:
it runs a shadow tensor of channel ids through the exported graph (see `sparsebayes.groups.channel_ids`).

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> trace_units(net, torch.zeros(2, 4))
    UnitGraph(3 units; 0: 3)
    >>> [(s.parameter, s.dim, s.reads, s.unit.tolist()) for s in trace_units(net, torch.zeros(2, 4)).slices]
    [('0.weight', 0, False, [0, 1, 2]), ('0.bias', 0, False, [0, 1, 2]), ('2.weight', 1, True, [0, 1, 2])]

Nothing is guessed: channels that reach the model's outputs, or an operation that the tracer does not know,
stay, and `UnitGraph.fixed` says why.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from sparsebayes.errors import ModelError
from sparsebayes.groups.channel_ids import Leaf, Trace
from sparsebayes.groups.exporting import Exported, Failure, exported, line_of, path_of, training_returns_more
from sparsebayes.groups.propagation import propagate
from sparsebayes.groups.resolving import resolve
from sparsebayes.groups.scope import owner
from sparsebayes.groups.standins import traceable
from sparsebayes.groups.trial import Traced, needs_trial, refuted_lines
from sparsebayes.groups.unit_graph import Slice, UnitGraph

__all__ = ["Slice", "UnitGraph", "trace_units"]

# Each round refutes at least one reading of a line, or freezes a module.
MAX_ROUNDS = 40
FEW_UNITS = 500


def trace_units(model: nn.Module, example: Tensor) -> UnitGraph:
    """Find the units of a model.

    Args:
        model: Any model of one tensor that `torch.export` can export. Its mode, gradients and the caller's
            random state are as before afterwards.
        example: An input, ``[B, ...]``; of a batch only the first two are used, unless the model takes none but the
            whole. It is moved to the model's device.

    Returns:
        The units. Models that use more parameters or return more in training mode (auxiliary heads, features for a
        loss) are traced in that mode as well. Where sizes are handed to views, splits or slices, a trial removal has
        shown that the model's code follows (`sparsebayes.groups.trial`).

    Raises:
        ModelError: If the model has no parameters or cannot be exported.
    """
    leaves = _leaves(model)
    model = traceable(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    example, evaluation = _exported(model, example.to(next(model.parameters()).device))
    returns_more = training_returns_more(model, example, evaluation)
    graphs: dict[bool, Exported | Failure] = {}
    levels: dict[str, int] = {}
    frozen: set[str] = set()
    for _ in range(MAX_ROUNDS):
        trace = Trace(levels)
        traced = [Traced(evaluation, propagate(trace, evaluation, leaves, modules, frozen), train=False)]
        notes: list[str] = []
        unreached = _unreached(model, trace)
        if unreached or returns_more:
            training = graphs.get(True) or exported(model, example, train=True)
            graphs[True] = training
            if isinstance(training, Exported):
                values = propagate(trace, training, leaves, modules, frozen)
                traced.append(Traced(training, values, train=True))
                unreached = _unreached(model, trace)
            notes = _notes(unreached, training)
        graph, unit_of_id = resolve(trace, notes)
        if not graph.num_units or not (trace.assumed or levels or any(map(needs_trial, traced))):
            return graph
        refuted: set[str] = set()
        # With few units a wrong reading can agree by chance.
        for seed in (0, 1) if graph.num_units < FEW_UNITS else (0,):
            refuted = refuted or refuted_lines(model, example, graph, unit_of_id, traced, trace.cuts, seed)
        if not refuted:
            return graph
        _give_up_(refuted, trace.assumed, levels, frozen, traced)
    raise ModelError(
        f"the tracer cannot tell how the code at {sorted(refuted)[0]!r} follows when channels go; use a rule that "
        "needs no tracing"
    )


def _exported(model: nn.Module, example: Tensor) -> tuple[Tensor, Exported]:
    """The graph in evaluation mode, and the part of the example that it was made with."""
    result = exported(model, example[:2], train=False)
    if isinstance(result, Failure) and len(example) > 2:  # a batch may hold several frames of each film
        whole = exported(model, example, train=False)
        if isinstance(whole, Exported):
            return example, whole
    if isinstance(result, Failure):
        raise ModelError(
            f"units need a model that torch.export can trace, but it failed: {result.reason}. Rules that need no "
            "tracing: weights, rows, columns, filters, channels, kernels, shapes, blocks, n:m"
        )
    return example[:2], result


def _notes(unreached: Collection[str], training: Exported | Failure) -> list[str]:
    """What to tell of layers that no graph uses, and of training mode where it has none."""
    if isinstance(training, Exported):
        return [f"{name!r} is never used by the model's forward" for name in unreached]
    failed = f"training mode cannot be traced: {training.reason}"
    return [f"{name!r} is not used in evaluation mode, and {failed}" for name in unreached] or [failed]


def _give_up_(
    refuted: Collection[str],
    assumed: Collection[str],
    levels: dict[str, int],
    frozen: set[str],
    traced: Collection[Traced],
) -> None:
    """Take the next reading of each refuted line; where none is left, the modules that run it keep their sizes."""
    for line in refuted:
        if line in assumed:
            levels[line] = levels.get(line, 0) + 1
            continue
        here = {
            path_of(node) for one in traced for node in one.exported.calls if line and line_of(node) == line
        }
        if here <= frozen:
            # An error without a line, or one that freezing has not cured: nothing that was assumed is trusted.
            levels.update(dict.fromkeys(assumed, MAX_ROUNDS))
            here = {
                path_of(node) for one in traced for node in one.exported.calls if line_of(node) in assumed
            }
            here = here or {path_of(node) for one in traced for node in one.exported.calls}
        frozen |= here


def _leaves(model: nn.Module) -> dict[str, Leaf]:
    """Leaf of each parameter and buffer, under all its names."""
    leaves: dict[str, Leaf] = {}
    first: dict[int, Leaf] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, nn.UninitializedParameter):
            raise ModelError(
                f"the lazy parameter {name!r} has no shape yet: run the model once on an example"
            )
        leaves[name] = first.setdefault(id(parameter), Leaf(name, tuple(parameter.shape), True))
    if not leaves:
        raise ModelError("units need a model with parameters, but this one has none")
    for name, buffer in model.named_buffers(remove_duplicate=False):
        leaves[name] = first.setdefault(id(buffer), Leaf(name, tuple(buffer.shape), False))
    return leaves


def _unreached(model: nn.Module, trace: Trace) -> list[str]:
    """Layers none of whose parameters were reached, in order."""
    names = [name for name, _ in model.named_parameters()]
    used = {owner(name) for name in names if name in trace.reached}
    return [layer for layer in dict.fromkeys(map(owner, names)) if layer not in used]
