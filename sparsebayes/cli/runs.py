"""The command that works for long: `run`."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsebayes.cli import arguments
from sparsebayes.cli.outcomes import missed_budget, over_seeds
from sparsebayes.cli.program import BUDGET_MISSED, main
from sparsebayes.errors import RunError
from sparsebayes.launcher import launched

if TYPE_CHECKING:
    from sparsebayes.recipe import AnyRecipe

__all__ = ["run"]

_RUN_EXAMPLES = """\b
Examples:
  sparsebayes run quickstart
  sparsebayes run lenet5_mnist prune.budget.params=0.01 --seed 1
  sparsebayes run mine.yaml --preset smoke --out runs/first
  sparsebayes run mine.yaml --resume runs/first
  sparsebayes run quickstart --seeds 5
"""


@main.command(epilog=_RUN_EXAMPLES)
@arguments.recipe()
@arguments.overrides()
@arguments.preset()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where to run; same as device=...")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    metavar="N",
    help="Seed of every random choice; same as seed=...",
)
@click.option(
    "--seeds",
    type=click.IntRange(1, 1000),
    metavar="K",
    help="Run with K seeds, counted from the recipe's; with --out, in OUT-seedN, those finished there left out.",
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
    seeds: int | None,
    out: Path | None,
    resume: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Run a RECIPE.

    Writes a run folder with the networks, their ONNX files and a report.
    """
    if resume is not None and (out is not None or overwrite):
        raise RunError(
            "expected either --resume or --out and --overwrite, got both; a resumed run has its folder"
        )
    if seeds is not None and resume is not None:
        raise RunError(
            "expected either --seeds or --resume, got both; resume the run of one seed with --seed"
        )
    changes = [*overrides]
    changes += [f"device={device}"] if device is not None else []
    changes += [f"seed={seed}"] if seed is not None else []
    asked = _Asked(recipe, preset, resume, quiet, overwrite)
    resolved = asked.resolved(changes)
    process = launched()
    if resume is not None and process.is_first:
        arguments.require_run(resume)
    arguments.require_device(resolved)
    if seeds is None:
        folders = [asked.run(resolved, changes, out)]
    elif process.count > 1:
        raise RunError("expected --seed under torchrun, got --seeds; start it once for each seed")
    else:
        folders = _run_seeds(asked, changes, out, range(resolved.seed, resolved.seed + seeds))
    # To torchrun any other status than 0 is a process that died.
    if process.count == 1 and any(map(missed_budget, folders)):
        click.get_current_context().exit(BUDGET_MISSED)


@dataclass(frozen=True)
class _Asked:
    """What was typed, for one run or for several that differ in their seeds."""

    recipe: str
    preset: str | None
    resume: Path | None
    quiet: bool
    overwrite: bool

    def resolved(self, changes: list[str]) -> AnyRecipe:
        """The recipe with some overrides."""
        return arguments.read_recipe(self.recipe, self.preset, changes)

    def run(self, resolved: AnyRecipe, changes: list[str], out: Path | None) -> Path:
        """Run the recipe, and say where it is and whether it is too large; or how an interrupted run is continued."""
        from sparsebayes.train.run import run_recipe

        process = launched()
        try:
            folder = run_recipe(
                resolved,
                out=out,
                resume=self.resume,
                quiet=self.quiet,
                overwrite=self.overwrite,
            )
        except KeyboardInterrupt as interrupt:
            known = interrupt.args[0] if interrupt.args else self.resume or out
            if known is not None and process.is_first:
                again = [*_program(), "run", self.recipe, *changes]
                again += ["--preset", self.preset] if self.preset is not None else []
                words = (
                    "continue with" if process.count == 1 else "continue, started by torchrun as before, with"
                )
                click.echo(f"{words}: {shlex.join([*again, '--resume', str(known)])}", err=True)
            raise
        if process.is_first:
            click.echo(f"run folder: {folder}")
            missed = missed_budget(folder)
            if missed:
                click.echo(f"warning: {missed}", err=True)
        return folder


def _run_seeds(asked: _Asked, changes: list[str], out: Path | None, seeds: range) -> list[Path]:
    """Run one seed after the other, but not those that are done in their folder already; mean and spread at the end."""
    folders = []
    for seed in seeds:
        own = [*changes, f"seed={seed}"]
        resolved = asked.resolved(own)
        target = None if out is None else out.with_name(f"{out.name}-seed{seed}")
        if target is not None and not asked.overwrite and (target / "report.json").is_file():
            from sparsebayes.train.folder import is_finished

            if is_finished(target, resolved):
                click.echo(f"run folder: {target} (finished before)")
                folders.append(target)
                continue
        folders.append(asked.run(resolved, own, target))
    summary = over_seeds(folders)
    if summary:
        click.echo(summary)
    return folders


def _program() -> list[str]:
    """This program as a shell finds it: by name, else by the path or the module that it was started by."""
    name = str(click.get_current_context().find_root().info_name)
    started = Path(sys.argv[0])
    if started.resolve().parent == Path(__file__).resolve().parents[1]:
        return [sys.executable, "-m", "sparsebayes"]
    if started.stem != name:
        return [name]
    found = shutil.which(name)
    return [name] if found is not None and Path(found).samefile(started) else [sys.argv[0]]
