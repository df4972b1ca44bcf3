"""The contract that the three posteriors share, over groupings of every kind, and resuming to the same numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsebayes.errors import GroupingError, NumericsError, RecipeError, RunError
from sparsebayes.groups import Grouping, make_grouping
from sparsebayes.groups.grouping import Labels
from sparsebayes.groups.hierarchy import Hierarchy
from sparsebayes.inference import Laplace, NaturalGradient, Posterior, VariationalDropout
from sparsebayes.prune.selection import Selection, select
from sparsebayes.recipe.names import RULE_NAMES

DOUBLE = torch.float64
Maker = Callable[..., Posterior]


def laplace(num_groups: int, **options: Any) -> Posterior:
    return Laplace(num_groups, **options)


def dropout(num_groups: int, **options: Any) -> Posterior:
    return VariationalDropout(num_groups, num_data=500, lr=0.2, **options)


def vadam(num_groups: int, **options: Any) -> Posterior:
    return NaturalGradient(num_groups, num_data=500, betas=(0.9, 0.9), **options)


def ivon(num_groups: int, **options: Any) -> Posterior:
    return NaturalGradient(num_groups, num_data=500, update="ivon", betas=(0.9, 0.9), **options)


MAKERS = [laplace, dropout, vadam, ivon]


class Net(nn.Module):
    """A convolution, two linear layers, and switches that are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3)
        self.hidden = nn.Linear(12, 4)
        self.out = nn.Linear(4, 2)
        self.edges = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(torch.relu(self.conv(x)), 1)
        return self.out(torch.relu(self.hidden(x)) * self.edges)


