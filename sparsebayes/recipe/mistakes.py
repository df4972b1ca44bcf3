"""What is wrong with a recipe, in the recipe's own words: pydantic's errors as sentences with a line.

>>> from pydantic import ValidationError
>>> from sparsebayes.recipe.document import parse
>>> tree, _ = parse("{version: 1, name: tiny, model: {name: lenet5_caffe}, seed: -1}", "tiny.yaml")
>>> try:
...     Recipe.model_validate(tree.data)
... except ValidationError as error:
...     print(explain(error.errors()[0], tree))
tiny.yaml:1: seed: expected a number >= 0, got -1
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from sparsebayes.errors import unknown
from sparsebayes.recipe.document import Keys, Problem, Tree
from sparsebayes.recipe.names import PATTERNS, show_value
from sparsebayes.recipe.schema import Recipe
from sparsebayes.recipe.search_schema import AnyRecipe

__all__ = ["dotted", "explain"]

# Pydantic's kinds of error that the schema can meet, as what was expected; the braces are pydantic's context.
_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a section of key: value lines",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number > {gt:g}",
    "greater_than_equal": "a number >= {ge:g}",
    "int_type": "a whole number",
    "less_than": "a number < {lt:g}",
    "less_than_equal": "a number <= {le:.10g}",
    "literal_error": "{expected}",
    "model_type": "a section of key: value lines",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "string_unicode": "text of Unicode characters",
    "too_long": "at most {max_length} entries",
    "too_short": "at least one entry",
    "tuple_type": "a list, as in [a, b]",
}


def explain(mistake: ErrorDetails, tree: Tree, root: type[AnyRecipe] = Recipe) -> Problem:
    """Say what is wrong.

    Args:
        mistake: one of pydantic's errors.
        tree: the data that pydantic checked.
        root: the kind of recipe that it checked them for.

    Returns:
        The mistake at the line where it was written; for a key that is missing, where its section begins.
    """
    location, kind, value = mistake["loc"], mistake["type"], mistake["input"]
    context: Mapping[str, Any] = mistake.get("ctx", {})
    if kind == "missing":
        return _problem(
            tree, location, location, "expected a value, got nothing; add this key, it has no default"
        )
    written = _written(tree.data, location)
    if kind == "extra_forbidden":
        key = str(location[-1])
        text = unknown("key", key, _model_at(location[:-1], root).model_fields) + _elsewhere(key, root)
        return _problem(tree, written, written[:-1], text)
    if kind == "value_error":
        text = str(context["error"])
    elif kind == "string_pattern_mismatch":
        text = f"expected {PATTERNS[context['pattern']]}, got {show_value(value)}"
    elif kind in _EXPECTED:
        text = f"expected {_EXPECTED[kind].format_map(context)}, got {show_value(value)}"
        text += (
            _nearest(value, re.findall("'([^']*)'", context["expected"])) if kind == "literal_error" else ""
        )
    else:
        text = f"{mistake['msg']}, got {show_value(value)}"
    return _problem(tree, written, written, text)


def dotted(keys: Keys) -> str:
    """Keys as a recipe's errors and overrides write them: `train.cycles.lr`, `groups[1].rule`."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".")


def _problem(tree: Tree, keys: Keys, shown: Keys, text: str) -> Problem:
    """A problem at the place of `keys`, which speaks of `shown`."""
    place = tree.place(keys)
    where = dotted((*place.prefix, *shown))
    return Problem(place, f"{where}: {text}" if where else text)


def _written(data: Any, location: Keys) -> Keys:
    """The part of `location` that is in the data: a rule that is plain text has no key `rule`."""
    written: Keys = ()
    for key in location:
        if isinstance(key, int) and isinstance(data, dict):
            continue  # a single rule, which pydantic saw as a list of one
        if isinstance(key, int) if isinstance(data, list) else isinstance(data, dict) and key in data:
            written, data = (*written, key), data[key]
        else:
            break
    return written


def _model_at(location: Keys, root: type[AnyRecipe]) -> type[BaseModel]:
    """The section of the schema under `location`."""
    model: type[BaseModel] = root
    for key in location:
        if isinstance(key, str):
            model = next(_sections(model.model_fields[key].annotation))
    return model


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field's type speaks of: `Budget` for `Budget | None`, none for `int`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def _all_keys(model: type[BaseModel], above: Keys) -> Iterator[Keys]:
    """Every key of the schema with the keys that it stands under, list positions left out."""
    for key, field in model.model_fields.items():
        yield (*above, key)
        for section in _sections(field.annotation):
            yield from _all_keys(section, (*above, key))


def _elsewhere(key: str, root: type[AnyRecipe]) -> str:
    """Where else in a recipe a misplaced key would be right."""
    homes = [dotted(keys) for keys in _all_keys(root, ()) if keys[-1] == key]
    return f"; elsewhere there is {', '.join(homes)}" if homes else ""


def _nearest(value: object, choices: list[str]) -> str:
    """The choice that was probably meant, if one is near."""
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""
