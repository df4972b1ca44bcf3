"""The schema of searches: names that exist, described keys, round trips, compression of what is found, JSON Schema."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel

from sparsebayes.nas import SPACES
from sparsebayes.nas.posteriors import METHODS
from sparsebayes.recipe import SearchRecipe, dump_recipe, json_schema, load_recipe, parse_recipe
from sparsebayes.recipe.posteriors import (
    ArchitectureSamplingSection,
    LogitGaussianSection,
    OperationDropoutSection,
)
from sparsebayes.recipe.schema import Recipe
from sparsebayes.recipe.search_schema import SPACE_NAMES, CompressSection, RetrainSection, SearchSection

SECTIONS: list[type[BaseModel]] = [
    ArchitectureSamplingSection,
    LogitGaussianSection,
    OperationDropoutSection,
    SearchRecipe,
    SearchSection,
    RetrainSection,
    CompressSection,
]
NAMES = [
    "nas_bench201",
    "nas_bench201_balenas",
    "nas_proxy_pgnas",
    "nas_proxy",
    "nas_proxyless",
    "nas_then_compress",
]


def test_the_spaces_and_methods_that_recipes_may_name_are_those_there_are():
    assert sorted(SPACE_NAMES) == sorted(SPACES)
    baselines = SearchSection.model_fields["baseline"].annotation.__args__
    posteriors = SearchRecipe.model_fields["posterior"].annotation.__args__
    assert set(METHODS) == {*posteriors, *baselines} - {"none", "random"}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_says_what_it_is_and_none_is_unknown(section):
    assert section.model_config["frozen"]
    assert section.model_config["extra"] == "forbid"
    for name, field in section.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("preset", [None, "smoke"])
def test_a_dumped_search_reads_back_to_an_equal_one(name, preset):
    recipe = load_recipe(name, preset=preset)
    assert isinstance(recipe, SearchRecipe)
    assert parse_recipe(dump_recipe(recipe), "dumped") == recipe


def test_what_was_found_is_compressed_by_an_ordinary_recipe():
    recipe = load_recipe("nas_then_compress")
    assert isinstance(recipe, SearchRecipe)
    made = recipe.compression("package.module:function", {"width": 3})
    assert isinstance(made, Recipe)
    assert made.model.options == {"width": 3}
    assert (made.prior.price, made.train.pretrain.epochs, made.data) == ("macs", 0, recipe.data)
    without = load_recipe("nas_bench201")
    assert isinstance(without, SearchRecipe)
    with pytest.raises(ValueError, match="expected a section compress"):
        without.compression("a:b", {})


def test_the_json_schema_has_both_tasks_and_resolves():
    schema = json.loads(json.dumps(json_schema()))
    definitions = schema["$defs"]
    assert set(definitions["SearchRecipe"]["properties"]) == set(SearchRecipe.model_fields)
    assert set(definitions["Recipe"]["properties"]) == set(Recipe.model_fields)
    assert definitions["SearchRecipe"]["properties"]["task"]["const"] == "search"
    assert "task" in definitions["SearchRecipe"]["required"]
    references = {part.split('"')[0] for part in json.dumps(schema).split('"#/$defs/')[1:]}
    assert references <= set(definitions)
    assert "darts" in json.dumps(definitions["SearchSection"]["properties"]["space"])
    groups = {name: definitions[name]["properties"]["groups"] for name in ("Recipe", "CompressSection")}
    assert groups["CompressSection"] == groups["Recipe"], "both accept groups: units"
