"""The run folder: made, checked and read. A folder that holds anything but a run is never touched."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sparsebayes.errors import RecipeError, RunError
from sparsebayes.files import write_atomically
from sparsebayes.recipe import AnyRecipe, dump_recipe, parse_recipe
from sparsebayes.train.example import EXAMPLE_FILE
from sparsebayes.train.lock import LOCK_FILE, refuse_running

__all__ = [
    "is_finished",
    "mend_lines_",
    "open_folder",
    "read_seconds",
    "recorded_recipe",
    "settle_lines_",
    "write_seconds",
]

WRITTEN = (
    *("recipe.yaml", "metrics.jsonl", "pareto.json", "points", "seconds.json"),
    *("selection.json", "evidence.json", "environment.json", "report.json", "report.md", "report.html"),
    *(
        "model.safetensors",
        "architecture.json",
        "model.onnx",
        "dense.onnx",
        "export-*",
        "*.part",
        EXAMPLE_FILE,
    ),
    *("genotype.json", "candidates.json", "switches.json", "cell-*.svg", "found"),
    *("bench.html", "bench.json", LOCK_FILE),
    *(".model.onnx-*", ".dense.onnx-*"),  # folders that a kill in the middle of an export leaves behind
    *("checkpoint*.pt", "posterior*.pt", "search*.pt", "retrain*.pt"),
)
"""Patterns of what a run, its report and its exports write: all that overwriting may delete."""


def open_folder(recipe: AnyRecipe, out: Path | None, resume: Path | None, overwrite: bool) -> Path:
    """Make the run folder, or check the one to resume."""
    if resume is not None:
        if not (resume / "recipe.yaml").is_file():
            raise RunError(f"{resume} is not a run folder: expected recipe.yaml in it")
        different = _differences(_of_training(recorded_recipe(resume)), _of_training(recipe))
        if different:
            more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
            raise RunError(
                f"{resume} was made by another recipe or with other overrides: {'; '.join(different[:3])}{more}; "
                "resume it with the same ones"
            )
        refuse_running(resume)
        write_atomically(resume / "recipe.yaml", _recorded(recipe))
        return resume
    if out is None:
        return _new_folder(recipe)
    folder = out
    try:
        if folder.exists() and any(folder.iterdir()) if folder.is_dir() else folder.exists():
            if not (overwrite and _is_run(folder)):
                raise RunError(
                    f"{folder} exists already; give another --out, --overwrite a run there, or --resume it"
                )
            foreign = sorted(path.name for path in folder.iterdir() if not _is_written(path.name))
            if foreign:
                raise RunError(
                    f"{folder} holds {foreign[0]!r}, which no run writes and --overwrite would delete; "
                    "move it away, or give another --out"
                )
            refuse_running(folder)
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "recipe.yaml", _recorded(recipe))
    except OSError as error:
        raise RunError(f"cannot write the run folder {folder}: {error.strerror or error}") from None
    return folder


def _new_folder(recipe: AnyRecipe) -> Path:
    """A folder named after the recipe and the time; with a number behind it where another run began in that second."""
    first = Path(recipe.out) / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder, number = first, 1
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            number += 1
            folder = first.with_name(f"{first.name}-{number}")
        except OSError as error:
            raise RunError(f"cannot write the run folder {folder}: {error.strerror or error}") from None
    write_atomically(folder / "recipe.yaml", _recorded(recipe))
    return folder


def is_finished(folder: Path, recipe: AnyRecipe) -> bool:
    """Whether a folder holds the report of a run of this very recipe.

    Args:
        folder: Any folder.
        recipe: What would be run; where it runs and where its files lie makes no difference.
    """
    if not (folder / "report.json").is_file() or not (folder / "recipe.yaml").is_file():
        return False
    return not _differences(_without_paths(recorded_recipe(folder)), _without_paths(recipe))


def _is_run(folder: Path) -> bool:
    """Whether a run has begun here, however early it was killed; a folder with a recipe of the user's own is none."""
    names = [path.name for path in folder.iterdir()]
    if all(fnmatch(name, ".recipe.yaml.*.part") for name in names):  # killed while it wrote its first file
        return True
    if not (folder / "recipe.yaml").is_file():
        return False
    if (folder / "seconds.json").is_file():
        return True
    try:
        recipe = recorded_recipe(folder)
    except (RunError, RecipeError):
        return False
    # A run writes every default out, which no person does.
    return (folder / "recipe.yaml").read_text(encoding="utf-8") == _recorded(recipe)


def _is_written(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WRITTEN)


def mend_lines_(path: Path) -> None:
    """Cut off a last line that a kill left unfinished; the next record would be glued to it."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            write_atomically(path, content[: content.rfind(b"\n") + 1])


def settle_lines_(path: Path) -> None:
    """Of the records of the same phase, cycle and epoch keep the last.

    An epoch that was broken off after its record and before its checkpoint is done, and recorded, again.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept: dict[object, str] = {}
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            key = tuple(row.get(name) for name in ("phase", "cycle", "epoch", "lr"))
        except (ValueError, AttributeError, RecursionError):
            key = (number,)
        kept[key] = line  # where the first one stood, so that the order is that of an unbroken run
    if len(kept) < len(lines):
        write_atomically(path, "".join(line + "\n" for line in kept.values()))


def recorded_recipe(run_dir: Path) -> AnyRecipe:
    """The recipe that a run folder was made with."""
    path = run_dir / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    return parse_recipe(text, str(path))


def _recorded(recipe: AnyRecipe) -> str:
    """What a run folder keeps: the presets that were not asked for need not suit what was."""
    return dump_recipe(recipe.model_copy(update={"presets": {}}))


def _of_training(recipe: AnyRecipe) -> dict[str, Any]:
    """What must be equal for a run to be resumed: all but where it runs, where its files lie and what it exports."""
    content = _without_paths(recipe)
    for key in ("export", "evaluate"):
        content.pop(key)
    return content


def _without_paths(recipe: AnyRecipe) -> dict[str, Any]:
    """What must be equal for a finished run to be the one that is asked for."""
    content = recipe.model_dump(mode="json")
    for key in ("out", "device", "threads", "presets"):
        content.pop(key)
    content["data"].pop("root")
    return content


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key whose value is not the same, with both values."""
    found = []
    for key in dict.fromkeys([*there, *here]):
        before, now = there.get(key), here.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key} is {json.dumps(before)} there and {json.dumps(now)} here")
    return found


def read_seconds(folder: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each phase, and of each kind of work, in earlier parts of an interrupted run.

    Raises:
        RunError: If they are damaged.
    """
    path = folder / "seconds.json"
    parts: dict[str, dict[str, float]] = {"phases": {}, "work": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for part, seconds in found.items():
            parts[part].update({name: float(value) for name, value in seconds.items()})
        if not all(0 <= value < math.inf for seconds in parts.values() for value in seconds.values()):
            raise ValueError
    except (OSError, ValueError, AttributeError, KeyError, TypeError, OverflowError, RecursionError):
        raise RunError(
            f"{path} is damaged; delete it to go on without the times of the earlier part"
        ) from None
    return parts["phases"], parts["work"]


def write_seconds(folder: Path, phases: Mapping[str, float], work: Mapping[str, float]) -> None:
    """Keep the seconds of each phase and of each kind of work, should the run be interrupted and resumed."""
    write_atomically(folder / "seconds.json", json.dumps({"phases": phases, "work": work}))
