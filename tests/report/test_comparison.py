"""Several runs on one page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsebayes.errors import RunError
from sparsebayes.report import write_comparison
from sparsebayes.report.files import recipe_values


def run(folder: Path, params: int, recipe: str) -> Path:
    """A finished run of few records."""
    folder.mkdir(parents=True)
    figures = {
        "test_error": 0.01,
        "macs": 500,
        "onnx_bytes": 2000,
        "latency_ms_batch1": 0.5,
        "latency_ms_batch64": 9.0,
    }
    report = {
        "name": "n", "task": "compress", "seed": 0, "widths": {}, "wall_seconds": {}, "versions": {}, "refused": [],
        "dense": {**figures, "params": 1000}, "compact": {**figures, "params": params, "test_error": 0.02},
    }  # fmt: skip
    points = [
        {"point": k, "params": size, "macs": 500, "heldout_loss": 0.1, "heldout_error": 0.02, "strength": None,
         "chosen": size == params}
        for k, size in enumerate((1000, params))
    ]  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "pareto.json").write_text(json.dumps(points))
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def test_networks_and_the_differing_keys_stand_side_by_side(tmp_path: Path) -> None:
    a = run(tmp_path / "a", 100, "name: x\nseed: 0\ntrain: {lr: 0.1, epochs: 3}\n")
    b = run(tmp_path / "b", 50, "name: y\nseed: 0\ntrain: {lr: 0.2, epochs: 3}\n")
    page = write_comparison([a, b], tmp_path / "c.html").read_text()
    assert "10x fewer" in page and "20x fewer" in page
    assert '<th scope="row">train.lr</th><td>0.1</td><td>0.2</td>' in page
    assert "train.epochs" not in page and ">seed<" not in page and ">name<" not in page
    assert page.count('class="dot c1') >= 2  # the second run has another colour, and another shape:
    assert page.count("<polygon") >= 2


def test_runs_of_one_recipe_are_said_to_be(tmp_path: Path) -> None:
    folders = [run(tmp_path / part / "run", 100, "seed: 0\n") for part in ("one", "two")]
    page = write_comparison(folders, tmp_path / "c.html").read_text()
    assert "made by the same recipe" in page
    assert "one/run" in page and "two/run" in page


def test_only_an_earlier_comparison_is_replaced(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", 100, ""), run(tmp_path / "b", 50, "")
    target = write_comparison([a, b], tmp_path / "c.html")
    assert write_comparison([a, b], target) == target
    target.write_text("my notes")
    with pytest.raises(RunError, match=r"c\.html exists and is no comparison of ours; give another --out"):
        write_comparison([a, b], target)
    assert target.read_text() == "my notes"
    write_comparison([a, b], target, overwrite=True)
    assert "Comparison of 2 runs" in target.read_text()


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = run(tmp_path / "a", 100, "")
    with pytest.raises(RunError, match="needs at least two runs, got 1"):
        write_comparison([a], tmp_path / "c.html")
    with pytest.raises(RunError, match="got the same folder twice"):
        write_comparison([a, tmp_path / "b" / ".." / "a"], tmp_path / "c.html")
    with pytest.raises(RunError, match="a run folder was expected"):
        write_comparison([a, tmp_path / "none"], tmp_path / "c.html")
    b = run(tmp_path / "b", 50, "")
    with pytest.raises(RunError, match=r"expected an existing folder"):
        write_comparison([a, b], tmp_path / "none" / "c.html")


def test_a_recipe_that_is_none_differs_in_nothing() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"b{k}: &b{k} [*a, *a]\n" for k in range(5))
    for text in (bomb, "when: 2000-13-13\n", "[" * 5000, "- a\n", "{", None, "\x00"):
        assert recipe_values(text) == {}
    assert recipe_values("train: {lr: 0.1}\n") == {"train": {"lr": 0.1}}
