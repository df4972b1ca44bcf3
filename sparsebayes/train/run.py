"""From a recipe to a run folder: data, model, compression, the one reading of the test set, exports, report.

A run folder holds the recipe as resolved, metrics.jsonl, pareto.json, points/K (every network of the front), the chosen
network (model.safetensors and architecture.json), model.onnx and dense.onnx, report.json, report.md and report.html.
"""

from __future__ import annotations

import json
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import sparsebayes
from sparsebayes.cost import cost
from sparsebayes.data import Dataset, Images, Loader, load, split
from sparsebayes.errors import DataError, RecipeError, RunError, SparseBayesError
from sparsebayes.export import check_onnx, compare_latency, export_onnx
from sparsebayes.models import build
from sparsebayes.recipe import Recipe, dump_recipe, parse_recipe
from sparsebayes.report import read_report, summary_line, write_report
from sparsebayes.train.checkpoint import write_atomically
from sparsebayes.train.compress import Compressor, Loaders
from sparsebayes.train.evaluation import Evaluation, check_logits, evaluate
from sparsebayes.train.front import Point, choose, read_front
from sparsebayes.train.progress import Reporter
from sparsebayes.train.seeding import derive_seed

__all__ = ["export_point", "run_recipe"]

EVALUATION_BATCH = 1000
"""Images of one evaluation step: large enough to be fast, small enough for any memory."""


def run_recipe(
    recipe: Recipe, *, out: Path | None = None, resume: Path | None = None, quiet: bool = False, overwrite: bool = False
) -> Path:
    """Run a recipe from data to report.

    Args:
        recipe: What to do.
        out: Run folder; None: a new one below ``recipe.out``, named after the recipe and the time.
        resume: Folder of an interrupted run of the same recipe, to go on with.
        quiet: Print nothing.
        overwrite: Replace `out` if it exists and holds a run.

    Returns:
        The run folder.

    Raises:
        SparseBayesError: In one sentence: what was expected, what came, what to do.
        KeyboardInterrupt: If interrupted; the folder can then be resumed.
    """
    device = _device(recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    dataset = load(recipe.data.name, root=recipe.data.root)
    loaders, test = _loaders(recipe, dataset, device)
    make = _builder(recipe, device)
    _check_model(make(), loaders)
    folder = _open_folder(recipe, out, resume, overwrite)
    with Reporter(quiet=quiet) as reporter, _terminable():
        reporter.line(f"run folder {folder}")
        metrics = folder / "metrics.jsonl"

        def record(row: dict[str, Any]) -> None:
            with metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

        compressor = Compressor(recipe, loaders, make, folder, record, reporter)
        compressor.seconds.update(_read_seconds(folder))
        try:
            chosen = compressor.run()
        except KeyboardInterrupt:
            # Whoever catches it can tell the user which folder to resume.
            raise KeyboardInterrupt(str(folder)) from None
        finally:
            write_atomically(folder / "seconds.json", json.dumps(compressor.seconds))
        reporter.phase("export", 1)
        start = time.perf_counter()
        report = _results(recipe, compressor, chosen, test, loaders, folder)
        compressor.seconds["export"] = time.perf_counter() - start
        report["wall_seconds"] = {name: round(s, 3) for name, s in compressor.seconds.items()}
        write_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")
        write_report(folder)
        reporter.line(summary_line(read_report(folder)))
        reporter.line(f"report {folder / 'report.html'}")
    return folder


def export_point(
    run_dir: Path, *, point: int | None = None, max_params: int | None = None, out: Path | None = None, legacy: bool = False
) -> Path:
    """Export any network of a run's front as its own folder.

    Args:
        run_dir: The run folder.
        point: Number of the point; None: by size, or the chosen one.
        max_params: Take the best point with at most so many parameters.
        out: Where to; None: ``RUN/export-K``.
        legacy: Use the TorchScript-based exporter.

    Returns:
        The folder with model.safetensors, architecture.json and model.onnx.

    Raises:
        RunError: If the folder is no run, or no point fits.
    """
    points = read_front(run_dir / "pareto.json")
    if not points:
        raise RunError(f"{run_dir} is not a run folder with finished points: expected pareto.json in it")
    number = choose(points, point=point, max_params=max_params).point
    target = out or run_dir / f"export-{number}"
    recipe = _recorded_recipe(run_dir)
    model = sparsebayes.load(run_dir / "points" / str(number))
    example = _example(load(recipe.data.name, root=recipe.data.root), torch.device("cpu"))
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "architecture.json"):
            shutil.copyfile(run_dir / "points" / str(number) / name, target / name)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}") from None
    export_onnx(model, example, target / "model.onnx", legacy=legacy)
    return target


