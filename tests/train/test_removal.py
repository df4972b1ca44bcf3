"""Removal: what orders the groups does not depend on how many draws estimate it."""

from __future__ import annotations

import torch

from sparsebayes.data import load
from sparsebayes.models import build
from sparsebayes.prune.carry import Lineage
from sparsebayes.prune.pricing import entry_costs
from sparsebayes.recipe import Recipe, load_recipe
from sparsebayes.train.removal import dense_groups, remove
from sparsebayes.train.setup import make_loaders
from sparsebayes.train.stopwatch import Stopwatch


def survival(*overrides: str, joint: bool = True) -> torch.Tensor:
    """Strength up to which each group of an untrained LeNet-5 survives its first removal."""
    changes = [
        f"prior.joint={str(joint).lower()}",
        "prior.price=none",
        "curvature.num_images=256",
        *overrides,
    ]
    recipe = load_recipe("quickstart", preset="smoke", overrides=changes)
    assert isinstance(recipe, Recipe)
    dataset = load(recipe.data.name)
    loaders, _ = make_loaders(recipe, dataset, torch.device("cpu"))
    torch.manual_seed(0)
    model = build("lenet5_caffe")
    dense = dense_groups(recipe, model, loaders.example).grouping
    costs = entry_costs(model, loaders.example, "params")
    lineage, target = Lineage(torch.ones(dense.num_groups, dtype=torch.bool)), 0.5 * 431_080
    removal = remove(
        recipe,
        model,
        lineage,
        dense,
        loaders.plain,
        loaders.example,
        costs=costs,
        target=target,
        number=1,
        watch=Stopwatch(),
    )
    assert removal is not None
    return removal.survives


def test_joint_evidence_is_of_one_size_whatever_estimates_it() -> None:
    exact = survival("curvature.estimator=exact")
    for draws in (1, 4):
        sampled = survival("curvature.estimator=monte_carlo", f"curvature.draws={draws}")
        ratio = float(sampled.log().median().exp() / exact.log().median().exp())
        assert 0.8 < ratio < 1.25, f"{draws} draws: {ratio}"


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Of a group at 1 the strength up to which it survives is its curvature."""
    return float((found - truth).norm() / truth.norm())


def test_a_recipe_chooses_the_images_of_its_curvature() -> None:
    everything = survival("curvature.num_images=100000", joint=False)
    until = survival("curvature.num_images=auto", "curvature.tolerance=0.05", joint=False)
    assert 0.01 < relative_error(until, everything) < 0.1
    seen = survival("curvature.num_images=2048", joint=False)
    chosen = survival("curvature.num_images=2048", "curvature.importance=0.2", joint=False)
    assert 0.01 < relative_error(chosen, seen) < 0.3
