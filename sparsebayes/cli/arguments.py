"""What several commands share: arguments, their completion with the tab key, and checks of what was typed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from sparsebayes.errors import RecipeError, RunError
from sparsebayes.files import write_atomically

if TYPE_CHECKING:
    from sparsebayes.recipe import AnyRecipe

__all__ = ["folder", "overrides", "preset", "read_recipe", "recipe", "require_device", "require_run", "write"]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def recipe(*, required: bool = True) -> Decorator:
    """The argument RECIPE: a file, or the name of a shipped recipe."""
    return click.argument("recipe", required=required, shell_complete=_complete_recipe)


def overrides() -> Decorator:
    """The arguments KEY=VALUE."""
    return click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=_complete_override)


def preset() -> Decorator:
    """The option --preset."""
    return click.option("--preset", metavar="NAME", help="One of the recipe's presets, such as smoke.")


def folder(name: str, *, many: bool = False) -> Decorator:
    """The argument RUN: one run folder, or several."""
    if many:
        return click.argument(name, metavar="RUN...", nargs=-1, required=True, type=_Folder())
    return click.argument(name, metavar="RUN", type=_Folder())


class _Folder(click.Path):
    """A path that is completed with folders; whether it is one is said by `require_run`, in a sentence of ours."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


def _complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shipped recipes that begin so, and files."""
    from sparsebayes.recipe.shipped import shipped_recipes

    found = [name for name in shipped_recipes() if name.startswith(incomplete)]
    items = [CompletionItem(name) for name in found]
    return [*items, CompletionItem(incomplete, type="file")]


def _complete_override(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Keys of a recipe that begin so, up to the next dot or the equals sign."""
    from sparsebayes.recipe.reference import dotted_keys

    start = incomplete.rpartition(".")[0]
    depth = start.count(".") + 1 if start else 0
    found: dict[str, None] = {}
    for key in dotted_keys():
        parts = key.split(".")
        if key.startswith(incomplete) and len(parts) > depth:
            whole = len(parts) == depth + 1
            found[".".join(parts[: depth + 1]) + ("=" if whole else ".")] = None
    return list(found)


def read_recipe(name: str, preset: str | None, changes: Sequence[str]) -> AnyRecipe:
    """`load_recipe`, imported late."""
    from sparsebayes.recipe import load_recipe

    return load_recipe(name, preset=preset, overrides=changes)


def require_run(path: Path) -> None:
    """Raise `RunError` where there is no such folder."""
    if not path.is_dir():
        raise RunError(
            f"expected a run folder, got {str(path)!r}, which is no folder; runs/ holds them by default"
        )


def require_device(recipe: AnyRecipe) -> None:
    """Raise `RecipeError` where the recipe asks for a GPU that is not there."""
    if recipe.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise RecipeError(
                "expected a CUDA device for 'device: cuda', found none; use --device cpu or auto"
            )


def write(path: Path, text: str, overwrite: bool) -> None:
    """Write a whole file or nothing."""
    if path.exists() and not overwrite:
        raise RunError(f"{str(path)!r} exists already; give another name, or --overwrite")
    write_atomically(path, text)
