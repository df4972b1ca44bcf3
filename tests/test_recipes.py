"""Every shipped recipe runs from end to end with its smoke preset, on data inside the package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import sparsebayes
from sparsebayes.recipe import load_recipe, shipped_recipes
from sparsebayes.train.run import run_recipe

RECIPES = shipped_recipes()


def test_there_are_recipes() -> None:
    assert {"vgg_cifar_filter", "resnet56_cifar_units", "resnet18_cifar_blocks"} <= set(RECIPES)
    assert {"quickstart", "lenet5_mnist", "lenet300_mnist", "nas_proxy", "nas_bench201"} <= set(RECIPES)
    assert {"nas_proxy_pgnas", "nas_proxy_balenas", "nas_bench201_balenas"} <= set(RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_smoke_preset_runs(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, preset="smoke", overrides=["evaluate.latency=false", "export.legacy=true"])
    folder = run_recipe(recipe, out=tmp_path / "run", quiet=True)
    report = json.loads((folder / "report.json").read_text())
    assert report["compact"]["params"] < report["dense"]["params"]
    # A search's smoke preset trains a network on 2,200 images of ten classes for one epoch.
    assert report["compact"]["test_error"] < (0.5 if recipe.task == "compress" else 0.88)
    assert report["compact"]["onnx_error"] <= 1e-4
    model = sparsebayes.load(folder)
    assert sum(p.numel() for p in model.parameters()) >= report["compact"]["params"]
    record = "pareto.json" if recipe.task == "compress" else "genotype.json"
    for file in ("report.html", "report.md", "model.onnx", "recipe.yaml", record):
        assert (folder / file).stat().st_size > 0
