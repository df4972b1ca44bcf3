"""Damaged copies of what users hand in, as strategies of hypothesis: bytes, JSON, recipes, tables and overrides.

>>> json_like({"version": 1}).example()
b'{"version": "!!python/object:x"}'
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from sparsebayes.recipe.reference import dotted_keys

__all__ = ["bytes_like", "json_like", "overrides", "table_like", "yaml_like"]

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**30, -(10**18), 0.5, -1e308, 1e308, "", " ", "a", "A" * 5000, "../../x", "/",
    "nan", "1e5", "x:y", "no.such.module:thing", "\x00", "\u202e", "ä" * 50, [], [[]], {}, [None], [0], ["", ""],
    {"a": 1}, {"": None}, [[[[[[[[[[]]]]]]]]]], "2:4", "units", "off", "~", "*", "[", "{}", "!!python/object:x",
)  # fmt: skip
DEEP = b"[" * 100_000
"""JSON that no parser follows to its end."""


def bytes_like(content: bytes) -> st.SearchStrategy[bytes]:
    """Damaged copies of some bytes."""
    edit = st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat", "zero"]),
        st.integers(0, max(len(content) - 1, 0)) | st.integers(0, min(64, max(len(content) - 1, 0))),
        st.binary(min_size=1, max_size=16),
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _edit(content, edits))


def _edit(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, payload in edits:
        if kind == "flip" and place < len(content):
            content = content[:place] + bytes([content[place] ^ (payload[0] or 1)]) + content[place + 1 :]
        elif kind == "cut":
            content = content[:place]
        elif kind == "insert":
            content = content[:place] + payload + content[place:]
        elif kind == "repeat":
            content += content[place:]
        elif kind == "zero":
            content = content[:place] + bytes(len(payload)) + content[place + len(payload) :]
    return content


def json_like(document: Any) -> st.SearchStrategy[bytes]:
    """Documents with values replaced, removed or added, now and then also damaged as text."""
    places = list(_places(document))
    change = st.tuples(
        st.sampled_from(places), st.sampled_from(["replace", "remove", "add"]), st.sampled_from(HOSTILE)
    )
    changed = st.lists(change, min_size=1, max_size=3).map(lambda changes: _change(document, changes))
    plain = json.dumps(document).encode()
    return changed | bytes_like(plain) | st.just(DEEP)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _change(document: Any, changes: list[tuple[tuple[Any, ...], str, Any]]) -> bytes:
    document = copy.deepcopy(document)
    for path, kind, hostile in changes:
        value = copy.deepcopy(hostile)  # a later change may land in it
        if not path:
            document = value if kind == "replace" else document
            continue
        inner = document
        try:
            for key in path[:-1]:
                inner = inner[key]
            if kind == "replace":
                inner[path[-1]] = value
            elif kind == "remove":
                del inner[path[-1]]
            elif isinstance(inner, dict):
                inner["added"] = value
            elif isinstance(inner, list):
                inner.append(value)
        except (KeyError, IndexError, TypeError):  # an earlier change took the place away
            continue
    return json.dumps(document).encode()


def yaml_like(text: str) -> st.SearchStrategy[bytes]:
    """A recipe with lines changed, moved, repeated or indented otherwise, now and then damaged as bytes."""
    lines = text.splitlines()
    edit = st.tuples(
        st.sampled_from(["value", "delete", "repeat", "indent", "key"]),
        st.integers(0, len(lines) - 1),
        st.sampled_from(HOSTILE),
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _edit_lines(lines, edits)) | bytes_like(
        text.encode()
    )


def _edit_lines(lines: list[str], edits: list[tuple[str, int, Any]]) -> bytes:
    lines = list(lines)
    for kind, number, value in edits:
        if number >= len(lines):
            continue
        line, shown = lines[number], value if isinstance(value, str) else json.dumps(value)
        if kind == "value":
            lines[number] = f"{line.partition(':')[0]}: {shown}"
        elif kind == "key":
            lines[number] = f"{shown}:{line.partition(':')[2]}"
        elif kind == "indent":
            lines[number] = "   " + line
        elif kind == "repeat":
            lines.insert(number, line)
        else:
            del lines[number]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def table_like(text: str) -> st.SearchStrategy[bytes]:
    """A compressed table with values changed, now and then damaged as text or as compressed bytes."""
    rows = [line.split(",") for line in text.splitlines()]
    edit = st.tuples(
        st.integers(0, len(rows) - 1), st.integers(0, len(rows[0]) - 1), st.sampled_from(HOSTILE).map(str)
    )

    def changed(edits: list[tuple[int, int, str]]) -> bytes:
        table = copy.deepcopy(rows)
        for row, column, value in edits:
            table[row][column] = value
        return "\n".join(map(",".join, table)).encode("utf-8", "surrogatepass")

    damaged = st.lists(edit, min_size=1, max_size=3).map(changed) | bytes_like(text.encode())
    return damaged.map(gzip.compress) | bytes_like(gzip.compress(text.encode(), mtime=0))


def overrides() -> st.SearchStrategy[list[str]]:
    """Overrides of keys that there are and of keys that there are not, with values of all kinds."""
    key = (
        st.sampled_from(dotted_keys())
        | st.text(max_size=12)
        | st.sampled_from(["groups", "presets", "train", "a.b"])
    )
    value = st.sampled_from([v if isinstance(v, str) else json.dumps(v) for v in HOSTILE]) | st.text(
        max_size=20
    )
    return st.lists(st.builds("{}={}".format, key, value) | st.text(max_size=15), min_size=1, max_size=3)
