"""Estimates: the arithmetic against a sum by hand, and a measurement that leaves everything as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sparsebayes.errors import DataError, ModelError
from sparsebayes.recipe import Recipe, parse_recipe
from sparsebayes.train.estimate import PUBLIC_SETS, estimate, training_seconds

RECIPE = """
version: 1
name: estimate
device: cpu
threads: 1
data: {name: mnist, holdout: 1000, batch_size: 100}
model: {name: lenet_300_100}
curvature: {num_images: 200}
prior: {strength: 5.0}
train:
  pretrain: {epochs: 3}
  cycles: {count: 2, epochs: 1, max_epochs: 2, shrink: 0.75}
  finetune: {epochs: 4}
"""


def recipe(*changes: str) -> Recipe:
    return parse_recipe(RECIPE, "estimate", overrides=changes)


def test_total_is_the_sum_of_the_phases() -> None:
    step, image = 0.01, 1e-4
    epoch = 590 * step + 1000 * image
    # A cycle removes three quarters: a step then costs half, so that twice as many passes are made.
    by_hand = 3 * epoch + (2 * step + 2 * epoch / 2) + (2 * step / 2 + 2 * epoch / 4) + 4 * epoch / 4
    assert training_seconds(recipe(), 60_000, step, image) == pytest.approx(by_hand)
    auto = training_seconds(recipe("prior.strength=auto"), 60_000, step, image)
    assert auto - by_hand == pytest.approx(4 * epoch / 4)
    # Images without a backward pass cost a third; how many "auto" takes is not known, so it counts as the default.
    fewer = training_seconds(recipe("curvature.importance=0.1"), 60_000, step, image)
    assert by_hand - fewer == pytest.approx(0.6 * (2 * step + 2 * step / 2))
    until = training_seconds(recipe("curvature.num_images=auto"), 60_000, step, image)
    assert until == training_seconds(recipe("curvature.num_images=2048"), 60_000, step, image)


def test_a_measurement_needs_no_data_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEBAYES_DATA", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    found = estimate(recipe())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert list(tmp_path.iterdir()) == []
    assert 0 < found.step_seconds < 10 and found.search_seconds == 0
    assert found.memory_bytes is not None and found.memory_bytes > 60_000 * 784
    # Besides steps, held-out images are evaluated, each for less than a step.
    least = training_seconds(recipe(), 60_000, found.step_seconds, 0.0)
    assert (
        least
        < found.training_seconds
        < training_seconds(recipe(), 60_000, found.step_seconds, found.step_seconds)
    )
    assert re.match(
        r"about .* of training on cpu with 1 thread \(.* ms a step\), in about .* of memory$",
        found.describe(),
    )


def test_public_sets_are_as_the_sources_say() -> None:
    assert PUBLIC_SETS["mnist"] == ((1, 28, 28), 60_000, 10)
    assert PUBLIC_SETS["cifar100"] == ((3, 32, 32), 50_000, 100)


def test_what_cannot_work_is_said_before_it_is_run() -> None:
    with pytest.raises(DataError, match="there are only 10000 training images"):
        estimate(recipe("data.name=embedded_mnist", "data.holdout=10000"))
    with pytest.raises(DataError, match=r"data\.holdout is 60000, but there are only 60000 training images"):
        estimate(recipe("data.holdout=60000"))
    with pytest.raises(DataError, match=r"data\.batch_size is 200, but only 100 images are left to train on"):
        estimate(recipe("data.holdout=59900", "data.batch_size=200"))
    with pytest.raises(DataError, match="the model has 3 outputs"):
        estimate(recipe("model.options={num_classes: 3}"))
    with pytest.raises(ModelError, match=r"unknown|takes"):
        estimate(recipe("model.options={width: 3}"))
