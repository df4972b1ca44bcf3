"""Estimates of searches: parts that follow from others, and a measurement that leaves everything as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsebayes.errors import DataError, RecipeError
from sparsebayes.recipe import SearchRecipe, parse_recipe
from sparsebayes.train import search_estimate
from sparsebayes.train.estimate import Estimate
from sparsebayes.train.search_estimate import estimate_search

RECIPE = """
version: 1
name: estimate
task: search
device: cpu
threads: 1
data: {name: cifar10, holdout: 5000, batch_size: 30}
search: {space: nas_bench_201, width: 4, depth: 1, num_images: 600, batch_size: 20, epochs: 2, cycles: 2}
curvature: {num_images: 100}
retrain: {width: 4, depth: 1, epochs: 3}
"""


HELD = 1 + 5000 / (3 * 600)
"""Each pass of 600 images ends with 5,000 that are only evaluated."""


def estimated(*changes: str) -> Estimate:
    recipe = parse_recipe(RECIPE, "estimate", overrides=changes)
    assert isinstance(recipe, SearchRecipe)
    return estimate_search(recipe)


def steps(found: Estimate) -> float:
    """The search in steps of the fresh supernet."""
    return found.search_seconds / found.step_seconds


def test_a_measurement_needs_no_data_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEBAYES_DATA", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    found = estimated()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []
    assert found.memory_bytes is not None and found.memory_bytes > 0
    # 2 cycles of 2 passes of 30 batches; curvature of 100 images is another 5 in each cycle.
    assert steps(found) == pytest.approx(HELD * 2 * (2 * 30 + 5))
    assert found.memory_bytes > 50_000 * 3 * 32 * 32
    assert 0 < found.training_seconds < 45_000 / 30 * 3 * 10


def test_more_work_takes_longer() -> None:
    plain, warm = steps(estimated()), steps(estimated("search.warmup_epochs=3"))
    assert warm - plain == pytest.approx(HELD * 3 * 30)
    assert steps(estimated("search.removal=0.5")) < plain
    # Half of the images teach the weights, each step beside one of the architecture; there is no curvature.
    darts = steps(estimated("search.baseline=darts", "search.removal=0.5"))
    assert darts == pytest.approx((1 + 5000 / (3 * 300)) * 120)
    # Curvature takes one pass at most.
    assert steps(estimated("curvature.num_images=4096")) == pytest.approx(HELD * 2 * (2 * 30 + 30))
    # Twenty cells on 5,000 held-out images: 250 batches each, a third of a step, and only a part of the operations.
    judged = steps(estimated("sampling.count=20")) - plain
    assert 0 < judged < 20 * 250 / 3
    compressed = "compress.train.cycles={count: 3, epochs: 1}"
    assert estimated("retrain.epochs=0", compressed).training_seconds > 0
    without = estimated("retrain.epochs=0")
    assert without.training_seconds == 0 and "of search on cpu" in without.describe()


def test_a_slow_step_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 9.0, 9.0, 10.0, 10.0, 13.0])  # two images in a second, eight in three
    monkeypatch.setattr(search_estimate, "now", lambda device: next(times))
    found = estimated("retrain.epochs=0")
    assert found.step_seconds == pytest.approx(3 + 12 * (3 - 1) / 6)


def test_what_cannot_work_is_said_before_it_is_run() -> None:
    with pytest.raises(DataError, match=r"data\.holdout is 60000, but there are only 50000 training images"):
        estimated("data.holdout=60000")
    with pytest.raises(DataError, match="the batch size is 700, but the search has only 600 images"):
        estimated("search.batch_size=700")
    with pytest.raises(DataError, match=r"search\.num_images is 60000, but only 45000 images are left"):
        estimated("search.num_images=60000")
    with pytest.raises(DataError, match="expected a table of cells at nowhere"):
        estimated("table=nowhere.csv")
    with pytest.raises(RecipeError, match=r"retrain\.depth must be that of the search"):
        estimated("search.space=tree", "retrain.depth=2")
