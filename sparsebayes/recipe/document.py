"""YAML text to plain data that remembers the line of every key, and back.

The dialect is the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/, chapter 10.3), not PyYAML's 1.1:
`1e-3` is a number, `2:4` and `yes` are text. Anchors, aliases, merge keys and tags are refused: a recipe says
what it means, and a text of one megabyte cannot grow into gigabytes.

    >>> tree, problems = parse("train: {lr: 1e-3}", "recipe.yaml")
    >>> tree.data, str(tree.places[("train", "lr")]), problems
    ({'train': {'lr': 0.001}}, 'recipe.yaml:1', [])
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

__all__ = ["MAX_BYTES", "Keys", "Place", "Problem", "Tree", "dump", "overlay", "parse"]

MAX_BYTES = 1_000_000
_MAX_DEPTH = 30

Keys: TypeAlias = "tuple[str | int, ...]"
"""Where a value stands: mapping keys and list positions from the top, such as `("train", "cycles", "lr")`."""


@dataclass(frozen=True)
class Place:
    """Where something was written, as an error names it: `recipe.yaml:12`, or `override 'train.lr=3'`.

    Attributes:
        source: the file as the user named it, or the override.
        line: line number from 1; 0 where there are no lines.
        prefix: keys that the value stood under before it was laid over the recipe: `("presets", "smoke")`.
    """

    source: str
    line: int = 0
    prefix: Keys = ()

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Problem:
    """One mistake: where it was made, and what is wrong."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class Tree:
    """Plain data (dict, list, str, int, float, bool, None), and the place of every key and list entry."""

    data: Any
    places: dict[Keys, Place] = field(default_factory=dict)

    def place(self, keys: Keys) -> Place:
        """The place of `keys`, or of the nearest thing around them that was written down."""
        while keys not in self.places:
            keys = keys[:-1]
        return self.places[keys]

    def at(self, key: str) -> Tree:
        """The part under one key of the top mapping; its places remember the key as their prefix."""
        places = {
            keys[1:]: Place(place.source, place.line, (*place.prefix, key))
            for keys, place in self.places.items()
            if keys[:1] == (key,)
        }
        return Tree(self.data[key], places)


def overlay(below: Tree, above: Tree) -> Tree:
    """Lay one tree over another: mappings merge key by key, anything else in `above` replaces what is below.

    Args:
        below: the tree that gives way; not changed.
        above: the tree that wins; not changed.

    Returns:
        A new tree. A mapping that merged keeps the place that it has below.
    """
    replaced: set[Keys] = set()
    data = _merge(below.data, above.data, (), replaced)

    def is_new(keys: Keys) -> bool:
        return any(keys[:length] in replaced for length in range(len(keys) + 1))

    places = {keys: place for keys, place in below.places.items() if not is_new(keys)}
    return Tree(data, places | {keys: place for keys, place in above.places.items() if is_new(keys)})


def _merge(below: Any, above: Any, keys: Keys, replaced: set[Keys]) -> Any:
    """Data of `overlay` under `keys`; adds the keys that `above` has put in place of what was below."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        replaced.add(keys)
        return above
    return below | {
        key: _merge(below.get(key), value, (*keys, key), replaced) for key, value in above.items()
    }


_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[re.Pattern[str], list[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""], lambda text: None),
    "bool": (
        re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"),
        list("tTfF"),
        lambda text: text.lower() == "true",
    ),
    "int": (
        re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"),
        list("-+0123456789"),
        lambda text: int(text, 0 if text[:2] in ("0o", "0x") else 10),
    ),
    "float": (
        re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
        list("-+.0123456789"),
        float,
    ),
}


class _Refused(Exception):
    """Well-formed YAML that is no part of a recipe; the arguments are the reason and the line from 1."""


class _Loader(yaml.SafeLoader):
    """Composes nodes only: scalars by the core schema, no aliases, and no deeper than `_MAX_DEPTH`."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            raise _Refused("expected no anchors (&) and aliases (*) in a recipe; write the value out", line)
        if self.depth >= _MAX_DEPTH:
            raise _Refused(f"expected lists and sections no more than {_MAX_DEPTH} deep in each other", line)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: quotes by the core schema, no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _dialect in (_Loader, _Dumper):
    _dialect.yaml_implicit_resolvers = {}
    for _name, (_pattern, _first, _) in _SCALARS.items():
        _dialect.add_implicit_resolver(_TAG + _name, _pattern, _first)


