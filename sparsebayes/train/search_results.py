"""The outcome of a search: the test set read once, the network exported and measured, as the content of report.json."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsebayes
from sparsebayes.cost import cost
from sparsebayes.export import check_onnx, compare_latency, export_onnx
from sparsebayes.files import copy_file, write_atomically
from sparsebayes.nas.genotype import Genotype
from sparsebayes.nas.tabular import BenchTable
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.report.provenance import library_versions, machine_hardware
from sparsebayes.train.evaluation import evaluate
from sparsebayes.train.search import WithSwitches
from sparsebayes.train.search_setup import Setting

__all__ = ["about_search", "search_results"]


def search_results(
    setting: Setting, switches: Tensor, network: nn.Module, genotype: Genotype, folder: Path
) -> dict[str, Any]:
    """Read the test set once, export the network, measure it: the content of report.json.

    Args:
        setting: what the search started from; its supernet as the search left it.
        switches: values of the supernet's switches, of shape `[T]`.
        network: of the genotype, trained.
        genotype: what was found.
        folder: the run folder.

    Returns:
        "dense" speaks of the supernet, which has all operations, "compact" of the network of the genotype.
    """
    recipe, loaders = setting.recipe, setting.loaders
    for name in ("model.safetensors", "architecture.json"):
        copy_file(folder / "found" / name, folder / name)
    report: dict[str, Any] = {"name": recipe.name, "task": recipe.task}
    networks = {"dense": WithSwitches(setting.supernet, switches), "compact": network}
    for name, model in networks.items():
        tested = evaluate(model, setting.test)
        spent = cost(model, loaders.example)
        report[name] = {
            "test_error": tested.error,
            "test_loss": tested.loss,
            "params": spent.params,
            "macs": spent.macs,
            "onnx_bytes": None,
            "latency_ms_batch1": None,
            "latency_ms_batch64": None,
        }
    if recipe.export.onnx:
        _export(recipe, network, report["compact"], next(iter(setting.test))[0].cpu(), folder)
    environment = {
        "versions": {"sparsebayes": sparsebayes.__version__, **library_versions()},
        "machine": platform.machine(),
        "processor": machine_hardware(),
        "threads": torch.get_num_threads(),
    }
    report.update(
        widths={},
        seed=recipe.seed,
        refused=[],
        data=recipe.data.name,
        num_test_images=setting.test.num_data,
        device=str(loaders.example.device),
        versions=environment["versions"],
        **about_search(recipe, genotype, setting.table),
    )
    write_atomically(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    return report


def about_search(recipe: SearchRecipe, genotype: Genotype, table: BenchTable | None) -> dict[str, Any]:
    """What a report says of the search itself; the one place where a table of true accuracies is read.

    Args:
        recipe: the recipe.
        genotype: what was found.
        table: true accuracies, or None.

    Raises:
        DataError: the cell is not in the table.
        RecipeError: the genotype is no cell of the table's space.
    """
    found: dict[str, Any] = {
        "space": genotype.search_space.name,
        "method": recipe.posterior if recipe.search.baseline == "none" else recipe.search.baseline,
        "operations": {key: [f"{s}->{t} {op}" for s, t, op in ops] for key, ops in genotype.cells.items()},
        "parameter_free_share": round(genotype.parameter_free_share, 4),
    }
    if table is not None:
        judged = table.look_up(genotype)
        found["table"] = {
            "cell": judged.cell,
            "num_cells": judged.num_cells,
            "accuracies": dict(judged.accuracies),
            "ranks": dict(judged.ranks),
        }
    return found


def _export(
    recipe: SearchRecipe, network: nn.Module, figures: dict[str, Any], images: Tensor, folder: Path
) -> None:
    """Write and check model.onnx, and time it."""
    path = folder / "model.onnx"
    options = recipe.export
    written = export_onnx(network, images[:1], path, legacy=options.legacy, opset=options.opset)
    figures.update(
        onnx_bytes=written.bytes, onnx_exporter=written.exporter, onnx_error=check_onnx(path, network, images)
    )
    if recipe.evaluate.latency:
        for batch in recipe.evaluate.batch_sizes:
            times = compare_latency({"model": path}, batch=batch, threads=recipe.evaluate.threads)
            figures[f"latency_ms_batch{batch}"] = times["model"]