class Branched(nn.Module):
    """Two residual branches."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(64, 6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.leave = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(torch.flatten(x, 1)))
        x = x + torch.relu(self.one(x))
        return self.leave(x + torch.relu(self.two(x)))


def grouping(name: str) -> Grouping:
    if name == "switches":
        labels = Labels("edges", (4,), torch.arange(4))
        return Grouping("switches", (labels,), ("edges",), torch.zeros(4, dtype=torch.int64))
    model = Branched() if name == "branches" else Net()
    return make_grouping(model, name, example=torch.zeros(2, 4, 4, 4))


RULE_OF = {"blocks": "blocks:2x2"}
EVERY_RULE = [RULE_OF.get(name, name) for name in (*RULE_NAMES, "2:4", "units+features", "switches")]


def step(posterior: Posterior, needed: Tensor, generator: torch.Generator) -> None:
    """One update where the mean loss is needed (z - 1)^2/2."""
    if isinstance(posterior, Laplace):
        posterior.update_(torch.ones_like(needed), needed)
        return
    z = posterior.sample(generator)
    if isinstance(posterior, VariationalDropout):
        posterior.update_(z, needed * (z - 1), torch.full_like(needed, 4.0))
    else:
        posterior.update_(z, needed * (z - 1))


def train(posterior: Posterior, groups: Grouping, generator: torch.Generator, steps: int = 60) -> None:
    """Updates at drawn switches; the first half of the groups is needed, the rest is not."""
    needed = torch.zeros(groups.num_groups, dtype=DOUBLE)
    needed[: groups.num_groups // 2] = 50.0
    for _ in range(steps):
        step(posterior, needed, generator)


def test_three_final_classes_keep_the_contract() -> None:
    classes = Posterior.__subclasses__()
    assert {one.__name__ for one in classes} == {"Laplace", "VariationalDropout", "NaturalGradient"}
    assert {type(make(2)) for make in MAKERS} == set(classes)
    for one in classes:
        assert getattr(one, "__final__", False) and not one.__subclasses__()
        assert not one.__abstractmethods__
    with pytest.raises(TypeError, match="abstract"):
        Posterior(2)


@pytest.mark.parametrize("rule", EVERY_RULE)
@pytest.mark.parametrize("make", MAKERS)
def test_the_contract(make: Maker, rule: str) -> None:
    groups = grouping(rule)
    size = groups.num_groups
    posterior = make(size, strength=3.0)
    generator = torch.Generator().manual_seed(1)
    train(posterior, groups, generator)
    assert posterior.num_updates == 60 and posterior.strength == 3.0 and posterior.penalty_order in (1, 2)
    vectors = {
        "mean": posterior.mean,
        "penalty": posterior.penalty,
        "relevance": posterior.relevance,
        "survives": posterior.survives(),
        "sample": posterior.sample(generator),
        "sample_survival": posterior.sample_survival(generator),
    }
    for name, values in vectors.items():
        assert values.shape == (size,) and values.dtype == DOUBLE, name
        assert bool(torch.isfinite(values).all()), name
    assert bool((vectors["penalty"] >= 0).all()) and bool((vectors["survives"] >= 0).all())
    assert bool(((vectors["relevance"] >= 0) & (vectors["relevance"] <= 1)).all())
    # What is needed is more relevant than what is not, and survives longer; keep and survives agree.
    for values in (posterior.relevance, posterior.survives()):
        assert float(values[: size // 2].min()) > float(values[size // 2 :].max())
    assert torch.equal(posterior.keep(), posterior.survives() > 3.0)
    assert posterior.draw(generator).dtype == torch.bool
    draws = torch.stack([posterior.sample(generator) for _ in range(1600)])
    torch.testing.assert_close(draws.mean(0), posterior.mean, rtol=0, atol=0.15)
    # The decision masks parameters of the grouping.
    masks = groups.masks(posterior.keep())
    assert {name: mask.shape for name, mask in masks.items()} == groups.parameters


@pytest.mark.parametrize("rule", ["weights", "units", "branches", "switches"])
@pytest.mark.parametrize("make", MAKERS)
def test_a_selection_is_the_decision_within_its_bounds(make: Maker, rule: str) -> None:
    groups = grouping(rule)
    posterior = make(groups.num_groups, strength=3.0)
    train(posterior, groups, torch.Generator().manual_seed(1))
    keep, survives = posterior.keep(), posterior.survives()
    free = select(groups, survives, threshold=posterior.strength, max_removal=1.0, min_keep=0)
    assert torch.equal(free.on, keep) and not bool(keep.all())
    bounded = select(groups, survives, threshold=posterior.strength, max_removal=0.25, min_keep=1)
    assert bool(bounded.on[keep].all()) and int(bounded.on.sum()) > int(keep.sum())
    assert Selection.from_json(bounded.to_json()).on.tolist() == bounded.on.tolist()


@pytest.mark.parametrize("rule", ["filters", "switches"])
@pytest.mark.parametrize("make", MAKERS)
def test_a_resumed_posterior_goes_on_to_the_same_numbers(make: Maker, rule: str) -> None:
    groups = grouping(rule)
    posterior, generator = make(groups.num_groups), torch.Generator().manual_seed(2)
    train(posterior, groups, generator, 7)
    file = io.BytesIO()
    torch.save({"posterior": posterior.state_dict(), "generator": generator.get_state()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, again = make(groups.num_groups), torch.Generator()
    resumed.load_state_dict(saved["posterior"])
    again.set_state(saved["generator"])
    for one, stream in ((posterior, generator), (resumed, again)):
        train(one, groups, stream, 5)
    assert repr(resumed) == repr(posterior)
    state = resumed.state_dict()
    for key, value in posterior.state_dict().items():
        assert torch.equal(state[key], value) if isinstance(value, Tensor) else state[key] == value, key
    assert torch.equal(posterior.sample(generator), resumed.sample(again))
    assert torch.equal(posterior.draw(generator), resumed.draw(again))


@pytest.mark.gpu
@pytest.mark.parametrize("make", MAKERS[1:])
def test_measurements_of_a_cuda_device_give_the_same_numbers(make: Maker) -> None:
    here, there = make(4), make(4)
    z = here.sample(torch.Generator().manual_seed(0))
    here.update_(z, 0.1 * z)
    there.update_(z.cuda(), (0.1 * z).cuda())
    assert torch.equal(here.survives(), there.survives())


@pytest.mark.gpu
def test_a_curvature_of_a_cuda_device_gives_the_same_numbers() -> None:
    here, there = laplace(4), laplace(4)
    curvature = torch.tensor([0.5, 2.0, 30.0, 0.0], dtype=DOUBLE)
    here.update_(torch.ones(4, dtype=DOUBLE), curvature)
    there.update_(torch.ones(4, dtype=DOUBLE).cuda(), curvature.cuda())
    assert torch.equal(here.survives(), there.survives())
    assert torch.equal(here.penalty, there.penalty)


@pytest.mark.parametrize("make", MAKERS[1:])
def test_a_refused_update_changes_nothing(make: Maker) -> None:
    posterior = make(2)
    ones = torch.ones(2, dtype=DOUBLE)
    posterior.update_(0.5 * ones, ones)
    before = posterior.state_dict()
    with pytest.raises(NumericsError, match=r"a finite gradient, got nan at \[1\]"):
        posterior.update_(0.5 * ones, torch.tensor([1.0, torch.nan]))
    with pytest.raises(NumericsError, match=r"a finite draw of the switches, got inf at \[0\]"):
        posterior.update_(torch.tensor([torch.inf, 1.0]), ones)
    with pytest.raises(GroupingError, match=r"gradient of shape \[2\] or \[images, 2\], got \[3\]"):
        posterior.update_(0.5 * ones, torch.ones(3))
    with pytest.raises(RecipeError, match=r"expected a positive finite lr, got 0\.0"):
        posterior.update_(0.5 * ones, ones, lr=0.0)
    with pytest.raises(RunError, match="with the keys"):
        posterior.load_state_dict({**before, "more": 1})
    with pytest.raises(RunError, match=r"with num_data 500\.0, got 7\.0: resume with the recipe"):
        posterior.load_state_dict({**before, "num_data": 7.0})
    key = "logits" if "logits" in before else "mean"
    with pytest.raises(RunError, match=rf"expected '{key}' of the posterior state with shape \[2\]"):
        posterior.load_state_dict({**before, key: torch.ones(3)})
    with pytest.raises(RunError, match=f"expected finite values in '{key}'"):
        posterior.load_state_dict({**before, key: torch.tensor([1.0, torch.nan])})
    after = posterior.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) if isinstance(value, Tensor) else after[name] == value


@pytest.mark.parametrize("make", MAKERS)
def test_states_are_copies(make: Maker) -> None:
    posterior = make(3)
    state = posterior.state_dict()
    expected = {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}
    for key in expected:
        state[key].fill_(0.25)
    posterior.penalty.fill_(9.0)
    for key, value in expected.items():
        assert torch.equal(posterior.state_dict()[key], value)


@pytest.mark.parametrize("make", MAKERS)
def test_what_needs_a_group_goes_with_it(make: Maker) -> None:
    hierarchy = Hierarchy.build(predecessors=[[], [], [0], [1]])
    posterior = make(4, hierarchy=hierarchy)
    needed = torch.tensor([0.0, 50.0, 50.0, 50.0], dtype=DOUBLE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        step(posterior, needed, generator)
    assert posterior.keep().tolist() == [False, True, False, True]
    for _ in range(20):
        on = posterior.draw(generator)
        assert not (on[2] and not on[0])


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("size", "options", "error", "message"),
    [
        (0, {}, GroupingError, "expected at least one group, got 0"),
        (2, {"strength": 0.0}, RecipeError, "expected a positive finite strength, got 0.0"),
        (
            2,
            {"hierarchy": Hierarchy.build(predecessors=[[], [0], []])},
            GroupingError,
            "a hierarchy over 2 groups, got one over 3",
        ),
    ],
)
def test_bad_options(
    make: Maker, size: int, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(size, **options)
