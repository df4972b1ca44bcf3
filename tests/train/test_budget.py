"""Budgets: what a cycle aims at, latencies that are measured, and the outcome in the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from sparsebayes.cli import main
from sparsebayes.cli.program import BUDGET_MISSED
from sparsebayes.cost import cost
from sparsebayes.errors import RecipeError
from sparsebayes.recipe import Recipe, load_recipe
from sparsebayes.train import compress, phase_checkpoints
from sparsebayes.train.budget import Goal, goals_of, network_latency_ms, next_aim
from sparsebayes.train.front import Point, read_front
from sparsebayes.train.run import run_recipe

DENSE = Point(0, params=1000, macs=90_000, heldout_loss=0.1, standard_error=0.01, heldout_error=0.02)
USER_CODE = """
import torch
from torch import nn
from sparsebayes.data import Dataset, Images

def halves(num):
    labels = torch.arange(num) % 2
    images = torch.randint(0, 90, (num, 1, 8, 8), generator=torch.Generator().manual_seed(num), dtype=torch.uint8)
    images[labels == 1, :, :4] += 100
    return Images(images, labels)

def data():
    return Dataset("halves", halves(200), halves(50), 2, (0.3,), (0.3,))

def net():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 20), nn.ReLU(), nn.Linear(20, 2),
    )
"""
RECIPE = """
version: 1
name: halves
data: {name: "small_task:data", holdout: 50, batch_size: 50}
model: {name: "small_task:net"}
curvature: {num_images: 50}
train: {pretrain: {epochs: 2}, cycles: {count: 4, max_epochs: 1, shrink: 0.5}, finetune: {epochs: 0}}
export: {onnx: false}
"""


@pytest.fixture(autouse=True)
def _user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A data set and a network with a batch norm, importable from the folder where the user works."""
    (tmp_path / "small_task.py").write_text(USER_CODE)
    (tmp_path / "halves.yaml").write_text(RECIPE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("small_task", None)


def recipe(*changes: str) -> Recipe:
    return load_recipe("halves.yaml", overrides=changes)


@pytest.mark.parametrize(
    ("changes", "kind", "limit", "unit"),
    [
        ((), "params", 0.0, "params"),
        (("prior.price=macs",), "macs", 0.0, "macs"),
        (("prior.price=params",), "params", 0.0, "params"),
        (("prune.budget.params=0.2",), "params", 200.0, "params"),
        (("prune.budget.macs=0.5", "prior.price=params"), "macs", 45_000.0, "macs"),
        (("prune.budget.latency_ms=1.5",), "latency_ms", 1.5, "macs"),
    ],
)
def test_the_goal_is_what_the_recipe_says(
    changes: tuple[str, ...], kind: str, limit: float, unit: str
) -> None:
    [goal] = goals_of(recipe(*changes), DENSE)
    assert (goal.kind, goal.limit, goal.unit) == (kind, limit, unit)


def test_a_cycle_aims_at_the_limit_but_not_too_far() -> None:
    goal = Goal("params", 300.0)
    assert goal.target(present=1000, latency_ms=None, shrink=0.25) == 750
    assert goal.target(present=350, latency_ms=None, shrink=0.25) == 300
    assert goal.is_met(300, None)
    assert not goal.is_met(301, None)


def test_a_latency_is_predicted_by_macs() -> None:
    goal = Goal("latency_ms", 2.0)
    assert goal.target(present=8e6, latency_ms=4.0, shrink=0.25) == pytest.approx(6e6)
    assert goal.target(present=8e6, latency_ms=2.2, shrink=0.25) == pytest.approx(8e6 * 0.97 * 2.0 / 2.2)
    assert goal.target(present=8e6, latency_ms=2.0001, shrink=0.25) == pytest.approx(8e6 * 0.95)
    assert goal.target(present=8e6, latency_ms=2.0001, shrink=0.01) == pytest.approx(8e6 * 0.99)
    assert goal.is_met(8e6, 2.0)
    assert not goal.is_met(0.0, 2.1)
    assert not goal.is_met(0.0, None)


def test_latency_loops_reach_an_affine_truth_from_above() -> None:
    """Latency is really 0.4 ms + MACs / 4e6 per ms: the prediction is too hopeful each time, and still gets there."""
    goal, macs, visited = Goal("latency_ms", 1.0), 8e6, []
    for _ in range(30):
        latency = 0.4 + macs / 4e6
        visited.append(latency)
        if goal.is_met(macs, latency):
            break
        macs = goal.target(present=macs, latency_ms=latency, shrink=0.3)
    assert 0.85 < visited[-1] <= 1.0
    assert len(visited) < 15


def test_the_limit_that_is_exceeded_most_comes_first() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 3, bias=False))
    example = torch.zeros(1, 1, 8, 8)  # 36 + 432 parameters, 36 * 36 + 432 MACs

    def aim(params: float, macs: float) -> tuple[str, float] | None:
        goals = (Goal("params", params), Goal("macs", macs))
        found = next_aim(goals, model, example, {}, latency_ms=None, shrink=0.5)
        return None if found is None else (found.costs.kind, found.target)

    assert aim(400, 500) == ("macs", 1728 / 2)
    assert aim(100, 1000) == ("params", 234)
    assert aim(400, 1728) == ("params", 400)
    assert aim(468, 1728) is None
    keep_half = {"2.weight": torch.arange(432).reshape(3, 144) % 2 == 0}
    found = next_aim((Goal("params", 252),), model, example, keep_half, latency_ms=None, shrink=0.5)
    assert found is None


