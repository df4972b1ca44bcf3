"""The commands that read recipes and train nothing: `validate`, `show`, `list`, `copy`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from sparsebayes.cli import arguments
from sparsebayes.cli.program import main
from sparsebayes.errors import RecipeError

__all__ = ["copy", "list_", "show", "validate"]

_VALIDATE_EXAMPLES = """\b
Examples:
  sparsebayes validate mine.yaml
  sparsebayes validate quickstart train.lr=0.02 --preset smoke
  sparsebayes validate quickstart --no-estimate
"""


@main.command(epilog=_VALIDATE_EXAMPLES)
@arguments.recipe()
@arguments.overrides()
@arguments.preset()
@click.option("--no-estimate", is_flag=True, help="Check the recipe only; measure no time and memory.")
def validate(recipe: str, overrides: tuple[str, ...], preset: str | None, no_estimate: bool) -> None:
    """Check a RECIPE with all of its presets.

    Prints in short what it does, and from a few steps of training how long it will take on this machine and in
    how much memory: an estimate. Nothing is written or downloaded.
    """
    from sparsebayes.recipe import SearchRecipe, summarise

    resolved = arguments.read_recipe(recipe, preset, overrides)
    if isinstance(resolved, SearchRecipe):
        resolved.check()
    click.echo(summarise(resolved))
    click.echo("recipe is valid")
    if no_estimate:
        return
    arguments.require_device(resolved)
    if isinstance(resolved, SearchRecipe):
        from sparsebayes.train.search_estimate import estimate_search

        click.echo(f"estimate   {estimate_search(resolved).describe()}")
    else:
        from sparsebayes.train.estimate import estimate

        click.echo(f"estimate   {estimate(resolved).describe()}")


_SHOW_EXAMPLES = """\b
Examples:
  sparsebayes show quickstart
  sparsebayes show quickstart --preset smoke train.lr=0.02
  sparsebayes show --schema > recipe.schema.json
"""


@main.command(epilog=_SHOW_EXAMPLES)
@arguments.recipe(required=False)
@arguments.overrides()
@arguments.preset()
@click.option("--schema", is_flag=True, help="Print the JSON Schema of recipes, for an editor, instead.")
def show(recipe: str | None, overrides: tuple[str, ...], preset: str | None, schema: bool) -> None:
    """Print a RECIPE with every default written out."""
    from sparsebayes.recipe import dump_recipe, json_schema

    if schema == (recipe is not None):
        raise RecipeError("expected a recipe or --schema, got " + ("both" if schema else "neither"))
    if recipe is None:
        click.echo(json.dumps(json_schema(), indent=2))
    else:
        click.echo(dump_recipe(arguments.read_recipe(recipe, preset, overrides)), nl=False)


_LIST_EXAMPLES = """\b
Examples:
  sparsebayes list
"""


@main.command("list", epilog=_LIST_EXAMPLES)
def list_() -> None:
    """List the recipes that are shipped."""
    from sparsebayes.recipe.shipped import headline, read_text, shipped_recipes

    recipes = shipped_recipes()
    width = max(map(len, recipes), default=0)
    for name, path in recipes.items():
        click.echo(f"{name:{width}}  {headline(read_text(path))}")


_COPY_EXAMPLES = """\b
Examples:
  sparsebayes copy quickstart
  sparsebayes copy lenet5_mnist mine.yaml
"""


@main.command(epilog=_COPY_EXAMPLES)
@click.argument("name")
@click.argument("dest", required=False, type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace DEST, if there is one.")
def copy(name: str, dest: Path | None, overwrite: bool) -> None:
    """Copy a recipe to a file of your own.

    NAME is a shipped recipe or a file, DEST a file or a folder (default: NAME.yaml in this folder).
    """
    from sparsebayes.recipe.shipped import find_recipe, read_text

    source = find_recipe(name)
    target = Path(source.name) if dest is None else dest
    if target.is_dir():
        target /= source.name
    arguments.write(target, read_text(source), overwrite)
    click.echo(f"copied to {target}; run it with: {shlex.join(['sparsebayes', 'run', str(target)])}")
