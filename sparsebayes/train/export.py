"""Networks of a finished run for use elsewhere: any point of its front as a folder of its own, also in 8 bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from sparsebayes.data import Dataset, Images, Loader, load
from sparsebayes.errors import RunError
from sparsebayes.export import classify, compare_latency, export_onnx, load_model, quantize_onnx
from sparsebayes.files import copy_file, make_folder, write_atomically
from sparsebayes.recipe import SearchRecipe
from sparsebayes.train.example import read_example
from sparsebayes.train.folder import recorded_recipe
from sparsebayes.train.front import choose, read_front
from sparsebayes.train.measuring import input_metadata
from sparsebayes.train.seeding import derive_seed
from sparsebayes.train.setup import EVALUATION_BATCH
from sparsebayes.words import milliseconds, percent, ratio, size

__all__ = ["Quantized", "export_point", "quantize_export"]

INT8 = ("model.int8.onnx", "quantization.json")
EXPORTED = ("model.safetensors", "architecture.json", "model.onnx", *INT8)
"""All that an export writes, and all that --overwrite replaces."""
CALIBRATION_IMAGES = 512
LATENCY_BATCHES = (1, 64)


def export_point(
    run_dir: Path,
    *,
    point: int | None = None,
    max_params: int | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    legacy: bool = False,
) -> Path:
    """Export any network of a run's front as its own folder; of a search that compressed nothing, the one it found.

    Args:
        run_dir: The run folder.
        point: Number of the point; None: by size, or the chosen one.
        max_params: Take the best point with at most so many parameters.
        out: Where to, a new or empty folder; None: ``RUN/export-K`` or ``RUN/export-found``, which is written anew.
        overwrite: Let `out` hold files of an earlier export, which are replaced.
        legacy: Use the TorchScript-based exporter.

    Returns:
        The folder with model.safetensors, architecture.json and model.onnx.

    Raises:
        RunError: If the folder is no run, no point fits, or `out` holds something that is no export.
    """
    source = _network_folder(run_dir, point, max_params)
    target = out or run_dir / f"export-{source.name}"
    _require_room(target, overwrite or out is None)
    model, example = load_model(source), read_example(run_dir)
    make_folder(target)
    try:
        _clear(target, source)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}") from None
    metadata = input_metadata(example.mean, example.std)
    export_onnx(model, example.image, target / "model.onnx", legacy=legacy, metadata=metadata)
    for name in ("model.safetensors", "architecture.json"):
        copy_file(source / name, target / name)
    return target


def _clear(target: Path, source: Path) -> None:
    """Delete what a kill left of an export, and the 8-bit file of another network."""
    for path in target.iterdir():
        if _is_left_over(path.name):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    weights = target / "model.safetensors"
    if not weights.is_file() or weights.read_bytes() != (source / weights.name).read_bytes():
        for name in INT8:
            (target / name).unlink(missing_ok=True)


def _is_left_over(name: str) -> bool:
    """Whether a kill in the middle of an export leaves a file or folder of that name."""
    return any(fnmatch(name, pattern) for pattern in (".model*.onnx-*", ".*.part"))


def _network_folder(run_dir: Path, point: int | None, max_params: int | None) -> Path:
    """Where the run keeps the network that is asked for."""
    points = read_front(run_dir / "pareto.json")
    if points:
        return run_dir / "points" / str(choose(points, point=point, max_params=max_params).point)
    if not (run_dir / "recipe.yaml").is_file() or not isinstance(recorded_recipe(run_dir), SearchRecipe):
        raise RunError(f"{run_dir} is not a run folder with finished points: expected pareto.json in it")
    found = run_dir / "found"
    if not (found / "architecture.json").is_file():
        raise RunError(
            f"the search in {run_dir} has not trained the network that it found yet; resume it, and export then"
        )
    if point is not None or max_params is not None:
        raise RunError(
            f"the search in {run_dir} has compressed nothing yet, so there is one network to export; leave out --point "
            "and --max-params, or give the recipe a section compress"
        )
    return found


def _require_room(target: Path, overwrite: bool) -> None:
    """Refuse a folder that holds anything else than an export that may be replaced."""
    if target.exists() and not target.is_dir():
        raise RunError(f"expected a folder to export to, got the file {target}; give another --out")
    try:
        names = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    except OSError as error:
        raise RunError(f"cannot read {target}: {error.strerror or error}") from None
    names = [name for name in names if not _is_left_over(name)]
    foreign = [name for name in names if name not in EXPORTED]
    if foreign:
        raise RunError(f"{target} holds {foreign[0]!r}, which no export writes; give a new folder as --out")
    if names and not overwrite:
        raise RunError(f"{target} holds an export already; give another --out, or --overwrite")


@dataclass(frozen=True)
class Quantized:
    """A network in floating point and in 8 bits, side by side.

    Attributes:
        num_calibration_images: Training images that the ranges of the activations were taken from.
        num_test_images: Images of the test set that both errors were measured on.
        float_error: Share of them that the float file gets wrong, 0..1.
        int8_error: Share of them that the 8-bit file gets wrong.
        agreement: Share of them on which both name the same class.
        float_bytes: Size of the float file.
        int8_bytes: Size of the 8-bit file.
        float_ms: Milliseconds per call in onnxruntime with one thread, by batch size.
        int8_ms: The same of the 8-bit file.
    """

    num_calibration_images: int
    num_test_images: int
    float_error: float
    int8_error: float
    agreement: float
    float_bytes: int
    int8_bytes: int
    float_ms: dict[str, float]
    int8_ms: dict[str, float]

    def describe(self) -> str:
        """The comparison in words, what got worse included."""
        lines = [
            f"8 bits: test error {percent(self.float_error)} -> {percent(self.int8_error)} "
            f"({self.num_test_images:,} images, the same class on {percent(self.agreement)})",
            f"8 bits: {size(self.float_bytes)} -> {size(self.int8_bytes)} "
            f"({ratio(self.float_bytes, self.int8_bytes, 'smaller', 'larger')})",
        ]
        for batch, before in self.float_ms.items():
            after = self.int8_ms[batch]
            lines.append(
                f"8 bits: batch {batch} {milliseconds(before)} -> {milliseconds(after)} "
                f"({ratio(before, after, 'faster', 'slower')})"
            )
        if all(self.int8_ms[batch] >= before for batch, before in self.float_ms.items()):
            lines.append(
                "8 bits are not faster here: on this processor, or at this size, converting between the types "
                "costs more than it saves; prefer model.onnx unless the device has 8-bit arithmetic"
            )
        return "\n".join(lines)


def quantize_export(run_dir: Path, folder: Path, *, data_root: str | None = None) -> Quantized:
    """Write ``model.int8.onnx`` beside an exported ``model.onnx``, and measure both.

    The ranges of the activations come from training images as they are; nothing is chosen by the test set, on which
    both files are then compared.

    Args:
        run_dir: The run, whose data are used.
        folder: What `export_point` wrote.
        data_root: Folder of the data; None: as the run's recipe says.

    Returns:
        The comparison, also written to ``quantization.json``.

    Raises:
        SparseBayesError: If the data are not there, or onnxruntime cannot quantize or run the network.
    """
    recipe = recorded_recipe(run_dir)
    dataset = load(recipe.data.name, root=data_root or recipe.data.root)
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, "calibration"))
    some = torch.randperm(len(dataset.train), generator=generator)[:CALIBRATION_IMAGES]
    images, _ = _normalised(dataset, dataset.train.subset(some))
    files = {"float": folder / "model.onnx", "int8": folder / "model.int8.onnx"}
    int8_bytes = quantize_onnx(files["float"], images, files["int8"])
    tested, labels = _normalised(dataset, dataset.test)
    classes = {name: torch.from_numpy(classify(path, tested)) for name, path in files.items()}
    times = {batch: compare_latency(files, batch=batch) for batch in LATENCY_BATCHES}
    outcome = Quantized(
        num_calibration_images=len(images),
        num_test_images=len(labels),
        float_error=float((classes["float"] != labels).double().mean()),
        int8_error=float((classes["int8"] != labels).double().mean()),
        agreement=float((classes["float"] == classes["int8"]).double().mean()),
        float_bytes=files["float"].stat().st_size,
        int8_bytes=int8_bytes,
        float_ms={str(batch): found["float"] for batch, found in times.items()},
        int8_ms={str(batch): found["int8"] for batch, found in times.items()},
    )
    write_atomically(folder / "quantization.json", json.dumps(asdict(outcome), indent=1) + "\n")
    return outcome


def _normalised(dataset: Dataset, images: Images) -> tuple[Tensor, Tensor]:
    """All images as the network takes them, of shape ``[N, C, H, W]``, and their labels."""
    loader = Loader(
        images,
        batch_size=EVALUATION_BATCH,
        mean=dataset.mean,
        std=dataset.std,
        shuffle=False,
        augment="none",
        seed=0,
        device=torch.device("cpu"),
    )
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