@pytest.mark.parametrize("price", ["none", "budget"])
def test_several_limits_are_all_met(price: str, tmp_path: Path) -> None:
    changes = ("prune.budget={params: 0.3, macs: 0.4}", f"prior.price={price}", "train.cycles.count=8")
    report = json.loads(
        (run_recipe(recipe(*changes), out=tmp_path / "run", quiet=True) / "report.json").read_text()
    )
    assert report["compact"]["params"] <= 0.3 * report["dense"]["params"]
    assert report["compact"]["macs"] <= 0.4 * report["dense"]["macs"]
    assert [limit["kind"] for limit in report["budget"]["limits"]] == ["params", "macs"]


def test_a_price_without_a_budget_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"prior\.price is budget, but the recipe has none"):
        run_recipe(recipe("prior.price=budget"), out=Path("run"), quiet=True)


def test_networks_are_measured_in_onnxruntime() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    assert 0 < network_latency_ms(model, torch.zeros(1, 3, 2, 2), legacy=True) < 1000


def test_a_latency_budget_measures_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(model: nn.Module, example: torch.Tensor, *, legacy: bool) -> float:
        return 0.1 + cost(model, example).macs / 7.5e3  # 2.1 ms for the dense network

    monkeypatch.setattr(compress, "network_latency_ms", stand_in)
    folder = run_recipe(
        recipe("prune.budget.latency_ms=1.0", "train.cycles.count=8"), out=tmp_path / "run", quiet=True
    )
    points = read_front(folder / "pareto.json")
    assert [p.latency_ms for p in points] == [pytest.approx(0.1 + p.macs / 7.5e3) for p in points]
    assert all(p.latency_ms > 1.0 for p in points[:-1])
    assert 0.5 < points[-1].latency_ms <= 1.0
    assert points[-1].chosen
    budget = json.loads((folder / "report.json").read_text())["budget"]
    limit = {"kind": "latency_ms", "limit": 1.0, "reached": points[-1].latency_ms, "met": True}
    assert budget == {"met": True, "limits": [limit]}


@pytest.mark.parametrize(("cycles", "met"), [(1, False), (4, True)])
def test_a_missed_budget_is_said_and_its_status_differs(cycles: int, met: bool, tmp_path: Path) -> None:
    changes = ["prune.budget.params=0.2", f"train.cycles.count={cycles}"]
    result = CliRunner().invoke(
        main, ["run", "halves.yaml", "--quiet", "--out", str(tmp_path / "run"), *changes]
    )
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["budget"]["met"] == met
    [limit] = report["budget"]["limits"]
    assert limit["reached"] == report["compact"]["params"]
    assert limit["limit"] == pytest.approx(0.2 * report["dense"]["params"])
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert result.exit_code == (0 if met else BUDGET_MISSED)
    sentence = f"closest network is exported: params {report['compact']['params']:,g} instead of 1,071; raise"
    assert (sentence in result.stderr) == (not met)


def test_slow_checkpoints_are_written_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(phase_checkpoints, "SLOW_SAVE", -1.0)
    monkeypatch.setattr(phase_checkpoints, "SAVE_SHARE", 1e-9)
    monkeypatch.setattr(
        phase_checkpoints, "write_checkpoint", lambda path, state: written.append(state["phase"])
    )
    run_recipe(recipe("train.pretrain.epochs=3", "train.cycles.count=1"), out=tmp_path / "run", quiet=True)
    assert written == ["pretrain"]


def test_batch_norm_statistics_follow_a_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(compress, "reestimate_", lambda model, batches, num_images: seen.append(num_images))
    run_recipe(recipe("train.cycles.count=2", "prune.reestimate=77"), out=tmp_path / "run", quiet=True)
    assert seen == [77, 77]
