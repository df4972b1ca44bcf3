"""The command that works for long: `run`."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import click

from sparsebayes.cli import arguments
from sparsebayes.cli.program import BUDGET_MISSED, main
from sparsebayes.errors import RunError
from sparsebayes.launcher import launched

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
    help="Run with K seeds, counted from the recipe's; with --out, in OUT-seedN.",
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
    resolved = arguments.read_recipe(recipe, preset, changes)
    process = launched()
    if resume is not None and process.is_first:
        arguments.require_run(resume)
    arguments.require_device(resolved)
    if seeds is not None and process.count > 1:
        raise RunError("expected --seed under torchrun, got --seeds; start it once for each seed")
    from sparsebayes.train.run import run_recipe

    missed = []
    for number in range(resolved.seed, resolved.seed + (seeds or 1)):
        target = out if out is None or seeds is None else out.with_name(f"{out.name}-seed{number}")
        own = changes if seeds is None else [*changes, f"seed={number}"]
        try:
            folder = run_recipe(
                resolved if seeds is None else arguments.read_recipe(recipe, preset, own),
                out=target,
                resume=resume,
                quiet=quiet,
                overwrite=overwrite,
            )
        except KeyboardInterrupt as interrupt:
            known = interrupt.args[0] if interrupt.args else resume or target
            if known is not None and process.is_first:
                again = [*_program(), "run", recipe, *own]
                again += ["--preset", preset] if preset is not None else []
                words = (
                    "continue with" if process.count == 1 else "continue, started by torchrun as before, with"
                )
                click.echo(f"{words}: {shlex.join([*again, '--resume', str(known)])}", err=True)
            raise
        if not process.is_first:
            return
        click.echo(f"run folder: {folder}")
        missed.append(_missed_budget(folder))
        if missed[-1]:
            click.echo(f"warning: {missed[-1]}", err=True)
    # To torchrun any other status than 0 is a process that died.
    if any(missed) and process.count == 1:
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
