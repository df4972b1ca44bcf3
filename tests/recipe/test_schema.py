"""The schema: defaults, bounds, immutability, and its JSON form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from sparsebayes.recipe.schema import (
    CurvatureSection,
    Cycles,
    DropoutSection,
    Finetune,
    GaussianSection,
    ModelSection,
    Recipe,
    TrainSection,
    json_schema,
)


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """`model` and every section below it."""
    yield model
    for field in model.model_fields.values():
        pending = [field.annotation]
        while pending:
            part = pending.pop()
            pending += get_args(part)
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from sections(part)


SECTIONS = list(sections(Recipe))


def smallest() -> Recipe:
    return Recipe(version=1, name="tiny", model=ModelSection(name="lenet5_caffe"))


def test_all_sections_are_found():
    assert len(SECTIONS) == 17


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_says_what_it_is(section):
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no description"
        assert field.description.endswith(".")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_sections_are_frozen_and_refuse_unknown_keys(section):
    assert section.model_config["frozen"]
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["strict"]


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        smallest().seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        smallest().train.lr = 1.0


def test_defaults_hold_their_own_bounds():
    recipe = smallest()
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        (CurvatureSection, {"num_images": 0}),
        (CurvatureSection, {"num_images": "all"}),
        (CurvatureSection, {"num_images": True}),
        (CurvatureSection, {"num_images": 2.5}),
        (CurvatureSection, {"importance": 0.0}),
        (CurvatureSection, {"importance": 1.5}),
        (CurvatureSection, {"tolerance": 0.0}),
        (CurvatureSection, {"draws": 0}),
        (CurvatureSection, {"factor": "exact"}),
        (Cycles, {"count": 0}),
        (Cycles, {"shrink": 1.0}),
        (Cycles, {"epochs": -1}),
        (DropoutSection, {"epochs": 0}),
        (GaussianSection, {"epochs": 0}),
        (TrainSection, {"distill": 1.5}),
        (TrainSection, {"distill_temperature": 0.0}),
        (TrainSection, {"grad_clip": 0.0}),
        (TrainSection, {"weight_decay": -1.0}),
        (TrainSection, {"label_smoothing": 1.0}),
        (TrainSection, {"lr": float("nan")}),
        (Finetune, {"lr": 0.0}),
    ],
)
def test_bounds(section, wrong):
    with pytest.raises(ValidationError):
        section(**wrong)


def test_images_of_a_curvature_are_a_number_or_auto():
    with pytest.raises(
        ValidationError, match=r"expected auto or a whole number >= 1 and <= 10,000,000, got 'aut'"
    ):
        CurvatureSection(num_images="aut")
    assert CurvatureSection(num_images="auto").likely_images == CurvatureSection().num_images == 2048
    assert CurvatureSection(num_images=7).likely_images == 7


def test_a_phase_without_a_rate_takes_the_common_one():
    train = TrainSection(lr=0.3, cycles=Cycles(lr=0.1))
    assert [train.rate(phase) for phase in (train.pretrain, train.cycles, train.finetune)] == [0.3, 0.1, 0.3]


def test_the_json_schema_is_json_and_complete():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert sorted(schema["required"]) == ["model", "name", "version"]
    assert schema["additionalProperties"] is False
    for section in SECTIONS[1:]:
        definition = schema["$defs"][section.__name__]
        assert set(definition["properties"]) == set(section.model_fields)
        assert all("description" in entry for entry in definition["properties"].values())
    forms = schema["properties"]["groups"]["anyOf"]
    assert [form.get("type", "object") for form in forms] == ["string", "object", "array"]
    assert schema["$defs"]["PriorSection"]["properties"]["strength"]["anyOf"][0] == {"const": "auto"}
