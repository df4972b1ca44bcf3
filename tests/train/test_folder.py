"""Run folders: what they record can be read back."""

from __future__ import annotations

from pathlib import Path

from sparsebayes.recipe import load_recipe
from sparsebayes.train.folder import open_folder, recorded_recipe


def test_presets_that_were_not_asked_for_do_not_bar_a_resumption(tmp_path: Path) -> None:
    changes = ["posterior=laplace", "sampling.count=1", "sampling.baseline=false"]
    recipe = load_recipe("lenet5_mnist_dropout", overrides=changes)  # its preset smoke draws several
    folder = open_folder(recipe, tmp_path / "run", None, overwrite=False)
    assert recorded_recipe(folder) == recipe.model_copy(update={"presets": {}})
    assert open_folder(recipe, None, folder, overwrite=False) == folder
