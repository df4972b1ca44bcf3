"""The outcome of a run: the test set read once, both networks exported and measured, as the content of report.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsebayes.data import Loader
from sparsebayes.files import copy_file, write_atomically
from sparsebayes.groups import Grouping
from sparsebayes.prune.carry import Lineage
from sparsebayes.prune.selection import Selection
from sparsebayes.recipe import Recipe
from sparsebayes.train.budget import budget_outcome
from sparsebayes.train.compress import Compressor
from sparsebayes.train.front import Point
from sparsebayes.train.loaders import Loaders
from sparsebayes.train.measuring import export_networks, figures, write_environment

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
        report[name] = figures(model, test, loaders.example, params[name])
    files = {"dense": folder / "dense.onnx", "compact": folder / "model.onnx"}
    export_networks(recipe, networks, files, report, test)
    # Those of the dense network, so that a resumed run, which need not remove anything, reports the same.
    refused = list(groups.fixed) if len(compressor.points) > 1 else []
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
        versions=write_environment(folder),
    )
    return report


def _selection(dense: Grouping, lineage: Lineage, strength: float | None) -> Selection:
    """What is left of the dense network's groups, over all removals."""
    _, origin = lineage.grouping(dense)
    on = torch.zeros(dense.num_groups, dtype=torch.bool)
    on[origin] = True
    return Selection(dense.name, on, dense.layers, dense.layer_index, dense.fingerprint(), strength)


def _widths(dense: nn.Module, compact: nn.Module) -> dict[str, list[int]]:
    """Output size of each weighted layer, before and after."""
    small = dict(compact.named_parameters())
    return {
        name.removesuffix(".weight"): [len(parameter), len(small[name])]
        for name, parameter in dense.named_parameters()
        if name.endswith(".weight") and parameter.ndim > 1 and name in small
    }
