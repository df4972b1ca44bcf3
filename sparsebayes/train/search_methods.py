"""The method that a recipe's search learns its switches by, and which weights decay by what that method believes."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsebayes.inference.natural_gradient import NaturalGradient
from sparsebayes.inference.variational_dropout import VariationalDropout
from sparsebayes.nas.methods import Method, Options, initial_logits
from sparsebayes.nas.posteriors import METHODS, DropoutSearch, NaturalGradientSearch
from sparsebayes.nas.supernet import Supernet
from sparsebayes.nas.switches import Switch
from sparsebayes.recipe.search_schema import SearchRecipe
from sparsebayes.train.seeding import derive_seed

__all__ = ["make_method", "method_name", "weight_groups"]


def make_method(recipe: SearchRecipe, supernet: Supernet, num_data: int) -> Method:
    """The method that a recipe asks for.

    Args:
        recipe: its posterior, or its baseline; for `random`, which learns nothing, any will do.
        supernet: whose switches it is about.
        num_data: training images.
    """
    section = recipe.search
    options = Options(
        num_data=num_data,
        strength=section.strength_for(num_data),
        rule=section.rule,
        joint=section.joint,
        rescale=section.rescale,
        switch_lr=section.switch_lr,
        momentum=section.momentum,
        seed=derive_seed(recipe.seed, "search", "logits"),
    )
    name = method_name(recipe)
    if name == "natural_gradient":
        gaussian = recipe.natural_gradient
        return NaturalGradientSearch(
            supernet.table,
            options,
            NaturalGradient(
                supernet.table.num_groups,
                num_data=num_data,
                update=gaussian.update,
                mean=initial_logits(supernet.table, options.seed),
                prior_precision=gaussian.prior_precision,
                initial_precision=gaussian.initial_precision,
                lr=gaussian.lr,
                betas=(gaussian.gradient_decay, gaussian.curvature_decay),
                strength=options.strength,
            ),
        )
    if name == "variational_dropout":
        dropout = recipe.variational_dropout
        return DropoutSearch(
            supernet.table,
            options,
            VariationalDropout(
                supernet.table.num_switches,
                num_data=num_data,
                shared=supernet.table.group,
                length_scale=dropout.length_scale,
                tau=dropout.tau,
                initial=dropout.initial,
                lr=dropout.lr,
                adaptive=dropout.adaptive,
                strength=options.strength,
            ),
        )
    return METHODS[name](supernet.table, options)


def method_name(recipe: SearchRecipe) -> str:
    """The method's name in `METHODS`: the posterior's, or that of a baseline that learns something."""
    baseline = recipe.search.baseline
    return recipe.posterior if baseline in ("none", "random") else baseline


def weight_groups(supernet: Supernet, method: Method) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: what belongs to no operation first, then the weights of each group of switches.

    Args:
        supernet: the network.
        method: where it asks for no shares of the weight decay, all parameters are one group.

    Returns:
        One dictionary, or 1 + G of them; those of gates are empty.
    """
    if method.decay_shares() is None:
        return [{"params": list(supernet.network.parameters())}]
    table = supernet.table
    number = {switch: position for position, switch in enumerate(table.groups)}
    members: list[list[nn.Parameter]] = [[] for _ in table.groups]
    for (key, _), cell in zip(table.cells, supernet.network.cells, strict=True):
        for (edge, op), module in cell.operations():
            members[number[Switch(key, edge, op)]] += module.parameters()
    owned = {id(parameter) for group in members for parameter in group}
    others = [p for p in supernet.network.parameters() if id(p) not in owned]
    return [{"params": others}, *({"params": group} for group in members)]
