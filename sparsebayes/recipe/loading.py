r"""From YAML text, a preset and overrides to a checked `Recipe`, or to one error that lists every mistake.

The text is laid out as data with line numbers (`document`), the preset and the overrides are laid over it,
and the schema checks the result. Every preset is checked, also those that were not asked for. Where all keys are
in order by themselves, those that contradict each other are refused (`contradictions`).

    >>> text = "version: 1\nname: tiny\nmodel: {name: lenet5_caffe}\ntrain:\n  lr: fast\n"
    >>> parse_recipe(text, "tiny.yaml")
    Traceback (most recent call last):
    sparsebayes.errors.RecipeError: tiny.yaml:5: train.lr: expected a number, got 'fast'
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import ValidationError

from sparsebayes.errors import RecipeError, unknown
from sparsebayes.recipe.contradictions import contradictions
from sparsebayes.recipe.document import Keys, Place, Problem, Tree, dump, overlay, parse
from sparsebayes.recipe.mistakes import dotted, explain
from sparsebayes.recipe.names import show_value
from sparsebayes.recipe.schema import Recipe
from sparsebayes.recipe.search_schema import AnyRecipe, SearchRecipe
from sparsebayes.recipe.shipped import find_recipe, read_text

__all__ = ["dump_recipe", "load_recipe", "parse_recipe"]

_MOST = 50
"""Mistakes that one error lists; who has more of them mends these first."""


def load_recipe(name: str, *, preset: str | None = None, overrides: Sequence[str] = ()) -> AnyRecipe:
    """Read a recipe from a file.

    Args:
        name: path of a file, else the name of a shipped recipe.
        preset: one of the recipe's own presets, or None.
        overrides: changes such as `"train.lr=0.01"`, the value in YAML, laid over recipe and preset in turn.

    Returns:
        The recipe, with the preset and the overrides in it.

    Raises:
        RecipeError: no such recipe, unreadable file, or any mistake in it, in the preset's name or in an
            override; the message lists all mistakes, each with its line.
    """
    path = find_recipe(name)
    return parse_recipe(read_text(path), str(path), preset=preset, overrides=overrides)


def parse_recipe(
    text: str, source: str, *, preset: str | None = None, overrides: Sequence[str] = ()
) -> AnyRecipe:
    """Read a recipe from YAML text.

    Args:
        text: the YAML document.
        source: what errors call it, usually the file's path.
        preset: as in `load_recipe`.
        overrides: as in `load_recipe`.

    Returns:
        The recipe, with the preset and the overrides in it.

    Raises:
        RecipeError: any mistake; the message lists all of them, each with its line.
    """
    tree, problems = parse(text, source)
    if not isinstance(tree.data, dict):
        if not problems:
            came = "an empty file" if tree.data is None else show_value(tree.data)
            hint = "see 'sparsebayes show quickstart' for a whole one"
            problems = [Problem(tree.place(()), f"expected a recipe's key: value lines, got {came}; {hint}")]
        raise _refusal(problems, source)
    recipe, found = _check(tree)
    problems += found
    base, base_recipe, others = tree, recipe, []
    presets = tree.at("presets") if isinstance(tree.data.get("presets"), dict) else Tree({})
    for name, body in presets.data.items():
        if isinstance(body, dict):
            changed = overlay(base, presets.at(name))
            changed_recipe, found = _check(changed)
            problems += _no_presets(presets.at(name)) + found
            if name == preset:
                tree, recipe = changed, changed_recipe
            else:
                others.append((name, changed_recipe, changed))
    if preset is not None and preset not in presets.data:
        problems.append(Problem(Place(source), unknown("preset", preset, presets.data)))
    for override in overrides:
        change, found = _read_override(override, tree)
        problems += found
        tree = overlay(tree, change)
    if overrides:
        recipe, found = _check(tree)
        problems += found
    if not problems:
        problems += _contradictions(recipe, tree)
        # An override can mend what the file says, so that presets answer only for what they add to it.
        known = {problem.text for problem in _contradictions(base_recipe, base)}
        for name, other, changed in others:
            added = [problem for problem in _contradictions(other, changed) if problem.text not in known]
            problems += [Problem(wrong.place, f"with preset {name!r}: {wrong.text}") for wrong in added]
    if problems or recipe is None:
        raise _refusal(problems, source)
    return recipe


def dump_recipe(recipe: AnyRecipe) -> str:
    """The recipe as YAML with every default written out; `parse_recipe` reads it back to an equal recipe."""
    return dump(recipe.model_dump(mode="json"))


def _refusal(problems: Sequence[Problem], source: str) -> RecipeError:
    """The problems as one error: once each, by line, those without a line last."""
    ordered = sorted(
        dict.fromkeys(problems), key=lambda problem: (problem.place.line == 0, problem.place.line)
    )
    lines = list(dict.fromkeys(str(problem) for problem in ordered))
    if len(lines) == 1:
        return RecipeError(lines[0])
    many = (
        f"{len(lines)} mistakes" if len(lines) <= _MOST else f"more than {_MOST} mistakes, the first of them"
    )
    return RecipeError(f"{many} in {source}:\n  " + "\n  ".join(lines[:_MOST]))


def _contradictions(recipe: AnyRecipe | None, tree: Tree) -> list[Problem]:
    """What contradicts itself in the recipe that `tree` says."""
    if recipe is None:
        return []
    return [Problem(tree.place(wrong.keys), wrong.text) for wrong in contradictions(recipe)]


def _no_presets(tree: Tree) -> list[Problem]:
    """Refuse presets in what is laid over a recipe: within a preset, or made up on the command line."""
    if "presets" not in tree.data:
        return []
    place = tree.place(("presets",))
    where = dotted((*place.prefix, "presets"))
    return [Problem(place, f"{where}: expected only at the top of a recipe's file")]


_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


def _read_override(text: str, below: Tree) -> tuple[Tree, list[Problem]]:
    """`key.key=value` as a tree to lay over `below`, and what is wrong with it; then the tree is empty."""
    place = Place(f"override {text!r}")
    key, equals, value = text.partition("=")
    key = key.strip()
    wrong = ""
    if text.startswith("-"):
        wrong = "expected key=value without dashes, such as train.lr=0.01"
    elif not equals:
        wrong = "expected key=value, such as train.lr=0.01"
    elif not _KEY.fullmatch(key):
        wrong = f"expected a dotted key before '=', such as train.lr, got {key!r}"
    elif not value.strip():
        wrong = f"expected a value after '=', got nothing; write {key}=null to set nothing"
    if wrong:
        return Tree({}), [Problem(place, wrong)]
    keys: Keys = tuple(key.split("."))
    tree, problems = parse(value, place.source, numbered=False)
    inner: object = below.data
    for length, name in enumerate(keys):
        if isinstance(inner, list):
            listed = dotted(keys[:length])
            problems.append(Problem(place, f"{listed} is a list; write all of it, as in {listed}=[a, b]"))
        inner = inner.get(name) if isinstance(inner, dict) else None
    data = tree.data
    for name in reversed(keys):
        data = {name: data}
    places = {keys[:length]: place for length in range(len(keys) + 1)}
    change = Tree(data, places | {(*keys, *under): place for under in tree.places})
    problems += _no_presets(change)
    return (Tree({}) if problems else change), problems


def _check(tree: Tree) -> tuple[AnyRecipe | None, list[Problem]]:
    """The recipe that `tree` says, or None and all that the schema of its task finds wrong with it."""
    kind: type[AnyRecipe] = SearchRecipe if tree.data.get("task") == "search" else Recipe
    try:
        return kind.model_validate(tree.data), []
    except ValidationError as error:
        # Pydantic calls a list too short when it has left out the entries that are wrong.
        mistakes = [
            mistake
            for mistake in error.errors(include_url=False)
            if mistake["type"] != "too_short" or not mistake["input"]
        ]
        return None, [explain(mistake, tree, kind) for mistake in mistakes[: _MOST + 1]]
