"""What a report says of a network, however it came about: tested once, counted, exported and timed."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsebayes
from sparsebayes.cost import cost
from sparsebayes.data import Loader
from sparsebayes.export import check_onnx, compare_latency, export_onnx
from sparsebayes.files import write_atomically
from sparsebayes.recipe import AnyRecipe
from sparsebayes.report.provenance import library_versions, machine_hardware
from sparsebayes.train.evaluation import evaluate

__all__ = ["export_networks", "figures", "input_metadata", "write_environment"]


def input_metadata(mean: Sequence[float], std: Sequence[float]) -> dict[str, str]:
    """What an ONNX file says of its input and output, since normalising is no part of the network.

    Args:
        mean: Of each channel, for pixels scaled to 0..1.
        std: Standard deviation of the same.
    """
    return {
        "input": "float32 [batch, channels, height, width]: (pixel / 255 - mean) / std, by channel",
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
        "output": "float32 [batch, classes]: logits",
    }


def figures(model: nn.Module, test: Loader, example: Tensor, params: int | None = None) -> dict[str, Any]:
    """A network's figures in report.json; those of its ONNX file are absent until it is exported.

    Args:
        model: The network.
        test: The test set, read once.
        example: One input.
        params: Parameter entries that count; None: all.
    """
    tested, spent = evaluate(model, test), cost(model, example)
    return {
        "test_error": tested.error,
        "test_loss": tested.loss,
        "params": spent.params if params is None else params,
        "macs": spent.macs,
        "onnx_bytes": None,
        "latency_ms_batch1": None,
        "latency_ms_batch64": None,
    }


def export_networks(
    recipe: AnyRecipe,
    networks: Mapping[str, nn.Module],
    files: Mapping[str, Path],
    report: dict[str, Any],
    test: Loader,
) -> None:
    """Write and check the ONNX files of some networks, time them in turns, and add what came out to their figures.

    Args:
        recipe: Its sections export and evaluate; nothing is done where `export.onnx` is false.
        networks: By their names in the report.
        files: Where each is written to.
        report: The content of report.json, which gets sizes, errors and latencies.
        test: Test images, of which a batch is compared.

    Raises:
        ModelError: If a network cannot be exported, or its file computes something else.
        RunError: If a file cannot be written.
    """
    if not recipe.export.onnx:
        return
    images = next(iter(test))[0].cpu()
    for name, model in networks.items():
        written = export_onnx(
            model,
            images[:1],
            files[name],
            legacy=recipe.export.legacy,
            opset=recipe.export.opset,
            metadata=input_metadata(test.mean, test.std),
        )
        error = check_onnx(files[name], model, images)
        report[name].update(onnx_bytes=written.bytes, onnx_exporter=written.exporter, onnx_error=error)
    if recipe.evaluate.latency:
        for batch in recipe.evaluate.batch_sizes:
            times = compare_latency(files, batch=batch, threads=recipe.evaluate.threads)
            for name, milliseconds in times.items():
                report[name][f"latency_ms_batch{batch}"] = milliseconds


def write_environment(folder: Path) -> dict[str, str]:
    """Write down what the run ran on, as environment.json; the versions of the libraries."""
    versions = {"sparsebayes": sparsebayes.__version__, **library_versions()}
    environment = {
        "versions": versions,
        "machine": platform.machine(),
        "processor": machine_hardware(),
        "threads": torch.get_num_threads(),
    }
    write_atomically(folder / "environment.json", json.dumps(environment, indent=1) + "\n")
    return versions
