"""The outcome of a run: the test set read once, both networks exported and measured, as the content of report.json."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsebayes
from sparsebayes.cost import cost
from sparsebayes.data import Loader
from sparsebayes.export import check_onnx, compare_latency, export_onnx
from sparsebayes.files import copy_file, write_atomically
from sparsebayes.groups import Grouping
from sparsebayes.prune.carry import Lineage
from sparsebayes.prune.selection import Selection
from sparsebayes.recipe import Recipe
from sparsebayes.report.provenance import library_versions, machine_hardware
from sparsebayes.train.budget import budget_outcome
from sparsebayes.train.compress import Compressor
from sparsebayes.train.evaluation import evaluate
from sparsebayes.train.front import Point
from sparsebayes.train.loaders import Loaders

__all__ = ["results"]


def results(
    recipe: Recipe, compressor: Compressor, chosen: Point, test: Loader, loaders: Loaders, folder: Path
) -> dict[str, Any]:
    """Read the test set once, export both networks, measure them: the content of report.json."""
    dense, _ = compressor.network(0)
    compact, lineage = compressor.network(chosen.point)
    for name in ("model.safetensors", "architecture.json", "evidence.json"):
        source = compressor.point_folder(chosen.point) / name
        if source.is_file():
            copy_file(source, folder / name)
    groups = compressor.groups(dense)
    selection = _selection(groups.grouping, lineage, chosen.strength)
    write_atomically(folder / "selection.json", selection.to_json())
    networks = {"dense": dense, "compact": compact}
    params = {"dense": compressor.points[0].params, "compact": chosen.params}
    report: dict[str, Any] = {"name": recipe.name, "task": recipe.task}
    for name, model in networks.items():
        tested = evaluate(model, test)
        report[name] = {
            "test_error": tested.error,
            "test_loss": tested.loss,
            "params": params[name],
            "macs": cost(model, loaders.example).macs,
            "onnx_bytes": None,
            "latency_ms_batch1": None,
            "latency_ms_batch64": None,
        }
    if recipe.export.onnx:
        _export(recipe, networks, report, test, loaders, folder)
    # Those of the dense network, so that a resumed run, which need not remove anything, reports the same.
    refused = list(groups.fixed) if len(compressor.points) > 1 else []
    environment = {
        "versions": {"sparsebayes": sparsebayes.__version__, **library_versions()},
        "machine": platform.machine(),
        "processor": machine_hardware(),
        "threads": torch.get_num_threads(),
    }
    outcome = budget_outcome(recipe, compressor.points[0], chosen, compact, loaders.example, lineage.masks)
    report.update(
        budget=outcome,
        widths=_widths(dense, compact),
        chosen_point=chosen.point,
        strength=chosen.strength,
        seed=recipe.seed,
        refused=refused,
        data=recipe.data.name,
        model=recipe.model.name,
        num_test_images=test.num_data,
        device=str(loaders.example.device),
        threads=torch.get_num_threads(),
        versions=environment["versions"],
    )
    write_atomically(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    return report


def _selection(dense: Grouping, lineage: Lineage, strength: float | None) -> Selection:
    """What is left of the dense network's groups, over all removals."""
    _, origin = lineage.grouping(dense)
    on = torch.zeros(dense.num_groups, dtype=torch.bool)
    on[origin] = True
    return Selection(dense.name, on, dense.layers, dense.layer_index, dense.fingerprint(), strength)


def _export(
    recipe: Recipe,
    networks: dict[str, nn.Module],
    report: dict[str, Any],
    test: Loader,
    loaders: Loaders,
    folder: Path,
) -> None:
    """Write and check model.onnx and dense.onnx, and time both in turns."""
    files = {"dense": folder / "dense.onnx", "compact": folder / "model.onnx"}
    example = loaders.example.cpu()
    images = next(iter(test))[0].cpu()
    for name, model in networks.items():
        written = export_onnx(
            model, example, files[name], legacy=recipe.export.legacy, opset=recipe.export.opset
        )
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