def _results(
    recipe: Recipe, compressor: Compressor, chosen: Point, test: Loader, loaders: Loaders, folder: Path
) -> dict[str, Any]:
    """Read the test set once, export both networks, measure them: the content of report.json."""
    dense, _ = compressor.network(0)
    compact, _ = compressor.network(chosen.point)
    points = folder / "points" / str(chosen.point)
    for name in ("model.safetensors", "architecture.json"):
        shutil.copyfile(points / name, folder / name)
    networks = {"dense": dense, "compact": compact}
    params = {"dense": compressor.points[0].params, "compact": chosen.params}
    report: dict[str, Any] = {"name": recipe.name, "task": recipe.task}
    for name, model in networks.items():
        tested: Evaluation = evaluate(model, test)
        report[name] = {
            "test_error": tested.error, "test_loss": tested.loss, "params": params[name],
            "macs": cost(model, loaders.example).macs, "onnx_bytes": None, "latency_ms_batch1": None,
            "latency_ms_batch64": None,
        }  # fmt: skip
    if recipe.export.onnx:
        _export(recipe, networks, report, test, loaders, folder)
    grouping_widths = {
        layer: [count, chosen.widths.get(layer, count)]
        for layer, count in compressor.points[1].widths.items()
    } if len(compressor.points) > 1 else {}
    report["widths"] = _widths(dense, compact) or grouping_widths
    report.update(
        chosen_point=chosen.point, strength=chosen.strength, seed=recipe.seed, refused=list(compressor.refused),
        data=recipe.data.name, model=recipe.model.name, num_test_images=test.num_data, device=str(loaders.example.device),
        threads=torch.get_num_threads(), versions=_versions(),
    )  # fmt: skip
    write_atomically(folder / "environment.json", json.dumps({"versions": _versions(), "machine": platform.machine(),
        "processor": platform.processor(), "threads": torch.get_num_threads()}, indent=1) + "\n")  # fmt: skip
    return report


def _export(
    recipe: Recipe, networks: dict[str, nn.Module], report: dict[str, Any], test: Loader, loaders: Loaders, folder: Path
) -> None:
    """Write and check model.onnx and dense.onnx, and time both in turns."""
    files = {"dense": folder / "dense.onnx", "compact": folder / "model.onnx"}
    example = loaders.example.cpu()
    images = next(iter(test))[0].cpu()
    for name, model in networks.items():
        written = export_onnx(model, example, files[name], legacy=recipe.export.legacy, opset=recipe.export.opset)
        error = check_onnx(files[name], model, images)
        report[name].update(onnx_bytes=written.bytes, onnx_exporter=written.exporter, onnx_error=error)
    if recipe.evaluate.latency:
        for batch in recipe.evaluate.batch_sizes:
            times = compare_latency(files, batch=batch, threads=recipe.evaluate.threads)
            for name, milliseconds in times.items():
                report[name][f"latency_ms_batch{batch}"] = milliseconds


def _widths(dense: nn.Module, compact: nn.Module) -> dict[str, list[int]]:
    """Output size of each weighted layer, before and after."""
    small = dict(compact.named_parameters())
    return {
        name.removesuffix(".weight"): [len(parameter), len(small[name])]
        for name, parameter in dense.named_parameters()
        if name.endswith(".weight") and parameter.ndim > 1 and name in small
    }