def parse(text: str, source: str, *, numbered: bool = True) -> tuple[Tree, list[Problem]]:
    """Read YAML text.

    Args:
        text: one YAML document.
        source: what errors call it.
        numbered: whether places name a line; False for an override's value.

    Returns:
        The tree, and what is wrong with the text. Broken YAML is one problem, with None as the data; where a
        key is given twice or is no text, or a value has a tag, the tree has the rest.
    """
    top = Place(source, 1 if numbered else 0)
    reader = _Reader(source, numbered)
    try:
        node = _Loader(text).get_single_node()
        data = None if node is None else reader.read(node, ())
        return Tree(data, {(): top, **reader.places}), reader.problems
    except _Refused as refusal:
        reason, line = refusal.args
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason, line = _explain(error), mark.line + 1 if mark is not None else 1
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # The first names a character that YAML forbids; the others are PyYAML's own chr() and int() failing
        # on an escape or a version number beyond all bounds.
        reason, line = f"expected YAML text, got what cannot be read: {str(error).splitlines()[0]}", 1
    return Tree(None, {(): top}), [Problem(Place(source, line if numbered else 0), reason)]


def _explain(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's reason in a sentence that says what to look at."""
    if isinstance(error, yaml.composer.ComposerError):
        return "expected one YAML document, got another after '---'; keep one of them"
    problem = (error.problem or "broken text").splitlines()[0]
    return f"expected YAML, got {problem}; check the indentation, colons and quotes here and just above"


class _Reader:
    """Turns nodes into plain data, collecting the place of every key and what is wrong."""

    def __init__(self, source: str, numbered: bool) -> None:
        self.source = source
        self.numbered = numbered
        self.places: dict[Keys, Place] = {}
        self.problems: list[Problem] = []

    def place(self, node: yaml.Node) -> Place:
        return Place(self.source, node.start_mark.line + 1 if self.numbered else 0)

    def refuse(self, node: yaml.Node, text: str) -> None:
        self.problems.append(Problem(self.place(node), text))

    def read(self, node: yaml.Node, keys: Keys) -> Any:
        """The data of `node`, which stands under `keys`."""
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.read_mapping(node, keys)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.read_entry(entry, (*keys, position)) for position, entry in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and (kind == "str" or kind in _SCALARS):
            return self.read_scalar(node, kind)
        self.refuse(node, f"expected plain YAML, got the tag {node.tag!r}; write the value without a tag")
        return None

    def read_entry(self, node: yaml.Node, keys: Keys) -> Any:
        self.places[keys] = self.place(node)
        return self.read(node, keys)

    def read_mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            under = (*keys, key) if isinstance(key, str) else keys
            is_name = isinstance(key, str) and key_node.tag == _TAG + "str" and key.isprintable()
            if not is_name or key == "<<":
                shown = repr(key) if isinstance(key, str) else "a list or section"
                self.refuse(key_node, f"expected a name before the colon, got {shown}")
            elif key in data:
                first = f" (first on line {self.places[under].line})" if self.numbered else ""
                self.refuse(key_node, f"expected each key once, got {key!r} again{first}; remove one of them")
            else:
                self.places[under] = self.place(key_node)
                data[key] = self.read(value_node, under)
        return data

    def read_scalar(self, node: yaml.ScalarNode, kind: str) -> Any:
        if kind == "str":
            return node.value
        pattern, _, convert = _SCALARS[kind]
        try:
            value = convert(node.value) if pattern.match(node.value) else math.nan
        except ValueError:  # Python converts no more than 4,300 digits
            value = math.nan
        if isinstance(value, float) and not math.isfinite(value):
            self.refuse(node, f"expected a finite number or text, got {node.value[:40]!r}")
            return None
        return value


def dump(data: object) -> str:
    """Write plain data as YAML that `parse` reads back to the same data, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110)
