"""The command line: `sparsebayes run | validate | show | list | copy | export | report`.

Each command reads its arguments, calls one function of the package and prints what came of it. A mistake of
the user's ends in one sentence on standard error and exit status 2, an interruption in status 130; only an
error of the program's own shows a traceback. What a command needs is imported inside it, so that help, and
all that only reads recipes, does not wait for torch.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from sparsebayes import __version__
from sparsebayes.errors import RecipeError, RunError, SparseBayesError, unknown

if TYPE_CHECKING:
    from sparsebayes.recipe import Recipe

__all__ = ["main"]

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells count it: 128 + the signal's number."""
BUDGET_MISSED = 3
"""Exit status of a run that is complete, but whose network is larger or slower than the recipe's budget allows."""


class _Sentence(click.ClickException):
    """A mistake of the user's: printed as `error: ...`, exit status 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", err=True, file=file)


def _usage_sentence(error: click.UsageError) -> _Sentence:
    """What is wrong with the command's arguments, and where its arguments are explained."""
    command = error.ctx.command_path if error.ctx is not None else "sparsebayes"
    message = error.format_message()
    if isinstance(error, click.NoSuchOption) and "." in error.option_name:
        message += f" A key of the recipe is written without dashes: {error.option_name.lstrip('-')}=VALUE."
    return _Sentence(f"{message.removesuffix('.')}; see '{command} --help'")


class _Commands(click.Group):
    """The command group; turns what a command raises into a sentence and an exit status."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            click.echo(ctx.get_help(), err=True)
            ctx.exit(2)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _usage_sentence(error) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None:
            raise RecipeError(unknown("command", args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SparseBayesError as error:
            raise _Sentence(str(error)) from error
        except click.UsageError as error:
            raise _usage_sentence(error) from None
        except SystemExit as end:  # click's own way out is another exception
            raise _Sentence(
                f"the code of your model or data ended the program (SystemExit: {end.code}) before the command "
                "was done; let it return or raise an exception instead"
            ) from None
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)


_EXAMPLES = """\b
Examples:
  sparsebayes list
  sparsebayes run quickstart
  sparsebayes run quickstart train.lr=0.02 --preset smoke
  sparsebayes copy quickstart mine.yaml
"""


@click.group(
    cls=_Commands,
    epilog=_EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="sparsebayes")
def main() -> None:
    """Find out from data which parts of a network are needed, and remove the rest.

    A RECIPE is a YAML file, or the name of a shipped one (see `sparsebayes list`). KEY=VALUE changes one of
    its values: the key is dotted, as in train.lr=0.02, and the value is YAML.
    """


_RUN_EXAMPLES = """\b
Examples:
  sparsebayes run quickstart
  sparsebayes run lenet5_mnist prune.budget.params=0.01 --seed 1
  sparsebayes run mine.yaml --preset smoke --out runs/first
  sparsebayes run mine.yaml --resume runs/first
"""


@main.command(epilog=_RUN_EXAMPLES)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--preset", metavar="NAME", help="One of the recipe's presets, such as smoke.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to run; same as device=...")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    metavar="N",
    help="Seed of every random choice; same as seed=...",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run folder to write; else one with the time in it."
)
@click.option(
    "--resume", type=click.Path(path_type=Path), metavar="RUN", help="Continue this interrupted run."
)
@click.option("--overwrite", is_flag=True, help="Replace the folder of --out, if there is one.")
@click.option("--quiet", is_flag=True, help="No progress, only the result.")
def run(
    recipe: str,
    overrides: tuple[str, ...],
    preset: str | None,
    device: str | None,
    seed: int | None,
    out: Path | None,
    resume: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Run a RECIPE.

    Writes a run folder with the networks, their ONNX files and a report.

    Exit status: 0 done; 2 a mistake; 3 done, but the budget is not met (the closest network is exported, and
    report.json says how close); 130 interrupted.
    """
    if resume is not None and (out is not None or overwrite):
        raise RunError(
            "expected either --resume or --out and --overwrite, got both; a resumed run has its folder"
        )
    changes = [*overrides]
    changes += [f"device={device}"] if device is not None else []
    changes += [f"seed={seed}"] if seed is not None else []
    resolved = _load(recipe, preset, changes)
    if resume is not None:
        _require_run(resume)
    _require_device(resolved)
    from sparsebayes.train.run import run_recipe

    try:
        folder = run_recipe(resolved, out=out, resume=resume, quiet=quiet, overwrite=overwrite)
    except KeyboardInterrupt as interrupt:
        known = interrupt.args[0] if interrupt.args else resume or out
        if known is not None:
            again = [*_program(), "run", recipe, *changes]
            again += ["--preset", preset] if preset is not None else []
            click.echo(f"continue with: {shlex.join([*again, '--resume', str(known)])}", err=True)
        raise
    click.echo(f"run folder: {folder}")
    missed = _missed_budget(folder)
    if missed:
        click.echo(f"warning: {missed}", err=True)
        click.get_current_context().exit(BUDGET_MISSED)


def _missed_budget(folder: Path) -> str:
    """One sentence if the run's network exceeds its budget, else nothing."""
    report = folder / "report.json"
    budget = json.loads(report.read_text(encoding="utf-8")).get("budget") if report.is_file() else None
    if budget is None or budget["met"]:
        return ""
    missed = [
        f"{limit['kind']} {limit['reached']:,g} instead of {limit['limit']:,g}"
        for limit in budget["limits"]
        if not limit["met"]
    ]
    return (
        f"the budget is not met, and the closest network is exported: {', '.join(missed)}; "
        "raise train.cycles.count, train.cycles.shrink or prune.max_removal"
    )


