"""The reference of the recipe's keys: complete, and the page in the docs is what the schema says today."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
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


def test_every_key_of_a_resolved_search_is_there() -> None:
    recipe = load_recipe("nas_then_compress", overrides=["compress.prune.budget.params=0.1"])
    written = keys_of({**yaml.safe_load(dump_recipe(recipe)), "presets": None})
    assert {"search.removal", "retrain.inherit", "sampling.proxies", "compress.prior.joint"} <= written
    assert written <= set(dotted_keys())
    page = render_reference()
    assert all(f"`{key.removeprefix('compress.')}`" in page for key in written)


def test_a_search_has_a_chapter_of_its_own_and_repeats_no_table() -> None:
    compress, search = render_reference().split("## Recipes of `task: search`")
    assert "`search.space`" in search and "`search.space`" not in compress
    assert "`data.holdout`" in compress and "`data.holdout`" not in search
    assert "[data](#data), [curvature](#curvature), [export](#export) and [evaluate](#evaluate)" in search
    assert "one level deeper: `compress.prior.scale`" in search
    # Sections of the same name that differ have a table in both.
    assert "`variational_dropout.relative`" in compress and "`variational_dropout.relative`" not in search
    assert "`variational_dropout.length_scale`" in compress and "`variational_dropout.length_scale`" in search


def test_keys_are_completed_once() -> None:
    keys = dotted_keys()
    assert len(set(keys)) == len(keys)
    assert {"train.lr", "search.lr", "compress.train.lr", "data.root"} <= set(keys)


@pytest.mark.parametrize("task", ["compress", "search"])
def test_every_key_is_explained(task: Literal["compress", "search"]) -> None:
    found = rows(task)
    assert [row.key for row in found if not row.meaning] == []
    assert [
        row.key
        for row in found
        if row.kind in ("", "section") and "." in row.key and row.default == "required"
    ] == []


def test_types_defaults_and_bounds_are_in_words() -> None:
    by_key = {row.key: row for row in rows()}
    assert by_key["train.lr"].default == "`0.05`"
    assert by_key["prior.strength"].kind == "`auto` or number > 0"
    assert by_key["name"].default == "required"
    assert by_key["groups[].rule"].kind == "text"
    assert by_key["variational_dropout.epochs"].kind == "whole number >= 1, <= 100,000"
    assert by_key["train.grad_clip"].kind == "number > 0, <= 1,000,000 or `null`"
    assert by_key["presets"].default == by_key["model.options"].default == "empty"
    assert "exit status is 3" in by_key["prune.budget"].meaning
    assert "`prune.budget`" in render_reference()
