"""Rules: from a model to a grouping, by name.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> make_grouping(net, "rows")
    Grouping('rows', 5 groups; 0: 3, 2: 2)
    >>> make_grouping(net, "rows+columns", exclude=("2",))
    Grouping('rows+columns', 7 groups; 0: 3, 0 (columns): 4)

The plain rules are those of `sparsebayes.groups.patterns`: they look at one weight at a time and need no
example input. ``units``, ``features`` and ``branches`` trace the model. Biases are in no group of a plain rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from sparsebayes.errors import GroupingError
from sparsebayes.groups.branch_rules import branches
from sparsebayes.groups.grouping import Grouping, Labels, Quota
from sparsebayes.groups.patterns import PATTERNS, Layer, ParsedPattern, layers_of, parse_pattern
from sparsebayes.groups.scope import EVERYTHING, Scope
from sparsebayes.groups.stacking import concatenate
from sparsebayes.groups.tracing import UnitGraph, trace_units
from sparsebayes.groups.unit_rules import feature_grouping, features, needed, unit_grouping, units

__all__ = ["RULES", "Rule", "Spec", "check_spec", "make_grouping"]

Rule = Callable[[nn.Module, "Tensor | None"], Grouping]
Spec = str | Rule | Grouping


def plain(
    model: nn.Module, example: Tensor | None = None, scope: Scope = EVERYTHING, *, name: str
) -> Grouping:
    """Apply a plain pattern to every layer in the scope to which it applies.

    Args:
        model: The model.
        example: Not used; plain rules need no input.
        scope: Layers, by module path or parameter name.
        name: Name of the pattern, such as ``"filters"`` or ``"2:4"``.

    Raises:
        GroupingError: If the pattern is unknown or applies to no layer in the scope, if a weight is computed
            from others, or if the inputs of a layer cannot be divided into pools of m.
    """
    parsed = parse_pattern(name)
    labels: list[Labels] = []
    names: list[str] = []
    counts: list[int] = []
    pools: list[Tensor] = []
    known = layers_of(model)
    for layer in known:
        index = parsed.pattern(layer) if scope.covers(layer.name, f"{layer.name}.weight") else None
        if index is None:
            continue
        if not layer.parameter:
            raise GroupingError(
                f"the weight of {layer.name!r} is computed from other parameters: remove its "
                f"parametrization, or exclude {layer.name!r}"
            )
        if parsed.of:
            pools.append(_pools(layer, parsed, name) + sum(int(pool.max()) + 1 for pool in pools[-1:]))
        labels.append(Labels(layer.parameter, layer.shape, index + sum(counts)))
        names.append(layer.name)
        counts.append(int(index.max()) + 1)
    if not labels:
        _refuse(name, scope, [layer.name for layer in known])
    layer_index = torch.repeat_interleave(torch.tensor(counts))
    quota = Quota(torch.cat(pools), parsed.keep) if pools else None
    return Grouping(name, tuple(labels), tuple(names), layer_index, quota)


def _pools(layer: Layer, parsed: ParsedPattern, name: str) -> Tensor:
    """Pool of each weight, flat: runs of m along the input dim, at equal output and kernel position."""
    dim = 0 if layer.kind == "transposed" else 1
    size = layer.shape[dim]
    if size % parsed.of:
        raise GroupingError(
            f"{name!r} needs layers whose inputs divide by {parsed.of}, but {layer.name!r} has {size} per "
            f"output: exclude {layer.name!r}"
        )
    shape = [*layer.shape]
    shape[dim] //= parsed.of
    pool = torch.arange(torch.Size(shape).numel()).view(shape)
    return pool.repeat_interleave(parsed.of, dim).flatten()


def _refuse(name: str, scope: Scope, layers: Sequence[str]) -> None:
    known = ", ".join(layers) or "none"
    raise GroupingError(f"the rule {name!r} found nothing to group ({scope}); layers of the model: {known}")


ScopedRule = Callable[..., Grouping]

# Every rule here takes (model, example, scope); as a `Rule` it is called with the first two.
RULES: Mapping[str, ScopedRule] = MappingProxyType(
    {
        **{name: partial(plain, name=name) for name in (*PATTERNS, "blocks", "1:4", "2:4")},
        "units": units,
        "features": features,
        "branches": branches,
    }
)

# Those that look at the traced units alone, as functions of (model, units, scope): one trace serves them all.
_OF_UNITS: Mapping[str, Callable[[nn.Module, UnitGraph, Scope], Grouping]] = MappingProxyType(
    {"units": unit_grouping, "features": feature_grouping}
)


def check_spec(spec: str) -> None:
    """Refuse a spec that names no rule; used where no model is at hand yet.

    Args:
        spec: One name, or several joined by ``+``: ``"filters"``, ``"blocks:8x8"``, ``"1:8"``,
            ``"units+features"``.

    Raises:
        GroupingError: If a name is unknown, with the choices and the nearest one.
    """
    for name in spec.split("+"):
        _rule(name.strip())


def _rule(name: str) -> ScopedRule:
    if name in RULES:
        return RULES[name]
    parse_pattern(name, others=("units", "features", "branches"))
    return partial(plain, name=name)


def make_grouping(
    model: nn.Module,
    spec: Spec | Sequence[Spec],
    *,
    example: Tensor | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    trace: Callable[[], UnitGraph] | None = None,
) -> Grouping:
    """Make the grouping that a spec describes.

    Args:
        model: The model; it is not changed.
        spec: Rule names (``"filters"``, ``"units+features"``, ``"blocks:8x1"``, ``"2:4"``), a function from
            (model, example) to a grouping, a ready grouping, or a sequence of those, which is stacked.
        example: An input, ``[B, ...]``, for the rules that trace the model.
        include: Patterns on layer and parameter names (``"conv*"``, ``"features.3.weight"``); one must match.
        exclude: Patterns of which none may match.
        trace: Gives the units of the model, for callers who have them or want them too; it is asked only if a rule
            needs them. None: they are traced, once for all rules.

    Returns:
        The groups of all layers that the patterns cover. The groups of functions and ready groupings are
        chosen by their layer names.

    Raises:
        GroupingError: If a rule is unknown, or finds nothing to group.
        ModelError: If a rule traces the model and it cannot be traced.
    """
    scope = Scope(_patterns("include", include), _patterns("exclude", exclude))
    if isinstance(spec, (str, Grouping)) or callable(spec):
        specs = [spec]
    elif isinstance(spec, Sequence):
        specs = list(spec)
    else:
        raise GroupingError(
            f"expected a rule's name, a function, a Grouping or several of them, got {spec!r}"
        )
    parts: list[Grouping] = []
    traced = cache(trace or (lambda: trace_units(model, needed(example, "units"))))

    def units_for(rule: str) -> UnitGraph:
        if trace is None:
            needed(example, rule)
        return traced()

    for item in specs:
        if isinstance(item, str):
            for name in map(str.strip, item.split("+")):
                if name in _OF_UNITS:
                    parts.append(_OF_UNITS[name](model, units_for(name), scope))
                else:
                    parts.append(_rule(name)(model, example, scope))
        else:
            grouping = item if isinstance(item, Grouping) else item(model, example)
            parts.append(_restrict(grouping, scope))
    return concatenate(parts)


def _patterns(option: str, patterns: Sequence[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        raise GroupingError(
            f"expected a list of patterns for {option}, got the text {patterns!r}: write [{patterns!r}]"
        )
    return tuple(patterns)


def _restrict(grouping: Grouping, scope: Scope) -> Grouping:
    """The groups of the layers in the scope."""
    covered = torch.tensor([scope.covers(layer) for layer in grouping.layers], dtype=torch.bool)
    if bool(covered.all()):
        return grouping
    on = covered[grouping.layer_index]
    if not bool(on.any()):
        _refuse(grouping.name, scope, grouping.layers)
    number = torch.full((grouping.num_groups,), -1).masked_scatter(on, torch.arange(int(on.sum())))
    labels = []
    for part in grouping.labels:
        index = torch.where(part.index < 0, -1, number[part.index])
        if bool((index >= 0).any()):
            labels.append(Labels(part.parameter, part.shape, index, part.gate))
    position = covered.cumsum(0) - 1
    layers = tuple(layer for layer, here in zip(grouping.layers, covered.tolist(), strict=True) if here)
    quota = grouping.quota and Quota(grouping.quota.pool[on], grouping.quota.keep)
    optional = tuple(layer for layer in grouping.optional_layers if layer in layers)
    return Grouping(grouping.name, tuple(labels), layers, position[grouping.layer_index[on]], quota, optional)