_VALIDATE_EXAMPLES = """\b
Examples:
  sparsebayes validate mine.yaml
  sparsebayes validate quickstart train.lr=0.02 --preset smoke
"""


@main.command(epilog=_VALIDATE_EXAMPLES)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--preset", metavar="NAME", help="One of the recipe's presets, such as smoke.")
def validate(recipe: str, overrides: tuple[str, ...], preset: str | None) -> None:
    """Check a RECIPE with all of its presets.

    Prints in short what it does; nothing is trained or written.
    """
    from sparsebayes.recipe import summarise

    click.echo(summarise(_load(recipe, preset, overrides)))
    click.echo("recipe is valid")


_SHOW_EXAMPLES = """\b
Examples:
  sparsebayes show quickstart
  sparsebayes show quickstart --preset smoke train.lr=0.02
  sparsebayes show --schema > recipe.schema.json
"""


@main.command(epilog=_SHOW_EXAMPLES)
@click.argument("recipe", required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--preset", metavar="NAME", help="One of the recipe's presets, such as smoke.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of recipes, for an editor, instead.")
def show(recipe: str | None, overrides: tuple[str, ...], preset: str | None, schema: bool) -> None:
    """Print a RECIPE with every default written out."""
    from sparsebayes.recipe import dump_recipe, json_schema

    if schema == (recipe is not None):
        raise RecipeError("expected a recipe or --schema, got " + ("both" if schema else "neither"))
    if recipe is None:
        click.echo(json.dumps(json_schema(), indent=2))
    else:
        click.echo(dump_recipe(_load(recipe, preset, overrides)), nl=False)


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
    _write(target, read_text(source), overwrite)
    click.echo(f"copied to {target}; run it with: {shlex.join(['sparsebayes', 'run', str(target)])}")


_EXPORT_EXAMPLES = """\b
Examples:
  sparsebayes export runs/first
  sparsebayes export runs/first --point 3
  sparsebayes export runs/first --max-params 5000 --out small
"""


@main.command(epilog=_EXPORT_EXAMPLES)
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--point",
    type=click.IntRange(min=0),
    metavar="K",
    help="Point of the Pareto front, by its number in the report.",
)
@click.option(
    "--max-params",
    type=click.IntRange(min=1),
    metavar="N",
    help="Best point with at most so many parameters.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write; else one inside the run folder."
)
@click.option("--legacy", is_flag=True, help="Use the TorchScript-based ONNX exporter.")
def export(folder: Path, point: int | None, max_params: int | None, out: Path | None, legacy: bool) -> None:
    """Write a network of a RUN for use.

    By default the one that the run chose, with its ONNX file; or another point of its Pareto front.
    """
    if point is not None and max_params is not None:
        raise RunError("expected --point or --max-params, got both; give one of them")
    _require_run(folder)
    from sparsebayes.train.run import export_point

    written = export_point(folder, point=point, max_params=max_params, out=out, legacy=legacy)
    click.echo(f"exported to {written}")


_REPORT_EXAMPLES = """\b
Examples:
  sparsebayes report runs/first
  sparsebayes report runs/*
"""


@main.command(epilog=_REPORT_EXAMPLES)
@click.argument("folders", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
def report(folders: tuple[Path, ...]) -> None:
    """Write the report of each RUN again.

    As report.html and report.md in the run's folder.
    """
    for folder in folders:
        _require_run(folder)
    from sparsebayes.report import write_report

    for folder in folders:
        write_report(folder)
        click.echo(f"report: {folder / 'report.html'}")


def _program() -> list[str]:
    """This program as a shell finds it: by name, else by the path or the module that it was started by."""
    name = str(click.get_current_context().find_root().info_name)
    started = Path(sys.argv[0])
    if started.resolve().parent == Path(__file__).resolve().parent:
        return [sys.executable, "-m", "sparsebayes"]
    if started.stem != name:
        return [name]
    found = shutil.which(name)
    return [name] if found is not None and Path(found).samefile(started) else [sys.argv[0]]


def _load(name: str, preset: str | None, overrides: Sequence[str]) -> Recipe:
    """`load_recipe`, imported late."""
    from sparsebayes.recipe import load_recipe

    return load_recipe(name, preset=preset, overrides=overrides)


def _require_run(folder: Path) -> None:
    """Raise `RunError` where there is no such folder."""
    if not folder.is_dir():
        raise RunError(
            f"expected a run folder, got {str(folder)!r}, which is no folder; runs/ holds them by default"
        )


def _require_device(recipe: Recipe) -> None:
    """Raise `RecipeError` where the recipe asks for a GPU that is not there."""
    if recipe.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise RecipeError(
                "expected a CUDA device for 'device: cuda', found none; use --device cpu or auto"
            )


def _write(path: Path, text: str, overwrite: bool) -> None:
    """Write a whole file or nothing."""
    if path.exists() and not overwrite:
        raise RunError(f"{str(path)!r} exists already; give another name, or --overwrite")
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise RunError(f"{str(path)!r} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    main(prog_name="sparsebayes")
