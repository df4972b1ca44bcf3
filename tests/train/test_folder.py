"""Run folders: what they record can be read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsebayes.errors import RunError
from sparsebayes.recipe import load_recipe
from sparsebayes.train.folder import open_folder, read_seconds, recorded_recipe, write_seconds


def test_presets_that_were_not_asked_for_do_not_bar_a_resumption(tmp_path: Path) -> None:
    changes = ["posterior=laplace", "sampling.count=1", "sampling.baseline=false"]
    recipe = load_recipe("lenet5_mnist_dropout", overrides=changes)  # its preset smoke draws several
    folder = open_folder(recipe, tmp_path / "run", None, overwrite=False)
    assert recorded_recipe(folder) == recipe.model_copy(update={"presets": {}})
    assert open_folder(recipe, None, folder, overwrite=False) == folder


def test_times_of_an_earlier_part_are_read_back(tmp_path: Path) -> None:
    assert read_seconds(tmp_path) == ({}, {})
    write_seconds(tmp_path, {"pretrain": 1.5}, {"training": 1.25, "evaluation": 0.25})
    assert read_seconds(tmp_path) == ({"pretrain": 1.5}, {"training": 1.25, "evaluation": 0.25})


@pytest.mark.parametrize(
    "content",
    ["", "[]", "3", '{"phases": 3}', '{"phases": {"pretrain": null}}', '{"phases": {"pretrain": "long"}}',
     '{"phases": {"pretrain": NaN}}', '{"work": {"training": -1}}', '{"pretrain": 1.5}',
     '{"work": {"training": ' + "9" * 400 + "}}"],
)  # fmt: skip
def test_damaged_times_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "seconds.json").write_text(content)
    with pytest.raises(RunError, match=r"seconds\.json is damaged; delete it to go on without the times"):
        read_seconds(tmp_path)
