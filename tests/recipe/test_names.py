"""The names that a recipe accepts are those that the package has."""

from __future__ import annotations

import pytest

from sparsebayes.recipe import names


def test_data_names_are_the_sources():
    from sparsebayes.data.sources import SOURCES

    assert sorted(SOURCES) == sorted(names.DATA_NAMES), "keep DATA_NAMES equal to the table of data sources"


def test_model_names_are_the_models():
    from sparsebayes.models import MODELS

    assert sorted(MODELS) == sorted(names.MODEL_NAMES), "keep MODEL_NAMES equal to the table of models"


def test_rule_names_are_the_rules():
    from sparsebayes.groups.rules import RULES

    plain = {name for name in RULES if name.isidentifier()}
    assert plain == set(names.RULE_NAMES), "keep RULE_NAMES equal to the table of rules"


@pytest.mark.parametrize(
    "rule", [*names.RULE_NAMES, "2:4", "1:4", "blocks:2x8", "units+features", "rows+1:2"]
)
def test_rules_that_are_accepted(rule):
    assert names.check_rule(rule) == rule


@pytest.mark.parametrize("name", ["mine:load", "my_package.data:Load2", *names.DATA_NAMES])
def test_data_names_that_are_accepted(name):
    assert names.check_data_name(name) == name


@pytest.mark.parametrize(
    "name", ["mine", "a.b", "a b:c", ":c", "a:", "a:b.c", "a:b:c", "a..b:c", None, ["mnist"]]
)
def test_data_names_that_are_refused(name):
    with pytest.raises(ValueError, match=r"data set|user code"):
        names.check_data_name(name)


@pytest.mark.parametrize(
    ("written", "listed"),
    [
        ("units", [{"rule": "units"}]),
        ({"rule": "units"}, [{"rule": "units"}]),
        (["units", {"rule": "rows"}, 3], [{"rule": "units"}, {"rule": "rows"}, 3]),
        (3, 3),
        (None, None),
    ],
)
def test_groups_are_brought_into_one_form(written, listed):
    assert names.list_rules(written) == listed


@pytest.mark.parametrize(("value", "strength"), [("auto", "auto"), (1, 1.0), (0.5, 0.5), (1e12, 1e12)])
def test_strengths_that_are_accepted(value, strength):
    checked = names.check_strength(value)
    assert checked == strength
    assert isinstance(checked, (str, float))


@pytest.mark.parametrize(
    "value", [0, -1.0, 1e13, 10**400, float("nan"), float("inf"), True, "", "1", None, [1]]
)
def test_strengths_that_are_refused(value):
    with pytest.raises(ValueError, match=r"^expected auto or a number > 0 and <= 1e\+12, got "):
        names.check_strength(value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "nothing"),
        (False, "false"),
        ({}, "an empty section"),
        ({"a": 1}, "a section"),
        ((), "an empty list"),
        ([1, 2], "a list of 2"),
        (0.1, "0.1"),
        (10**20, "a number of over 20 digits"),
        ("a\nb", "'a\\nb'"),
        ("x" * 100, "'" + "x" * 56 + "..."),
    ],
)
def test_values_are_shown_short_and_on_one_line(value, shown):
    assert names.show_value(value) == shown
