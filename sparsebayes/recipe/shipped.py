"""Where a recipe is: a file of the user's, or one that is shipped with the package.

>>> find_recipe("quickstart").name
'quickstart.yaml'
"""

from __future__ import annotations

from pathlib import Path

from sparsebayes.errors import RecipeError, unknown
from sparsebayes.recipe.document import MAX_BYTES

__all__ = ["find_recipe", "headline", "read_text", "recipe_folder", "shipped_recipes"]

_PACKAGE = Path(__file__).resolve().parents[1]


def recipe_folder(package: Path = _PACKAGE) -> Path:
    """The folder of the shipped recipes.

    Args:
        package: the folder of the package `sparsebayes`.

    Returns:
        `sparsebayes/recipes` where the package is installed from a wheel; `recipes` beside the package in a
        source checkout, known by its pyproject.toml: the folder beside an installed package is anybody's.

    Raises:
        RecipeError: there is neither.
    """
    inside, beside = package / "recipes", package.parent / "recipes"
    if inside.is_dir():
        return inside
    if beside.is_dir() and (package.parent / "pyproject.toml").is_file():
        return beside
    raise RecipeError(
        f"expected shipped recipes in {inside}, found none; reinstall the package, or give a recipe's path"
    )


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes by name (path in their folder, without `.yaml`), in the order of names.

    Raises:
        RecipeError: this installation has no shipped recipes.
    """
    folder = recipe_folder()
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.yaml")}
    return dict(sorted(files.items()))


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: path of a file, else the name of a shipped recipe, with or without `.yaml`.

    Returns:
        Path of the file: as it was given, or that of the shipped recipe.

    Raises:
        RecipeError: there is no such file and no such recipe, or it is a folder.
    """
    path = Path(name)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name too long or with a zero byte: no file has it
        is_folder = exists = False
    if exists and not is_folder:
        return path
    shipped = shipped_recipes()
    known = shipped.get(name.removesuffix(".yaml"))
    if known is not None:
        return known
    if is_folder:
        raise RecipeError(f"expected a recipe file, got the folder {name!r}; name the YAML file in it")
    raise RecipeError(unknown("recipe", name, shipped) + ", or the path of a YAML file")


def read_text(path: Path) -> str:
    """The text of a recipe.

    Raises:
        RecipeError: the file cannot be read, is larger than `MAX_BYTES`, or is no UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: expected a recipe of at most {MAX_BYTES:,} bytes, got a larger file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: expected UTF-8 text, got other bytes; save it as UTF-8") from None


def headline(text: str) -> str:
    """The first line of a recipe's head comment, without `#`; empty where the text begins with none."""
    first = text.lstrip().partition("\n")[0]
    return first.lstrip("# ").rstrip() if first.startswith("#") else ""
