"""The reference of the recipe's keys: complete, and the page in the docs is what the schema says today."""

from __future__ import annotations

from pathlib import Path

import yaml

from sparsebayes.recipe import dump_recipe, load_recipe
from sparsebayes.recipe.reference import dotted_keys, render_reference, rows

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def keys_of(content: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in content.items():
        inner = isinstance(value, dict) and value
        found |= keys_of(value, f"{prefix}{key}.") if inner else {prefix + key}
    return found


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_reference(), "run tools/render_recipe_reference.py"


def test_every_key_of_a_resolved_recipe_is_there() -> None:
    recipe = load_recipe("quickstart", overrides=["prune.budget.params=0.1"])
    written = keys_of({**yaml.safe_load(dump_recipe(recipe)), "presets": None})
    assert written <= set(dotted_keys())
    assert all(f"`{key}`" in render_reference() for key in written)


def test_every_key_is_explained() -> None:
    assert [row.key for row in rows() if not row.meaning] == []
    assert [
        row.key
        for row in rows()
        if row.kind in ("", "section") and "." in row.key and row.default == "required"
    ] == []
    by_key = {row.key: row for row in rows()}
    assert by_key["train.lr"].default == "`0.05`"
    assert by_key["prior.strength"].kind == "`auto` or number > 0"
    assert by_key["name"].default == "required"
    assert by_key["groups[].rule"].kind == "text"