def _loaders(recipe: Recipe, dataset: Dataset, device: torch.device) -> tuple[Loaders, Loader]:
    """Training, curvature and held-out images, and the test set."""
    data = recipe.data
    train, heldout = split(dataset.train, holdout=data.holdout, seed=recipe.seed)

    def loader(images: Images, batch: int, *, shuffle: bool = False, augment: str = "none") -> Loader:
        return Loader(
            images, batch_size=batch, mean=dataset.mean, std=dataset.std, shuffle=shuffle, augment=augment,
            seed=derive_seed(recipe.seed, "loader"), device=device,
        )  # fmt: skip

    if data.batch_size > len(train):
        raise DataError(
            f"data.batch_size is {data.batch_size}, but only {len(train)} images are left to train on; lower it"
        )
    loaders = Loaders(
        train=loader(train, data.batch_size, shuffle=True, augment=data.augment),
        plain=loader(train, 256, shuffle=True),
        heldout=loader(heldout, EVALUATION_BATCH),
        example=_example(dataset, device),
    )
    return loaders, loader(dataset.test, EVALUATION_BATCH)


def _example(dataset: Dataset, device: torch.device) -> torch.Tensor:
    """One normalised image of the training set, of shape ``[1, C, H, W]``."""
    one = Images(dataset.train.images[:1], dataset.train.labels[:1])
    loader = Loader(
        one, batch_size=1, mean=dataset.mean, std=dataset.std, shuffle=False, augment="none", seed=0, device=device
    )
    return next(iter(loader))[0]


def _builder(recipe: Recipe, device: torch.device) -> Callable[[], nn.Module]:
    """A function that makes the dense network, always with the same initial weights, leaving the global RNG alone."""

    def make() -> nn.Module:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(derive_seed(recipe.seed, "model"))
            return build(recipe.model.name, recipe.model.options).to(device)

    return make


def _check_model(model: nn.Module, loaders: Loaders) -> None:
    """Refuse, before anything is written, a model whose input or output does not fit the data."""
    images, labels = next(iter(loaders.heldout))
    try:
        with torch.no_grad():
            logits = model.eval()(images[:2])
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"the model does not accept images of shape {list(images.shape[1:])} ({reason}); "
            "choose model and data that belong together"
        ) from None
    check_logits(logits, labels[:2])
    classes = int(labels.max()) + 1
    if logits.shape[1] < classes:
        raise DataError(
            f"the data have {classes} classes, but the model has {logits.shape[1]} outputs; "
            "set model.options.num_classes"
        )


def _device(name: str) -> torch.device:
    """The device of a recipe's name for it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device is cuda, but this PyTorch sees no CUDA device; use --device cpu or auto")
    return torch.device(name)


def _open_folder(recipe: Recipe, out: Path | None, resume: Path | None, overwrite: bool) -> Path:
    """Make the run folder, or check the one to resume."""
    if resume is not None:
        if not (resume / "recipe.yaml").is_file():
            raise RunError(f"{resume} is not a run folder: expected recipe.yaml in it")
        if _without_paths(_recorded_recipe(resume)) != _without_paths(recipe):
            raise RunError(f"{resume} was made by another recipe or with other overrides; resume it with the same ones")
        return resume
    folder = out or Path(recipe.out) / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        if folder.exists() and any(folder.iterdir()) if folder.is_dir() else folder.exists():
            if not (overwrite and (folder / "recipe.yaml").is_file()):
                raise RunError(f"{folder} exists already; give another --out, --overwrite a run there, or --resume it")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
    except OSError as error:
        raise RunError(f"cannot write the run folder {folder}: {error.strerror or error}") from None
    return folder


def _recorded_recipe(run_dir: Path) -> Recipe:
    """The recipe that a run folder was made with."""
    path = run_dir / "recipe.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    return parse_recipe(text, str(path))


def _without_paths(recipe: Recipe) -> dict[str, Any]:
    """What must be equal for a run to be resumed: all but where it runs and where its files lie."""
    content = recipe.model_dump(mode="json")
    for key in ("out", "device", "threads", "presets"):
        content.pop(key)
    content["data"].pop("root")
    return content


def _read_seconds(folder: Path) -> dict[str, float]:
    path = folder / "seconds.json"
    if not path.is_file():
        return {}
    try:
        return {str(name): float(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        raise RunError(f"{path} is damaged; delete it to go on without the times of the earlier part") from None


@contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C while a run works, so that both leave a folder to resume from."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import numpy
    import onnx
    import onnxruntime

    return {
        "sparsebayes": sparsebayes.__version__, "python": platform.python_version(), "torch": torch.__version__,
        "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__,
    }  # fmt: skip
