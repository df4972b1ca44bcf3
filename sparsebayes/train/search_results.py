"""The outcome of a search: the test set read once, the network exported and measured, as the content of report.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsebayes.files import copy_file
from sparsebayes.nas.genotype import Genotype
from sparsebayes.nas.tabular import BenchTable
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.train.measuring import export_networks, figures, write_environment
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
        report[name] = figures(model, setting.test, loaders.example)
    export_networks(recipe, {"compact": network}, {"compact": folder / "model.onnx"}, report, setting.test)
    report.update(
        widths={},
        seed=recipe.seed,
        refused=[],
        data=recipe.data.name,
        num_test_images=setting.test.num_data,
        device=str(loaders.example.device),
        versions=write_environment(folder),
        **about_search(recipe, genotype, setting.table),
    )
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
