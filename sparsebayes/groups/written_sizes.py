"""Sizes and positions that the model's code hands to views, splits and slices: how they follow a removal.

A graph shows ``view(2, 4, 3)``, not where the 4 came from. It may be a number in the code, which stays; it may be
worked out from the tensor, and adapts; or it may be an attribute of a module, which can be set. So the rules list
their *readings*, the most permissive one first, and assume one; the trial run (`sparsebayes.groups.trial`) shows
whether the code agrees, and where it does not the next reading of that line is taken.

    >>> find_attributes({"attend": attention}, "attend", 4)     # self.num_heads = 4
    [Attribute(module='attend', name='num_heads', position=None)]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparsebayes.groups.channel_ids import Trace
from sparsebayes.groups.trace_layers import Call

__all__ = ["Attribute", "assumed_reading", "attributes_for", "find_attributes", "follow", "in_order"]

T = TypeVar("T")


@dataclass(frozen=True)
class Attribute:
    """A number that a module holds.

    Attributes:
        module: Path of the module.
        name: Name of the attribute.
        position: Position in it, where it is a list or tuple; None for a plain number.
    """

    module: str
    name: str
    position: int | None


def assumed_reading(trace: Trace, call: Call, readings: Sequence[T]) -> T | None:
    """The reading that is not refuted yet; None if all of them are."""
    level = trace.levels.get(call.line, 0)
    if level >= len(readings):
        return None
    trace.assumed.add(call.line)
    return readings[level]


def find_attributes(modules: Mapping[str, nn.Module], path: str, value: int) -> list[Attribute]:
    """Attributes of a module, then of those around it, that equal ``value``."""
    found: list[Attribute] = []
    here: str | None = path
    while here is not None:
        for name, held in vars(modules[here]).items() if here in modules else ():
            if name.startswith("_"):
                continue
            if type(held) is int and held == value:
                found.append(Attribute(here, name, None))
            elif _is_sequence(held) and all(type(item) is int for item in held):
                found += [Attribute(here, name, spot) for spot, item in enumerate(held) if item == value]
        here = here.rpartition(".")[0] if here else None
    return found


def _is_sequence(held: object) -> bool:
    """Whether this is a list or tuple that can be made again of other items."""
    return type(held) in (list, tuple, torch.Size) or isinstance(getattr(held, "_fields", None), tuple)


def attributes_for(call: Call, values: Sequence[int]) -> list[tuple[Attribute, ...]]:
    """Ways of taking all ``values`` from attributes of the calling module."""
    ways = [find_attributes(call.modules, call.module, value) for value in values]
    if not ways or not all(ways):
        return []
    # Where several attributes fit, each number takes its first, then each its second: enough in practice, and
    # the trial run and the comparison after surgery refuse a wrong one.
    return [
        tuple(choice[min(rank, len(choice) - 1)] for choice in ways) for rank in range(max(map(len, ways)))
    ]


def in_order(call: Call, adapting: list[T], following: list[T]) -> list[T]:
    """Readings, the likelier first: an attribute of the very module that calls is hardly there by chance.

    Args:
        call: The call.
        adapting: Those in which the code works the size out.
        following: Those in which it is an attribute, those of the calling module first.
    """
    own = [vars(module) for path, module in call.modules.items() if path == call.module]
    likely = bool(own) and any(
        type(v) in (int, tuple, list) for k, v in own[0].items() if not k.startswith("_")
    )
    return [*following, *adapting] if likely else [*adapting, *following]


def follow(trace: Trace, attributes: Sequence[Attribute], counted: Sequence[Tensor]) -> None:
    """Let each attribute count the channels beside it."""
    for attribute, ids in zip(attributes, counted, strict=True):
        trace.count(attribute.module, attribute.name, attribute.position, ids)
