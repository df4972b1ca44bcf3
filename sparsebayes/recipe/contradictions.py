"""Keys of a recipe that are each in order, but cannot be carried out together, or of which one would be ignored.

The schema checks values one by one; what follows from several of them stands here, so that `validate` refuses what a
run would refuse. Nothing here looks at data, at a model or at the machine.

    >>> recipe = load_recipe("quickstart").model_copy(update={"prior": PriorSection(price="budget")})
    >>> [wrong.keys for wrong in contradictions(recipe)]
    [('prior', 'price')]
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsebayes.errors import RecipeError
from sparsebayes.recipe.document import Keys
from sparsebayes.recipe.schema import CurvatureSection, PriorSection, PruneSection, Recipe
from sparsebayes.recipe.search_schema import AnyRecipe, SearchRecipe

__all__ = ["Contradiction", "contradictions", "refuse_contradictions"]


@dataclass(frozen=True)
class Contradiction:
    """One mistake that takes more than one key.

    Attributes:
        keys: The key that the sentence begins with.
        text: What contradicts what, and what to change.
    """

    keys: Keys
    text: str


def contradictions(recipe: AnyRecipe) -> list[Contradiction]:
    """Everything in a recipe that contradicts itself.

    Args:
        recipe: Of either task; of a search its section `compress` is looked at.
    """
    if isinstance(recipe, SearchRecipe):
        inner = recipe.compress
        found = [] if inner is None else _of_prior(inner.prior, inner.prune, ("compress",))
        return found + _of_curvature(
            recipe.curvature, "a search measures every switch on each of a number of images"
        )
    return [
        *_of_prior(recipe.prior, recipe.prune, ()),
        *_of_posterior(recipe),
        *_of_curvature(recipe.curvature, _why_all_images(recipe)),
    ]


def refuse_contradictions(recipe: AnyRecipe) -> None:
    """Refuse a recipe that contradicts itself, for those that were not read from YAML.

    Raises:
        RecipeError: The first contradiction.
    """
    for wrong in contradictions(recipe):
        raise RecipeError(wrong.text)


def _of_prior(prior: PriorSection, prune: PruneSection, above: tuple[str, ...]) -> list[Contradiction]:
    """Contradictions around the prior; `above` are the keys that both sections stand under."""
    found = []
    here = ".".join((*above, "prior"))
    if prior.joint and (prior.scale != "switches" or prior.rule != "evidence"):
        text = (
            f"{here}.joint judges switches by evidence, but scale is {prior.scale} and rule is {prior.rule}; "
            f"set {here}.joint to false, or the other two to switches and evidence"
        )
        found.append(Contradiction((*above, "prior", "joint"), text))
    if prior.price == "budget" and prune.budget is None:
        budget = ".".join((*above, "prune.budget"))
        text = f"{here}.price is budget, but the recipe has none; set {budget}, or {here}.price to params or macs"
        found.append(Contradiction((*above, "prior", "price"), text))
    return found


def _why_all_images(recipe: Recipe) -> str | None:
    """Why an estimate must use each of a number of images; None where it may choose."""
    if recipe.posterior != "laplace":
        return f"the posterior {recipe.posterior} measures no curvature"
    if recipe.prune.score != "evidence":
        return f"prune.score {recipe.prune.score} measures no curvature"
    if recipe.prior.joint:
        return "prior.joint needs the derivatives of each of a number of images"
    return None


def _of_curvature(curvature: CurvatureSection, why_all: str | None) -> list[Contradiction]:
    """Options that choose images where all of them are needed, and a tolerance that nothing stops at."""
    found, defaults = [], CurvatureSection()
    auto = curvature.num_images == "auto"
    wrong = {"num_images": auto, "importance": curvature.importance != defaults.importance}
    for name in (name for name, asked in wrong.items() if asked and why_all is not None):
        text = f"{why_all}, but curvature.{name} is {getattr(curvature, name)}; set it to {getattr(defaults, name)}"
        found.append(Contradiction(("curvature", name), text))
    if curvature.tolerance != defaults.tolerance and not auto:
        text = (
            f"curvature.tolerance is where num_images: auto stops, but curvature.num_images is {curvature.num_images}; "
            "leave out the tolerance, or set num_images to auto"
        )
        found.append(Contradiction(("curvature", "tolerance"), text))
    return found


def _of_posterior(recipe: Recipe) -> list[Contradiction]:
    """Options of the Laplace posterior beside another one, and sampling beside the Laplace posterior."""
    prior, defaults = recipe.prior, PriorSection()
    if recipe.posterior == "laplace":
        if recipe.sampling == type(recipe.sampling)():
            return []
        text = (
            "sampling draws from a posterior that is learned along with the weights, but posterior is laplace; "
            "leave out sampling, or set posterior to variational_dropout or natural_gradient"
        )
        return [Contradiction(("sampling",), text)]
    found = []
    for name in ("scale", "rule", "joint"):
        if getattr(prior, name) != getattr(defaults, name):
            text = f"prior.{name} belongs to the posterior laplace, but posterior is {recipe.posterior}; leave it out"
            found.append(Contradiction(("prior", name), text))
    if recipe.prune.score != "evidence":
        text = (
            f"prune.score is {recipe.prune.score}, which would ignore the posterior {recipe.posterior}; "
            "set it to evidence, or posterior to laplace"
        )
        found.append(Contradiction(("prune", "score"), text))
    gaussian = recipe.natural_gradient
    if recipe.posterior == "natural_gradient" and gaussian.initial_precision < gaussian.prior_precision:
        text = (
            f"natural_gradient.initial_precision is {gaussian.initial_precision}, below prior_precision "
            f"{gaussian.prior_precision}; data only add precision: lower one or raise the other"
        )
        found.append(Contradiction(("natural_gradient", "initial_precision"), text))
    return found
