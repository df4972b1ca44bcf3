"""Runs by variational dropout and natural gradients: what they remove, resuming, sampling, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsebayes
from sparsebayes.errors import GroupingError, NumericsError, RecipeError
from sparsebayes.groups import Grouping, make_grouping
from sparsebayes.groups.grouping import Labels
from sparsebayes.inference import NaturalGradient, VariationalDropout
from sparsebayes.recipe import Recipe, parse_recipe
from sparsebayes.train import phase_checkpoints
from sparsebayes.train.front import read_front
from sparsebayes.train.run import run_recipe
from sparsebayes.train.switched import Switched, gate_energy, make_posterior

USER_CODE = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(128, 24)
        self.out = nn.Linear(24, 3)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.out(torch.relu(self.hidden(torch.flatten(x, 1))))
"""

RECIPE = """
version: 1
name: corners
data: {name: "drawn_task:data", holdout: 60, batch_size: 24}
model: {name: "drawn_task:Net"}
groups: units
posterior: variational_dropout
variational_dropout: {epochs: 2, lr: 0.2}
natural_gradient: {epochs: 2}
sampling: {count: 5, baseline: true, norm_batches: 2}
prune: {budget: {params: 0.4}}
train:
  pretrain: {epochs: 4}
  cycles: {count: 3, epochs: 1, shrink: 0.5}
  finetune: {epochs: 2}
export: {onnx: false}
evaluate: {latency: false}
"""


@pytest.fixture(autouse=True)
def _user_code(corners_module: Callable[[str, str], None]) -> None:
    """A module of the user's, importable from the folder where the user works."""
    corners_module("drawn_task", USER_CODE)


def recipe(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE, "corners.yaml", overrides=overrides)


def records(folder: Path, phase: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == phase]


@pytest.mark.parametrize(
    "change",
    [
        "prior.price=params",
        "prior.price=budget",
        "posterior=natural_gradient",
        "natural_gradient={epochs: 2, update: ivon}",
        "groups=weights",
        "variational_dropout.relative=false",
    ],
)
def test_every_posterior_reaches_the_budget_and_keeps_its_record(change: str) -> None:
    more = {
        "natural_gradient={": "posterior=natural_gradient",
        "groups=w": "variational_dropout.length_scale=0.2",
    }
    changes = [change, *(value for key, value in more.items() if change.startswith(key))]
    asked = recipe(*changes)
    folder = run_recipe(asked, out=Path("run"), quiet=True)
    report = json.loads((folder / "report.json").read_text())
    assert report["compact"]["params"] <= 0.4 * report["dense"]["params"]
    assert report["compact"]["test_error"] < 0.1
    drawn, states = records(folder, "sample"), records(folder, "posterior state")
    points = read_front(folder / "pareto.json")
    assert len(states) == len(points) - 1 and [row["cycle"] for row in drawn] == [
        row["cycle"] for row in states
    ]
    for row in drawn:
        assert row["losses"][row["best"]] == min(row["losses"])
        if row["distinct"] > 1:
            assert len(row["losses"]) == len(row["random_losses"]) == 5
    assert any(row["distinct"] > 1 for row in drawn)
    assert "Best of n, cycle" in (folder / "report.html").read_text()
    if asked.posterior == "natural_gradient":
        assert all(row["exploration_noise"] > 0 and row["curvature_trace"] > 0 for row in states)
    assert len(records(folder, "posterior")) == 2 * len(states)
    assert not (folder / "posterior.pt").exists()


