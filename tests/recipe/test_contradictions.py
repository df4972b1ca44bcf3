"""Keys that contradict each other: named with their line, in presets and in a search's compression as well."""

from __future__ import annotations

import pytest

from sparsebayes.errors import RecipeError
from sparsebayes.recipe import load_recipe, parse_recipe, shipped_recipes
from sparsebayes.recipe.contradictions import contradictions, refuse_contradictions

RECIPE = """version: 1
name: tiny
model: {name: lenet5_caffe}
prior:
  joint: true
"""

SEARCH = """version: 1
name: found
task: search
search: {space: nas_bench_201}
compress:
  prior: {price: budget}
"""


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            ["prior.scale=entries"],
            r"^tiny\.yaml:5: prior\.joint judges switches by evidence, but scale is entries",
        ),
        (["prior.rule=entropy"], "scale is switches and rule is entropy; set prior.joint to false"),
        (
            ["prior.price=budget"],
            "prior.price is budget, but the recipe has none; set prune.budget, or prior.price",
        ),
        (["posterior=variational_dropout"], "prior.joint belongs to the posterior laplace"),
        (
            ["prior.joint=false", "prior.scale=entries", "posterior=natural_gradient"],
            "override 'prior.scale=entries': prior.scale belongs to the posterior laplace",
        ),
        (
            ["prior.joint=false", "prior.rule=entropy", "posterior=natural_gradient"],
            "prior.rule belongs to the posterior laplace",
        ),
        (
            ["prior.joint=false", "prune.score=taylor", "posterior=variational_dropout"],
            "would ignore the posterior variational_dropout",
        ),
        (["sampling.count=5"], "sampling draws from a posterior that is learned along"),
        (
            [
                "prior.joint=false",
                "posterior=natural_gradient",
                "natural_gradient={prior_precision: 5.0, initial_precision: 1.0}",
            ],
            "data only add precision",
        ),
        (
            ["curvature.importance=0.1"],
            "override 'curvature.importance=0.1': prior.joint needs the derivatives of each of a number of images, but "
            "curvature.importance is 0.1; set it to 1.0",
        ),
        (
            ["curvature.num_images=auto"],
            "each of a number of images, but curvature.num_images is auto; set it to 2048",
        ),
        (
            ["prior.joint=false", "prune.score=taylor", "curvature.importance=0.1"],
            "prune.score taylor measures no curvature, but curvature.importance is 0.1",
        ),
        (
            ["prior.joint=false", "posterior=natural_gradient", "curvature.num_images=auto"],
            "the posterior natural_gradient measures no curvature, but curvature.num_images is auto",
        ),
        (
            ["prior.joint=false", "curvature.tolerance=0.1"],
            "curvature.tolerance is where num_images: auto stops, but curvature.num_images is 2048; leave out the",
        ),
    ],
)
def test_what_a_run_would_refuse_is_refused_at_once(changes: list[str], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        parse_recipe(RECIPE, "tiny.yaml", overrides=changes)


def test_all_of_them_are_listed() -> None:
    with pytest.raises(RecipeError, match=r"2 mistakes in tiny\.yaml(.|\n)*prior\.joint(.|\n)*prior\.price"):
        parse_recipe(RECIPE, "tiny.yaml", overrides=["prior.scale=entries", "prior.price=budget"])


def test_presets_answer_for_what_they_add() -> None:
    text = RECIPE + "presets:\n  paper:\n    prior: {scale: entries}\n"
    with pytest.raises(
        RecipeError, match=r"^tiny\.yaml:5: with preset 'paper': prior\.joint judges switches"
    ):
        parse_recipe(text, "tiny.yaml")
    assert parse_recipe(
        RECIPE + "presets:\n  paper:\n    prior: {scale: entries, joint: false}\n", "tiny.yaml"
    )


def test_an_override_can_mend_the_file() -> None:
    text = RECIPE + "  scale: entries\npresets:\n  quick: {train: {lr: 0.1}}\n"
    with pytest.raises(RecipeError, match=r"tiny\.yaml:5: prior\.joint"):
        parse_recipe(text, "tiny.yaml")
    assert parse_recipe(text, "tiny.yaml", overrides=["prior.joint=false"]).prior.scale == "entries"


def test_the_compression_of_a_search_is_looked_at() -> None:
    wrong = r"^found\.yaml:6: compress\.prior\.price is budget, but the recipe has none; set compress\.prune\.budget"
    with pytest.raises(RecipeError, match=wrong):
        parse_recipe(SEARCH, "found.yaml")
    assert parse_recipe(SEARCH, "found.yaml", overrides=["compress.prune.budget.params=0.5"])


def test_a_search_takes_every_image_of_its_curvature() -> None:
    text = SEARCH.replace("{price: budget}", "{price: params}")
    for change, came in (("importance=0.5", "importance is 0.5"), ("num_images=auto", "num_images is auto")):
        with pytest.raises(
            RecipeError, match=f"a search measures every switch on each .*, but curvature.{came}"
        ):
            parse_recipe(text, "found.yaml", overrides=[f"curvature.{change}"])


def test_recipes_that_were_not_read_from_text_are_refused_too() -> None:
    sound = parse_recipe(RECIPE, "tiny.yaml")
    refuse_contradictions(sound)
    with pytest.raises(RecipeError, match=r"^prior\.joint judges"):
        refuse_contradictions(
            sound.model_copy(update={"prior": sound.prior.model_copy(update={"rule": "entropy"})})
        )


def test_shipped_recipes_do_not_contradict_themselves() -> None:
    for name in shipped_recipes():
        assert contradictions(load_recipe(name)) == []
