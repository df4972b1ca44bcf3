"""What a recipe does, in a few lines of text for a terminal.

>>> from sparsebayes.recipe.loading import load_recipe
>>> print(summarise(load_recipe("quickstart")).splitlines()[2])
model      lenet5_caffe
"""

from __future__ import annotations

import json

from sparsebayes.recipe.schema import Budget, ModelSection, Recipe
from sparsebayes.recipe.search_schema import AnyRecipe, SearchRecipe

__all__ = ["summarise"]


def summarise(recipe: AnyRecipe) -> str:
    """One line each for the data, the network, what may go, and how long it trains."""
    if isinstance(recipe, SearchRecipe):
        return _summarise_search(recipe)
    data, prior, train = recipe.data, recipe.prior, recipe.train
    phases = [
        f"{train.pretrain.epochs} dense",
        f"up to {train.cycles.count} cycles of {train.cycles.epochs}",
        f"{train.finetune.epochs} after",
    ]
    rows = {
        "name": recipe.name,
        "data": f"{data.name}, {data.holdout} held out, batches of {data.batch_size}, augment {data.augment}",
        "model": _model(recipe.model),
        "groups": " + ".join(group.rule for group in recipe.groups),
        "posterior": _posterior(recipe),
        "strength": f"{prior.strength}, price {prior.price}, budget {_budget(recipe.prune.budget)}",
        "epochs": ", ".join(phases),
        "optimizer": f"{train.optimizer}, lr {train.lr:g}",
        "presets": ", ".join(recipe.presets) or "none",
    }
    return "\n".join(f"{name:10} {value}" for name, value in rows.items())


def _summarise_search(recipe: SearchRecipe) -> str:
    """The same for a search: the data, the space, what decides, and how long it trains."""
    data, search, retrain = recipe.data, recipe.search, recipe.retrain
    space = search.space if isinstance(search.space, str) else search.space.get("name", "of the recipe")
    phases = [
        f"{search.warmup_epochs} warm-up",
        f"{search.cycles} cycles of {search.epochs}",
        f"{retrain.epochs} after",
    ]
    strength = (
        f"lambda {search.paper_lambda:g}" if search.paper_lambda is not None else f"{search.strength:g}"
    )
    rows = {
        "name": recipe.name,
        "data": f"{data.name}, {data.holdout} held out, batches of {search.batch_size or data.batch_size}",
        "space": f"{space}, width {search.width}, {search.depth} cells in each stage",
        "posterior": _decides(recipe),
        "strength": strength,
        "epochs": ", ".join(phases),
        "retrain": f"width {retrain.width or search.width}, {retrain.depth or search.depth} cells in each stage",
        "compress": "no"
        if recipe.compress is None
        else " + ".join(group.rule for group in recipe.compress.groups),
        "presets": ", ".join(recipe.presets) or "none",
    }
    return "\n".join(f"{name:10} {value}" for name, value in rows.items())


def _posterior(recipe: Recipe) -> str:
    """What decides which groups go."""
    if recipe.prune.score != "evidence":
        return f"none, groups go by {recipe.prune.score}"
    if recipe.posterior == "laplace":
        return f"laplace, {recipe.prior.scale}, by {recipe.prior.rule}"
    return recipe.posterior + _best_of(recipe.sampling.count, "held-out loss")


def _decides(recipe: SearchRecipe) -> str:
    """What decides on the architecture: the method alone, or what its best or its draws are judged by."""
    search = recipe.search
    if search.baseline != "none":
        return f"baseline {search.baseline}" + _best_of(recipe.num_draws, "held-out loss")
    own = f"laplace, by {search.rule}" if recipe.posterior == "laplace" else recipe.posterior
    judge = "training-free proxies" if recipe.posterior == "natural_gradient" else "held-out loss"
    return own + _best_of(recipe.num_draws, judge)


def _best_of(number: int, judge: str) -> str:
    return f", best of {number} by {judge}" if number > 1 else ""


def _model(model: ModelSection) -> str:
    return f"{model.name} {json.dumps(model.options)}" if model.options else model.name


def _budget(budget: Budget | None) -> str:
    if budget is None:
        return "none"
    limits = (
        (budget.params, "{:g} of params"),
        (budget.macs, "{:g} of MACs"),
        (budget.latency_ms, "{:g} ms"),
    )
    return " and ".join(text.format(limit) for limit, text in limits if limit is not None)