@pytest.mark.parametrize(
    ("posterior", "stop"), [("variational_dropout", 5), ("variational_dropout", 7), ("natural_gradient", 5)]
)
def test_interrupted_and_resumed_run_ends_in_the_same_numbers(
    posterior: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off while the posterior is learned, and in the training after a removal."""
    quick = recipe(f"posterior={posterior}", "train.distill=0.5", "train.cycles.epochs=2")
    whole = run_recipe(quick, out=Path("whole"), quiet=True)
    done = 0
    write = phase_checkpoints.write_checkpoint

    def write_then_stop(path: Path, state: dict) -> None:
        nonlocal done
        write(path, state)
        done += 1
        if done == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(phase_checkpoints, "write_checkpoint", write_then_stop)
    with pytest.raises(KeyboardInterrupt, match="broken"):
        run_recipe(quick, out=Path("broken"), quiet=True)
    monkeypatch.setattr(phase_checkpoints, "write_checkpoint", write)
    resumed = run_recipe(quick, resume=Path("broken"), quiet=True)
    assert read_front(whole / "pareto.json") == read_front(resumed / "pareto.json")
    for name, value in sparsebayes.load(whole).state_dict().items():
        assert torch.equal(value, sparsebayes.load(resumed).state_dict()[name]), name


def small() -> tuple[nn.Module, Grouping]:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return model, make_grouping(model, "units", example=torch.randn(2, 4))


@pytest.mark.parametrize("name", ["variational_dropout", "natural_gradient"])
def test_weights_and_posterior_are_saved_and_loaded_together(name: str) -> None:
    model, grouping = small()
    asked = recipe(f"posterior={name}")

    def fresh() -> Switched:
        return Switched(
            nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),
            grouping,
            make_posterior(asked, model, grouping, 100, None),
            torch.randn(2, 4),
        )

    first, second = fresh(), fresh()
    optimizer = torch.optim.SGD(first.parameters(), 0.1)
    for _ in range(3):
        loss = first(torch.randn(7, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first.learn_(0.1)
    assert first.posterior.num_updates == 3 and first.per_image
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    expected, got = first.posterior.state_dict(), second.posterior.state_dict()
    for key, value in expected.items():
        assert torch.equal(got[key], value) if isinstance(value, torch.Tensor) else got[key] == value, key
    images = torch.randn(5, 4)
    assert torch.equal(first.eval()(images), second.eval()(images))


def test_a_posterior_goes_on_where_sums_are_rounded_otherwise() -> None:
    model, grouping = small()
    scales = [50.0, 50.0 * (1 + 1e-12)]
    first, second = (
        Switched(model, grouping, VariationalDropout(6, num_data=100, length_scale=scale), torch.randn(2, 4))
        for scale in scales
    )
    first.posterior.update_(torch.full((6,), 0.5), torch.ones(6))
    second.load_state_dict(first.state_dict())
    got, expected = second.posterior.state_dict(), first.posterior.state_dict()
    assert torch.equal(got["logits"], expected["logits"]) and got["num_updates"] == 1
    assert got["length_scale"] == pytest.approx(scales[1], rel=1e-14)


def test_the_step_sees_the_gradient_at_the_draw_and_weights_decay_by_their_probability() -> None:
    model, grouping = small()
    posterior = VariationalDropout(6, num_data=10, length_scale=2.0, initial=torch.linspace(0.1, 0.8, 6))
    switched = Switched(model, grouping, posterior, torch.randn(2, 4))
    torch.manual_seed(3)
    images = torch.randn(4, 4)
    switched(images).square().mean().backward()
    torch.manual_seed(3)
    images = torch.randn(4, 4)
    z = posterior.sample(torch.default_generator, 4).float().requires_grad_()
    hidden = torch.relu(model[0](images)) * z
    (gradient,) = torch.autograd.grad(model[2](hidden).square().mean(), z)
    expected = VariationalDropout(6, num_data=10, length_scale=2.0, initial=torch.linspace(0.1, 0.8, 6))
    expected.update_(z, gradient, model[2].weight.detach().square().sum(0))
    before = model[2].weight.detach().clone()
    switched.learn_(0.5)
    torch.testing.assert_close(
        posterior.state_dict()["logits"], expected.state_dict()["logits"], rtol=1e-4, atol=1e-4
    )
    # The gradient of sum penalty ||m||^2/N, one step of it; the penalty after the update, as in the code.
    decay = 0.5 * 2 * posterior.penalty / 10
    torch.testing.assert_close(model[2].weight.detach(), before * (1 - decay).float())


def test_gaussian_switches_are_absorbed() -> None:
    model, grouping = small()
    posterior = NaturalGradient(6, num_data=10, mean=torch.linspace(-1, 2, 6))
    switched = Switched(model, grouping, posterior, torch.randn(2, 4)).eval()
    images = torch.randn(3, 4)
    before = switched(images)
    switched.absorb_()
    torch.testing.assert_close(model(images), before)


def test_relative_length_scales_weigh_all_layers_alike() -> None:
    model, grouping = small()
    with torch.no_grad():
        model[2].weight.mul_(100)
    posterior = make_posterior(recipe("variational_dropout.initial=0.5"), model, grouping, 10, None)
    cost = posterior.penalty * gate_energy(model, grouping)
    assert float(cost.mean()) == pytest.approx(50 / 2 * 0.5, rel=1e-5)  # l^2 (1 - p)/2 for the average group


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (["sampling.count=0"], RecipeError, "sampling.count"),
        (["variational_dropout.initial=0"], RecipeError, "variational_dropout.initial"),
        (["variational_dropout.initial=1"], RecipeError, "variational_dropout.initial"),
        (["natural_gradient.prior_precision=0"], RecipeError, "natural_gradient.prior_precision"),
        (["natural_gradient.prior_precision=-1"], RecipeError, "natural_gradient.prior_precision"),
        (["natural_gradient.initial_precision=0"], RecipeError, "natural_gradient.initial_precision"),
        (["sampling.count=-3"], RecipeError, "sampling.count"),
    ],
)
def test_bad_input_is_one_sentence(changes: list[str], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        run_recipe(recipe(*changes), out=Path("run"), quiet=True)
    assert not Path("run").exists()


def test_a_network_that_dropping_ruins_says_what_to_change() -> None:
    with pytest.raises(
        NumericsError, match=r"collapsed .*or drop less: lower variational_dropout\.length_scale"
    ):
        run_recipe(recipe("groups=weights", "train.pretrain.epochs=2"), out=Path("run"), quiet=True)


def test_groups_that_nothing_reads_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    own = Labels("0.weight", (6, 4), torch.arange(6).view(6, 1), gate=False)
    grouping = Grouping("units", (own,), ("0",), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(GroupingError, match=r"expected groups that can be masked, but nothing reads 0\[0\]"):
        Switched(model, grouping, NaturalGradient(6, num_data=10), torch.randn(2, 4))
