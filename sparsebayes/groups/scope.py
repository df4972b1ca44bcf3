"""Which layers a rule may touch: shell-style patterns on layer, module and parameter names.

>>> scope = Scope(include=("conv*", "fc1"), exclude=("conv1",))
>>> [scope.covers(layer) for layer in ("conv1", "conv2", "fc1", "fc2")]
[False, True, True, False]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

__all__ = ["EVERYTHING", "Scope", "owner"]


@dataclass(frozen=True)
class Scope:
    """Patterns that choose layers: a layer is covered iff one of its names is included and none is excluded.

    Attributes:
        include: Patterns of which one must match (``*``, ``?`` and ``[...]`` as in a shell).
        exclude: Patterns of which none may match.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def includes(self, *names: str) -> bool:
        """Whether one of ``names`` matches an ``include`` pattern."""
        return _matches(names, self.include)

    def excludes(self, *names: str) -> bool:
        """Whether one of ``names`` matches an ``exclude`` pattern."""
        return _matches(names, self.exclude)

    def covers(self, *names: str) -> bool:
        """Whether the layer that goes by all these names is in the scope."""
        return self.includes(*names) and not self.excludes(*names)

    def __str__(self) -> str:
        text = "include " + ", ".join(self.include)
        return f"{text}; exclude {', '.join(self.exclude)}" if self.exclude else text


EVERYTHING = Scope()


def owner(parameter: str) -> str:
    """Layer of a parameter: ``"conv1.weight"`` -> ``"conv1"``; a bare parameter is its own layer."""
    module, _, leaf = parameter.rpartition(".")
    return module or leaf


def _matches(names: Iterable[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
