"""Recipes: a whole run as typed data, read from YAML, checked before anything heavy is imported.

>>> recipe = load_recipe("quickstart", preset="smoke", overrides=["train.lr=0.02"])
>>> recipe.train.lr
0.02
"""

from __future__ import annotations

from sparsebayes.recipe.loading import dump_recipe, load_recipe, parse_recipe
from sparsebayes.recipe.schema import Recipe
from sparsebayes.recipe.search_schema import AnyRecipe, SearchRecipe, json_schema
from sparsebayes.recipe.shipped import shipped_recipes
from sparsebayes.recipe.summary import summarise

__all__ = [
    "AnyRecipe",
    "Recipe",
    "SearchRecipe",
    "dump_recipe",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "shipped_recipes",
    "summarise",
]
